"""F5, F6 and F7: whatever happens to the files of a run's folder, the run goes on to the same end.

Every file that a run leaves is damaged in turn, and the run resumed and compared bit for bit.
"""

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from random import Random
from typing import Any

import pytest
import torch
from torch import nn

from trainkit.config import CfgNode, get_cfg
from trainkit.data import build_train_loader
from trainkit.engine import DefaultTrainer

pytestmark = pytest.mark.faults

# A run of 7 iterations, saved after every second one, that is then made longer.
SHORT, LONG, PERIOD = 7, 10, 2
OLDER, NEWEST = "model_0000005.pth", "model_final.pth"
Fault = Callable[[Path, Random], None]
Ends = dict[int, dict[str, Any]]


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(4, 8), nn.Dropout(0.5), nn.ReLU(), nn.Linear(8, 2))

    def forward(self, batch: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        logits = self.layers(batch["point"])
        return {"loss_cls": nn.functional.cross_entropy(logits, batch["label"])}


class Trainer(DefaultTrainer):
    @classmethod
    def build_model(cls, cfg: CfgNode) -> nn.Module:
        return Net()

    @classmethod
    def build_train_loader(cls, cfg: CfgNode) -> Any:
        points = torch.randn(40, 4, generator=torch.Generator().manual_seed(0))
        return build_train_loader(cfg, [{"point": p, "label": int(p.sum() > 0)} for p in points])


def train(folder: Path, max_iter: int, resume: bool = True) -> dict[str, Any]:
    """Trains on to `max_iter`, and returns all that decides what would come next."""
    cfg = get_cfg()
    settings: list[Any] = ["OUTPUT_DIR", str(folder), "MODEL.DEVICE", "cpu", "SEED", 1]
    settings += ["SOLVER.MAX_ITER", max_iter, "SOLVER.IMS_PER_BATCH", 8, "LOG_PERIOD", 1]
    settings += ["SOLVER.LR_SCHEDULER_NAME", "WarmupMultiStepLR", "SOLVER.STEPS", (3,)]
    settings += ["SOLVER.WARMUP_ITERS", 2, "SOLVER.CHECKPOINT_PERIOD", PERIOD]
    settings += ["DATALOADER.NUM_WORKERS", 0, "DATASETS.TEST", (), "TEST.EVAL_PERIOD", 0]
    cfg.merge_from_list(settings)
    trainer = Trainer(cfg)
    trainer.resume_or_load(resume)
    trainer.train()
    saved = torch.load(folder / "model_final.pth", weights_only=True)
    return {"model": saved["model"], "optimizer": saved["trainer"]["optimizer"]["state"]}


@pytest.fixture(scope="module")
def short(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("short") / "run"
    train(folder, SHORT, resume=False)
    return folder


@pytest.fixture(scope="module")
def ends(tmp_path_factory: pytest.TempPathFactory) -> Ends:
    """The ends of a run that nothing happened to, by length."""
    return {n: train(tmp_path_factory.mktemp(str(n)), n, resume=False) for n in (SHORT, LONG)}


@pytest.fixture
def run(short: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(short, tmp_path / "run"))


# `events*` stands for TensorBoard's file, whose name is never the same.
FILES = ["config.yaml", "events*", "finished.json", "last_checkpoint", "metrics.json", "run.lock"]
FILES += ["model_0000001.pth", "model_0000003.pth", OLDER, NEWEST]


def the_file(run: Path, pattern: str) -> Path:
    (path,) = run.glob(pattern)
    return path


def flip(path: Path, draw: Random) -> None:
    content = bytearray(path.read_bytes())
    if content:
        content[draw.randrange(len(content))] ^= 1 << draw.randrange(8)
    path.write_bytes(content)


def truncate(path: Path, draw: Random) -> None:
    content = path.read_bytes()
    path.write_bytes(content[: draw.randrange(len(content))] if content else b"")


def empty(path: Path, draw: Random) -> None:
    path.write_bytes(b"")


def remove(path: Path, draw: Random) -> None:
    path.unlink()


def lengthen(path: Path, draw: Random) -> None:
    path.write_bytes(path.read_bytes() + draw.randbytes(draw.choice((1, 100, 5000))))


def test_every_file_of_a_run_is_damaged_in_turn(short: Path) -> None:
    patterns = [pattern for path in short.iterdir() for pattern in FILES if path.match(pattern)]
    assert sorted(patterns) == sorted(FILES)
    assert len(patterns) == len(list(short.iterdir()))


def assert_goes_on(run: Path, max_iter: int, ends: Ends) -> None:
    """The run reaches the end of the unbroken one, and all its files are whole again."""
    torch.testing.assert_close(train(run, max_iter), ends[max_iter], rtol=0, atol=0)
    lines = (run / "metrics.json").read_bytes().splitlines()
    assert json.loads(lines[-1])["iteration"] == max_iter - 1
    assert json.loads((run / "finished.json").read_text()) == {"iteration": max_iter - 1}
    assert (run / "last_checkpoint").read_text() == NEWEST
    cfg = get_cfg()
    cfg.merge_from_file(str(run / "config.yaml"))
    assert max_iter == cfg.SOLVER.MAX_ITER


def assert_told(log: str, name: str) -> None:
    """Of the checkpoints that were not used, no sound one is named, and the newest always is."""
    sound = [file for file in FILES if file.endswith(".pth") and file != name]
    assert not [file for file in sound if file in log]
    if name == NEWEST:
        assert "SKIPPING A CHECKPOINT. Checkpoint " in log
        assert f"{NEWEST} is damaged: " in log


@pytest.mark.parametrize("name", FILES)
def test_f05_a_flipped_bit_in_any_file_changes_no_weight(
    run: Path, ends: Ends, caplog: pytest.LogCaptureFixture, name: str, short: Path
) -> None:
    draw = Random(name)
    for _ in range(4):
        flip(the_file(run, name), draw)
        assert_goes_on(run, LONG, ends)
        assert_told(caplog.text, name)
        caplog.clear()
        shutil.rmtree(run)
        shutil.copytree(short, run)


@pytest.mark.parametrize("name", FILES)
@pytest.mark.parametrize("fault", [truncate, empty, lengthen])
def test_f06_a_truncated_empty_or_longer_file_changes_no_weight(
    run: Path, ends: Ends, caplog: pytest.LogCaptureFixture, name: str, fault: Fault
) -> None:
    fault(the_file(run, name), Random(name))
    assert_goes_on(run, LONG, ends)
    assert_told(caplog.text, name)


@pytest.mark.parametrize("name", FILES)
def test_f06_a_missing_file_changes_no_weight(run: Path, ends: Ends, name: str) -> None:
    the_file(run, name).unlink()
    assert_goes_on(run, LONG, ends)


def test_f06_surplus_files_change_no_weight(run: Path, ends: Ends) -> None:
    for name in (".model_0000009.pth.tmp", "model_9999997.pth", "x.pth", "finished.json.tmp"):
        (run / name).write_bytes(b"left behind")
    (run / "model_9999998.pth").mkdir()
    (run / "model_9999999.pth").symlink_to("gone.pth")
    shutil.copy(run / "model_0000001.pth", run / "model_0000008.pth")
    assert_goes_on(run, LONG, ends)


@pytest.mark.parametrize("fault", [flip, truncate, empty, remove, lengthen])
def test_f05_a_damaged_mark_of_the_end_costs_no_more_than_the_end(
    run: Path, ends: Ends, fault: Fault
) -> None:
    fault(run / "finished.json", Random(0))
    assert_goes_on(run, SHORT, ends)


@pytest.fixture(scope="module")
def another(short: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint of another run, newer than all of the short one's."""
    folder = tmp_path_factory.mktemp("another")
    train(folder, LONG, resume=False)
    return folder / NEWEST


POINTERS = {
    "empty": b"",
    "garbage": b"\xff\xfe\0" * 100,
    "long": b"x" * 1_000_000,
    "dangling": b"model_0000004.pth",
    "to the future": b"model_9999999.pth",
    "to the past": b"model_0000001.pth",
    "to what is damaged": b"model_0000006.pth",
    "out of the folder": b"../outside.pth",
    "absolute": b"/etc/passwd",
    "to the folder": b".",
}


@pytest.mark.parametrize("is_newest_damaged", [False, True])
@pytest.mark.parametrize("pointer", POINTERS)
def test_f07_a_pointer_is_only_advice(
    run: Path,
    ends: Ends,
    another: Path,
    caplog: pytest.LogCaptureFixture,
    pointer: str,
    is_newest_damaged: bool,
) -> None:
    (run / "model_0000006.pth").write_bytes(b"PK")
    os.utime(run / "model_0000006.pth", (0, 0))
    shutil.copy(another, run.parent / "outside.pth")
    if is_newest_damaged:
        flip(run / NEWEST, Random(0))
    (run / "last_checkpoint").write_bytes(POINTERS[pointer])
    assert_goes_on(run, LONG, ends)
    assert_told(caplog.text, NEWEST if is_newest_damaged else "")
