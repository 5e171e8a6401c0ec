"""A manifest is read from the end of a file, and only a sound one."""

import hashlib
import json
from pathlib import Path
from typing import Any

import pytest
import torch

from trainkit.checkpoint.format import write_checkpoint
from trainkit.checkpoint.manifest import (
    MAX_JSON_BYTES,
    DamagedError,
    FileEnd,
    Manifest,
    read_end,
    read_manifest,
    to_comment,
)
from trainkit.utils.errors import CheckpointError

MANIFEST = Manifest(1, 7, 2, {"torch": "x"}, 5, 22, "0" * 64, {"optimizer": "fused"})


def write_bare(path: Path, comment: bytes, length: int | None = None) -> None:
    """Writes an empty zip archive with a comment."""
    length = len(comment) if length is None else length
    path.write_bytes(b"PK\x05\x06" + bytes(16) + length.to_bytes(2, "little") + comment)


def comment_of(entries: Any) -> bytes:
    text = json.dumps(entries).encode()
    return b"trainkit-manifest 1 " + hashlib.sha256(text).hexdigest().encode() + b" " + text


def test_a_comment_is_read_as_it_was_written(tmp_path: Path) -> None:
    write_bare(tmp_path / "a.pth", to_comment(MANIFEST))
    assert read_end(tmp_path / "a.pth") == FileEnd(MANIFEST, 0)


def test_a_comment_is_ascii_and_carries_its_checksum() -> None:
    manifest = Manifest(1, 7, 2, {}, 5, 22, "0" * 64, {"n\u00f6te": "\x00PK\x05\x06"})
    comment = to_comment(manifest).decode("ascii")
    tag, version, digest, text = comment.split(" ", 3)
    assert (tag, version) == ("trainkit-manifest", "1")
    assert hashlib.sha256(text.encode()).hexdigest() == digest
    assert json.loads(text)["facts"] == manifest.facts
    assert comment.isprintable()


def test_facts_that_are_too_long_are_refused() -> None:
    manifest = Manifest(1, 7, 2, {}, 5, 22, "0" * 64, {"note": "x" * MAX_JSON_BYTES})
    with pytest.raises(CheckpointError, match=r"may have 4096.*\['note'\]"):
        to_comment(manifest)


@pytest.mark.parametrize("value", [float("nan"), object()])
def test_facts_that_are_no_plain_values_are_refused(value: Any) -> None:
    with pytest.raises(CheckpointError, match="finite number or a bool"):
        to_comment(Manifest(1, 7, 2, {}, 5, 22, "0" * 64, {"x": value}))


@pytest.mark.parametrize(
    ("entries", "reason"),
    [
        ({}, "other entries"),
        ({"schema": 0}, "other entries"),
        ({**MANIFEST.__dict__, "schema": 0}, "wrong type"),
        ({**MANIFEST.__dict__, "schema": 2, "more": 1}, "schema 2, so a later .* Update trainkit"),
        ({"schema": 1, "surprise": 1}, "other entries"),
        ({**MANIFEST.__dict__, "saved_at_ns": "late"}, "wrong type"),
        ({**MANIFEST.__dict__, "saved_at_ns": 2**63}, "wrong type"),
        ({**MANIFEST.__dict__, "iteration": [1]}, "wrong type"),
        ({**MANIFEST.__dict__, "versions": []}, "wrong type"),
        ({**MANIFEST.__dict__, "facts": {"optimizer": ["fused"]}}, "wrong type"),
        ({**MANIFEST.__dict__, "facts": 3}, "wrong type"),
        ({**MANIFEST.__dict__, "bytes": 23}, "22 bytes before its comment and was written with 23"),
    ],
)
def test_f23_a_manifest_by_another_hand_is_refused(
    tmp_path: Path, entries: Any, reason: str
) -> None:
    write_bare(tmp_path / "a.pth", comment_of(entries))
    with pytest.raises(DamagedError, match=reason):
        read_end(tmp_path / "a.pth")
    assert read_manifest(tmp_path / "a.pth") is None


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (b"", "it is empty"),
        (b"PK\x03\x04 and no more", "its end is missing"),
        (b"weights of mine", "no torch checkpoint"),
        (b"PK\x05\x06 cut", "no torch checkpoint"),
        (b"\x80\x02}q\x00.", "it is a bare pickle"),
        (b"\x80\x04PK\x05\x06" + bytes(30), "it is a bare pickle"),
    ],
)
def test_other_files_are_told_apart(tmp_path: Path, content: bytes, reason: str) -> None:
    (tmp_path / "a.pth").write_bytes(content)
    with pytest.raises(DamagedError, match=reason):
        read_end(tmp_path / "a.pth")


def test_a_foreign_comment_is_damage(tmp_path: Path) -> None:
    write_bare(tmp_path / "a.pth", b"packed by hand")
    with pytest.raises(DamagedError, match="not a manifest"):
        read_end(tmp_path / "a.pth")


def test_a_wrong_length_of_the_comment_is_damage(tmp_path: Path) -> None:
    write_bare(tmp_path / "a.pth", to_comment(MANIFEST), length=0)
    with pytest.raises(DamagedError, match="bytes follow its end record, where 0 should"):
        read_end(tmp_path / "a.pth")


def test_reading_a_manifest_does_not_read_the_data(tmp_path: Path) -> None:
    path = tmp_path / "a.pth"
    written = write_checkpoint({"x": torch.zeros(100_000)}, path, iteration=3)
    content = path.read_bytes()
    path.write_bytes(bytes(200_000) + content[200_000:])
    assert read_manifest(path) == written


def test_a_missing_file_has_no_manifest(tmp_path: Path) -> None:
    assert read_manifest(tmp_path / "none.pth") is None
