"""A file is what was written, or is known not to be; reading it runs no code."""

import collections
import errno
import io
import itertools
import os
import pickle
import random
import resource
import sys
import zipfile
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from tests.checkpoint.forge import archive_of, records_of, seal, unsealed
from trainkit.checkpoint import format as checkpoint_format
from trainkit.checkpoint.format import (
    load_checkpoint,
    load_safetensors,
    temporary_path,
    verify,
    write_checkpoint,
)
from trainkit.checkpoint.manifest import read_manifest
from trainkit.utils.errors import CheckpointError, CheckpointWriteError

STATE: dict[str, Any] = {
    "model": {"weight": torch.arange(40.0).reshape(5, 8), "bias": torch.ones(5)},
    "trainer": {"hooks": [{"best": 0.5}, None], "name": "x"},
    "iteration": 7,
}


@pytest.fixture
def path(tmp_path: Path) -> Path:
    write_checkpoint(STATE, tmp_path / "a.pth", iteration=7, world_size=2, facts={"o": "fused"})
    return tmp_path / "a.pth"


def assert_is_state(loaded: Any) -> None:
    assert torch.equal(loaded["model"]["weight"], STATE["model"]["weight"])
    assert torch.equal(loaded["model"]["bias"], STATE["model"]["bias"])
    assert loaded["trainer"] == STATE["trainer"]
    assert loaded["iteration"] == 7


def test_what_is_written_is_loaded(path: Path) -> None:
    assert_is_state(load_checkpoint(path))
    verdict = verify(path)
    assert verdict.state == "verified"
    assert verdict.manifest is not None
    assert (verdict.manifest.iteration, verdict.manifest.world_size) == (7, 2)
    assert verdict.manifest.facts == {"o": "fused"}
    assert set(verdict.manifest.versions) == {"trainkit", "torch", "python"}
    assert [p.name for p in path.parent.iterdir()] == ["a.pth"]


@pytest.mark.parametrize("mmap", [False, True])
def test_plain_torch_reads_it(path: Path, mmap: bool) -> None:
    assert_is_state(torch.load(path, weights_only=True, mmap=mmap))


def test_other_readers_of_zip_archives_read_it(path: Path) -> None:
    with zipfile.ZipFile(path) as archive:
        assert archive.testzip() is None
        assert archive.comment.startswith(b"trainkit-manifest 1 ")


def test_the_data_are_what_torch_alone_writes(path: Path) -> None:
    buffer = io.BytesIO()
    torch.save(STATE, buffer)
    manifest = read_manifest(path)
    assert manifest is not None
    assert manifest.bytes == len(buffer.getvalue())
    assert path.read_bytes()[: manifest.bytes - 2] == buffer.getvalue()[:-2]


def test_a_file_of_many_chunks_is_verified(tmp_path: Path) -> None:
    state = {f"w{i}": torch.rand(300_000) for i in range(4)}
    write_checkpoint(state, tmp_path / "a.pth")
    assert verify(tmp_path / "a.pth").state == "verified"
    loaded = load_checkpoint(tmp_path / "a.pth")
    assert all(torch.equal(loaded[key], state[key]) for key in state)


def test_a_time_is_later_than_the_ones_before_whatever_the_clock_says(tmp_path: Path) -> None:
    far = 2**62
    assert write_checkpoint(STATE, tmp_path / "a.pth", after_ns=far).saved_at_ns == far + 1
    assert write_checkpoint(STATE, tmp_path / "b.pth").saved_at_ns < far


