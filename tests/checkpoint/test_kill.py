"""F1, F2 and F20: a killed save leaves the old state or the new one, never a mix."""

import shutil
import signal
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import multiprocessing as mp

from tests.checkpoint.killed_save import State, save, save_within, train
from trainkit.checkpoint.checkpointer import Checkpointer
from trainkit.checkpoint.format import verify

pytestmark = pytest.mark.faults

OLD, NEW = 1, 2
NEVER = 1000


def start(function: Callable[..., None], *args: object) -> int:
    """Runs in a new process, which has imported everything, and returns its exit code."""
    context = mp.get_context("forkserver")
    # The second is what a process's first optimizer imports, in a second.
    context.set_forkserver_preload(["tests.checkpoint.killed_save", "torch._dynamo"])
    process = context.Process(target=function, args=args)
    process.start()
    process.join(60)
    assert process.exitcode is not None, "the save hangs"
    return process.exitcode


def saved_value(folder: Path) -> int:
    """Resumes, and returns the one value that everything in the checkpoint has."""
    model = State(0)
    extra = Checkpointer(model, folder).resume_or_load("")
    value = extra["iteration"]
    assert bool((model.weight == value).all()), "a mix"
    return int(value)


@pytest.fixture(scope="module")
def old(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("old")
    Checkpointer(State(OLD), folder).save("model_a", iteration=OLD)
    return folder


def test_f01_a_save_killed_at_any_call_loses_nothing(tmp_path: Path, old: Path) -> None:
    assert_no_kill_loses(tmp_path, old, "model_b")


def test_f02_an_overwriting_save_killed_at_any_call_loses_nothing(
    tmp_path: Path, old: Path
) -> None:
    assert_no_kill_loses(tmp_path, old, "model_a")


def assert_no_kill_loses(tmp_path: Path, old: Path, name: str) -> None:
    """The state before the save, or after it, is there whole, wherever the save is killed."""
    before = (old / "model_a.pth").read_bytes()
    values = []
    for kill_at in range(100):
        folder = tmp_path / str(kill_at)
        shutil.copytree(old, folder)
        code = start(save, folder, name, NEW, kill_at)
        values.append(saved_value(folder))
        if code == 0:
            break
        assert code == -signal.SIGKILL
        # Old bytes with their old manifest, or new ones with their new one.
        for path in folder.glob("*.pth"):
            assert path.read_bytes() == before or verify(path).state == "verified"
        assert sorted(p.name for p in folder.glob("*.pth")) in (
            [["model_a.pth"]]
            if name == "model_a"
            else [["model_a.pth"], ["model_a.pth", f"{name}.pth"]]
        )
        # The next save clears what is left.
        Checkpointer(State(3), folder).save(name, iteration=3)
        assert saved_value(folder) == 3
        assert not list(folder.glob(".*.tmp"))
    # At least: 4 writes, fsync and rename, then fsync of the folder, and the same of the pointer.
    assert len(values) > 10
    assert values == sorted(values), "once it is published, it stays"
    assert (values[0], values[-1]) == (OLD, NEW)
    assert values.count(NEW) > 4


def test_f01_a_run_killed_at_any_call_of_its_saves_ends_like_an_unbroken_one(
    tmp_path: Path,
) -> None:
    assert_no_kill_changes_the_end(tmp_path, is_async=False)


def test_f20_a_run_killed_at_any_call_of_a_save_in_the_background_ends_like_an_unbroken_one(
    tmp_path: Path,
) -> None:
    assert_no_kill_changes_the_end(tmp_path, is_async=True)


def assert_no_kill_changes_the_end(tmp_path: Path, is_async: bool) -> None:
    """Compares a run with synchronous saves and runs that are killed, each at another call."""
    assert start(train, tmp_path / "unbroken", NEVER) == 0
    expected = torch.load(tmp_path / "unbroken" / "model_final.pth", weights_only=True)
    for kill_at in range(NEVER):
        folder = tmp_path / str(kill_at)
        code = start(train, folder, kill_at, is_async)
        if code == 0:
            break
        assert code == -signal.SIGKILL
        assert start(train, folder, NEVER, is_async) == 0
        found = torch.load(folder / "model_final.pth", weights_only=True)
        for key in ("model", "optimizer"):
            part = [state if key == "model" else state["trainer"] for state in (found, expected)]
            torch.testing.assert_close(part[0][key], part[1][key], rtol=0, atol=0)
    # Three saves, each of at least: write, fsync, rename, fsync of the folder; and the pointer's.
    assert 20 < kill_at < NEVER


@pytest.mark.parametrize("part", [0, 1, 100, 70_000, 1_500_000, 2_799_000])
@pytest.mark.parametrize("name", ["model_a", "model_b"])
def test_f01_f02_a_save_killed_at_any_byte_loses_nothing(
    tmp_path: Path, old: Path, part: int, name: str
) -> None:
    folder = tmp_path / "run"
    shutil.copytree(old, folder)
    assert start(save_within, folder, name, NEW, part) == -signal.SIGXFSZ
    assert saved_value(folder) == OLD
