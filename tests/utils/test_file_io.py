import errno
import os
from collections.abc import Iterator
from pathlib import Path
from urllib.error import HTTPError

import pytest

from tests.web import Web, serving
from trainkit.utils.errors import ConfigError
from trainkit.utils.file_io import (
    PathHandler,
    PathManager,
    leads_out,
    publish,
    sync_folder,
    write_atomically,
)


@pytest.fixture
def web(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Web]:
    with serving(tmp_path / "web", monkeypatch) as served:
        (served.folder / "x.pth").write_text("weights")
        yield served


def test_path_manager_reads_local_files(tmp_path: Path) -> None:
    (tmp_path / "x.txt").write_text("grün", encoding="utf-8")
    with PathManager.open(str(tmp_path / "x.txt"), encoding="utf-8") as file:
        assert file.read() == "grün"


def test_d49_a_file_from_the_web_is_fetched_once_by_its_hash_and_anew_when_forced(
    web: Web, tmp_path: Path
) -> None:
    address = web.with_hash("x.pth")
    url, _, digest = address.partition("#sha256=")
    local = PathManager.get_local_path(address)
    assert Path(local) == tmp_path / "cache" / f"{digest}.pth"
    assert Path(local).read_text() == "weights"
    with PathManager.open(f"{url}#sha256={digest.upper()}") as file:
        assert file.read() == "weights"
    assert web.requests == ["/x.pth"]
    PathManager.get_local_path(address, force=True)
    assert web.requests == ["/x.pth", "/x.pth"]


@pytest.mark.parametrize(
    "fragment", ["", "#sha256=", "#sha256=abc", f"#sha256={'g' * 64}", f"#md5={'0' * 64}", "#x"]
)
def test_f23_without_a_hash_nothing_is_fetched(web: Web, fragment: str) -> None:
    with pytest.raises(
        ConfigError, match=r"x\.pth.* is on the web.*Append #sha256= and its SHA-256"
    ):
        PathManager.get_local_path(f"{web.address}/x.pth{fragment}")
    assert web.requests == []


@pytest.mark.parametrize("scheme", ["http", "https", "ftp"])
def test_every_address_on_the_web_needs_a_hash(scheme: str) -> None:
    with pytest.raises(ConfigError, match="Append #sha256="):
        PathManager.open(f"{scheme}://127.0.0.1:9/x.yaml")


def test_another_hash_names_both_and_leaves_no_file(web: Web, tmp_path: Path) -> None:
    found = web.with_hash("x.pth")[-64:]
    expected = "0" * 64
    with pytest.raises(ConfigError, match=f"has the SHA-256 {found}, but {expected} is expected"):
        PathManager.get_local_path(f"{web.address}/x.pth#sha256={expected}")
    assert not list((tmp_path / "cache").glob("*.pth"))


def test_a_cached_file_that_has_changed_is_fetched_once_more(web: Web, tmp_path: Path) -> None:
    address = web.with_hash("x.pth")
    local = Path(PathManager.get_local_path(address))
    local.write_text("changed")
    assert Path(PathManager.get_local_path(address)).read_text() == "weights"
    assert len(web.requests) == 2
    # And one that changed on the web is asked for once more too, but not taken.
    local.write_text("changed")
    (web.folder / "x.pth").write_text("newer weights")
    with pytest.raises(ConfigError, match="Check the address"):
        PathManager.get_local_path(address)
    assert len(web.requests) == 3
    assert not local.exists()


def test_d49_files_of_one_name_do_not_replace_each_other(web: Web) -> None:
    old = web.with_hash("x.pth")
    local = PathManager.get_local_path(old)
    (web.folder / "x.pth").write_text("other weights")
    assert Path(PathManager.get_local_path(web.with_hash("x.pth"))).read_text() == "other weights"
    assert Path(local).read_text() == "weights"
    assert PathManager.get_local_path(old) == local


