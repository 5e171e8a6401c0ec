"""Files that verify themselves: `torch.save`'s format, closed with a manifest (see `manifest`).

A file is written under a temporary name, hashed while it streams, synced, and only then given its
name, so a name never stands for half a checkpoint. Reading never runs code.
"""

import contextlib
import hashlib
import os
import pickle
import platform
import shutil
import struct
import time
import zipfile
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, Literal, cast

import torch

from trainkit import __version__
from trainkit.checkpoint.hashing_writer import HashingWriter
from trainkit.checkpoint.manifest import (
    END_RECORD_BYTES,
    SCHEMA,
    DamagedError,
    Fact,
    Manifest,
    read_end,
    to_comment,
)
from trainkit.checkpoint.storable import check_storable, tensor_bytes
from trainkit.utils.errors import CheckpointError
from trainkit.utils.file_io import publish

_CHUNK_BYTES = 1 << 20
_MAX_TEXT = 200
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
        CheckpointError: If `data` holds what could not be loaded again, or the storage fails. No
            partial file is left then, and nothing else in the folder has changed.
    """
    check_storable(data)
    path = Path(path)
    temporary = temporary_path(path)
    with _explaining(path, data), _removing(temporary):
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
        if end.manifest is None:
            zipfile.ZipFile(path).close()
            return Verdict("unverified")
        if _hash_file(Path(path), end.record_at) != end.manifest.sha256:
            return Verdict("damaged", "its bytes are not those that were written (SHA-256 differs)")
        return Verdict("verified", manifest=end.manifest)
    except DamagedError as e:
        return Verdict("damaged", str(e))
    except (zipfile.BadZipFile, NotImplementedError, ValueError, struct.error) as e:
        return Verdict("damaged", f"its zip archive is damaged: {e}")
    except OSError as e:
        return Verdict("damaged", f"it cannot be read: {e.strerror or e}")


def load_checkpoint(path: str | os.PathLike[str]) -> Any:
    """Verifies a checkpoint and loads it, on the CPU and without running code.

    Raises:
        CheckpointError: If the file is damaged, or holds more than tensors and plain values.
    """
    verdict = verify(path)
    if verdict.state == "damaged":
        raise CheckpointError(f"Checkpoint {os.fspath(path)} is damaged: {verdict.reason}.")
    try:
        return torch.load(path, map_location="cpu", weights_only=True)
    except Exception as e:
        # A pickle can fail in any way at all.
        raise CheckpointError(_explain_load(path, e)) from e


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
            f"Checkpoint {os.fspath(path)} holds more than tensors and plain values. It was "
            f"refused and nothing in it was run. torch says: {said}"
        )
    return f"Checkpoint {os.fspath(path)} cannot be loaded: {type(error).__name__}: {said}"


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
def _explaining(path: Path, data: Any) -> Iterator[None]:
    try:
        yield
    except OSError as e:
        raise CheckpointError(
            f"Cannot save checkpoint {path}: {e.strerror or e}. It needs about "
            f"{tensor_bytes(data):,} bytes, and {_free_bytes(path.parent)} are free there. Earlier "
            "checkpoints are intact: make room or set another OUTPUT_DIR."
        ) from e


def _free_bytes(folder: Path) -> str:
    try:
        return f"{shutil.disk_usage(folder).free:,}"
    except OSError:
        return "an unknown number"
