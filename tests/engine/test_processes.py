import multiprocessing
import os
import signal
import time
from collections.abc import Callable
from multiprocessing import Pipe
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import pytest

from trainkit.engine import processes
from trainkit.engine.failures import RankDiedError
from trainkit.engine.non_finite import NonFiniteError
from trainkit.engine.preemption import PreemptedExit
from trainkit.engine.processes import Processes, report_error, report_result
from trainkit.evaluation.testing import ResultsMismatchError
from trainkit.utils.errors import CheckpointError, ConfigError, UnknownNameError
from trainkit.utils.stop_signals import SIGNALS


def reported(error: BaseException) -> BaseException:
    """Returns what the launching process makes of an error."""
    ours, theirs = Pipe()
    ours.send(None)  # The answer.
    try:
        raise error
    except BaseException as e:
        report_error(theirs, e)
    received = ours.recv().error()
    assert isinstance(received, BaseException)
    return received


@pytest.mark.parametrize(
    "error",
    [
        ConfigError("SOLVER.BASE_LR is -1"),
        CheckpointError("damaged"),
        UnknownNameError("model", "resnt", ["resnet"]),
        ResultsMismatchError("top1 is 0.1, expected 0.9"),
        NonFiniteError("Iteration 3 is not finite", 3),
        KeyError("a"),
    ],
)
def test_an_error_keeps_kind_text_and_notes_and_brings_its_traceback(error: Exception) -> None:
    error.__notes__ = ["Training failed in iteration 3 on rank 1."]
    received = reported(error)
    assert type(received) is type(error)
    assert str(received) == str(error)
    assert received.__notes__ == error.__notes__
    assert ", in reported\n    raise error\n" in str(received.__cause__)


class NeedsTwo(Exception):  # noqa: N818  # what a user may write
    """Pickles, and cannot be made again from its one argument."""

    def __init__(self, name: str, value: int) -> None:
        super().__init__(f"{name} is {value}")


def unpicklable() -> Exception:
    error = ValueError("holds a function")
    error.function = lambda: None  # type: ignore[attr-defined]
    return error


@pytest.mark.parametrize("error", [NeedsTwo("lr", 3), unpicklable()])
def test_an_error_that_cannot_travel_comes_in_words(error: Exception) -> None:
    error.__notes__ = ["Training failed in iteration 3 on rank 1."]
    received = reported(error)
    assert type(received) is RuntimeError
    assert str(received).endswith(f"{type(error).__name__}: {error}")
    assert received.__notes__ == error.__notes__
    assert ", in reported\n    raise error\n" in str(received.__cause__)


@pytest.mark.parametrize(("code", "expected"), [(0, 0), (None, 0), ("text", 1), (143, 143)])
def test_the_exit_code_is_that_of_system_exit_and_zero_is_no_error(
    code: Any, expected: int
) -> None:
    ours, theirs = Pipe()
    ours.send(None)
    assert report_error(theirs, SystemExit(code)) == expected
    assert ours.poll() == bool(expected)


def test_a_rank_whose_launcher_is_gone_does_not_wait_for_it() -> None:
    ours, theirs = Pipe()
    ours.close()
    start = time.monotonic()
    assert report_error(theirs, ValueError()) == 1
    assert time.monotonic() - start < 1


def test_a_result_that_cannot_be_pickled_stays_and_is_said(
    caplog: pytest.LogCaptureFixture,
) -> None:
    ours, theirs = Pipe()
    report_result(theirs, lambda: None)
    assert not ours.poll()
    assert "What this rank returned stays here, as it cannot be pickled: " in caplog.text


# From here on with processes, that do what `steps` say for their rank.


def act(channel: Connection, rank: int, local_rank: int, folder: Path, steps: list[Any]) -> None:
    try:
        for step in steps[rank]:
            if isinstance(step, BaseException):
                raise step
            if isinstance(step, dict):
                report_result(channel, step or NeedsTwo("width", 3))
            elif isinstance(step, str):
                (folder / step).touch()
            else:
                time.sleep(step)
    except BaseException as e:
        exit_code = report_error(channel, e)
        (folder / f"left-{rank}").touch()
        raise SystemExit(exit_code) from None


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    multiprocessing.get_context("forkserver").set_forkserver_preload([__name__])
    monkeypatch.setattr(processes, "START_METHOD", "forkserver")
    monkeypatch.setattr(processes, "GRACE_SECONDS", 0.5)
    return lambda *steps: Processes(0).run(act, len(steps), (tmp_path, steps))


@pytest.mark.slow
def test_without_an_error_all_are_waited_for(run: Callable[..., None], tmp_path: Path) -> None:
    run(["zero"], [1.0, "one"])
    assert sorted(path.name for path in tmp_path.iterdir()) == ["one", "zero"]


@pytest.mark.slow
def test_d43_a_result_larger_than_a_pipe_comes_back(run: Callable[..., Any]) -> None:
    result = {"accuracy": 0.5, "predictions": bytes(1 << 20)}
    assert run([result], ["one"]) == result


