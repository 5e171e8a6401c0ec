"""Files that verify themselves: `torch.save`'s format, closed with a manifest (see `manifest`).

A file is written under a temporary name, hashed while it streams, synced, and only then given its
name, so a name never stands for half a checkpoint. Reading never runs code.
"""

import contextlib
import copy
import errno
import hashlib
import os
import pickle
import platform
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, Literal, cast

import torch

from trainkit import __version__
from trainkit.checkpoint.archive import check_archive
from trainkit.checkpoint.hashing_writer import HashingWriter
from trainkit.checkpoint.manifest import (
    BARE_PICKLE,
    END_RECORD_BYTES,
    SCHEMA,
    DamagedError,
    Fact,
    Manifest,
    read_end,
    to_comment,
)
from trainkit.checkpoint.space import free_bytes
from trainkit.checkpoint.storable import check_storable, tensor_bytes
from trainkit.utils.errors import CheckpointError, CheckpointWriteError
from trainkit.utils.file_io import publish

_CHUNK_BYTES = 1 << 20
_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
_MENDS = {
    errno.ENOSPC: "make room",
    errno.EDQUOT: "make room within your quota",
    errno.EFBIG: "allow larger files (ulimit -f)",
    errno.EIO: "the device fails, so see the system's log",
    **dict.fromkeys((errno.EROFS, errno.EACCES, errno.EPERM), "make the folder writable"),
}
_MAX_TEXT = 200
_TRUST = (
    "Nothing in it was run. Only if you trust whoever made it with all that you can do here, set "
    "MODEL.WEIGHTS to it and MODEL.TRUST_PICKLE to True, or pass trust_pickle=True."
)
_ADVICE = ("Weights only load failed", "(1)", "(2)", "Please file", "Check the documentation")


def temporary_path(path: Path) -> Path:
    """Returns the name under which a checkpoint is written; no listing of `*.pth` shows it."""
    return path.with_name(f".{path.name}.tmp")


def write_checkpoint(
    data: Mapping[str, Any],
    path: str | os.PathLike[str],
    *,
    iteration: int | None = None,
    world_size: int = 1,
    facts: Mapping[str, Fact] | None = None,
    after_ns: int = 0,
) -> Manifest:
    """Writes a checkpoint: when this returns, it is whole and durable under its name.

    Args:
        data: Tensors and plain values, nested in dicts and lists.
        path: The name, in a folder that exists; a file that has it is replaced in one instant.
        iteration: 0-based iteration that the checkpoint completes.
        world_size: Number of processes that trained.
        facts: More for the manifest, in a few short entries.
        after_ns: The manifest's `saved_at_ns` will be larger than this, whatever the clock says.

    Raises:
        CheckpointError: If `data` holds what could not be loaded again.
        CheckpointWriteError: If the storage refuses it. No partial file is left then, and nothing
            else in the folder has changed.
    """
    check_storable(data)
    path = Path(path)
    temporary = temporary_path(path)
    with explaining(path, data), _removing(temporary):
        temporary.unlink(missing_ok=True)
        # Exclusive, so that not even a link of this name is followed.
        with temporary.open("xb") as file:
            with HashingWriter(file) as writer:
                torch.save(data, cast(IO[bytes], writer))
            manifest = Manifest(
                schema=SCHEMA,
                iteration=iteration,
                world_size=world_size,
                versions=_versions(),
                saved_at_ns=max(time.time_ns(), after_ns + 1),
                bytes=writer.size,
                sha256=writer.hexdigest(),
                facts=dict(facts or {}),
            )
            writer.close_with(to_comment(manifest))
            file.flush()
            os.fsync(file.fileno())
        publish(temporary, path)
    return manifest


@dataclass(frozen=True)
class Verdict:
    """What verification found.

    Args:
        state: "verified"; "unverified" for a file of an earlier format, which cannot be verified;
            or "damaged".
        reason: What is wrong with a damaged file, as the end of a sentence; else empty.
        manifest: The manifest of a verified file.
    """

    state: Literal["verified", "unverified", "damaged"]
    reason: str = ""
    manifest: Manifest | None = None


def verify(path: str | os.PathLike[str]) -> Verdict:
    """Reads a whole checkpoint and tells whether it is what was written; it never raises."""
    try:
        end = read_end(path)
        if end.record_at is None:
            return Verdict("unverified")
        if end.manifest and _hash_file(Path(path), end.record_at) != end.manifest.sha256:
            return Verdict("damaged", "its bytes are not those that were written (SHA-256 differs)")
        check_archive(path, end.record_at)
        return Verdict("verified" if end.manifest else "unverified", manifest=end.manifest)
    except DamagedError as e:
        return Verdict("damaged", str(e))
    except OSError as e:
        return Verdict("damaged", f"it cannot be read: {e.strerror or e}")


