"""The manifest that a checkpoint carries in its zip comment, and the verdict that it allows."""

import builtins
import hashlib
import json
import platform
import re
from dataclasses import asdict, dataclass, field
from pathlib import Path

import torch

import trainkit
from trainkit.utils.errors import CheckpointError

# A zip file closes with this record (APPNOTE.TXT 6.3.10, sec. 4.3.16): signature, 16 bytes about
# the central directory, length of the comment, and the comment.
END_SIGNATURE = b"PK\x05\x06"
END_LENGTH = 22

_MAX_COMMENT = 4096
_COMMENT = re.compile(rb"trainkit-manifest 1 ([0-9a-f]{64}) (\{.*\})", re.DOTALL)


class DamagedCheckpointError(CheckpointError):
    """A file that is not what was written."""


@dataclass(frozen=True)
class Manifest:
    """What a checkpoint says of itself.

    Attributes:
        bytes: Length of the file without its comment.
        sha256: Of these bytes, in hexadecimal, with the comment's length taken as 0.
        iteration: The last iteration that is in the checkpoint, or None.
        world_size: Number of processes that trained.
        saved_at_ns: Nanoseconds since the epoch.
        facts: Further plain values, such as which implementation of the optimizer ran.
        versions: Of trainkit, torch and Python.
        schema: Version of this format.
    """

    bytes: int
    sha256: str
    iteration: int | None
    world_size: int
    saved_at_ns: int
    facts: dict[str, str | int | float | bool] = field(default_factory=dict)
    versions: dict[str, str] = field(
        default_factory=lambda: {
            "trainkit": trainkit.__version__,
            "torch": torch.__version__,
            "python": platform.python_version(),
        }
    )
    schema: int = 1

    def to_comment(self) -> "builtins.bytes":
        """Returns the ASCII comment: a tag, the checksum of the JSON, and the JSON."""
        text = json.dumps(asdict(self), sort_keys=True).encode("ascii")
        comment = b"trainkit-manifest 1 %s %s" % (_sha256(text).encode("ascii"), text)
        if len(comment) > _MAX_COMMENT:
            raise CheckpointError(
                f"The manifest has {len(comment)} bytes, more than {_MAX_COMMENT}. Put less into "
                f"the checkpointer's facts, which are {self.facts!r}."
            )
        return comment


def read_manifest(path: Path) -> Manifest | None:
    """Reads the end of a file only.

    Returns:
        The manifest, or None for a file of another program or an older version, without one.

    Raises:
        DamagedCheckpointError: If the end shows that the file is not whole.
    """
    size = path.stat().st_size
    if size == 0:
        raise DamagedCheckpointError(f"{path} is empty.")
    with path.open("rb") as file:
        is_zip = file.read(2) == b"PK"
        file.seek(max(0, size - END_LENGTH - _MAX_COMMENT))
        end = file.read()
    position = end.rfind(END_SIGNATURE)
    if position < 0:
        if is_zip:
            raise DamagedCheckpointError(f"{path} is cut off: its closing record is missing.")
        return None
    record, comment = end[position : position + END_LENGTH], end[position + END_LENGTH :]
    if len(record) < END_LENGTH or int.from_bytes(record[-2:], "little") != len(comment):
        raise DamagedCheckpointError(
            f"{path} is cut off, or followed by bytes that are not its own."
        )
    return _parse(path, comment, size) if comment else None


def verify(path: Path) -> Manifest | None:
    """Reads a file in full and compares it with its manifest.

    Returns:
        The manifest, or None for a file without one, which cannot be verified.

    Raises:
        DamagedCheckpointError: If the file is not what was written.
    """
    manifest = read_manifest(path)
    if manifest is None:
        return None
    digest = hashlib.sha256()
    remaining = manifest.bytes - 2
    with path.open("rb") as file:
        while remaining and (chunk := file.read(min(remaining, 1 << 20))):
            digest.update(chunk)
            remaining -= len(chunk)
    digest.update(b"\0\0")
    if digest.hexdigest() != manifest.sha256:
        raise DamagedCheckpointError(f"{path} is damaged: its SHA-256 is not that of its manifest.")
    return manifest


def _parse(path: Path, comment: bytes, size: int) -> Manifest:
    match = _COMMENT.fullmatch(comment)
    if match is None or _sha256(match[2]) != match[1].decode("ascii"):
        raise DamagedCheckpointError(f"{path} is damaged: its manifest is not what was written.")
    manifest = Manifest(**json.loads(match[2]))
    if manifest.bytes + len(comment) != size:
        raise DamagedCheckpointError(
            f"{path} has {size} bytes, but {manifest.bytes + len(comment)} were written."
        )
    return manifest


def _sha256(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()
