"""The processes that `launch` starts: watched until the last has left, and ended when one fails."""

import contextlib
import logging
import math
import multiprocessing
import os
import pickle
import re
import signal
import threading
import time
import traceback
from collections.abc import Callable, Iterator
from multiprocessing.connection import Connection, wait
from multiprocessing.process import BaseProcess
from types import FrameType
from typing import Any, Final, NamedTuple

from trainkit.engine.failures import RankDiedError, note_place, summary
from trainkit.engine.preemption import PreemptedExit
from trainkit.utils.errors import add_note
from trainkit.utils.stop_signals import COPY_SECONDS, SIGNALS

logger = logging.getLogger(__name__)

START_METHOD: Final = "spawn"
"""How processes come about: CUDA cannot be used in a forked one."""

GRACE_SECONDS = 5.0
"""How long the other ranks have to leave after one has failed, before they are killed."""

_ANSWER_SECONDS = 5.0
# A loader worker may keep the pipes of a killed rank open, so ranks are looked at now and then.
_POLL_SECONDS = 0.2


class _Report(NamedTuple):
    """What a rank raised: pickled, which may be read in vain, and in words."""

    sent_at: float
    pickled: bytes
    text: str
    notes: list[str]
    traceback: str

    def error(self) -> BaseException:
        error: BaseException
        try:
            error = pickle.loads(self.pickled)
        except Exception:  # What its class raises, or where it is found, is the user's.
            error = RuntimeError(self.text)
            for note in self.notes:
                add_note(error, note)
        error.__cause__ = _RankTracebackError(self.traceback)
        return error


class _RankTracebackError(Exception):
    """Shows the traceback of another process where that of a cause is shown."""

    def __str__(self) -> str:
        return f"\n{self.args[0]}"


def report_error(channel: Connection, error: BaseException) -> int:
    """Tells the launching process what ended this rank, and returns the exit code.

    Args:
        channel: To the launching process, whose answer is waited for: it has told the user then.
        error: What was raised; SystemExit(0) is none.
    """
    exit_code = 1
    if isinstance(error, SystemExit):
        exit_code = error.code if isinstance(error.code, int) else int(error.code is not None)
    if exit_code == 0:
        return 0
    if isinstance(error, Exception):
        note_place(error)
    try:
        pickled = pickle.dumps(error)
    except Exception:
        pickled = b""
    # What Python prints, which no failing `__str__` stops.
    text = traceback.format_exception_only(type(error), error)[0].strip()
    lines = "".join(traceback.format_exception(type(error), error, error.__traceback__))
    report = _Report(time.monotonic(), pickled, text, getattr(error, "__notes__", []), lines)
    with contextlib.suppress(OSError):  # The launching process is gone.
        channel.send(report)
        channel.poll(_ANSWER_SECONDS)
    return exit_code


def report_result(channel: Connection, result: Any) -> None:
    """Gives the launching process what this rank returned, unless that cannot be pickled."""
    try:
        pickled = pickle.dumps(result)
    except Exception as e:
        logger.warning("What this rank returned stays here, as it cannot be pickled: %s", e)
        return
    with contextlib.suppress(OSError):  # The launching process is gone.
        channel.send(pickled)


