"""The order in which a folder's checkpoints are trusted, which no other file can upset."""

import logging
import os
from pathlib import Path

import pytest
import torch

from trainkit.checkpoint.folder import (
    FINISHED,
    POINTER,
    describe_missing,
    newest_first,
    newest_time_ns,
    read_finished,
    remove_stale,
    signature,
)
from trainkit.checkpoint.format import write_checkpoint


def write_old(path: Path, changed_at: int) -> None:
    """Writes a file without a manifest."""
    torch.save({}, path)
    os.utime(path, (changed_at, changed_at))


def names(folder: Path) -> list[str]:
    return [path.name for path in newest_first(folder)]


def test_manifests_rank_by_their_time_whatever_the_files_say(tmp_path: Path) -> None:
    for name in ("c", "a", "b"):
        write_checkpoint({}, tmp_path / f"{name}.pth")
    os.utime(tmp_path / "c.pth", (2**33, 2**33))
    assert names(tmp_path) == ["b.pth", "a.pth", "c.pth"]


def test_files_without_manifest_come_last_and_the_pointer_leads_among_them(tmp_path: Path) -> None:
    write_checkpoint({}, tmp_path / "new.pth")
    for changed_at, name in enumerate(("a", "b", "c")):
        write_old(tmp_path / f"{name}.pth", 2**33 + changed_at)
    (tmp_path / POINTER).write_text("b.pth\n")
    assert names(tmp_path) == ["new.pth", "b.pth", "c.pth", "a.pth"]


def test_f06_a_file_damaged_at_its_end_keeps_its_place_by_its_age(tmp_path: Path) -> None:
    write_checkpoint({}, tmp_path / "a.pth")
    write_old(tmp_path / "old.pth", 100)
    (tmp_path / "cut.pth").write_bytes(b"PK\x03\x04")
    assert names(tmp_path) == ["cut.pth", "a.pth", "old.pth"]
    os.utime(tmp_path / "cut.pth", (100, 100))
    assert names(tmp_path) == ["a.pth", "cut.pth", "old.pth"]


@pytest.mark.parametrize(
    "pointer",
    [
        *(b"", b"\xff\xfe\0", b"../outside.pth", b"/etc/passwd", b"gone.pth", b"x" * 100_000, b"."),
        *(b"model_9999999.pth", b"b.pth\0", b"run/b.pth", b"*"),
    ],
)
def test_f07_a_pointer_to_nowhere_changes_nothing(tmp_path: Path, pointer: bytes) -> None:
    folder = tmp_path / "run"
    folder.mkdir()
    write_old(tmp_path / "outside.pth", 2**33)
    for changed_at, name in enumerate(("a", "b")):
        write_old(folder / f"{name}.pth", changed_at)
    (folder / POINTER).write_bytes(pointer)
    assert newest_first(folder) == [folder / "b.pth", folder / "a.pth"]


def test_f07_a_pointer_that_is_a_folder_changes_nothing(tmp_path: Path) -> None:
    write_old(tmp_path / "a.pth", 0)
    (tmp_path / POINTER).mkdir()
    assert names(tmp_path) == ["a.pth"]


def test_what_is_not_published_is_not_listed(tmp_path: Path) -> None:
    write_checkpoint({}, tmp_path / "a.pth")
    (tmp_path / ".b.pth.tmp").write_bytes(b"x")
    (tmp_path / "folder.pth").mkdir()
    (tmp_path / "dangling.pth").symlink_to(tmp_path / "none")
    (tmp_path / "notes.txt").write_text("x")
    assert names(tmp_path) == ["a.pth"]
    assert newest_first(tmp_path / "none") == []


def test_the_newest_time_is_that_of_any_manifest(tmp_path: Path) -> None:
    assert newest_time_ns(tmp_path) == 0
    write_old(tmp_path / "old.pth", 2**33)
    assert newest_time_ns(tmp_path) == 0
    write_checkpoint({}, tmp_path / "a.pth", after_ns=2**62)
    write_checkpoint({}, tmp_path / "b.pth")
    assert newest_time_ns(tmp_path) == 2**62 + 1


def test_only_partial_files_are_stale(tmp_path: Path) -> None:
    for name in (".a.pth.tmp", ".b.pth.tmp", "a.pth", "notes.tmp"):
        (tmp_path / name).write_bytes(b"x")
    remove_stale(tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.pth", "notes.tmp"]


def test_a_signature_changes_with_the_file(tmp_path: Path) -> None:
    path = tmp_path / "a.pth"
    write_checkpoint({}, path)
    before = signature(path)
    assert signature(path) == before
    os.utime(path, (1, 1))
    assert signature(path) != before


def test_a_run_without_marker_is_not_finished(tmp_path: Path) -> None:
    assert read_finished(tmp_path) is None
    (tmp_path / FINISHED).write_text('{"iteration": 119}')
    assert read_finished(tmp_path) == 119


@pytest.mark.parametrize(
    "content",
    [
        *(b"", b"{", b"\xff", b"[]", b"{}", b'{"iteration": "9"}', b'{"iteration": true}'),
        *(b'{"iteration": ' + b"9" * 5000 + b"}", b'{"iteration": ' + b"[" * 100_000),
        *(b'{"iteration": 9' + b" " * 5000 + b"}", b'{"iteration": NaN}', b'{"iteration": 2.0}'),
    ],
)
def test_f05_a_garbage_marker_is_a_warning(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, content: bytes
) -> None:
    (tmp_path / FINISHED).write_bytes(content)
    with caplog.at_level(logging.WARNING):
        assert read_finished(tmp_path) is None
    assert "taking the run for unfinished" in caplog.text


def test_a_missing_file_is_named_with_the_nearest(tmp_path: Path) -> None:
    write_old(tmp_path / "model_final.pth", 0)
    text = describe_missing(str(tmp_path / "model_fnal.pth"))
    assert text.endswith(f"Did you mean {str(tmp_path / 'model_final.pth')!r}?")
    assert "holds model_final.pth." in describe_missing(str(tmp_path / "zzz"))
    assert "there is no folder" in describe_missing(str(tmp_path / "none" / "a.pth"))
    assert "is a folder. Name a file in it: model_final.pth." in describe_missing(str(tmp_path))