@pytest.mark.parametrize("path", ["../../../x.pth", "%2e%2e/x.pth", "a/..%2f..%2fx.pth", ".."])
def test_f23_an_address_cannot_lead_out_of_the_cache(web: Web, tmp_path: Path, path: str) -> None:
    before = {p for p in tmp_path.rglob("*") if "cache" not in p.parts}
    with pytest.raises((HTTPError, ConfigError)):
        PathManager.get_local_path(f"{web.address}/{path}#sha256={'0' * 64}")
    assert {p for p in tmp_path.rglob("*") if "cache" not in p.parts} == before
    assert not [p for p in (tmp_path / "cache").iterdir() if p.suffix != ".lock"]


def test_d49_rm_and_mkdirs_follow_set_cwd(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "here").mkdir()
    (tmp_path / "there").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    PathManager.set_cwd(str(tmp_path / "there"))
    try:
        PathManager.mkdirs("a/b")
        with PathManager.open("a/b/x.txt", "w") as file:
            file.write("x")
        assert (tmp_path / "there/a/b/x.txt").read_text() == "x"
        PathManager.rm("a/b/x.txt")
        assert PathManager.ls("a/b") == []
    finally:
        PathManager.set_cwd(None)
    assert list((tmp_path / "here").iterdir()) == []


def test_a_handler_of_ones_own_serves_its_prefix(tmp_path: Path) -> None:
    (tmp_path / "x.txt").write_text("x")

    class Handler(PathHandler):  # type: ignore[misc]  # iopath has no types
        def _get_supported_prefixes(self) -> list[str]:
            return ["store://"]

        def _get_local_path(self, path: str, force: bool = False, **kwargs: object) -> str:
            return str(tmp_path / path.removeprefix("store://"))

    PathManager.register_handler(Handler())
    try:
        assert Path(PathManager.get_local_path("store://x.txt")).read_text() == "x"
    finally:
        del PathManager._path_handlers["store://"]


def test_a_link_is_told_from_what_lies_in_its_folder(tmp_path: Path) -> None:
    run = tmp_path / "run"
    run.mkdir()
    (tmp_path / "outside").write_text("x")
    (run / "inside").write_text("x")
    for name, target in (
        ("to_inside", run / "inside"),
        ("to_nowhere_inside", "none"),
        ("to_outside", "../outside"),
        ("to_nowhere_outside", "/none"),
        ("to_itself", "to_itself"),
        ("to_outside_by_another", "to_outside"),
    ):
        (run / name).symlink_to(target)
    out = sorted(path.name for path in run.iterdir() if leads_out(path))
    assert out == ["to_nowhere_outside", "to_outside", "to_outside_by_another"]
    # A folder may itself be a link.
    (tmp_path / "link").symlink_to(run)
    assert not leads_out(tmp_path / "link" / "to_inside")
    assert not leads_out(tmp_path / "none")


def test_f23_write_atomically_follows_no_link(tmp_path: Path) -> None:
    (tmp_path / "victim").write_text("mine")
    for name in ("a.json", "a.json.tmp"):
        (tmp_path / name).symlink_to(tmp_path / "victim")
    write_atomically(tmp_path / "a.json", "new")
    assert (tmp_path / "victim").read_text() == "mine"
    assert (tmp_path / "a.json").read_text() == "new"
    assert not (tmp_path / "a.json").is_symlink()


def test_d49_write_atomically_replaces_a_file_and_leaves_nothing_else(tmp_path: Path) -> None:
    path = tmp_path / "config.yaml"
    path.write_text("old, and much longer", encoding="utf-8")
    write_atomically(path, "ü")
    assert path.read_bytes() == "ü".encode()
    assert list(tmp_path.iterdir()) == [path]


def test_a_failed_sync_leaves_the_old_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "config.yaml"
    path.write_text("old", encoding="utf-8")

    def fail(descriptor: int) -> None:
        raise OSError(errno.EIO, "Input/output error")

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
