import os
from pathlib import Path

import pytest

from trainkit.utils.file_io import PathManager, publish, sync_folder, write_atomically


def test_path_manager_reads_local_files(tmp_path: Path) -> None:
    (tmp_path / "x.txt").write_text("grün", encoding="utf-8")
    with PathManager.open(str(tmp_path / "x.txt"), encoding="utf-8") as file:
        assert file.read() == "grün"


def test_path_manager_knows_web_addresses() -> None:
    handler = PathManager._PathManager__get_path_handler("https://example.com/x.pth")
    assert type(handler).__name__ == "HTTPURLHandler"


def test_write_atomically_replaces_a_file_and_leaves_nothing_else(tmp_path: Path) -> None:
    path = tmp_path / "config.yaml"
    path.write_text("old, and much longer", encoding="utf-8")
    write_atomically(path, "ü")
    assert path.read_bytes() == "ü".encode()
    assert list(tmp_path.iterdir()) == [path]


def test_a_failed_sync_leaves_the_old_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "config.yaml"
    path.write_text("old", encoding="utf-8")

    def fail(descriptor: int) -> None:
        raise OSError(5, "Input/output error")

    monkeypatch.setattr(os, "fsync", fail)
    with pytest.raises(OSError, match="Input/output error"):
        write_atomically(path, "new")
    assert path.read_text(encoding="utf-8") == "old"


def test_publish_renames_before_it_syncs_the_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "x.tmp").write_text("new", encoding="utf-8")
    there_at_sync = []
    monkeypatch.setattr(os, "fsync", lambda _: there_at_sync.append((tmp_path / "x").exists()))
    publish(tmp_path / "x.tmp", tmp_path / "x")
    assert there_at_sync == [True]
    assert not (tmp_path / "x.tmp").exists()


def test_sync_folder_closes_what_it_opened(tmp_path: Path) -> None:
    free = os.dup(0)
    os.close(free)
    sync_folder(tmp_path)
    assert os.dup(0) == free
    os.close(free)


def test_sync_folder_refuses_a_folder_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="gone"):
        sync_folder(tmp_path / "gone")
