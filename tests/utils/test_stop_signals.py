"""What a signal does; runs that get one are in tests/engine/test_fault_signals.py."""

import contextlib
import ctypes
import os
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from multiprocessing.process import BaseProcess
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import multiprocessing as mp

from trainkit.utils import comm, stop_signals
from trainkit.utils.stop_signals import (
    SIGNALS,
    Interruption,
    StopRequested,
    interruptible,
    raise_if_stopping,
)

INT, TERM, USR1 = signal.SIGINT, signal.SIGTERM, signal.SIGUSR1


def get(*signals: int) -> None:
    """Sends signals to this process."""
    for signum in signals:
        os.kill(os.getpid(), signum)


class Requests:
    """Writes down what is asked for."""

    def __init__(self) -> None:
        self.made: list[tuple[str, int]] = []

    def __call__(self, reason: str, exit_code: int) -> None:
        self.made.append((reason, exit_code))


class Clock:
    def __init__(self) -> None:
        self.now = 100.0

    def monotonic(self) -> float:
        return self.now

    def wait(self, seconds: float) -> None:
        self.now += seconds


def in_block(requests: Requests, *steps: Callable[[], Any] | int) -> None:
    """Gets signals and calls functions inside a block."""
    with stop_signals.stop_signals(requests):
        for step in steps:
            if callable(step):
                step()
            else:
                get(step)


def in_interruptible(*signals: int, last: list[str]) -> None:
    """Gets signals inside such a block, and then notes its end."""
    with interruptible():
        get(*signals)
        last.append("end")


def fail() -> None:
    raise ValueError("mine")


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    clock = Clock()
    monkeypatch.setattr(stop_signals, "time", SimpleNamespace(monotonic=clock.monotonic))
    return clock


@pytest.fixture(autouse=True)
def _everything_is_put_back() -> Iterator[None]:
    handlers, threads = [signal.getsignal(s) for s in SIGNALS], threading.active_count()
    yield
    assert [signal.getsignal(s) for s in SIGNALS] == handlers
    assert signal.set_wakeup_fd(-1) == -1
    assert threading.active_count() == threads


@pytest.mark.parametrize(("signum", "code"), [(INT, 130), (TERM, 143), (USR1, 138)])
def test_a_signal_is_a_request_with_its_exit_code(
    signum: signal.Signals, code: int, capfd: pytest.CaptureFixture[str]
) -> None:
    requests = Requests()
    in_block(requests, signum)
    assert requests.made == [(signum.name, code)]
    assert f"{signum.name}: leaving once this is saved. A second" in capfd.readouterr().err


def test_a_copy_is_not_a_second_signal(clock: Clock, capfd: pytest.CaptureFixture[str]) -> None:
    requests = Requests()
    in_block(requests, INT, lambda: clock.wait(0.9), INT)
    assert requests.made == [("SIGINT", 130)] * 2
    assert capfd.readouterr().err.count("leaving") == 1


def test_a_second_ctrl_c_raises_at_once(clock: Clock) -> None:
    requests = Requests()
    with pytest.raises(KeyboardInterrupt):
        in_block(requests, INT, lambda: clock.wait(1.1), INT, fail)
    assert requests.made == [("SIGINT", 130)]


