"""F3 and F4: a save that the storage refuses is said, and costs no earlier checkpoint."""

import contextlib
import errno
import io
import logging
import os
import re
import resource
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from torch import multiprocessing as mp

from tests.checkpoint.killed_save import NUM_WEIGHTS, State
from tests.small_disk import small_disk
from trainkit.checkpoint.checkpointer import Checkpointer
from trainkit.utils.errors import CheckpointWriteError

pytestmark = pytest.mark.faults

NUM_BYTES = 4 * NUM_WEIGHTS


def save(folder: Path, value: int) -> str:
    """Saves a state of one value; returns the error's text if the storage refuses it."""
    try:
        Checkpointer(State(value), folder).save(f"model_{value:07d}", iteration=value)
    except CheckpointWriteError as e:
        return str(e)
    return ""


def resumed_value(folder: Path) -> int:
    model = State(0)
    value = Checkpointer(model, folder).resume_or_load("")["iteration"]
    assert bool((model.weight == value).all())
    return int(value)


def content(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


Save = Callable[[Path, int], str]


def save_under_limit(folder: Path, value: int) -> str:
    # Python ignores the signal, so that a write past the limit fails.
    resource.setrlimit(resource.RLIMIT_FSIZE, (NUM_BYTES // 2, NUM_BYTES // 2))
    return save(folder, value)


def save_in_child(folder: Path, value: int) -> str:
    context = mp.get_context("forkserver")
    context.set_forkserver_preload(["tests.checkpoint.killed_save"])
    with context.Pool(1) as pool:
        return str(pool.apply(save_under_limit, (folder, value)))


def save_to_full_device(folder: Path, value: int) -> str:
    open_file: Any = Path.open

    def opening(path: Path, mode: str = "r", *args: Any, **kwargs: Any) -> Any:
        is_new = path.name.endswith(".pth.tmp")
        return open("/dev/full", "wb") if is_new else open_file(path, mode, *args, **kwargs)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Path, "open", opening)
        return save(folder, value)


@contextlib.contextmanager
def full_storage(injector: str, folder: Path) -> Iterator[tuple[Path, Save, int]]:
    """Gives a folder for one checkpoint, what saves another there, and the error that is due."""
    if injector == "tmpfs":
        with small_disk(folder, int(1.5 * NUM_BYTES)) as disk:
            yield disk, save, errno.ENOSPC
    elif injector == "RLIMIT_FSIZE":
        yield folder, save_in_child, errno.EFBIG
    else:
        yield folder, save_to_full_device, errno.ENOSPC


@pytest.mark.parametrize("injector", ["tmpfs", "RLIMIT_FSIZE", "/dev/full"])
def test_f03_a_full_disk_costs_no_earlier_checkpoint(tmp_path: Path, injector: str) -> None:
    with full_storage(injector, tmp_path / "disk") as (folder, save_refused, code):
        assert save(folder, 1) == ""
        before = content(folder)
        error = save_refused(folder, 2)
        # The partial file is removed, and the pointer is as it was.
        assert content(folder) == before
        assert sorted(before) == ["last_checkpoint", "model_0000001.pth"]
        assert resumed_value(folder) == 1

        path = folder / "model_0000002.pth"
        assert error.startswith(f"Cannot save checkpoint {path}: {os.strerror(code)}.")
        numbers = re.search(r"needs about ([\d,]+) bytes, and ([\d,]+) are free there\.", error)
        assert numbers, error
        needed, free = (int(number.replace(",", "")) for number in numbers.groups())
        assert needed == NUM_BYTES
        if injector == "tmpfs":
            assert free == shutil.disk_usage(folder).free
        mend = "make room" if code == errno.ENOSPC else "allow larger files (ulimit -f)"
        assert error.endswith(f"intact: {mend}, or set another OUTPUT_DIR.")
        # With room again, the next save is one as any other.
        (folder / "model_0000001.pth").unlink()
        assert save(folder, 3) == ""
        assert resumed_value(folder) == 3


def fail_at(monkeypatch: pytest.MonkeyPatch, name: str, number: int) -> None:
    """Makes a call of the operating system fail the given time, from 1, that it is made."""
    function: Any = getattr(os, name)
    calls = []

    def failing(*args: Any) -> Any:
        calls.append(args)
        if len(calls) == number:
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        return function(*args)

    monkeypatch.setattr(os, name, failing)


@pytest.mark.parametrize(
    ("call", "number", "is_published"),
    [("fsync", 1, False), ("replace", 1, False), ("fsync", 2, True)],
    ids=["fsync of the file", "rename", "fsync of the folder"],
)
@pytest.mark.parametrize("value", [1, 2], ids=["over a name", "under a new name"])
def test_f04_a_failing_device_is_not_reported_as_saved(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    call: str,
    number: int,
    is_published: bool,
    value: int,
) -> None:
    assert save(tmp_path, 0) == save(tmp_path, 1) == ""
    before = content(tmp_path)
    fail_at(monkeypatch, call, number)
    with caplog.at_level(logging.INFO):
        error = save(tmp_path, value)
    monkeypatch.undo()
    path = tmp_path / f"model_{value:07d}.pth"
    assert error == (
        f"Cannot save checkpoint {path}: Input/output error. Earlier checkpoints are intact: the "
        "device fails, so see the system's log, or set another OUTPUT_DIR."
    )
    assert "Saved checkpoint" not in caplog.text
    after = content(tmp_path)
    # What has its name is whole, although a power loss may still take the name back.
    published = after.pop(path.name) if is_published else b""
    if is_published:
        assert len(published) > NUM_BYTES
        before.pop(path.name, None)
    assert after == before
    assert resumed_value(tmp_path) == (value if is_published else 1)


def test_f04_an_error_of_the_first_write_is_raised_and_not_hidden_by_later_ones(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert save(tmp_path, 1) == ""
    before = content(tmp_path)
    open_file: Any = Path.open

    class FailingFile(io.FileIO):
        def write(self, data: Any) -> int:
            raise OSError(errno.EIO, os.strerror(errno.EIO))

    def opening(path: Path, mode: str = "r", *args: Any, **kwargs: Any) -> Any:
        if "x" in mode:
            return io.BufferedWriter(FailingFile(path, mode.replace("b", "")))
        return open_file(path, mode, *args, **kwargs)

    monkeypatch.setattr(Path, "open", opening)
    assert "Input/output error" in save(tmp_path, 2)
    monkeypatch.undo()
    assert content(tmp_path) == before