@pytest.mark.slow
def test_a_result_that_cannot_be_made_again_is_none_and_that_is_said(
    run: Callable[..., Any], caplog: pytest.LogCaptureFixture
) -> None:
    assert run([{}]) is None
    assert "What rank 0 returned cannot be made again: " in caplog.text


@pytest.mark.slow
def test_the_first_error_is_raised_and_those_that_stay_are_killed(
    run: Callable[..., None], tmp_path: Path
) -> None:
    with pytest.raises(ValueError, match="first"):
        run([0.3, RuntimeError("connection closed")], [ValueError("first")], [60.0, "two"])
    assert not (tmp_path / "two").exists()


@pytest.mark.slow
def test_a_rank_that_failed_leaves_when_the_user_was_told(
    run: Callable[..., None], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    told: list[Any] = []

    def tell(*message: Any) -> None:
        time.sleep(0.3)
        told.append((message[1:], (tmp_path / "left-1").exists()))

    monkeypatch.setattr(processes.logger, "error", tell)
    with pytest.raises(ValueError, match="first"):
        run([], [ValueError("first")])
    note = "Failed, outside of training."
    assert told == [((1, f"ValueError: first {note}"), False)]
    assert (tmp_path / "left-1").exists()


@pytest.mark.slow
def test_the_rank_that_an_error_came_from_is_believed_before_those_that_were_told(
    run: Callable[..., None],
) -> None:
    with pytest.raises(KeyError, match="mine"):
        run([RuntimeError("rank 1 failed: KeyError('mine')")], [0.2, KeyError("mine")])
    # Unless it is heard no more.
    with pytest.raises(RuntimeError, match="told"):
        run([RuntimeError("rank 1 failed: told")], [60.0])


@pytest.mark.slow
def test_ranks_that_agreed_to_leave_take_their_time(
    run: Callable[..., None], tmp_path: Path
) -> None:
    with pytest.raises(SystemExit) as raised:
        run([2.0, "requeued", PreemptedExit(138)], [PreemptedExit(138)])
    assert raised.value.code == 138
    assert (tmp_path / "requeued").exists()


@pytest.mark.slow
def test_a_rank_that_exits_alone_ends_the_others_with_its_code(run: Callable[..., None]) -> None:
    with pytest.raises(SystemExit) as raised:
        run([60.0], [SystemExit(3)])
    assert raised.value.code == 3


def die(channel: Connection, rank: int, local_rank: int, exit_codes: list[int]) -> None:
    code = exit_codes[rank]
    if code < 0:
        os.kill(os.getpid(), -code)
    os._exit(code)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("code", "text"),
    [
        (-signal.SIGKILL, r"was killed by SIGKILL; the kernel does that when memory runs out"),
        (-signal.SIGSEGV, r"was killed by signal 11 \(Segmentation fault\)"),
        (7, r"left with exit code 7 and no error"),
    ],
)
@pytest.mark.usefixtures("run")
def test_a_rank_that_died_is_named(code: int, text: str) -> None:
    with pytest.raises(RankDiedError, match=rf"^Rank 3 \(pid \d+\) {text}.*--resume\.$"):
        Processes(2).run(die, 2, ([0, 0, 0, code],))


def die_with_a_child_left(channel: Connection, rank: int, local_rank: int) -> None:
    if rank == 1 and os.fork() == 0:
        time.sleep(4)  # As a loader's worker, which has all that its rank has open.
        os._exit(0)
    os.kill(os.getpid(), signal.SIGKILL) if rank == 1 else time.sleep(60)


@pytest.mark.slow
@pytest.mark.usefixtures("run")
def test_a_rank_that_died_is_seen_though_its_children_hold_its_pipes() -> None:
    start = time.monotonic()
    with pytest.raises(RankDiedError, match=r"^Rank 1 "):
        Processes(0).run(die_with_a_child_left, 2, ())
    assert time.monotonic() - start < 3


@pytest.mark.slow
@pytest.mark.parametrize("code", [-signal.SIGTERM, 143])
@pytest.mark.usefixtures("run")
def test_a_rank_that_a_signal_ended_unsaved_ends_all_with_its_code(code: int) -> None:
    with pytest.raises(SystemExit) as raised:
        Processes(0).run(die, 2, ([0, code],))
    assert raised.value.code == 143


@pytest.mark.slow
@pytest.mark.usefixtures("run")
def test_a_function_that_cannot_reach_a_process_leaves_none_behind() -> None:
    with pytest.raises((AttributeError, multiprocessing.ProcessError), match="lambda"):
        Processes(0).run(lambda *args: None, 2, ())
    assert multiprocessing.active_children() == []


def test_the_handlers_of_signals_are_as_before() -> None:
    before = [signal.getsignal(s) for s in SIGNALS]
    Processes(0).run(die, 0, ())
    assert [signal.getsignal(s) for s in SIGNALS] == before