def test_the_notice_of_slurm_is_not_the_first_of_two_signals(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(stop_signals, "COPY_SECONDS", 0.0)
    requests = Requests()
    # A second signal would end the tests here.
    in_block(requests, USR1, TERM)
    assert requests.made == [("SIGUSR1", 138), ("SIGUSR1", 138)]


def test_of_several_signals_the_first_gives_the_exit_code() -> None:
    requests = Requests()
    in_block(requests, TERM, USR1, INT)
    assert [code for _, code in requests.made] == [143] * 3


def test_a_handler_of_the_callers_is_left_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(stop_signals, "COPY_SECONDS", 0.0)
    caught: list[int] = []
    previous = signal.signal(USR1, lambda signum, frame: caught.append(signum))
    requests = Requests()
    try:
        # Nor do they count as second ones, which would end the tests here.
        in_block(requests, USR1, USR1, USR1)
    finally:
        signal.signal(USR1, previous)
    assert (caught, requests.made) == ([USR1] * 3, [])


def test_an_inner_block_and_other_threads_change_nothing() -> None:
    inner, outer = Requests(), Requests()
    handlers: list[Any] = []

    def note_handler() -> None:
        handlers.append(signal.getsignal(TERM))

    thread = threading.Thread(target=in_block, args=(inner, note_handler))
    thread.start()
    thread.join()
    assert handlers == [signal.SIG_DFL]
    in_block(outer, lambda: in_block(inner, TERM), TERM)
    assert (outer.made, inner.made) == ([("SIGTERM", 143)] * 2, [])


def test_an_error_in_the_block_passes_and_the_next_block_is_a_new_one() -> None:
    with pytest.raises(ValueError, match="mine"):
        in_block(Requests(), TERM, fail)
    in_block(Requests(), raise_if_stopping)


@pytest.mark.skipif(sys.platform != "linux", reason="descriptors are counted in /proc")
def test_a_block_leaves_no_descriptor_open() -> None:
    before = len(os.listdir("/proc/self/fd"))
    in_block(Requests(), TERM)
    assert len(os.listdir("/proc/self/fd")) == before


def test_an_interruptible_block_is_left_at_once() -> None:
    requests = Requests()
    last: list[str] = []
    with stop_signals.stop_signals(requests):
        with pytest.raises(StopRequested) as stop:
            in_interruptible(TERM, last=last)
        assert stop.value.interruption == Interruption("SIGTERM", 143)
        assert last == []
        # Not so outside of it, as in the save that follows.
        get(TERM)
    assert requests.made == [("SIGTERM", 143)] * 2


def test_a_copy_does_not_raise_out_of_what_answers_the_first() -> None:
    answered: list[str] = []

    def answer() -> None:
        try:
            with interruptible():
                try:
                    get(TERM)
                finally:
                    get(TERM)
                    answered.append("answered")
        except StopRequested:
            answered.append("left")

    in_block(Requests(), answer)
    assert answered == ["answered", "left"]


def test_an_interruptible_block_does_nothing_without_a_run() -> None:
    in_interruptible(last=[])
    raise_if_stopping()


def test_several_ranks_are_not_left_by_one(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(comm, "get_world_size", lambda: 2)
    requests = Requests()
    last: list[str] = []
    in_block(requests, lambda: in_interruptible(TERM, last=last))
    assert (requests.made, last) == ([("SIGTERM", 143)], ["end"])


def test_a_fetch_in_another_thread_does_not_make_the_main_thread_interruptible() -> None:
    is_inside, may_leave = threading.Event(), threading.Event()

    def fetch() -> None:
        with interruptible():
            is_inside.set()
            may_leave.wait(10)

    thread = threading.Thread(target=fetch)
    requests = Requests()
    # The signal raises here if it does.
    in_block(requests, thread.start, is_inside.wait, TERM, may_leave.set, thread.join)
    assert requests.made == [("SIGTERM", 143)]


def test_an_evaluation_is_left_once_a_signal_came() -> None:
    with pytest.raises(StopRequested) as stop:
        in_block(Requests(), raise_if_stopping, USR1, raise_if_stopping)
    assert stop.value.interruption == Interruption("SIGUSR1", 138)
    raise_if_stopping()


@pytest.mark.parametrize("own", [[], [INT]])
def test_all_ranks_leave_an_evaluation_for_the_same_reason(
    own: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(comm, "get_world_size", lambda: 2)
    monkeypatch.setattr(comm, "all_gather_tensor", lambda t: torch.stack([t, torch.tensor(143)]))
    with pytest.raises(StopRequested) as stop:
        in_block(Requests(), *own, raise_if_stopping)
    assert stop.value.interruption == Interruption("SIGTERM", 143)


# Below, in processes of their own, which a second signal may end.

SURVIVED = 7
"""Exit code of a process that no signal has ended."""


def start(function: Callable[..., None], *args: Any) -> BaseProcess:
    context = mp.get_context("forkserver")
    context.set_forkserver_preload(["tests.utils.test_stop_signals"])
    process = context.Process(target=function, args=args)
    process.start()
    return process


def exit_code(function: Callable[..., None], *args: Any) -> int | None:
    process = start(function, *args)
    process.join(20)
    code = process.exitcode
    process.kill()
    process.join()
    return code


def hang() -> None:
    """Waits in C for a lock that this thread holds; no Python handler runs there."""
    libc, lock = ctypes.CDLL(None), ctypes.create_string_buffer(64)
    libc.pthread_mutex_lock(lock)
    libc.pthread_mutex_lock(lock)


def send(signals: tuple[int, ...]) -> None:
    """Sends signals from a thread, each once the one before has arrived."""
    signal.pthread_sigmask(signal.SIG_BLOCK, SIGNALS)
    for signum in signals:
        get(signum)
        # Two that wait at a time would be one.
        while signum in signal.sigpending():
            pass


def get_and_hang(*signals: int) -> None:
    stop_signals.COPY_SECONDS = 0.0
    with stop_signals.stop_signals(Requests()):
        threading.Thread(target=send, args=(signals,), daemon=True).start()
        while True:
            with contextlib.suppress(KeyboardInterrupt):
                hang()


@pytest.mark.faults
@pytest.mark.skipif(sys.platform != "linux", reason="the lock is glibc's")
@pytest.mark.parametrize(
    ("signals", "code"),
    [
        ((TERM, TERM), 143),
        ((USR1, USR1), 138),
        ((TERM, USR1), 138),
        ((INT, TERM), 143),
        ((USR1, TERM, TERM), 143),
        # The second one waits for the main thread, to leave it alive.
        ((INT, INT, INT), 130),
    ],
)
def test_a_second_signal_ends_a_process_that_hangs(signals: tuple[int, ...], code: int) -> None:
    assert exit_code(get_and_hang, *signals) == code


def get_without_stderr() -> None:
    stop_signals.COPY_SECONDS = 0.0
    readable, writable = os.pipe()
    os.close(readable)
    os.dup2(writable, 2)
    requests = Requests()
    with stop_signals.stop_signals(requests):
        get(TERM)
        assert requests.made == [("SIGTERM", 143)]
        get(TERM)
        hang()


@pytest.mark.faults
def test_signals_do_their_work_when_nobody_reads_stderr_any_more() -> None:
    assert exit_code(get_without_stderr) == 143


def fork_and_end() -> None:
    stop_signals.COPY_SECONDS = 0.0
    requests = Requests()
    with stop_signals.stop_signals(requests):
        for _ in range(3):
            child = mp.get_context("fork").Process(target=signal.pause)
            child.start()
            for signum in (INT, USR1):
                os.kill(child.pid or 0, signum)
            child.terminate()
            child.join(10)
            assert child.exitcode == -TERM, child.exitcode
    assert requests.made == []
    sys.exit(SURVIVED)


@pytest.mark.faults
def test_a_forked_child_ends_by_its_parent_and_its_signals_are_none_of_the_parents() -> None:
    assert exit_code(fork_and_end) == SURVIVED
