"""What a run does when the storage refuses a save, and what it tells before that happens."""

import contextlib
import errno
import json
import logging
import os
import re
import socket
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn
from torch.multiprocessing.spawn import start_processes

from tests.engine.hooks.refused_save import run
from tests.small_disk import small_disk
from trainkit.checkpoint import format as checkpoint_format
from trainkit.checkpoint import space
from trainkit.checkpoint.checkpointer import Checkpointer
from trainkit.engine.hook_base import HookBase
from trainkit.engine.hooks.callback import CallbackHook
from trainkit.engine.hooks.checkpoint import BestCheckpointer, PeriodicCheckpointer
from trainkit.engine.train_loop import SimpleTrainer, TrainerBase
from trainkit.utils import file_io
from trainkit.utils.errors import CheckpointError, CheckpointWriteError

MakeTrainer = Callable[..., SimpleTrainer]
Refuse = Callable[[SimpleTrainer, set[int]], None]
GOES_ON = "TRAINING GOES ON WITHOUT A CHECKPOINT. Cannot save checkpoint "


def checkpointer_of(trainer: TrainerBase, folder: Path, model: Any = None) -> Checkpointer:
    return Checkpointer(model or trainer.model, folder, trainer=weakref.proxy(trainer))  # type: ignore[attr-defined]  # SimpleTrainer's


def saved(folder: Path) -> list[str]:
    return sorted(path.stem for path in folder.glob("*.pth"))


@pytest.fixture
def trainer(simple: MakeTrainer) -> SimpleTrainer:
    return simple(seed=1)


@pytest.fixture
def refuse(monkeypatch: pytest.MonkeyPatch) -> Refuse:
    """Makes publishing fail in some iterations; after the last one, `iter` is one more."""

    def install(trainer: SimpleTrainer, iterations: set[int]) -> None:
        publish, of = file_io.publish, weakref.ref(trainer)

        def publishing(temporary: Path, path: Path) -> None:
            if of().iter in iterations:  # type: ignore[union-attr]  # alive
                raise OSError(errno.EIO, os.strerror(errno.EIO))
            publish(temporary, path)

        monkeypatch.setattr(checkpoint_format, "publish", publishing)

    return install


def test_a_refused_save_ends_the_run_by_default(
    trainer: SimpleTrainer, tmp_path: Path, refuse: Refuse
) -> None:
    trainer.register_hooks([PeriodicCheckpointer(checkpointer_of(trainer, tmp_path), 1)])
    refuse(trainer, {2})
    with pytest.raises(CheckpointWriteError, match=r"model_0000002\.pth: Input/output error"):
        trainer.train(0, 5)
    assert (trainer.iter, saved(tmp_path)) == (2, ["model_0000000", "model_0000001"])


def test_a_refused_save_is_loud_and_the_run_goes_on_if_that_is_set(
    trainer: SimpleTrainer, tmp_path: Path, refuse: Refuse, caplog: pytest.LogCaptureFixture
) -> None:
    checkpointer = checkpointer_of(trainer, tmp_path)
    trainer.register_hooks([PeriodicCheckpointer(checkpointer, 1, on_error="warn")])
    refuse(trainer, {1, 2})
    trainer.train(0, 5)
    assert trainer.iter == 5
    assert saved(tmp_path) == [
        f"model_{name}" for name in ("0000000", "0000003", "0000004", "final")
    ]
    errors = [record for record in caplog.records if record.levelno == logging.ERROR]
    assert len(errors) == 2
    assert errors[0].getMessage().startswith(f"{GOES_ON}{tmp_path / 'model_0000001.pth'}: Input")


def test_a_refused_final_save_always_ends_the_run(
    trainer: SimpleTrainer, tmp_path: Path, refuse: Refuse
) -> None:
    checkpointer = checkpointer_of(trainer, tmp_path)
    trainer.register_hooks([PeriodicCheckpointer(checkpointer, 2, on_error="warn")])
    refuse(trainer, {4})
    with pytest.raises(CheckpointWriteError, match=r"model_final\.pth: Input/output error"):
        trainer.train(0, 5)


