"""An archive that would grow when it is read, or reads differently to two readers, is refused."""

import io
import struct
import zipfile
from pathlib import Path
from typing import Any

import pytest
import torch

from trainkit.checkpoint.archive import check_archive
from trainkit.checkpoint.format import verify
from trainkit.checkpoint.manifest import DamagedError

STATE = {"model": {"weight": torch.arange(100.0)}}


def archive_of(state: Any = STATE) -> bytes:
    buffer = io.BytesIO()
    torch.save(state, buffer)
    return buffer.getvalue()


def check(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "a.pth").write_bytes(content)
    check_archive(tmp_path / "a.pth", content.rindex(b"PK\x05\x06"))


def repacked(compression: int, data: bytes | None = None) -> bytes:
    """What another zip program makes of a checkpoint."""
    buffer = io.BytesIO()
    with (
        zipfile.ZipFile(io.BytesIO(archive_of())) as source,
        zipfile.ZipFile(buffer, "w", compression) as target,
    ):
        for name in source.namelist():
            is_data = data is not None and name.endswith("/data/0")
            target.writestr(name, data if is_data and data is not None else source.read(name))
    return buffer.getvalue()


def changed(content: bytes, at: int, layout: str, *values: int) -> bytes:
    new = bytearray(content)
    struct.pack_into(layout, new, at, *values)
    return bytes(new)


@pytest.mark.parametrize("content", [archive_of(), archive_of({}), repacked(zipfile.ZIP_STORED)])
def test_what_torch_saves_and_its_plain_copies_pass(tmp_path: Path, content: bytes) -> None:
    check(tmp_path, content)


def test_an_archive_of_the_format_before_zip64_passes(tmp_path: Path) -> None:
    content = repacked(zipfile.ZIP_STORED)
    assert b"PK\x06\x06" not in content
    assert b"PK\x06\x06" in archive_of()
    check(tmp_path, content)


def test_f23_a_bomb_is_refused_before_it_is_inflated(tmp_path: Path) -> None:
    content = repacked(zipfile.ZIP_DEFLATED, bytes(1 << 24))
    assert len(content) < 1 << 16
    with pytest.raises(DamagedError, match="compressed or encrypted"):
        check(tmp_path, content)
    assert verify(tmp_path / "a.pth").state == "damaged"


def test_a_mildly_compressed_archive_is_refused_too(tmp_path: Path) -> None:
    with pytest.raises(DamagedError, match=r"compressed or encrypted, as torch\.save writes none"):
        check(tmp_path, repacked(zipfile.ZIP_DEFLATED))


def test_f23_entries_that_overlap_are_refused(tmp_path: Path) -> None:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        archive.writestr("a", bytes(10_000))
    content = buffer.getvalue()
    at, end_at = content.index(b"PK\x01\x02"), content.index(b"PK\x05\x06")
    directory = content[at:end_at] * 100
    content = content[:at] + directory + content[end_at:]
    content = changed(content, at + len(directory) + 8, "<HHI", 100, 100, len(directory))
    with zipfile.ZipFile(io.BytesIO(content)) as archive:
        assert [len(archive.read(entry)) for entry in archive.infolist()] == [10_000] * 100
    with pytest.raises(DamagedError, match=r"claims 1,000,000 bytes .* has room for 10,031"):
        check(tmp_path, content)


def test_a_size_beyond_the_file_is_refused(tmp_path: Path) -> None:
    content = archive_of()
    at = content.index(b"PK\x01\x02")
    for size_at in (20, 24):  # As stored, and as read.
        with pytest.raises(DamagedError, match=r"claims 2,0.* bytes of data"):
            check(tmp_path, changed(content, at + size_at, "<I", 2_000_000_000))


def test_an_encrypted_entry_is_refused(tmp_path: Path) -> None:
    content = archive_of()
    with pytest.raises(DamagedError, match="encrypted"):
        check(tmp_path, changed(content, content.index(b"PK\x01\x02") + 8, "<H", 1))


def test_f23_a_second_directory_for_other_readers_is_refused(tmp_path: Path) -> None:
    """The end record points to one directory; Python looks for it right before that record."""
    good, evil = repacked(zipfile.ZIP_STORED), repacked(zipfile.ZIP_DEFLATED)
    evil_at = evil.index(b"PK\x01\x02")
    evil_directory = evil[evil_at : evil.rindex(b"PK\x05\x06")]
    good_at = good.index(b"PK\x01\x02")
    end_at = good.rindex(b"PK\x05\x06")
    content = good[:good_at] + evil_directory + good[good_at:]
    end_at += len(evil_directory)
    # Sizes are equal, so only the offset tells them apart; a reader trusts it or the position.
    assert len(evil_directory) == len(good) - 22 - good_at
    check(tmp_path, changed(content, end_at + 16, "<I", good_at + len(evil_directory)))
    with pytest.raises(DamagedError, match="more than one directory"):
        check(tmp_path, changed(content, end_at + 16, "<I", good_at))


def test_end_records_that_contradict_each_other_are_refused(tmp_path: Path) -> None:
    content = archive_of()
    locator_at = content.index(b"PK\x06\x07")
    with pytest.raises(DamagedError, match="more than one directory"):
        check(tmp_path, changed(content, locator_at + 8, "<Q", 0))


@pytest.mark.parametrize("offset", [2**63, 2**64 - 1])
def test_an_offset_that_no_file_has_is_refused(tmp_path: Path, offset: int) -> None:
    content = archive_of()
    with pytest.raises(DamagedError, match="its zip archive is damaged"):
        check(tmp_path, changed(content, content.index(b"PK\x06\x06") + 48, "<Q", offset))


def test_a_file_that_is_nothing_but_an_end_is_refused_or_empty(tmp_path: Path) -> None:
    check(tmp_path, b"PK\x05\x06" + bytes(18))
    with pytest.raises(DamagedError, match="its zip archive is damaged"):
        check(tmp_path, b"PK\x05\x06" + b"\xff" * 16 + b"\0\0")
