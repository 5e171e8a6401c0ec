"""The manifest: what a checkpoint says about itself, in the zip comment at its end.

`torch.save` writes a zip archive, which ends with a record of 22 bytes whose last two give the
length of a comment (PKWARE's APPNOTE.TXT, 4.3.16). trainkit fills that comment with ASCII text:

    trainkit-manifest 1 <sha256 of the JSON> <JSON>

Readers of zip archives skip comments, so plain `torch.load` reads such a file as before.
"""

import hashlib
import json
import os
import re
import struct
from dataclasses import asdict, dataclass
from pathlib import Path

from trainkit.utils.errors import CheckpointError

Fact = str | int | float | bool

SCHEMA = 1
END_RECORD_BYTES = 22
MAX_JSON_BYTES = 4096
BARE_PICKLE = "it is a bare pickle, which could run code"

_INT64 = range(-(2**63), 2**63)
_MAX_COMMENT_BYTES = 65_535
_COMMENT = re.compile(r"trainkit-manifest 1 ([0-9a-f]{64}) (\{.*\})")
_ZIP_START, _ZIP_END = b"PK\x03\x04", b"PK\x05\x06"
# Before its zip format, torch.save began with its magic number, pickled by protocol 2.
_LEGACY_START = b"\x80\x02\x8a\nl\xfc\x9cF\xf9 j\xa8P\x19."
# Of protocol 2, which detectron2's model zoo has, and later ones.
_PICKLE_START = b"\x80"


class DamagedError(Exception):
    """A file that is not, or no longer, what it was written as; its text is the reason."""


@dataclass(frozen=True)
class Manifest:
    """What a checkpoint says about itself.

    Args:
        schema: Number of this list of entries.
        iteration: 0-based iteration that the checkpoint completes, or None if it was not told.
        world_size: Number of processes that trained.
        versions: Version of "trainkit", "torch" and "python" that wrote it.
        saved_at_ns: Nanoseconds since 1970; later saves into one folder have larger ones.
        bytes: Length of the file without the comment.
        sha256: Of these bytes in hexadecimal, the comment's length taken as 0.
        facts: What the caller added, such as the optimizer's implementation.
    """

    schema: int
    iteration: int | None
    world_size: int
    versions: dict[str, str]
    saved_at_ns: int
    bytes: int
    sha256: str
    facts: dict[str, Fact]


@dataclass(frozen=True)
class FileEnd:
    """How a checkpoint ends: all that is known of it without reading its data.

    Args:
        manifest: None in a file of an earlier format, which cannot be verified.
        record_at: Offset of the zip's end record; None in a file from before torch's zip format.
    """

    manifest: Manifest | None
    record_at: int | None


def to_comment(manifest: Manifest) -> bytes:
    """Returns the zip comment.

    Raises:
        CheckpointError: If the facts make it longer than 4 KB, or are not plain values.
    """
    try:
        text = json.dumps(asdict(manifest), allow_nan=False).encode("ascii")
        _from_json(text.decode("ascii"))
    except (TypeError, ValueError, DamagedError) as e:
        raise CheckpointError(
            f"The facts {manifest.facts!r} cannot be written as JSON ({e}). Give each as a string, "
            "a finite number or a bool."
        ) from None
    if len(text) > MAX_JSON_BYTES:
        raise CheckpointError(
            f"The manifest has {len(text)} bytes of JSON and may have {MAX_JSON_BYTES}. Give fewer "
            f"or shorter facts than {sorted(manifest.facts)}."
        )
    return f"trainkit-manifest 1 {hashlib.sha256(text).hexdigest()} ".encode("ascii") + text


def read_end(path: str | os.PathLike[str]) -> FileEnd:
    """Reads the first and the last bytes of a checkpoint, at most 64 KiB.

    Raises:
        DamagedError: If they show that the file is empty, truncated, followed by surplus bytes, or
            no checkpoint at all, or if its comment is not a sound manifest.
    """
    with Path(path).open("rb") as file:
        size = file.seek(0, os.SEEK_END)
        file.seek(0)
        start = file.read(len(_LEGACY_START))
        tail_at = file.seek(max(0, size - END_RECORD_BYTES - _MAX_COMMENT_BYTES))
        tail = file.read()
    if size == 0:
        raise DamagedError("it is empty")
    if start == _LEGACY_START:
        return FileEnd(None, None)
    if start.startswith(_PICKLE_START):
        raise DamagedError(BARE_PICKLE)
    at = tail.rfind(_ZIP_END)
    if at < 0 or len(tail) - at < END_RECORD_BYTES:
        is_cut = start.startswith(_ZIP_START)
        raise DamagedError("its end is missing" if is_cut else "it is no torch checkpoint")
    comment = tail[at + END_RECORD_BYTES :]
    (length,) = struct.unpack_from("<H", tail, at + END_RECORD_BYTES - 2)
    if length != len(comment):
        raise DamagedError(f"{len(comment)} bytes follow its end record, where {length} should")
    if comment:
        return FileEnd(_parse(comment, tail_at + at), tail_at + at)
    if not start.startswith(_ZIP_START):
        raise DamagedError("it does not begin like a checkpoint")
    return FileEnd(None, tail_at + at)


def read_manifest(path: str | os.PathLike[str]) -> Manifest | None:
    """Returns the manifest of a checkpoint without reading its data.

    Returns:
        None if the file is of an earlier format, damaged at its end, or unreadable.
    """
    try:
        return read_end(path).manifest
    except (DamagedError, OSError):
        return None


def _parse(comment: bytes, record_at: int) -> Manifest:
    match = _COMMENT.fullmatch(comment.decode("latin-1"))
    if not match:
        raise DamagedError("its zip comment is not a manifest of trainkit's")
    digest, text = match.groups()
    if hashlib.sha256(text.encode("latin-1")).hexdigest() != digest:
        raise DamagedError("its manifest is damaged")
    manifest = _from_json(text)
    if manifest.bytes != record_at + END_RECORD_BYTES:
        raise DamagedError(
            f"it has {record_at + END_RECORD_BYTES} bytes before its comment and was written with "
            f"{manifest.bytes}"
        )
    return manifest


def _from_json(text: str) -> Manifest:
    """Checks types too: the file may have been made by somebody who can compute a SHA-256."""
    try:
        entries = json.loads(text)
        schema = entries["schema"]
        if schema in range(SCHEMA + 1, 1000):
            raise DamagedError(
                f"its manifest has schema {schema}, so a later trainkit wrote it, and this one, "
                f"which reads schema {SCHEMA}, cannot tell whether it is sound. Update trainkit"
            )
        manifest = Manifest(**entries)
    except (KeyError, TypeError, ValueError, RecursionError):
        raise DamagedError("its manifest has other entries than it should") from None
    if not _has_types(manifest):
        raise DamagedError("its manifest has entries of a wrong type")
    return manifest


def _has_types(m: Manifest) -> bool:
    numbers = (m.world_size, m.saved_at_ns, m.bytes, 0 if m.iteration is None else m.iteration)
    return (
        m.schema == SCHEMA
        and all(isinstance(n, int) and n in _INT64 for n in numbers)
        and (isinstance(m.versions, dict) and isinstance(m.facts, dict))
        and all(isinstance(value, Fact) for value in m.facts.values())
    )
