"""A run that is killed again and again ends like one that is not."""

import json
import random
import signal
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import multiprocessing as mp

from tests.engine.killed_run import Kill, run

pytestmark = pytest.mark.faults

TIMINGS = {"time", "data_time", "rank_data_time", "eta_seconds"}

PLACES: list[Kill] = [
    ("inside a save", 29),
    ("evaluation", 39),
    ("before publishing", 44),
    ("after publishing", 59),
    ("between save and evaluation", 59),
    ("before writing", 79),
    ("backward", 97),
    ("inside a save", 119),
    ("between save and evaluation", 119),
    ("before writing", 119),
    ("evaluation", 120),
]


def start(output_dir: Path, opts: list[Any], kill: Kill | None, resume: bool) -> int:
    """Runs in a new process, which has imported everything, and returns its exit code."""
    context = mp.get_context("forkserver")
    context.set_forkserver_preload(["tests.engine.killed_run"])
    process = context.Process(target=run, args=(output_dir, opts, kill, resume))
    process.start()
    process.join(120)
    assert process.exitcode is not None, "the run hangs"
    return process.exitcode


def metrics(output_dir: Path) -> list[str]:
    """Returns the lines of metrics.json without what depends on the time that things took."""
    lines = []
    for line in (output_dir / "metrics.json").read_text().splitlines():
        record = {k: v for k, v in json.loads(line).items() if k not in TIMINGS}
        lines.append(json.dumps(record, sort_keys=True))
    return lines


def assert_same_end(output_dir: Path, expected_dir: Path) -> None:
    ended = torch.load(output_dir / "model_final.pth", weights_only=True)
    expected = torch.load(expected_dir / "model_final.pth", weights_only=True)
    assert_same(ended["model"], expected["model"])
    assert_same(ended["trainer"]["optimizer"], expected["trainer"]["optimizer"])
    assert ended["trainer"]["hooks"]["LRScheduler"] == expected["trainer"]["hooks"]["LRScheduler"]
    best = [d["trainer"]["hooks"]["BestCheckpointer"] for d in (ended, expected)]
    assert best[0] == best[1]
    assert metrics(output_dir) == metrics(expected_dir)


def assert_same(found: Any, expected: Any, path: str = "") -> None:
    """Compares nested states bit for bit."""
    assert type(found) is type(expected), path
    if isinstance(found, dict):
        assert found.keys() == expected.keys(), path
        for key in found:
            assert_same(found[key], expected[key], f"{path}.{key}")
    elif isinstance(found, (list, tuple)):
        assert len(found) == len(expected), path
        for i, (a, b) in enumerate(zip(found, expected, strict=True)):
            assert_same(a, b, f"{path}[{i}]")
    elif isinstance(found, torch.Tensor):
        assert found.dtype == expected.dtype, path
        assert torch.equal(found, expected), path
    else:
        assert found == expected, path


VARIANTS = {
    "0 workers": ["DATALOADER.NUM_WORKERS", 0],
    "2 workers": ["DATALOADER.NUM_WORKERS", 2],
    "accumulation, bf16, clipping": [
        *("DATALOADER.NUM_WORKERS", 0, "SOLVER.ACCUMULATE", 3, "SOLVER.PRECISION", "bf16"),
        *("SOLVER.CLIP_GRADIENTS.ENABLED", True, "SOLVER.OPTIMIZER", "AdamW"),
        *("SOLVER.BASE_LR", 0.003),
    ],
}


@pytest.mark.parametrize("variant", VARIANTS)
def test_a_run_killed_everywhere_ends_like_an_unbroken_one(tmp_path: Path, variant: str) -> None:
    opts = VARIANTS[variant]
    assert start(tmp_path / "unbroken", opts, None, resume=False) == 0
    draw = random.Random(variant)
    kills = [("step", draw.randrange(1, 28)), *PLACES]
    for kill in kills:
        assert start(tmp_path / "killed", opts, kill, resume=True) == -signal.SIGKILL, kill
    assert start(tmp_path / "killed", opts, None, resume=True) == 0
    assert_same_end(tmp_path / "killed", tmp_path / "unbroken")


def test_a_finished_run_is_left_alone(tmp_path: Path) -> None:
    opts = ["SOLVER.MAX_ITER", 30, "DATALOADER.NUM_WORKERS", 0]
    assert start(tmp_path, opts, None, resume=False) == 0
    before = metrics(tmp_path)
    saved = (tmp_path / "model_final.pth").read_bytes()
    assert start(tmp_path, opts, None, resume=True) == 0
    assert metrics(tmp_path) == before
    assert (tmp_path / "model_final.pth").read_bytes() == saved


def test_a_finished_run_that_is_made_longer_goes_on(tmp_path: Path) -> None:
    # A schedule that does not depend on the length of the run.
    opts = ["DATALOADER.NUM_WORKERS", 0, "SOLVER.LR_SCHEDULER_NAME", "WarmupMultiStepLR"]
    opts += ["SOLVER.STEPS", (25,), "SOLVER.WARMUP_ITERS", 0]
    assert start(tmp_path / "long", [*opts, "SOLVER.MAX_ITER", 60], None, resume=False) == 0
    assert start(tmp_path / "grown", [*opts, "SOLVER.MAX_ITER", 30], None, resume=False) == 0
    assert start(tmp_path / "grown", [*opts, "SOLVER.MAX_ITER", 60], None, resume=True) == 0
    ended, expected = (
        torch.load(tmp_path / name / "model_final.pth", weights_only=True)
        for name in ("grown", "long")
    )
    assert_same(ended["model"], expected["model"])
    assert_same(ended["trainer"]["optimizer"], expected["trainer"]["optimizer"])
