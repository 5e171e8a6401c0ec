"""F20: periodic saves that are written while training goes on."""

import errno
import logging
import os
import threading
import time
import weakref
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch

from trainkit.checkpoint.checkpointer import Checkpointer
from trainkit.checkpoint.format import verify, write_checkpoint
from trainkit.checkpoint.manifest import read_manifest
from trainkit.engine.hooks.callback import CallbackHook
from trainkit.engine.hooks.checkpoint import BestCheckpointer, PeriodicCheckpointer
from trainkit.engine.hooks.ema import EMA
from trainkit.engine.train_loop import SimpleTrainer
from trainkit.utils.errors import CheckpointWriteError

MakeTrainer = Callable[..., SimpleTrainer]
WRITE = "trainkit.checkpoint.checkpointer.write_checkpoint"


class SlowDisk:
    """Takes its time in a thread other than the main one, and sees how many write at once."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.may_write = threading.Event()
        self.max_now = self.num_now = 0
        self.saving: list[str] = []

    def write(self, function: Callable[..., Any], data: Any, path: Path, **kwargs: Any) -> Any:
        self.saving.append(Path(path).stem)
        self.num_now += 1
        self.max_now = max(self.max_now, self.num_now)
        if threading.current_thread() is not threading.main_thread():
            self.may_write.wait(0.1)
        try:
            return function(data, path, **kwargs)
        finally:
            self.num_now -= 1


@pytest.fixture
def slow_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> SlowDisk:
    disk = SlowDisk(tmp_path)
    monkeypatch.setattr(WRITE, partial(disk.write, write_checkpoint))
    return disk


def async_hook(trainer: SimpleTrainer, folder: Path, period: int, **kwargs: Any) -> Any:
    checkpointer = Checkpointer(trainer.model, folder, trainer=weakref.proxy(trainer))
    return PeriodicCheckpointer(checkpointer, period, is_async=True, **kwargs)


def saved(folder: Path) -> list[str]:
    assert not list(folder.glob(".*.tmp"))
    return sorted(path.stem for path in folder.glob("*.pth"))


def at(iteration: int, action: Callable[[], object], name: str = "after_step") -> CallbackHook:
    def act(trainer: SimpleTrainer) -> None:
        if trainer.iter == iteration:
            action()

    return CallbackHook(**{name: act})


def raising(error: BaseException) -> None:
    raise error


@pytest.fixture
def trainer(simple: MakeTrainer) -> SimpleTrainer:
    return simple(seed=1)


def test_f20_slow_saves_are_whole_bounded_and_spare_the_newest(
    trainer: SimpleTrainer, tmp_path: Path, slow_disk: SlowDisk
) -> None:
    seen: list[int] = []

    def look(trainer: SimpleTrainer) -> None:
        seen.append(trainer.iter)
        names = sorted(path.name for path in tmp_path.glob("*.pth"))
        assert len(names) <= 2
        assert len(list(tmp_path.glob(".*.tmp"))) <= 1
        assert all(verify(tmp_path / name).state == "verified" for name in names)
        # The one before is published before the next one begins.
        assert not seen[1:] or names[-1] >= f"model_{trainer.iter - 1:07d}.pth"

    hook = async_hook(trainer, tmp_path, 1, max_to_keep=1)
    trainer.register_hooks([hook, CallbackHook(after_step=look)])
    trainer.train(0, 5)
    assert saved(tmp_path) == ["model_0000004", "model_final"]
    assert (slow_disk.max_now, len(slow_disk.saving)) == (1, 6)
    assert slow_disk.saving[-2:] == ["model_0000004", "model_final"]


def test_f20_training_goes_on_while_a_save_is_written(
    trainer: SimpleTrainer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    gate = threading.Event()

    def writing(*args: Any, **kwargs: Any) -> Any:
        assert gate.wait(30)
        return write_checkpoint(*args, **kwargs)

    monkeypatch.setattr(WRITE, writing)
    published: list[list[str]] = []

    def look(trainer: SimpleTrainer) -> None:
        published.append(saved(tmp_path))
        if trainer.iter == 6:
            gate.set()

    trainer.register_hooks([async_hook(trainer, tmp_path, 4), CallbackHook(after_step=look)])
    trainer.train(0, 8)
    assert published[:7] == [[]] * 7
    assert saved(tmp_path) == ["model_0000003", "model_0000007", "model_final"]
    content = torch.load(tmp_path / "model_0000003.pth", weights_only=True)
    assert content["trainer"]["iteration"] == 3


@pytest.mark.parametrize("seed", [1, None])
def test_f20_a_run_saves_the_same_bytes_as_with_synchronous_saves(
    simple: MakeTrainer,
    tmp_path: Path,
    slow_disk: SlowDisk,
    monkeypatch: pytest.MonkeyPatch,
    seed: int | None,
) -> None:
    # The history of a metric holds times.
    monkeypatch.setattr(time, "perf_counter", lambda: 0.0)
    for name in ("synchronous", "behind"):
        torch.manual_seed(7)
        trainer = simple(seed=seed)
        hook = async_hook(trainer, tmp_path / name, 2, max_to_keep=2)
        hook._is_async = name == "behind"
        trainer.register_hooks([EMA(trainer.model, 0.9), hook])
        trainer.train(0, 6)
    names = saved(tmp_path / "behind")
    assert names == saved(tmp_path / "synchronous")
    assert names == ["model_0000003", "model_0000005", "model_final"]
    for name in names:
        paths = [tmp_path / folder / f"{name}.pth" for folder in ("synchronous", "behind")]
        manifests = [read_manifest(path) for path in paths]
        told = [{**vars(manifest), "saved_at_ns": 0} for manifest in manifests]
        assert told[0] == told[1]
        # The comment's length, and the comment itself, follow: the manifest with its time.
        size = told[0]["bytes"] - 2
        assert paths[0].read_bytes()[:size] == paths[1].read_bytes()[:size]


@pytest.mark.parametrize(
    "error", [RuntimeError("broken"), KeyboardInterrupt(), CheckpointWriteError("other")]
)
def test_f20_every_way_out_of_training_waits(
    trainer: SimpleTrainer, tmp_path: Path, slow_disk: SlowDisk, error: BaseException
) -> None:
    hook = async_hook(trainer, tmp_path, 3)
    trainer.register_hooks([hook, at(3, partial(raising, error), "before_step")])
    with pytest.raises(type(error)):
        trainer.train(0, 8)
    assert saved(tmp_path) == ["model_0000002"]
    assert hook._background._is_over.is_set()


def test_f20_saves_that_must_be_made_wait_and_are_synchronous(
    trainer: SimpleTrainer, tmp_path: Path, slow_disk: SlowDisk
) -> None:
    hook = async_hook(trainer, tmp_path, 2)
    best = BestCheckpointer(2, hook._periodic.checkpointer, "total_loss", "min")
    seen: list[list[str]] = []
    look = at(1, lambda: seen.append(saved(tmp_path)))
    stop = at(5, lambda: trainer.request_stop("test"), "before_step")
    trainer.register_hooks([hook, best, look, stop])
    trainer.train(0, 8)
    assert seen == [["model_0000001", "model_best"]]
    assert slow_disk.max_now == 1
    # Due in the step in which the run was asked to leave: once behind, once for sure.
    assert slow_disk.saving[-2:] == ["model_0000005", "model_0000005"]
    assert saved(tmp_path)[-2:] == ["model_0000005", "model_best"]


class FailingDisk:
    def __init__(self, monkeypatch: pytest.MonkeyPatch, *names: str) -> None:
        self.failed = threading.Event()
        fsync = os.fsync

        def failing(descriptor: int) -> None:
            path = os.readlink(f"/proc/self/fd/{descriptor}")
            if any(name in path for name in names):
                self.failed.set()
                raise OSError(errno.EIO, os.strerror(errno.EIO))
            fsync(descriptor)

        monkeypatch.setattr(os, "fsync", failing)

    def wait(self, hook: Any) -> None:
        assert self.failed.wait(30)
        assert hook._background._is_over.wait(30)


def test_f20_an_error_of_the_disk_ends_the_run_in_the_next_step(
    trainer: SimpleTrainer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    disk, hook = FailingDisk(monkeypatch, "model_0000003"), async_hook(trainer, tmp_path, 2)
    trainer.register_hooks([hook, at(4, lambda: disk.wait(hook), "before_step")])
    with pytest.raises(CheckpointWriteError) as info:
        trainer.train(0, 8)
    path = tmp_path / "model_0000003.pth"
    assert str(info.value) == (
        f"While training went on after iteration 3: Cannot save checkpoint {path}: Input/output "
        "error. Earlier checkpoints are intact: the device fails, so see the system's log, or set "
        "another OUTPUT_DIR."
    )
    assert (trainer.iter, saved(tmp_path)) == (4, ["model_0000001"])


def test_f20_an_error_of_the_disk_is_loud_and_the_run_goes_on_if_that_is_set(
    trainer: SimpleTrainer,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    disk = FailingDisk(monkeypatch, "model_0000003")
    hook = async_hook(trainer, tmp_path, 2, on_error="warn")
    trainer.register_hooks([hook, at(4, lambda: disk.wait(hook), "before_step")])
    trainer.train(0, 8)
    errors = [r.getMessage() for r in caplog.records if r.levelno == logging.ERROR]
    start = "TRAINING GOES ON WITHOUT A CHECKPOINT. While training went on after iteration 3: "
    assert len(errors) == 1
    assert errors[0].startswith(start)
    assert saved(tmp_path) == [f"model_{n}" for n in ("0000001", "0000005", "0000007", "final")]


def test_f20_a_run_that_leaves_is_saved_though_the_save_before_failed(
    trainer: SimpleTrainer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    FailingDisk(monkeypatch, "model_0000003")
    hook = async_hook(trainer, tmp_path, 4)
    # Later than the checkpointer in that step: the save is in flight, or has failed.
    trainer.register_hooks([hook, at(3, lambda: trainer.request_stop("test"))])
    monkeypatch.setattr(hook, "_ask_for_errors", lambda: None)
    with pytest.raises(CheckpointWriteError, match="model_0000003") as info:
        trainer.train(0, 8)
    # Both were tried, since the second might have been made where the first was not.
    assert any("_save_end" in note for note in info.value.__notes__)


def test_f20_an_error_of_training_is_not_hidden_by_one_of_the_disk(
    trainer: SimpleTrainer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    FailingDisk(monkeypatch, "model_0000002")
    failing = at(2, lambda: raising(RuntimeError("broken")))
    trainer.register_hooks([async_hook(trainer, tmp_path, 3), failing])
    with pytest.raises(RuntimeError, match="broken") as info:
        trainer.train(0, 8)
    assert any("after iteration 2: Cannot save" in note for note in info.value.__notes__)
    assert saved(tmp_path) == []


def test_a_slow_save_in_the_background_is_told_too(
    trainer: SimpleTrainer,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "job")
    hook = async_hook(trainer, tmp_path, 2)
    trainer.register_hooks([hook, at(2, lambda: hook._background.wait())])
    trainer.register_hooks(
        [at(3, lambda: setattr(hook._background, "seconds", 40.0), "before_step")]
    )
    trainer.train(0, 5)
    assert caplog.text.count("A checkpoint took 40 s to save") == 1
