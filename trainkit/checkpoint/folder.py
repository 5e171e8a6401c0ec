"""The folder of a run: which checkpoints it holds, in which order they are to be trusted."""

import json
import logging
import os
import re
from collections.abc import Callable, Sequence
from http.client import HTTPException
from pathlib import Path
from typing import Any

from trainkit.checkpoint.format import temporary_path, verify
from trainkit.checkpoint.manifest import DamagedError, read_end, read_manifest
from trainkit.utils.errors import CheckpointError, nearest_name
from trainkit.utils.file_io import leads_out, write_atomically

POINTER = "last_checkpoint"
FINISHED = "finished.json"
WEIGHTS_ONLY = "weights_only"
"""Fact in the manifest of a file that is no checkpoint to resume from."""

_MAX_BYTES = 4096

logger = logging.getLogger(__name__)


def newest_first(folder: Path) -> list[Path]:
    """Returns the published checkpoints of a folder, the one to resume from first.

    Those with a manifest come by the time in it, newest first, and among them, by their time of
    change, those damaged at the end, so that what is skipped is noticed. Files of an earlier format
    follow: the one that the pointer names, then the others by their time of change.
    """
    tagged = _read_pointer(folder)
    ranks = {path: _rank(path, path.name == tagged) for path in _published(folder)}
    ranked = {path: rank for path, rank in ranks.items() if rank is not None}
    return sorted(ranked, key=lambda path: (ranked[path], path.name), reverse=True)


def newest_valid(folder: Path) -> str:
    """Returns the checkpoint to resume from, or "" if there is none; says what it skips."""
    for path in newest_first(folder):
        fault = find_fault(path)
        if not fault:
            return os.fspath(path)
        logger.warning("Skipping the damaged checkpoint %s: %s", path, fault)
    return ""


def newest_time_ns(folder: Path) -> int:
    """Returns the largest time in any manifest of a folder, or 0."""
    manifests = map(read_manifest, _published(folder))
    return max((m.saved_at_ns for m in manifests if m is not None), default=0)


def find_fault(path: Path) -> str:
    """Returns what keeps a checkpoint from being used, as the end of a sentence, or ""."""
    if leads_out(path):
        return f"it is a link out of this folder, to {os.path.realpath(path)}: put that file here"
    return verify(path).reason


def surplus(
    ranked: Sequence[Path], file_prefix: str, max_to_keep: int, is_valid: Callable[[Path], bool]
) -> list[Path]:
    """Returns the numbered ones of `newest_first` beyond the newest, the oldest first.

    The newest valid one is none of them in any case.
    """
    numbered = re.compile(rf"{re.escape(file_prefix)}_\d{{7,}}\.pth")
    paths = [path for path in ranked if numbered.fullmatch(path.name)]
    left = paths[max_to_keep:]
    newest_valid = next(filter(is_valid, paths), None) if left else None
    return [path for path in reversed(left) if path != newest_valid]


def delete(path: Path) -> None:
    """Deletes an old checkpoint; a failure is no more than a warning."""
    try:
        path.unlink(missing_ok=True)
    except OSError as e:
        logger.warning("Cannot delete the old checkpoint %s: %s", path, str(e))


def signature(path: Path) -> tuple[object, ...]:
    """Returns what changes when somebody replaces a file or writes to it."""
    stat = path.stat()
    return path.name, stat.st_ino, stat.st_size, stat.st_mtime_ns


def remove_stale(folder: Path) -> None:
    """Removes what saves left behind that were killed.

    Raises:
        OSError: If the folder does not allow it.
    """
    for path in folder.glob(temporary_path(Path("*.pth")).name):
        path.unlink(missing_ok=True)


def read_finished(folder: Path) -> int | None:
    """Returns the last iteration of a run that came to its end, or None if this one has not."""
    try:
        iteration = json.loads(_read_small(folder / FINISHED))["iteration"]
    except FileNotFoundError:
        return None
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        iteration = None
    if type(iteration) is not int:
        logger.warning(
            "%s is damaged: taking the run for unfinished. If it is finished, write "
            '{"iteration": <its last iteration>} into that file.',
            folder / FINISHED,
        )
        return None
    return iteration


def mark_finished(folder: Path, iteration: int) -> None:
    """Notes that a run came to its end after 0-based `iteration`; a failure is a warning."""
    text = json.dumps({"iteration": iteration}) + "\n"
    _write_note(folder / FINISHED, text, "note that the run is finished")


def point_to(folder: Path, name: str) -> None:
    """Points to a checkpoint; a failure is a warning."""
    _write_note(folder / POINTER, name, f"point to {name}")


def local_file(path: str, path_manager: Any) -> str:
    """Returns the local path of a checkpoint, which iopath's path manager fetches if need be.

    Raises:
        CheckpointError: If it cannot be fetched, or there is none.
    """
    local = path
    if not os.path.isfile(local):
        try:
            local = path_manager.get_local_path(path)
        except (OSError, ValueError, HTTPException) as e:
            raise CheckpointError(
                f"Cannot fetch checkpoint {path!r}: {e}. Check the address and the network, or "
                "download the file and give its path."
            ) from e
    if not os.path.isfile(local):
        raise CheckpointError(describe_missing(path))
    return local


def describe_missing(path: str) -> str:
    """Returns what to tell a user who named a checkpoint that is not there."""
    folder, name = Path(path).parent, Path(path).name
    # Not Path's: they raise for a name that is too long.
    if os.path.isdir(path):
        return f"{path!r} is a folder. Name a file in it: {_list_checkpoints(Path(path))}."
    if not os.path.isdir(folder):
        return f"There is no checkpoint {path!r}: there is no folder {str(folder)!r} either."
    nearest = nearest_name(name, (entry.name for entry in folder.iterdir()))
    if nearest:
        return f"There is no checkpoint {path!r}. Did you mean {os.fspath(folder / nearest)!r}?"
    return f"There is no checkpoint {path!r}. That folder holds {_list_checkpoints(folder)}."


def _published(folder: Path) -> list[Path]:
    # Regular files and links to them: a named pipe would be waited for when it is opened.
    return [path for path in folder.glob("*.pth") if os.path.isfile(path)]


def _write_note(path: Path, text: str, aim: str) -> None:
    try:
        write_atomically(path, text)
    except OSError as e:
        logger.warning("Cannot %s: %s", aim, str(e))


def _read_small(path: Path) -> bytes:
    """Returns the first bytes of a file that has no more if it is ours."""
    if path.is_fifo():
        raise OSError("a named pipe, which would be waited for")
    with path.open("rb") as file:
        return file.read(_MAX_BYTES)


def _rank(path: Path, is_tagged: bool) -> tuple[bool, bool, int] | None:
    try:
        changed_at = path.stat().st_mtime_ns
    except OSError:
        return None
    try:
        manifest = read_end(path).manifest
    except (DamagedError, OSError):
        return True, False, changed_at
    if manifest is None:
        return False, is_tagged, changed_at
    if manifest.facts.get(WEIGHTS_ONLY):
        return None
    return True, False, manifest.saved_at_ns


def _read_pointer(folder: Path) -> str:
    try:
        return _read_small(folder / POINTER).decode("utf-8", "replace").strip()
    except OSError:
        return ""


def _list_checkpoints(folder: Path) -> str:
    return ", ".join(sorted(path.name for path in folder.glob("*.pth"))) or "no .pth file"
