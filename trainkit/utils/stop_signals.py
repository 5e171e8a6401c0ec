"""Signals that ask a run to leave: noticed at once, answered where nothing is lost.

SIGINT (Ctrl-C), SIGTERM (schedulers, torchrun) and SIGUSR1 (Slurm's notice) are requests: the run
saves and leaves. A second signal forces the exit, also of a process that hangs in a collective,
where Python runs no handler.
"""

import contextlib
import functools
import os
import signal
import threading
import time
from collections.abc import Callable, Collection, Iterator
from types import FrameType
from typing import NamedTuple

import torch

from trainkit.utils import comm

SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)

COPY_SECONDS = 1.0
"""Signals this close are one request: a group gets a signal, and a launcher's copy of it."""

# No signal has this number.
_END = b"\0"


class Interruption(NamedTuple):
    """Why a run leaves before its end.

    Attributes:
        reason: In words, or the signal's name.
        exit_code: That of the process, 128 + the signal's number; 0 without a signal.
    """

    reason: str
    exit_code: int = 0


class StopRequested(BaseException):
    """Cuts work short that a resume makes up for, on all ranks alike: the trainer saves and leaves.

    Like KeyboardInterrupt, it is no error that somebody should handle on its way.

    Args:
        interruption: Why.
    """

    def __init__(self, interruption: Interruption) -> None:
        super().__init__(interruption)
        self.interruption = interruption


class _Listener:
    """What arrived. Signals belong to the whole process, and so does the one who listens."""

    def __init__(
        self, request_stop: Callable[..., None] | None = None, signals: Collection[int] = ()
    ) -> None:
        self._request_stop = request_stop
        self.signals = signals
        self.exit_code = 0
        self.may_raise = False
        self._last_signal = 0
        self._last_at = 0.0

    def takes_as_request(self, signum: int) -> bool:
        """Whether a signal is a request, or the copy of one, and not the second signal."""
        now = time.monotonic()
        # Slurm's notice precedes its SIGTERM, which is then the first of those who mean it.
        is_first = not self._last_signal or self._last_signal == signal.SIGUSR1 != signum
        if is_first:
            self._last_signal, self._last_at = signum, now
        return is_first or now - self._last_at < COPY_SECONDS

    def on_signal(self, signum: int, frame: FrameType | None) -> None:
        """Runs in the main thread, between two bytecodes; it may not log there."""
        if not self.takes_as_request(signum):
            if signum == signal.SIGINT:
                raise KeyboardInterrupt
            return  # The watching thread has seen it too, and exits.
        if self.exit_code == 0:
            name = signal.Signals(signum).name
            _say(f"{name}: leaving once this is saved. A second signal leaves at once, unsaved.")
        # The first one counts: what Slurm said notice of is requeued, though SIGTERM follows.
        self.exit_code = self.exit_code or 128 + signum
        if self._request_stop is not None:
            self._request_stop(_by_signal(self.exit_code).reason, exit_code=self.exit_code)
        if self.may_raise and comm.get_world_size() == 1:
            # A copy must not raise again, out of the save that follows.
            self.may_raise = False
            raise StopRequested(_by_signal(self.exit_code))


_listener: _Listener | None = None