def test_a_refused_save_on_interruption_always_ends_the_run(
    trainer: SimpleTrainer, tmp_path: Path, refuse: Refuse
) -> None:
    def stop(trainer: SimpleTrainer) -> None:
        if trainer.iter == 2:
            trainer.request_stop("test")

    checkpointer = checkpointer_of(trainer, tmp_path)
    hooks = [PeriodicCheckpointer(checkpointer, 0, on_error="warn"), CallbackHook(after_step=stop)]
    trainer.register_hooks(hooks)
    refuse(trainer, {3})
    with pytest.raises(CheckpointWriteError, match=r"model_0000002\.pth: Input/output error"):
        trainer.train(0, 5)


def test_a_state_that_cannot_be_stored_always_ends_the_run(
    trainer: SimpleTrainer, tmp_path: Path
) -> None:
    class Late(HookBase):
        def state_dict(self) -> dict[str, Any]:
            return {"value": np.float64(1) if self.trainer.iter > 1 else 1.0}

    checkpointer = checkpointer_of(trainer, tmp_path)
    trainer.register_hooks([PeriodicCheckpointer(checkpointer, 1, on_error="warn"), Late()])
    with pytest.raises(CheckpointError, match=r"trainer\.hooks\..*Late\.value: numpy\.float64"):
        trainer.train(0, 5)
    assert trainer.iter == 2


def test_a_best_model_that_was_refused_is_still_to_be_beaten(
    trainer: SimpleTrainer, tmp_path: Path, refuse: Refuse, caplog: pytest.LogCaptureFixture
) -> None:
    values = {0: 0.1, 1: 0.9, 2: 0.5, 3: 0.4}

    def put(trainer: SimpleTrainer) -> None:
        if trainer.iter in values:
            trainer.storage.put_scalar("acc", values[trainer.iter], smoothing_hint=False)

    checkpointer = checkpointer_of(trainer, tmp_path)
    best = BestCheckpointer(1, checkpointer, "acc", on_error="warn")
    trainer.register_hooks([CallbackHook(after_step=put), best])
    refuse(trainer, {1})
    trainer.train(0, 5)
    assert f"{GOES_ON}{tmp_path / 'model_best.pth'}: Input" in caplog.text
    assert best.state_dict() == {"best": 0.5, "best_iter": 2}
    data = torch.load(tmp_path / "model_best.pth", weights_only=True)
    assert data["trainer"]["hooks"]["BestCheckpointer"] == {"best": 0.5, "best_iter": 2}


def test_a_refused_best_model_ends_the_run_by_default(
    trainer: SimpleTrainer, tmp_path: Path, refuse: Refuse
) -> None:
    checkpointer = checkpointer_of(trainer, tmp_path)
    trainer.register_hooks([BestCheckpointer(1, checkpointer, "total_loss", mode="min")])
    refuse(trainer, {0})
    with pytest.raises(CheckpointWriteError, match=r"model_best\.pth"):
        trainer.train(0, 5)


def test_an_unknown_policy_is_an_error(trainer: SimpleTrainer, tmp_path: Path) -> None:
    checkpointer = checkpointer_of(trainer, tmp_path)
    with pytest.raises(ValueError, match=r"ON_ERROR\) is 'ignore'; it must be 'raise' or 'warn'"):
        PeriodicCheckpointer(checkpointer, 1, on_error="ignore")
    with pytest.raises(ValueError, match=r"ON_ERROR\) is ''"):
        BestCheckpointer(1, checkpointer, "acc", on_error="")


