"""Checkpoints that will not fit are told about once, with numbers, while there is time."""

import logging
import shutil
from pathlib import Path
from types import SimpleNamespace

import pytest

from trainkit.checkpoint.space import SpaceWatch, free_bytes


@pytest.fixture
def disk(monkeypatch: pytest.MonkeyPatch) -> SimpleNamespace:
    usage = SimpleNamespace(free=10**9)
    monkeypatch.setattr(shutil, "disk_usage", lambda folder: usage)
    return usage


def write(folder: Path, *names: str, num_bytes: int = 100) -> None:
    for name in names:
        (folder / f"{name}.pth").write_bytes(bytes(num_bytes))


def test_free_bytes_are_those_of_the_folder_that_is_there(tmp_path: Path) -> None:
    free = free_bytes(tmp_path / "to" / "be" / "made")
    assert free is not None
    assert abs(free - shutil.disk_usage(tmp_path).free) < 10**9


def test_free_bytes_may_be_unknown(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def failing(folder: Path) -> None:
        raise PermissionError

    monkeypatch.setattr(shutil, "disk_usage", failing)
    assert free_bytes(tmp_path) is None
    SpaceWatch(tmp_path, "model", 100).check_run(10**12)


def test_a_run_that_fits_is_not_warned(
    tmp_path: Path, disk: SimpleNamespace, caplog: pytest.LogCaptureFixture
) -> None:
    disk.free = 400
    SpaceWatch(tmp_path / "new", "model", 100).check_run(4)
    # What is there already will not be needed again.
    write(tmp_path, "model_0000001", "model_best", "model_final", "model_start", "other")
    SpaceWatch(tmp_path, "model", 100).check_run(7)
    assert caplog.text == ""
    SpaceWatch(tmp_path, "model", 100).check_run(8)
    assert "need 500 more bytes" in caplog.text


def test_a_run_that_will_not_fit_is_told_the_bytes(
    tmp_path: Path, disk: SimpleNamespace, caplog: pytest.LogCaptureFixture
) -> None:
    disk.free = 4_999
    write(tmp_path, "model_0000001", num_bytes=1_000)
    SpaceWatch(tmp_path, "model", 1_000).check_run(6)
    assert caplog.messages == [
        "The 6 checkpoints that this run may hold at once, of about 1,000 bytes each, need 5,000 "
        f"more bytes in {tmp_path}, where 4,999 are free. Make room, lower CHECKPOINT.MAX_TO_KEEP "
        "or set another OUTPUT_DIR before a save fails."
    ]


@pytest.mark.parametrize(
    ("max_to_keep", "needed"),
    [(None, 200), (4, 200), (3, 100), (2, 0)],
    ids=["all stay", "none goes yet", "one goes", "two go"],
)
def test_what_retention_will_delete_counts_as_room(
    tmp_path: Path,
    disk: SimpleNamespace,
    caplog: pytest.LogCaptureFixture,
    max_to_keep: int | None,
    needed: int,
) -> None:
    write(tmp_path, "model_0000001", "model_0000002", "model_0000003", "model_best", "a_0000001")
    watch = SpaceWatch(tmp_path, "model", 100)
    disk.free = needed
    watch.check_save(max_to_keep)
    assert caplog.messages == []
    disk.free = needed - 1
    watch.check_save(max_to_keep)
    (message,) = caplog.messages
    assert f"and the next one, of about 100 bytes each, need {needed} more bytes" in message


def test_a_warning_is_repeated_only_when_it_got_worse(
    tmp_path: Path, disk: SimpleNamespace, caplog: pytest.LogCaptureFixture
) -> None:
    watch = SpaceWatch(tmp_path, "model", 100)
    counts = []
    for free in (200, 199, 150, 101, 100, 99, 50, 199, 200, 1000, 180, 150):
        disk.free = free
        watch.check_save(None)
        counts.append(len(caplog.messages))
    # One too few, then two, and again after there was room for both.
    assert counts == [0, 1, 1, 1, 1, 2, 2, 2, 2, 2, 3, 3]
    assert all(record.levelno == logging.WARNING for record in caplog.records)
