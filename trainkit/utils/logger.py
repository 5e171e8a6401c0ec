"""Logging: one logger for a package, on rank 0's standard output and in a file of every rank.

Modules log to `logging.getLogger(__name__)`; their records reach the handlers that `setup_logger`
puts on the package's logger.
"""

import copy
import logging
import math
import os
import sys
import time
from collections import Counter
from collections.abc import Hashable, Mapping
from pathlib import Path
from types import FrameType
from typing import Any

from tabulate import tabulate
from termcolor import colored

from trainkit.utils.file_io import leads_out


class _Formatter(logging.Formatter):
    """Writes `[11/21 10:00:00 trainkit.engine]: message`; warnings and worse say what they are."""

    def __init__(self, name: str, abbrev_name: str, color: bool) -> None:
        stamp = "[%(asctime)s %(name)s]:"
        # termcolor itself leaves the colors out where standard output is no terminal.
        stamp = colored(stamp, "green") if color else stamp
        super().__init__(f"{stamp} %(levelname)s%(message)s", datefmt="%m/%d %H:%M:%S")
        self._name = name
        self._abbrev_name = abbrev_name
        self._color = color

    def format(self, record: logging.LogRecord) -> str:
        shown = copy.copy(record)  # Other handlers see the record as it was.
        if f"{record.name}.".startswith(f"{self._name}."):
            shown.name = self._abbrev_name + record.name[len(self._name) :]
        shown.levelname = self._level(record)
        return super().format(shown)

    def _level(self, record: logging.LogRecord) -> str:
        if record.levelno < logging.WARNING:
            return ""
        color = "yellow" if record.levelno < logging.ERROR else "red"
        level = (
            colored(record.levelname, color, attrs=["bold"]) if self._color else record.levelname
        )
        return f"{level} "


class _StdoutHandler(logging.Handler):
    """Prints, and so follows a `sys.stdout` that is redirected after its construction."""

    def emit(self, record: logging.LogRecord) -> None:
        try:
            print(self.format(record), flush=True)
        except Exception:
            self.handleError(record)


class _RankFileHandler(logging.FileHandler):
    """The one file of a logger that `setup_logger` opened."""


def setup_logger(
    output: str | os.PathLike[str] | None = None,
    distributed_rank: int = 0,
    *,
    color: bool = True,
    name: str = "trainkit",
    abbrev_name: str | None = None,
    enable_propagation: bool = False,
    configure_stdout: bool = True,
) -> logging.Logger:
    """Sends what `name` and its children log to rank 0's standard output and to a file per rank.

    Calling it again replaces what the earlier call set up, so a process may train twice.

    Args:
        output: A folder, which gets `log.txt` from rank 0 and `log.txt.rank{N}` from the others; or
            a file, if it ends in .txt or .log, to which other ranks add `.rank{N}`. It is created,
            and appended to when it is there. None keeps the file of an earlier call, if any.
        distributed_rank: Rank of this process; only 0 prints.
        color: Whether to color what is printed, where that is a terminal.
        name: Root of the loggers to set up. Set up your own package by another call; both may write
            to one file.
        abbrev_name: What to print for `name`; itself by default.
        enable_propagation: Whether handlers of the root logger see the records too, and print them
            once more if they print.
        configure_stdout: Whether to print at all.

    Returns:
        The logger called `name`.
    """
    logger = logging.getLogger(name)
    logger.setLevel(logging.DEBUG)
    logger.propagate = enable_propagation
    abbrev_name = name if abbrev_name is None else abbrev_name

    _remove_handlers(logger, _StdoutHandler)
    if distributed_rank == 0 and configure_stdout:
        stdout = _StdoutHandler()
        stdout.setFormatter(_Formatter(name, abbrev_name, color))
        logger.addHandler(stdout)
    if output is not None:
        _remove_handlers(logger, _RankFileHandler)
        path = _log_file(Path(output), distributed_rank)
        path.parent.mkdir(parents=True, exist_ok=True)
        if leads_out(path):
            path.unlink()
        file = _RankFileHandler(path, mode="a", encoding="utf-8")
        file.setFormatter(_Formatter(name, abbrev_name, color=False))
        logger.addHandler(file)
    return logger


def _remove_handlers(logger: logging.Logger, kind: type[logging.Handler]) -> None:
    for handler in [h for h in logger.handlers if isinstance(h, kind)]:
        logger.removeHandler(handler)
        handler.close()


def _log_file(output: Path, rank: int) -> Path:
    path = output if output.suffix in (".txt", ".log") else output / "log.txt"
    return path if rank == 0 else path.with_name(f"{path.name}.rank{rank}")


_counts: Counter[Hashable] = Counter()
_last_seconds: dict[Hashable, float] = {}


def log_first_n(
    lvl: int,
    msg: str,
    n: int = 1,
    *,
    name: str | None = None,
    key: str | tuple[str, ...] = "caller",
) -> None:
    """Logs only the first `n` times.

    Args:
        lvl: Level of `logging`, such as `logging.WARNING`.
        msg: Text to log.
        n: How often.
        name: Logger to use; that of the calling module by default.
        key: What is counted: "caller" (each line of code that calls this), "message" (each text),
            or a tuple of both.
    """
    frame = sys._getframe(1)
    parts: dict[str, Hashable] = {"caller": _place(frame), "message": msg}
    counted = tuple(parts[part] for part in ((key,) if isinstance(key, str) else key))
    _counts[counted] += 1
    if _counts[counted] <= n:
        _logger_of(frame, name).log(lvl, msg, stacklevel=2)


def log_every_n(lvl: int, msg: str, n: int = 1, *, name: str | None = None) -> None:
    """Logs the first of every `n` calls that one line of code makes.

    Args:
        lvl: Level of `logging`, such as `logging.WARNING`.
        msg: Text to log.
        n: How many calls make one line of log.
        name: Logger to use; that of the calling module by default.
    """
    frame = sys._getframe(1)
    counted = ("every", _place(frame))
    _counts[counted] += 1
    if (_counts[counted] - 1) % n == 0:
        _logger_of(frame, name).log(lvl, msg, stacklevel=2)


def log_every_n_seconds(lvl: int, msg: str, n: float = 1, *, name: str | None = None) -> None:
    """Logs unless one line of code has logged in the last `n` seconds; else as `log_every_n`."""
    frame = sys._getframe(1)
    now = time.monotonic()
    if now - _last_seconds.get(_place(frame), -math.inf) >= n:
        _last_seconds[_place(frame)] = now
        _logger_of(frame, name).log(lvl, msg, stacklevel=2)


def create_small_table(small_dict: Mapping[str, Any]) -> str:
    """Returns a table of a few values in one row under their names; floats get three decimals.

    Example:
        >>> print(create_small_table({"top1": 0.91044, "top5": 0.9961}))
        |   top1 |   top5 |
        |--------|--------|
        |  0.910 |  0.996 |
    """
    return tabulate([list(small_dict.values())], list(small_dict), "github", floatfmt=".3f")


def _place(frame: FrameType) -> tuple[str, int]:
    return frame.f_code.co_filename, frame.f_lineno


def _logger_of(frame: FrameType, name: str | None) -> logging.Logger:
    return logging.getLogger(name or frame.f_globals["__name__"])