@pytest.mark.slow
@pytest.mark.faults
def test_f04_all_ranks_do_alike_after_a_refused_save(tmp_path: Path) -> None:
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        port = server.getsockname()[1]
    start_processes(run, (tmp_path, port), nprocs=2, start_method="forkserver")
    first, second = (json.loads((tmp_path / f"{rank}.json").read_text()) for rank in range(2))
    assert first == second
    assert "model_0000002.pth: Input/output error" in first["raise"]["error"]
    assert first["raise"]["iterations"] == [0, 1]
    assert first["warn"] == {"error": "", "iterations": [0, 1, 2, 3, 4]}
    names = [f"model_{name}" for name in ("0000000", "0000001", "0000003", "0000004", "final")]
    assert saved(tmp_path / "warn") == names


class Holding(HookBase):
    """A hook whose state is a given value."""

    def __init__(self, value: Any) -> None:
        self.value = value

    def state_dict(self) -> dict[str, Any]:
        return {"value": self.value}


@pytest.mark.parametrize("start_iter", [0, 3])
def test_a_state_that_cannot_be_stored_is_found_after_the_first_iteration(
    trainer: SimpleTrainer, tmp_path: Path, start_iter: int
) -> None:
    checkpointer = checkpointer_of(trainer, tmp_path)
    trainer.register_hooks([PeriodicCheckpointer(checkpointer, 0), Holding(np.float64(1))])
    with pytest.raises(CheckpointError, match=r"trainer\.hooks\.Holding\.value: numpy\.float64"):
        trainer.train(start_iter, 100)
    assert trainer.iter == start_iter
    assert saved(tmp_path) == []


def test_parts_beside_the_trainer_are_looked_at_too(trainer: SimpleTrainer, tmp_path: Path) -> None:
    checkpointer = Checkpointer(trainer.model, tmp_path, extra=Holding(np.float64(1)))
    # The hook's state is not saved by this checkpointer.
    trainer.register_hooks([PeriodicCheckpointer(checkpointer, 0), Holding({1, 2, object})])
    with pytest.raises(CheckpointError, match=r"extra\.value: numpy\.float64"):
        trainer.train(0, 100)
    assert trainer.iter == 0


def test_what_is_not_saved_is_not_looked_at(trainer: SimpleTrainer) -> None:
    checkpointer = checkpointer_of(trainer, Path())
    checkpointer.save_dir = ""
    trainer.register_hooks([PeriodicCheckpointer(checkpointer, 1), Holding(object())])
    trainer.train(0, 3)
    assert trainer.iter == 3


def test_the_state_is_looked_at_once(trainer: SimpleTrainer, tmp_path: Path) -> None:
    class Counting(HookBase):
        count = 0

        def state_dict(self) -> dict[str, Any]:
            Counting.count += 1
            return {}

    checkpointer = checkpointer_of(trainer, tmp_path)
    trainer.register_hooks([PeriodicCheckpointer(checkpointer, 0), Counting()])
    trainer.train(0, 10)
    # And by the final save.
    assert Counting.count == 2


def test_a_loop_without_optimizer_and_data_is_looked_at(
    loop: Callable[[], TrainerBase], tmp_path: Path
) -> None:
    trainer = loop()
    checkpointer = checkpointer_of(trainer, tmp_path, nn.Linear(1, 1))
    trainer.register_hooks([PeriodicCheckpointer(checkpointer, 1, max_to_keep=1)])
    trainer.train(0, 2)
    assert saved(tmp_path) == ["model_0000001", "model_final"]


@pytest.mark.parametrize(
    ("period", "max_to_keep", "with_best", "count"),
    [(2, 3, True, 6), (2, None, False, 7), (4, 3, False, 4), (0, 3, False, 2)],
)
def test_the_bytes_of_the_whole_run_are_told_after_the_first_iteration(
    trainer: SimpleTrainer,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    period: int,
    max_to_keep: int | None,
    with_best: bool,
    count: int,
) -> None:
    monkeypatch.setattr(space, "free_bytes", lambda folder: 10)
    checkpointer = checkpointer_of(trainer, tmp_path)
    hook = PeriodicCheckpointer(checkpointer, period, max_to_keep=max_to_keep)
    best = BestCheckpointer(5, checkpointer, "total_loss") if with_best else None
    trainer.register_hooks([hook, best])
    first: list[str] = []
    look = CallbackHook(after_step=lambda t: first.extend(caplog.messages[:1]))
    trainer.register_hooks([look])
    trainer.train(0, 10)
    found = re.match(
        r"The (\d+) checkpoints that this run may hold at once, of about ([\d,]+) bytes each, need "
        r"([\d,]+) more bytes in (.*), where 10 are free\. Make room",
        first[0],
    )
    assert found
    numbers = [int(number.replace(",", "")) for number in found.groups()[:3]]
    assert numbers == [count, numbers[1], count * numbers[1]]
    assert found[4] == str(tmp_path)
    # Without the frame of the format and the metrics, which a real model's size makes small.
    assert 0.5 < numbers[1] / (tmp_path / "model_final.pth").stat().st_size <= 1


