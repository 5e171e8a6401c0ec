"""One file for one checkpoint: `torch.save`'s format, sealed with a manifest."""

import contextlib
import hashlib
import os
import pickle
import queue
import shutil
import threading
import time
from collections import Counter, OrderedDict
from collections.abc import Mapping
from pathlib import Path
from typing import IO, Any, BinaryIO, cast

import torch

from trainkit.checkpoint.manifest import (
    END_LENGTH,
    END_SIGNATURE,
    DamagedCheckpointError,
    Manifest,
    verify,
)
from trainkit.utils.errors import CheckpointError

# What torch's weights_only unpickler admits; anything else could run code.
_CONTAINERS = (dict, OrderedDict, Counter, list, tuple, set, torch.Size)
_LEAVES = (type(None), bool, int, float, complex, str, bytes, bytearray)
_TORCH_LEAVES = (torch.Tensor, torch.nn.Parameter, torch.dtype, torch.device)


class _Hasher:
    """SHA-256 in a second thread, beside the writing."""

    def __init__(self) -> None:
        self._digest = hashlib.sha256()
        self._chunks: queue.Queue[bytes | None] = queue.Queue(maxsize=8)
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()

    def update(self, chunk: bytes) -> None:
        self._chunks.put(chunk)

    def finish(self) -> str:
        self._chunks.put(None)
        self._thread.join()
        return self._digest.hexdigest()

    def _run(self) -> None:
        while (chunk := self._chunks.get()) is not None:
            self._digest.update(chunk)


class _SealedFile:
    """What `torch.save` streams into: hashes, and withholds the closing record for the seal."""

    def __init__(self, file: BinaryIO) -> None:
        self._file = file
        self._hasher = _Hasher()
        self._withheld = b""
        self.length = 0
        self.error: OSError | None = None

    def write(self, data: bytes) -> int:
        # A copy, because the hash is taken later; torch may use its buffer again.
        data = bytes(data)
        joined = self._withheld + data
        self._emit(joined[:-END_LENGTH])
        self._withheld = joined[-END_LENGTH:]
        return len(data)

    def flush(self) -> None:
        """For `torch.save`; `seal` flushes."""

    def seal(self, **facts: Any) -> Manifest:
        """Closes the zip file with a comment that holds the manifest."""
        record, self._withheld = self._withheld, b""
        assert record.startswith(END_SIGNATURE), "torch.save closes with the record"
        assert record.endswith(b"\0\0"), "torch.save writes no comment"
        self._hasher.update(record)
        manifest = Manifest(self.length + END_LENGTH, self._hasher.finish(), **facts)
        comment = manifest.to_comment()
        self._file.write(record[:-2] + len(comment).to_bytes(2, "little") + comment)
        return manifest

    def abandon(self) -> None:
        """Ends the thread of a file that will not be sealed."""
        self._hasher.finish()

    def _emit(self, chunk: bytes) -> None:
        if chunk:
            try:
                self._file.write(chunk)
            except OSError as e:
                self.error = e
                raise
            self._hasher.update(chunk)
            self.length += len(chunk)


def write_checkpoint(
    data: Mapping[str, Any],
    path: Path,
    *,
    iteration: int | None = None,
    world_size: int = 1,
    facts: Mapping[str, str | int | float | bool] | None = None,
) -> Manifest:
    """Writes a checkpoint durably, under a name that is not yet the published one.

    Args:
        data: What `check_storable` accepts.
        path: The temporary name. On failure the file is removed.
        iteration: For the manifest.
        world_size: For the manifest.
        facts: For the manifest.

    Raises:
        CheckpointError: If the file cannot be written, with the bytes needed and free.
    """
    try:
        with path.open("wb") as file:
            sealed = _SealedFile(file)
            try:
                torch.save(data, cast(IO[bytes], sealed))
                manifest = sealed.seal(
                    iteration=iteration,
                    world_size=world_size,
                    saved_at_ns=time.time_ns(),
                    facts=dict(facts or {}),
                )
            except BaseException as e:
                sealed.abandon()
                # torch reports a failing file in words of its own.
                if sealed.error is not None and not isinstance(e, OSError):
                    raise sealed.error from None
                raise
            file.flush()
            os.fsync(file.fileno())
    except OSError as e:
        _remove(path)
        raise CheckpointError(_disk_message(path, data, e)) from e
    except BaseException:
        _remove(path)
        raise
    return manifest


def load_checkpoint(path: Path) -> tuple[Any, Manifest | None]:
    """Verifies a file and loads it to the CPU, without running code that it might hold.

    Returns:
        The data; and the manifest, or None if the file has none and could not be verified.

    Raises:
        DamagedCheckpointError: If the file is not what was written.
        CheckpointError: If it holds anything but tensors and plain values.
    """
    manifest = verify(path)
    try:
        return torch.load(path, map_location="cpu", weights_only=True), manifest
    except pickle.UnpicklingError as e:
        reason = str(e).split("\n")[0]
        raise CheckpointError(
            f"{path} was not loaded, and nothing in it was run: it holds more than tensors and "
            f"plain values, or is damaged ({reason}). Save it again as plain tensors, with a "
            "program that trusts it."
        ) from None
    except (RuntimeError, EOFError, ValueError, KeyError, OSError) as e:
        raise DamagedCheckpointError(f"{path} cannot be read as a checkpoint: {e}") from None


def check_storable(data: Any, path: str = "") -> None:
    """Checks that data is tensors and plain values, which can be loaded without running code.

    Raises:
        CheckpointError: If not, with the key path of the culprit.
    """
    kind = type(data)
    if kind in _LEAVES or kind in _TORCH_LEAVES:
        return
    if kind not in _CONTAINERS:
        raise CheckpointError(
            f"{path or 'The state'} is a {kind.__module__}.{kind.__qualname__}, which a checkpoint "
            "cannot hold: it could not be loaded without running code. Have state_dict() return "
            "tensors and plain values, as with float(x), x.tolist() or torch.from_numpy(x)."
        )
    items = data.items() if isinstance(data, dict) else enumerate(data)
    for key, value in items:
        check_storable(key, f"{path} (a key)")
        check_storable(value, f"{path}.{key}" if path else str(key))


def _remove(path: Path) -> None:
    # The first error is the one to report.
    with contextlib.suppress(OSError):
        path.unlink(missing_ok=True)


def _disk_message(path: Path, data: Mapping[str, Any], error: OSError) -> str:
    with contextlib.suppress(OSError):
        free = f"{shutil.disk_usage(path.parent).free:,} are free"
        return (
            f"The checkpoint {path} was not saved: {error.strerror or error}. About "
            f"{_num_bytes(data):,} bytes are needed and {free}. Earlier checkpoints are intact. "
            "Free space, or set OUTPUT_DIR to another disk, and go on with --resume."
        )
    return f"The checkpoint {path} was not saved: {error.strerror or error}. Is the folder there?"


def _num_bytes(data: Any) -> int:
    if isinstance(data, torch.Tensor):
        return data.nbytes
    if isinstance(data, dict):
        return sum(_num_bytes(value) for value in data.values())
    if isinstance(data, (list, tuple)):
        return sum(_num_bytes(value) for value in data)
    return 0
