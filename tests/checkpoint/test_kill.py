"""F1 and F2: a save that is killed anywhere leaves the old state or the new one, never a mix."""

import shutil
import signal
from collections.abc import Callable
from pathlib import Path

import pytest
from torch import multiprocessing as mp

from tests.checkpoint.killed_save import State, save, save_within
from trainkit.checkpoint.checkpointer import Checkpointer

pytestmark = pytest.mark.faults

OLD, NEW = 1, 2


def start(function: Callable[..., None], *args: object) -> int:
    """Runs in a new process, which has imported everything, and returns its exit code."""
    context = mp.get_context("forkserver")
    context.set_forkserver_preload(["tests.checkpoint.killed_save"])
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


# The name exists already in the first case (F2).
@pytest.mark.parametrize("name", ["model_a", "model_b"])
def test_a_kill_at_any_call_loses_nothing(tmp_path: Path, old: Path, name: str) -> None:
    values = []
    for kill_at in range(100):
        folder = tmp_path / str(kill_at)
        shutil.copytree(old, folder)
        code = start(save, folder, name, NEW, kill_at)
        values.append(saved_value(folder))
        if code == 0:
            break
        assert code == -signal.SIGKILL
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


@pytest.mark.parametrize("part", [0, 1, 100, 70_000, 1_500_000, 2_799_000])
def test_a_kill_at_any_byte_loses_nothing(tmp_path: Path, old: Path, part: int) -> None:
    folder = tmp_path / "run"
    shutil.copytree(old, folder)
    assert start(save_within, folder, "model_a", NEW, part) == -signal.SIGXFSZ
    assert saved_value(folder) == OLD