class Processes:
    """The ranks of this machine: what ends the first of them too early is what ends all.

    Args:
        first_rank: The lowest of them.
    """

    def __init__(self, first_rank: int) -> None:
        self._first_rank = first_rank
        self._processes: dict[int, BaseProcess] = {}
        # Of those that have yet to report or leave.
        self._channels: dict[int, Connection] = {}
        self._errors: dict[int, BaseException] = {}
        self._outcome: BaseException | None = None
        self._result = pickle.dumps(None)
        self._deadline = math.inf
        self._signum = 0
        self._signal_at = 0.0

    def run(self, target: Callable[..., None], count: int, args: tuple[Any, ...]) -> Any:
        """Starts `target(channel, rank, local_rank, *args)` in each process, and waits for all.

        A signal goes on to them, and they save and leave; a second one kills them.

        Returns:
            What one of them gave to `report_result`, else None.

        Raises:
            BaseException: What the first one raised that failed, RankDiedError if that was killed,
                or how a signal ends this process.
        """
        try:
            with _handling(self._on_signal):
                self._start(target, count, args)
                self._watch()
        finally:
            self._kill()
        if self._outcome is None and self._signum:
            self._outcome = _leaving_by(self._signum)
        if self._outcome is not None:
            # What ranks raise together, they raise at once: the one it came from knows more of it.
            match = re.match(r"rank (\d+) failed: ", str(self._outcome))
            raise self._errors.get(int(match[1]), self._outcome) if match else self._outcome
        try:
            return pickle.loads(self._result)
        except Exception as e:  # What its class raises, or where it is found, is the user's.
            logger.warning("What rank %d returned cannot be made again: %s", self._first_rank, e)
            return None

    def _start(self, target: Callable[..., None], count: int, args: tuple[Any, ...]) -> None:
        context = multiprocessing.get_context(START_METHOD)
        for local_rank in range(count):
            rank = self._first_rank + local_rank
            channel, theirs = context.Pipe()
            process = context.Process(target=target, args=(theirs, rank, local_rank, *args))
            process.start()
            theirs.close()
            self._processes[rank], self._channels[rank] = process, channel
        if self._signum:
            self._send(self._signum)

    def _watch(self) -> None:
        """Waits until all have left, and kills those that stay too long after one has failed."""
        while True:
            # In this order: whoever has left by now had sent its report before.
            ended = {r: p.exitcode for r, p in self._processes.items() if p.exitcode is not None}
            reports = self._take_reports()
            for rank, exit_code in ended.items():
                if exit_code and rank not in reports and self._outcome is None:
                    died = _death(rank, self._processes[rank].pid, exit_code)
                    self._take_error(rank, died, is_agreed=False)
            for rank, report in sorted(reports.items(), key=lambda item: item[1].sent_at):
                error = report.error()
                # These come out of the loop of every rank, and each leaves when it is ready.
                agreed = isinstance(error, (PreemptedExit, KeyboardInterrupt))
                self._take_error(rank, error, agreed)
                with contextlib.suppress(OSError):
                    self._channels.pop(rank).send(None)
            if len(ended) == len(self._processes):
                return
            if time.monotonic() > self._deadline:
                self._kill()
            alive = [p.sentinel for rank, p in self._processes.items() if rank not in ended]
            wait([*alive, *self._channels.values()], _POLL_SECONDS)

    def _take_reports(self) -> dict[int, _Report]:
        reports = {}
        for rank, channel in list(self._channels.items()):
            try:
                if not channel.poll():
                    continue
                if isinstance(message := channel.recv(), bytes):
                    self._result = message
                else:
                    reports[rank] = message
            except (EOFError, OSError):  # It has left.
                del self._channels[rank]
        return reports

    def _take_error(self, rank: int, error: BaseException, is_agreed: bool) -> None:
        self._errors[rank] = error
        if self._outcome is not None:
            return
        self._outcome = error
        if not is_agreed:
            self._deadline = time.monotonic() + GRACE_SECONDS
            notes = getattr(error, "__notes__", [])
            # At once: what the others say of it on their way out would come first otherwise.
            logger.error("Rank %d ends the run: %s", rank, " ".join([summary(error), *notes]))

    def _on_signal(self, signum: int, frame: FrameType | None) -> None:
        now = time.monotonic()
        # As the ranks themselves take it: Slurm's notice precedes its SIGTERM.
        is_first = signum != self._signum in (0, signal.SIGUSR1)
        if is_first or now - self._signal_at < COPY_SECONDS:
            if is_first:
                self._signum, self._signal_at = signum, now
            self._send(signum)
        else:
            if self._outcome is None:
                self._outcome = _leaving_by(signum)
            self._deadline = now

    def _send(self, signum: int) -> None:
        for process in self._processes.values():
            if process.exitcode is None and process.pid is not None:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(process.pid, signum)

    def _kill(self) -> None:
        """Ends those that are left; SIGTERM would have them save, which needs all of them."""
        for rank, process in self._processes.items():
            if process.exitcode is None:
                logger.warning("Killing rank %d (pid %d).", rank, process.pid)
                process.kill()
        for process in self._processes.values():
            process.join()


def _death(rank: int, pid: int | None, exit_code: int) -> BaseException:
    """Returns what the end of a rank that reported nothing means for all."""
    signum = -exit_code if exit_code < 0 else exit_code - 128
    if signum in SIGNALS:
        return _leaving_by(signum)
    if exit_code > 0:
        how = f"left with exit code {exit_code} and no error"
    elif signum == signal.SIGKILL:
        how = "was killed by SIGKILL; the kernel does that when memory runs out (see dmesg)"
    else:
        how = f"was killed by signal {signum} ({signal.strsignal(signum)})"
    return RankDiedError(
        f"Rank {rank} (pid {pid}) {how}. Go on from the last checkpoint with --resume."
    )


def _leaving_by(signum: int) -> BaseException:
    return KeyboardInterrupt() if signum == signal.SIGINT else SystemExit(128 + signum)


@contextlib.contextmanager
def _handling(handler: Callable[[int, FrameType | None], None]) -> Iterator[None]:
    """Handles the signals that ask a run to leave, but for those the caller handles itself."""
    defaults = (signal.SIG_DFL, signal.default_int_handler)
    previous = {s: h for s in SIGNALS if (h := signal.getsignal(s)) in defaults}
    if threading.current_thread() is not threading.main_thread():
        previous = {}
    for signum in previous:
        signal.signal(signum, handler)
    try:
        yield
    finally:
        for signum, default in previous.items():
            signal.signal(signum, default)
