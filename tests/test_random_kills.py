import json
import random
from pathlib import Path

import pytest
import torch

from tests import random_kills
from tests.random_kills import Torture, main, newest_valid
from tests.watched_run import Plan, Watch
from trainkit.checkpoint import Checkpointer

PLAN = Plan(1, 0, "", {"SOLVER.MAX_ITER": "40", "TEST.EVAL_PERIOD": "20"})

SMALL = ["SOLVER.MAX_ITER", "40", "SOLVER.CHECKPOINT_PERIOD", "5", "TEST.EVAL_PERIOD", "10"]
SMALL += ["SOLVER.WARMUP_ITERS", "5", "MODEL.BACKBONE.WIDTHS", "(4, 8)"]
SMALL += ["MODEL.BACKBONE.BLOCKS", "(0, 1)"]


@pytest.mark.faults
def test_f08_runs_killed_from_outside_are_not_lost(tmp_path: Path) -> None:
    arguments = ["--kills", "2", "--output", str(tmp_path), "--ranks", "2", "--workers", "0"]
    assert main([*arguments, *SMALL]) == 0
    kills = [json.loads(line) for line in (tmp_path / "kills.jsonl").read_text().splitlines()]
    assert len(kills) == 2
    text = (tmp_path / "kills.md").read_text()
    assert "Faults: 0." in text
    assert "| 1 of 1" in text


def test_phases_are_told_apart_by_the_log_and_by_temporary_files(tmp_path: Path) -> None:
    log, saving = tmp_path / "log.txt", tmp_path / ".model_0000009.pth.tmp"
    # Those of an earlier start do not count.
    log.write_text("Starting training from iteration 0\n")
    saving.touch()
    watch, seen = Watch(PLAN, tmp_path), []
    for line in (
        "Starting training from iteration 10",
        "Saved checkpoint to /x/model_0000009.pth: 7 bytes in 0.01 s",
        "Saved checkpoint to /x/model_0000019.pth: 7 bytes in 0.01 s",
        "Start inference on 4 batches",
        "Results on tiny:",
        "top1 is 0.5 after iteration 19, the best so far (before: none)",
        "Saved checkpoint to /x/model_best.pth: 7 bytes in 0.01 s",
        "Saved checkpoint to /x/model_final.pth: 7 bytes in 0.01 s",
    ):
        seen.append(watch.phase)
        with log.open("a") as file:
            file.write(f"[11/21] {line}\n")
        watch.look()
    expected = ["start-up", "steps", "steps", "between save and evaluation", "evaluation"]
    assert seen == [*expected, "steps", "steps", "steps"]
    assert watch.phase == "end of the run"
    assert watch.saved == [9, 19, 19, 39]
    saving.write_bytes(b"half")
    assert watch.phase == "save"


def test_the_newest_valid_checkpoint_is_found_behind_a_damaged_one(tmp_path: Path) -> None:
    assert newest_valid(tmp_path) == -1
    checkpointer = Checkpointer(torch.nn.Linear(1, 1), tmp_path)
    for iteration in (3, 7):
        checkpointer.save(f"model_{iteration:07d}", iteration=iteration)
    assert newest_valid(tmp_path) == 7
    (tmp_path / "model_0000007.pth").write_bytes(b"half")
    assert newest_valid(tmp_path) == 3


def test_a_run_that_ends_otherwise_is_a_fault(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def differ(*folders: Path) -> None:
        raise AssertionError(".head.weight")

    monkeypatch.setattr(random_kills, "assert_same_end", differ)
    torture = Torture(PLAN, tmp_path, draw=random.Random(0))
    assert not torture._ends_alike(tmp_path / "run-0")
    assert torture.num_different == 1
    assert torture.faults == [
        f"{tmp_path / 'run-0'} ends otherwise than the unbroken run: .head.weight"
    ]