@contextlib.contextmanager
def stop_signals(request_stop: Callable[..., None]) -> Iterator[None]:
    """Turns the first signal inside the block into a request; a second one forces the exit.

    In other threads than the main one, which Python hands no signals, inside another such block,
    and for signals that have a handler of the caller's own, nothing is changed. Processes forked in
    the block end by SIGTERM, and leave the other signals to this one.

    Args:
        request_stop: Called as `request_stop(reason, exit_code=…)` between two bytecodes of the
            main thread; it must not log.
    """
    global _listener
    if _listener or threading.current_thread() is not threading.main_thread():
        yield
        return
    defaults = (signal.SIG_DFL, signal.default_int_handler)
    previous = {s: signal.getsignal(s) for s in SIGNALS if signal.getsignal(s) in defaults}
    _listener = _Listener(request_stop, previous.keys())
    _prepare_forks()
    readable, writable = os.pipe()
    os.set_blocking(writable, False)
    previous_fd = signal.set_wakeup_fd(writable, warn_on_full_buffer=False)
    watch = threading.Thread(
        target=_force_exit_on_second, args=(readable, previous.keys()), daemon=True
    )
    watch.start()
    for signum in previous:
        signal.signal(signum, _listener.on_signal)
    try:
        yield
    finally:
        _listener = None
        for signum, handler in previous.items():
            signal.signal(signum, handler)
        signal.set_wakeup_fd(previous_fd)
        # Not by closing it: workers forked meanwhile have it open too.
        os.write(writable, _END)
        watch.join()
        os.close(writable)
        os.close(readable)


def _force_exit_on_second(readable: int, signals: Collection[int]) -> None:
    """Reads the numbers of signals as they arrive, whatever the main thread hangs in."""
    seen, has_raised = _Listener(), False
    while (number := os.read(readable, 1)) != _END:
        signum = number[0]
        if signum not in signals or seen.takes_as_request(signum):
            continue
        if signum == signal.SIGINT and not has_raised:
            # Raises KeyboardInterrupt in the main thread, so that a notebook lives on. One more
            # tells that the main thread hangs.
            seen, has_raised = _Listener(), True
            seen.takes_as_request(signum)
            continue
        _say("A second signal: leaving at once, unsaved.")
        os._exit(128 + signum)


def _say(line: str) -> None:
    # Whoever read it may have got the signal too, and be gone.
    with contextlib.suppress(OSError):
        os.write(2, f"{line}\n".encode())


@functools.cache
def _prepare_forks() -> None:
    """Makes forked children ones that their parent can end, and that end by no request to its run.

    They would answer signals as their parent does, and what they get would count as sent to it.
    """
    forking = threading.local()

    def before() -> None:
        # What a child gets before it has changed its handlers waits until then.
        forking.mask = signal.pthread_sigmask(signal.SIG_BLOCK, SIGNALS)

    def after_in_parent() -> None:
        signal.pthread_sigmask(signal.SIG_SETMASK, forking.mask)

    def after_in_child() -> None:
        global _listener
        if _listener is not None:
            signal.set_wakeup_fd(-1)
            for signum in _listener.signals:
                is_end = signum == signal.SIGTERM
                signal.signal(signum, signal.SIG_DFL if is_end else signal.SIG_IGN)
            _listener = None
        after_in_parent()

    os.register_at_fork(
        before=before, after_in_parent=after_in_parent, after_in_child=after_in_child
    )


@contextlib.contextmanager
def interruptible() -> Iterator[None]:
    """Lets a signal raise StopRequested inside the block at once, if there is one process only.

    For waiting of the main thread that may be long, with nothing done yet that a raise could tear.
    """
    listener = _listener
    if listener is None or threading.current_thread() is not threading.main_thread():
        yield
        return
    listener.may_raise = True
    try:
        yield
    finally:
        listener.may_raise = False


def is_asked_to_stop() -> bool:
    """Whether a signal has asked this very process to leave."""
    return _listener is not None and _listener.exit_code != 0


def stopping() -> Interruption | None:
    """Returns why all ranks leave, if a signal asked any of them to; a collective on several."""
    exit_code = _listener.exit_code if _listener else 0
    if comm.get_world_size() > 1:
        exit_code = int(comm.all_gather_tensor(torch.tensor(exit_code)).max())
    return _by_signal(exit_code) if exit_code else None


def raise_if_stopping() -> None:
    """Leaves a long evaluation if any rank was asked to stop; a collective on several ranks.

    Raises:
        StopRequested: The same on every rank.
    """
    if interruption := stopping():
        raise StopRequested(interruption)


def _by_signal(exit_code: int) -> Interruption:
    return Interruption(signal.Signals(exit_code - 128).name, exit_code)
