"""One run at a time in a folder: a lock that the operating system takes back from the dead."""

import contextlib
import errno
import importlib.util
import json
import logging
import os
import socket
from collections.abc import Iterator
from datetime import datetime

from trainkit.utils import comm
from trainkit.utils.errors import ConfigError

LOCK = "run.lock"

_MAX_BYTES = 4096
# Neither a link to another file is written through, nor a named pipe waited for.
_OWN_FILE = getattr(os, "O_NOFOLLOW", 0) | getattr(os, "O_NONBLOCK", 0)
# Windows has no record locks.
_fcntl = importlib.import_module("fcntl") if importlib.util.find_spec("fcntl") else None
# The process that holds each file, for a record lock never refuses its own process, and is lost as
# soon as that process closes any descriptor of the file. Forked children inherit the entry only.
_held: dict[str, int] = {}

logger = logging.getLogger(__name__)


@contextlib.contextmanager
def hold_run_folder(folder: str | os.PathLike[str]) -> Iterator[None]:
    """Keeps other runs out of a folder during the block; all ranks enter it, and rank 0 holds.

    A POSIX record lock on `run.lock`, which the kernel frees when the process dies in whatever way,
    even if its workers live on. The file says who holds it, and is emptied at the end; it stays,
    for somebody may have opened it to lock it next. Where it cannot be locked, a warning says so.

    Raises:
        ConfigError: On every rank, if another run holds the folder; it names host, process, start.
    """
    path = os.path.join(os.path.realpath(folder), LOCK)
    descriptor = comm.on_main(lambda: _acquire(path))
    try:
        yield
    finally:
        if descriptor is not None and comm.is_main_process():
            with contextlib.suppress(OSError):
                os.ftruncate(descriptor, 0)
            os.close(descriptor)
            del _held[path]


def check_not_held(folder: str | os.PathLike[str]) -> None:
    """Raises what `hold_run_folder` would raise now; all ranks call it, and nothing is written."""
    path = os.path.join(os.path.realpath(folder), LOCK)
    comm.on_main(lambda: _check(path))


def _acquire(path: str) -> int | None:
    """Returns the descriptor that holds the lock, or None where the file cannot be locked."""
    try:
        os.makedirs(os.path.dirname(path), exist_ok=True)
        descriptor = _open_locked(path, os.O_RDWR | os.O_CREAT, "LOCK_EX")
    except OSError as e:
        text = "Cannot lock %s (%s): see to it yourself that no other run uses that folder."
        logger.warning(text, path, e.strerror or e)
        return None
    _held[path] = os.getpid()
    _sign(descriptor, path)
    return descriptor


def _check(path: str) -> None:
    # What cannot be opened or locked is told when it is to be held.
    with contextlib.suppress(OSError):
        # Shared, so that two who check at the same moment do not refuse each other.
        os.close(_open_locked(path, os.O_RDONLY, "LOCK_SH"))


def _open_locked(path: str, flags: int, kind: str) -> int:
    if _held.get(path) == os.getpid():
        raise _refusal(path, "another trainer of this process")
    descriptor = os.open(path, flags | _OWN_FILE, 0o666)
    try:
        if _fcntl is None:
            raise OSError(errno.ENOTSUP, "this system has no record locks")
        _fcntl.lockf(descriptor, getattr(_fcntl, kind) | _fcntl.LOCK_NB)
    except OSError as e:
        holder = _holder(descriptor)
        os.close(descriptor)
        if e.errno not in (errno.EACCES, errno.EAGAIN):
            raise
        raise _refusal(path, holder or "another process") from None
    return descriptor


def _sign(descriptor: int, path: str) -> None:
    if before := _holder(descriptor):
        logger.info("Taking over %s from %s, which is gone", path, before)
    started = datetime.now().astimezone().isoformat(timespec="seconds")
    entries = {"host": socket.gethostname(), "pid": os.getpid(), "started": started}
    # What the file says is for people; the lock holds without it.
    with contextlib.suppress(OSError):
        os.ftruncate(descriptor, 0)
        os.pwrite(descriptor, f"{json.dumps(entries)}\n".encode(), 0)


def _holder(descriptor: int) -> str:
    """Returns who has signed, or "" if nobody has."""
    try:
        entries = json.loads(os.pread(descriptor, _MAX_BYTES, 0))
        return f"process {entries['pid']} on {entries['host']}, started {entries['started']}"
    except (OSError, ValueError, LookupError, TypeError, RecursionError):
        return ""


def _refusal(path: str, holder: str) -> ConfigError:
    return ConfigError(
        f"OUTPUT_DIR {os.path.dirname(path)!r} is in use by {holder}. Two runs would destroy each "
        "other's checkpoints there: wait for that one's end, stop it, or set another OUTPUT_DIR."
    )
