"""Checkpoints of somebody who means ill and can compute a SHA-256."""

import hashlib
import io
import json
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from trainkit.checkpoint.manifest import END_RECORD_BYTES, read_end

MANIFEST: dict[str, Any] = {
    "schema": 1,
    "iteration": 7,
    "world_size": 1,
    "versions": {"torch": "2.6.0"},
    "saved_at_ns": 2**61,
    "facts": {},
}


def seal(archive: bytes, manifest: Any = None) -> bytes:
    """Closes a zip archive that has no comment with a manifest whose checksums are right.

    Args:
        archive: As `torch.save` writes it, or not.
        manifest: Entries to add or change; what is no mapping stands for the whole manifest.
    """
    entries = manifest
    if manifest is None or isinstance(manifest, Mapping):
        digest = hashlib.sha256(archive).hexdigest()
        entries = {**MANIFEST, "bytes": len(archive), "sha256": digest, **(manifest or {})}
    return archive[:-2] + with_length(comment_of(json.dumps(entries).encode()))


def comment_of(text: bytes) -> bytes:
    """The comment that holds a manifest's JSON, or what stands in its place."""
    return b"trainkit-manifest 1 " + hashlib.sha256(text).hexdigest().encode() + b" " + text


def with_length(comment: bytes) -> bytes:
    return (len(comment) & 0xFFFF).to_bytes(2, "little") + comment


def unsealed(path: Path) -> bytes:
    """The archive in a checkpoint, as `torch.save` wrote it."""
    record_at = read_end(path).record_at
    assert record_at is not None
    return path.read_bytes()[: record_at + END_RECORD_BYTES - 2] + b"\0\0"


def records_of(archive: bytes) -> dict[str, bytes]:
    """What a zip archive holds, by name."""
    with zipfile.ZipFile(io.BytesIO(archive)) as opened:
        return {name: opened.read(name) for name in opened.namelist()}


def archive_of(records: Mapping[str, bytes], compression: int = zipfile.ZIP_STORED) -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", compression) as archive:
        for name, content in records.items():
            archive.writestr(name, content)
    return buffer.getvalue()