def test_safetensors_are_loaded_or_explained(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "a.safetensors"
    save_file(STATE["model"], path)
    assert torch.equal(load_safetensors(path)["weight"], STATE["model"]["weight"])
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(CheckpointError, match=r"a\.safetensors is no file of safetensors: "):
        load_safetensors(path)
    monkeypatch.setitem(sys.modules, "safetensors.torch", None)
    with pytest.raises(CheckpointError, match=r"pip install 'trainkit\[safetensors\]'"):
        load_safetensors(path)


def put(path: Path, index: int, byte: int) -> None:
    with path.open("r+b", buffering=0) as file:
        file.seek(index)
        file.write(bytes([byte]))


def test_f05_a_flipped_bit_is_never_verified(path: Path) -> None:
    content = path.read_bytes()
    manifest = read_manifest(path)
    assert manifest is not None
    draw = random.Random(0)
    directory = content.index(b"PK\x01\x02")
    indices = {*range(100), *range(directory, len(content))}
    indices |= set(draw.sample(range(len(content)), 300))
    for index in sorted(indices):
        # In the record and the comment all bits, elsewhere one of them.
        bits = range(8) if index >= manifest.bytes - 22 else [draw.randrange(8)]
        for bit in bits:
            put(path, index, content[index] ^ (1 << bit))
            verdict = verify(path)
            put(path, index, content[index])
            assert verdict.state == "damaged", (index, bit)
            assert verdict.reason
    assert verify(path).state == "verified"


def test_f06_every_truncation_is_damage(path: Path) -> None:
    size = path.stat().st_size
    lengths = {*range(60), *range(0, size, 17), *range(size - 700, size)}
    for length in sorted(lengths, reverse=True):
        os.truncate(path, length)
        assert verify(path).state == "damaged", length


@pytest.mark.parametrize("surplus", [b"\0", b"x", b"PK\x05\x06", bytes(100), bytes(70_000)])
def test_f06_surplus_bytes_are_damage(path: Path, surplus: bytes) -> None:
    content = path.read_bytes()
    path.write_bytes(content + surplus)
    assert verify(path).state == "damaged"
    path.write_bytes(surplus + content)
    assert verify(path).state == "damaged"


def test_f05_zeroed_pages_are_damage(tmp_path: Path) -> None:
    write_checkpoint({"x": torch.rand(10_000)}, tmp_path / "a.pth")
    content = (tmp_path / "a.pth").read_bytes()
    (tmp_path / "a.pth").write_bytes(content[:8192] + bytes(4096) + content[12288:])
    assert verify(tmp_path / "a.pth").reason == (
        "its bytes are not those that were written (SHA-256 differs)"
    )


def test_f02_an_old_manifest_under_new_bytes_is_damage(tmp_path: Path) -> None:
    for name, value in (("a", 0.0), ("b", 1.0)):
        write_checkpoint({"x": torch.full((100,), value)}, tmp_path / f"{name}.pth")
    (a, b) = ((tmp_path / f"{name}.pth").read_bytes() for name in "ab")
    manifest = read_manifest(tmp_path / "a.pth")
    assert manifest is not None
    (tmp_path / "c.pth").write_bytes(b[: manifest.bytes - 2] + a[manifest.bytes - 2 :])
    assert verify(tmp_path / "c.pth").state == "damaged"


@pytest.mark.parametrize("is_zip", [True, False])
def test_f24_older_files_load_unverified(tmp_path: Path, is_zip: bool) -> None:
    torch.save(STATE, tmp_path / "a.pth", _use_new_zipfile_serialization=is_zip)
    assert verify(tmp_path / "a.pth").state == "unverified"
    assert_is_state(load_checkpoint(tmp_path / "a.pth"))


def test_f06_an_older_file_that_is_cut_or_continued_is_damaged(tmp_path: Path) -> None:
    torch.save(STATE, tmp_path / "a.pth")
    content = (tmp_path / "a.pth").read_bytes()
    for changed in (content[:-1], content[: len(content) // 2], content + b"x", content[500:]):
        (tmp_path / "a.pth").write_bytes(changed)
        assert verify(tmp_path / "a.pth").state == "damaged"


def test_f05_an_older_file_with_any_damage_gets_a_verdict(tmp_path: Path) -> None:
    torch.save(STATE, tmp_path / "a.pth")
    content = (tmp_path / "a.pth").read_bytes()
    for index in range(content.index(b"PK\x01\x02"), len(content)):
        put(tmp_path / "a.pth", index, content[index] ^ (1 << index % 8))
        assert verify(tmp_path / "a.pth").state in ("unverified", "damaged")
        put(tmp_path / "a.pth", index, content[index])


def test_f06_what_cannot_be_read_is_damaged(tmp_path: Path) -> None:
    assert "No such file" in verify(tmp_path / "none.pth").reason
    assert "Is a directory" in verify(tmp_path).reason


def test_f06_a_damaged_file_is_not_loaded(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(CheckpointError, match=r"a\.pth is damaged: \d+ bytes follow"):
        load_checkpoint(path)


class Canary:
    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> Any:
        return os.mkdir, (str(self.path),)


@pytest.mark.parametrize("is_zip", [True, False])
def test_f23_code_in_a_file_is_refused_and_not_run(tmp_path: Path, is_zip: bool) -> None:
    path = tmp_path / "a.pth"
    data = {"model": {}, "x": Canary(tmp_path / "canary")}
    torch.save(data, path, _use_new_zipfile_serialization=is_zip)
    with pytest.raises(CheckpointError) as raised:
        load_checkpoint(path)
    text = str(raised.value)
    assert f"{path} holds more than tensors" in text
    assert "GLOBAL posix.mkdir whose module posix is blocked. Nothing in it was run." in text
    assert text.endswith("MODEL.TRUST_PICKLE to True, or pass trust_pickle=True.")
    assert not (tmp_path / "canary").exists()
    # The canary works: whoever trusts the file runs it.
    assert load_checkpoint(path, trust_pickle=True)["model"] == {}
    assert (tmp_path / "canary").exists()


def test_f23_code_in_a_file_with_a_sound_manifest_is_not_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(checkpoint_format, "check_storable", lambda data: None)
    write_checkpoint({"x": Canary(tmp_path / "canary")}, tmp_path / "a.pth")
    assert verify(tmp_path / "a.pth").state == "verified"
    with pytest.raises(CheckpointError, match="Nothing in it was run"):
        load_checkpoint(tmp_path / "a.pth")
    assert not (tmp_path / "canary").exists()


def test_a_class_that_is_not_known_is_named_without_bad_advice(tmp_path: Path) -> None:
    torch.save({"x": collections.defaultdict(int)}, tmp_path / "a.pth")
    with pytest.raises(CheckpointError, match=r"collections\.defaultdict was not an .* Nothing in"):
        load_checkpoint(tmp_path / "a.pth")


@pytest.mark.parametrize("protocol", range(2, pickle.HIGHEST_PROTOCOL + 1))
def test_f23_a_bare_pickle_runs_only_if_it_is_trusted(tmp_path: Path, protocol: int) -> None:
    (tmp_path / "a.pkl").write_bytes(pickle.dumps(Canary(tmp_path / "canary"), protocol))
    with pytest.raises(
        CheckpointError, match=r"a\.pkl was refused: it is a bare pickle, .* Only if you trust"
    ):
        load_checkpoint(tmp_path / "a.pkl")
    assert verify(tmp_path / "a.pkl").state == "damaged"
    assert not (tmp_path / "canary").exists()
    load_checkpoint(tmp_path / "a.pkl", trust_pickle=True)
    assert (tmp_path / "canary").exists()


def test_an_old_pickle_without_a_number_of_its_protocol_is_no_checkpoint(tmp_path: Path) -> None:
    (tmp_path / "a.pkl").write_bytes(pickle.dumps(Canary(tmp_path / "canary"), 0))
    for trust_pickle in (False, True):
        with pytest.raises(CheckpointError, match="it is no torch checkpoint"):
            load_checkpoint(tmp_path / "a.pkl", trust_pickle=trust_pickle)
    assert not (tmp_path / "canary").exists()


def test_trust_does_not_make_a_damaged_file_sound(path: Path) -> None:
    assert_is_state(load_checkpoint(path, trust_pickle=True))
    put(path, 300, path.read_bytes()[300] ^ 1)
    with pytest.raises(CheckpointError, match=r"is damaged: its bytes are not those"):
        load_checkpoint(path, trust_pickle=True)
    path.write_bytes(b"\x80\x02cut")
    with pytest.raises(CheckpointError, match=r"a\.pth (cannot be loaded|holds more)"):
        load_checkpoint(path, trust_pickle=True)


def reseal(path: Path, change: Any) -> None:
    """Changes the pickle of a checkpoint, as somebody does who can compute a SHA-256."""
    records = records_of(unsealed(path))
    (name,) = (name for name in records if name.endswith("/data.pkl"))
    path.write_bytes(seal(archive_of({**records, name: change(records[name])})))
    assert verify(path).state == "verified"


def test_f23_a_tensor_beyond_its_record_is_refused(tmp_path: Path) -> None:
    write_checkpoint({"x": torch.arange(200.0)}, tmp_path / "a.pth")
    # The number of elements, in a pickle: of the storage, and of the tensor.
    reseal(tmp_path / "a.pth", lambda data: data.replace(b"K\xc8", b"J\x00\x00\x00\x40"))
    with pytest.raises(CheckpointError, match=r"a\.pth cannot be loaded: RuntimeError"):
        load_checkpoint(tmp_path / "a.pth")


def test_f23_a_record_that_many_names_repeat_is_refused(tmp_path: Path) -> None:
    """torch finds a record whatever the case of its name, and would read each case anew."""
    path = tmp_path / "a.pth"
    write_checkpoint({"x": torch.zeros(50_000)}, path)
    before = path.stat().st_size
    records = {name.partition("/")[2]: data for name, data in records_of(unsealed(path)).items()}
    pickled = records["data.pkl"]
    item = pickled[pickled.index(b"X\x01\x00\x00\x00x") : -2]
    keys = ["".join(cases) for cases in itertools.product("aA", "bB", "cC")]
    items = [
        item.replace(b"X\x01\0\0\x000", b"X\x03\0\0\0" + key.encode()).replace(
            b"X\x01\0\0\0x", b"X\x03\0\0\0" + key.encode()
        )
        for key in keys
    ]
    pickled = b"\x80\x02}(" + b"".join(items) + b"u."
    forged = {"a/data.pkl": pickled, "a/data/abc": records["data/0"], "a/version": b"3"}
    path.write_bytes(archive_of(forged))
    assert path.stat().st_size < before + 2_000
    assert len(torch.load(path, weights_only=True)) == len(keys)
    with pytest.raises(CheckpointError, match=r"its values claim 1,600,000 bytes, more than the"):
        load_checkpoint(path)


def test_what_is_loaded_does_not_hang_on_the_file(path: Path) -> None:
    loaded = load_checkpoint(path)
    with path.open("r+b") as file:
        file.write(bytes(path.stat().st_size))
    assert_is_state(loaded)
    maps = Path("/proc/self/maps")
    assert not maps.exists() or str(path) not in maps.read_text()


def test_tensors_that_share_memory_still_do_after_loading(tmp_path: Path) -> None:
    base = torch.arange(10.0)
    write_checkpoint({"a": base[:5], "b": base[3:], "c": base}, tmp_path / "a.pth")
    loaded = load_checkpoint(tmp_path / "a.pth")
    loaded["c"].zero_()
    assert loaded["a"].sum() == loaded["b"].sum() == 0
    assert loaded["b"].shape == (7,)


def test_f23_nesting_without_end_is_refused(tmp_path: Path) -> None:
    write_checkpoint({"x": 1}, tmp_path / "a.pth")
    reseal(tmp_path / "a.pth", lambda data: b"\x80\x02" + b"]" * 20_000 + b"a" * 19_999 + b".")
    with pytest.raises(CheckpointError, match=r"a\.pth cannot be loaded: RecursionError"):
        load_checkpoint(tmp_path / "a.pth")


def test_a_zip_archive_without_a_pickle_is_explained(tmp_path: Path) -> None:
    with zipfile.ZipFile(tmp_path / "a.pth", "w") as archive:
        archive.writestr("readme", "x")
    with pytest.raises(CheckpointError, match=r"a\.pth cannot be loaded: RuntimeError"):
        load_checkpoint(tmp_path / "a.pth")


def test_what_cannot_be_stored_is_refused_before_writing(path: Path) -> None:
    before = path.read_bytes()
    with pytest.raises(CheckpointError, match=r"model\.x: object"):
        write_checkpoint({"model": {"x": object()}}, path)
    assert path.read_bytes() == before


def fail(error: int) -> Any:
    def failing(*args: Any) -> Any:
        raise OSError(error, os.strerror(error))

    return failing


@pytest.mark.parametrize("call", ["fsync", "replace"])
def test_an_error_of_the_disk_leaves_the_file_as_it_was(
    path: Path, monkeypatch: pytest.MonkeyPatch, call: str
) -> None:
    before = path.read_bytes()
    monkeypatch.setattr(os, call, fail(errno.EIO))
    with pytest.raises(CheckpointWriteError, match=r"Cannot save checkpoint .*a\.pth: Input/out"):
        write_checkpoint({"model": {}}, path)
    assert path.read_bytes() == before
    assert not temporary_path(path).exists()


@pytest.mark.parametrize(
    ("code", "mend", "tells_bytes"),
    [
        (errno.ENOSPC, "make room", True),
        (errno.EDQUOT, "make room within your quota", True),
        (errno.EFBIG, "allow larger files (ulimit -f)", True),
        (errno.EIO, "the device fails, so see the system's log", False),
        (errno.EROFS, "make the folder writable", False),
        (errno.EACCES, "make the folder writable", False),
        (errno.ESTALE, "check the storage", False),
    ],
)
def test_each_refusal_has_its_own_mend(
    path: Path, monkeypatch: pytest.MonkeyPatch, code: int, mend: str, tells_bytes: bool
) -> None:
    monkeypatch.setattr(os, "replace", fail(code))
    with pytest.raises(CheckpointWriteError) as raised:
        write_checkpoint({"model": torch.zeros(1000)}, path)
    text = str(raised.value)
    assert text.startswith(f"Cannot save checkpoint {path}: {os.strerror(code)}.")
    assert text.endswith(f". Earlier checkpoints are intact: {mend}, or set another OUTPUT_DIR.")
    assert ("It needs about 4,000 bytes, and " in text) == tells_bytes


def test_a_folder_that_cannot_be_synced_is_an_error(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fsync = os.fsync
    calls = []

    def second_fails(descriptor: int) -> None:
        calls.append(descriptor)
        fail(errno.EIO)() if len(calls) == 2 else fsync(descriptor)

    monkeypatch.setattr(os, "fsync", second_fails)
    with pytest.raises(CheckpointError, match="Input/output error"):
        write_checkpoint({"model": {}}, path)
    assert verify(path).state == "verified"


def test_a_full_disk_is_explained_in_bytes(path: Path) -> None:
    before = path.read_bytes()
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    # Python ignores the signal, so that a write past the limit fails as on a full disk.
    resource.setrlimit(resource.RLIMIT_FSIZE, (2_000_000, hard))
    try:
        with pytest.raises(CheckpointError) as raised:
            write_checkpoint({"model": torch.zeros(1_000_000)}, path)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    text = str(raised.value)
    assert f"Cannot save checkpoint {path}: File too large" in text
    assert "needs about 4,000,000 bytes" in text
    assert "are free there. Earlier checkpoints are intact" in text
    assert path.read_bytes() == before
    assert [p.name for p in path.parent.iterdir()] == ["a.pth"]


def test_a_partial_file_that_cannot_be_removed_hides_nothing(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    unlink = Path.unlink
    monkeypatch.setattr(os, "replace", fail(errno.ENOSPC))

    def failing(self: Path, missing_ok: bool = False) -> None:
        fail(errno.EROFS)() if self.exists() else unlink(self, missing_ok)

    monkeypatch.setattr(Path, "unlink", failing)
    with pytest.raises(CheckpointError, match="No space left on device"):
        write_checkpoint({"model": {}}, path)


def test_facts_that_are_refused_leave_no_partial_file(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="may have 4096"):
        write_checkpoint({}, tmp_path / "a.pth", facts={"x": "y" * 5000})
    assert list(tmp_path.iterdir()) == []


def test_f23_a_link_under_the_temporary_name_is_not_followed(tmp_path: Path) -> None:
    (tmp_path / "victim").write_text("mine")
    temporary_path(tmp_path / "a.pth").symlink_to(tmp_path / "victim")
    write_checkpoint({}, tmp_path / "a.pth")
    assert (tmp_path / "victim").read_text() == "mine"
    assert verify(tmp_path / "a.pth").state == "verified"


def test_f01_the_file_is_synced_before_it_has_its_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    events: list[str] = []
    fsync, replace = os.fsync, os.replace

    def note_fsync(descriptor: int) -> None:
        events.append("sync " + os.path.basename(os.readlink(f"/proc/self/fd/{descriptor}")))
        fsync(descriptor)

    def note_replace(source: Path, target: Path) -> None:
        events.append(f"rename {target.name}")
        replace(source, target)

    monkeypatch.setattr(os, "fsync", note_fsync)
    monkeypatch.setattr(os, "replace", note_replace)
    write_checkpoint({}, tmp_path / "a.pth")
    assert events == ["sync .a.pth.tmp", "rename a.pth", f"sync {tmp_path.name}"]