def load_checkpoint(path: str | os.PathLike[str], *, trust_pickle: bool = False) -> Any:
    """Verifies a checkpoint and loads it on the CPU, without running code unless it is trusted.

    Args:
        path: A file of trainkit's, fvcore's or `torch.save`'s; if it is trusted, any pickle too,
            such as the `.pkl` files of detectron2's model zoo.
        trust_pickle: Whether code in the file may run, which can do anything that you can.

    Raises:
        CheckpointError: If the file is damaged, or holds more than tensors and plain values and is
            not trusted.
    """
    verdict = verify(path)
    is_bare = verdict.reason == BARE_PICKLE
    if is_bare and not trust_pickle:
        raise CheckpointError(f"Checkpoint {os.fspath(path)} was refused: {BARE_PICKLE}. {_TRUST}")
    if verdict.state == "damaged" and not is_bare:
        raise CheckpointError(
            f"Checkpoint {os.fspath(path)} is damaged: {verdict.reason}. Use another one, or "
            "copy it here again."
        )
    try:
        return _load_trusted(path, is_bare) if trust_pickle else _load_plain(path)
    except Exception as e:
        # A pickle can fail in any way at all.
        raise CheckpointError(_explain_load(path, e)) from e


def load_safetensors(path: str | os.PathLike[str]) -> dict[str, Any]:
    """Loads the tensors of a `.safetensors` file, on the CPU.

    Raises:
        CheckpointError: If the package safetensors is missing, or the file is none of its own.
    """
    try:
        from safetensors.torch import load_file
    except ImportError:
        raise CheckpointError(
            f"Reading {os.fspath(path)} needs the package safetensors, which is not installed. Run "
            "pip install 'trainkit[safetensors]'."
        ) from None
    try:
        return load_file(path)
    except Exception as e:
        # Somebody else's file can fail in any way at all.
        raise CheckpointError(
            f"{os.fspath(path)} is no file of safetensors: {e}. Export or download it again."
        ) from e


def _load_plain(path: str | os.PathLike[str]) -> Any:
    """Loads tensors and plain values, none of them larger than the file is long."""
    is_zip = read_end(path).record_at is not None
    # Mapped at first: whatever sizes the pickle claims, torch reads nothing beyond the file then.
    data = torch.load(path, map_location="cpu", weights_only=True, mmap=is_zip)
    num_bytes = tensor_bytes(data)
    if num_bytes > os.path.getsize(path):
        raise ValueError(f"its values claim {num_bytes:,} bytes, more than the file has")
    # Of its own memory: a map would keep a deleted file's space, and fail with the file.
    return copy.deepcopy(data) if is_zip else data


def _load_trusted(path: str | os.PathLike[str], is_bare: bool) -> Any:
    if not is_bare:
        return torch.load(path, map_location="cpu", weights_only=False)
    with open(path, "rb") as file:
        # Python 2 wrote many of these.
        return pickle.load(file, encoding="latin1")


def _versions() -> dict[str, str]:
    return {
        "trainkit": __version__,
        "torch": str(torch.__version__),
        "python": platform.python_version(),
    }


def _explain_load(path: str | os.PathLike[str], error: Exception) -> str:
    lines = [" ".join(line.split()) for line in str(error).splitlines() if line.strip()]
    # Around its reason torch advises to trust the file, which is not ours to advise.
    telling = [line for line in lines if not line.startswith(_ADVICE)] or lines[:1] or [""]
    said = telling[0].removeprefix("WeightsUnpickler error: ").partition(" Please use ")[0]
    said = said if len(said) <= _MAX_TEXT else said[:_MAX_TEXT] + "…"
    if isinstance(error, pickle.UnpicklingError):
        return (
            f"Checkpoint {os.fspath(path)} holds more than tensors and plain values, and was "
            f"refused: {said.rstrip('.')}. {_TRUST}"
        )
    return (
        f"Checkpoint {os.fspath(path)} cannot be loaded: {type(error).__name__}: {said}. Give a "
        "file that torch.save wrote."
    )


def _hash_file(path: Path, record_at: int) -> str:
    """Returns the SHA-256 of a file up to its comment, whose length is taken as 0."""
    digest = hashlib.sha256()
    buffer = memoryview(bytearray(min(record_at, _CHUNK_BYTES)))
    left = record_at
    with path.open("rb") as file:
        while left and (count := file.readinto(buffer[:left])):
            digest.update(buffer[:count])
            left -= count
        digest.update(file.read(END_RECORD_BYTES)[:-2] + b"\0\0")
    return digest.hexdigest()


@contextlib.contextmanager
def _removing(temporary: Path) -> Iterator[None]:
    """Removes a partial file after any failure; that it cannot be removed hides nothing."""
    try:
        yield
    except BaseException:
        with contextlib.suppress(OSError):
            temporary.unlink(missing_ok=True)
        raise


@contextlib.contextmanager
def explaining(path: Path, data: Any) -> Iterator[None]:
    """Turns what the operating system raises while `data` is saved into what a user can mend.

    Raises:
        CheckpointWriteError: Instead of an OSError.
    """
    try:
        yield
    except OSError as e:
        mend, room = _MENDS.get(e.errno or 0, "check the storage"), ""
        if e.errno in _FULL:
            free = free_bytes(path.parent)
            told = "an unknown number" if free is None else f"{free:,}"
            room = f" It needs about {tensor_bytes(data):,} bytes, and {told} are free there."
        raise CheckpointWriteError(
            f"Cannot save checkpoint {path}: {e.strerror or e}.{room} Earlier checkpoints are "
            f"intact: {mend}, or set another OUTPUT_DIR."
        ) from e