@pytest.mark.faults
@pytest.mark.parametrize("on_error", ["raise", "warn"])
def test_f03_a_run_on_a_full_disk_is_warned_in_time_and_obeys_its_policy(
    trainer: SimpleTrainer, tmp_path: Path, caplog: pytest.LogCaptureFixture, on_error: str
) -> None:
    big: dict[str, Any] = {"rest": nn.Linear(500, 500)}
    with small_disk(tmp_path / "disk", 4_000_000) as disk:
        checkpointer = Checkpointer(trainer.model, disk, trainer=weakref.proxy(trainer), **big)
        hook = PeriodicCheckpointer(checkpointer, 1, on_error=on_error)
        log: list[tuple[int, int]] = []

        def look(trainer: SimpleTrainer) -> None:
            log.append((len(saved(disk)), len(caplog.messages)))
            if len(log) == 6:
                for path in disk.glob("*.pth"):
                    path.unlink()

        trainer.register_hooks([hook, CallbackHook(after_step=look)])
        if on_error == "raise":
            with pytest.raises(CheckpointWriteError, match="No space left on device"):
                trainer.train(0, 8)
        else:
            trainer.train(0, 8)
            assert saved(disk) == ["model_0000006", "model_0000007", "model_final"]
        assert not list(disk.glob(".*"))
    # A checkpoint has a megabyte: three fit.
    assert [count for count, _ in log][:3] == [1, 2, 3]
    warnings = [m for m in caplog.messages if "more bytes in" in m]
    assert warnings[0].startswith("The 10 checkpoints that this run may hold at once, of about 1,0")
    third = next(m for m in caplog.messages if "Cannot save" in m or "next one" in m)
    assert third.startswith("This checkpoint and the next one, of about 1,0")
    assert "Cannot save" not in "".join(caplog.messages[: log[2][1]])


@pytest.mark.faults
def test_f03_a_run_that_a_full_disk_ended_goes_on_bit_for_bit(
    simple: MakeTrainer, regression: Callable[..., nn.Module], tmp_path: Path
) -> None:
    def make() -> SimpleTrainer:
        return simple(regression(0.5), seed=1)

    def fill(trainer: SimpleTrainer) -> None:
        if trainer.iter == 4:
            with contextlib.suppress(OSError), (disk / "ballast").open("wb", buffering=0) as file:
                while file.write(bytes(1024)):
                    pass

    unbroken, ended, resumed = make(), make(), make()
    unbroken.train(0, 9)
    with small_disk(tmp_path / "disk", 1_000_000) as disk:
        checkpointer = checkpointer_of(ended, disk)
        ended.register_hooks(
            [CallbackHook(before_step=fill), PeriodicCheckpointer(checkpointer, 2)]
        )
        with pytest.raises(CheckpointWriteError, match="No space left on device"):
            ended.train(0, 9)
        assert saved(disk) == ["model_0000001", "model_0000003"]
        (disk / "ballast").unlink()
        checkpointer_of(resumed, disk).resume_or_load("")
        assert resumed.iter == 3
        resumed.train(4, 9)
    expected = unbroken.model.state_dict()
    assert all(torch.equal(v, expected[k]) for k, v in resumed.model.state_dict().items())
