"""Two processes train like one."""

import json
from itertools import chain
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.engine.distributed_run import run
from trainkit.engine import launch

pytestmark = pytest.mark.slow

TOLERANCE = 2e-5
"""Largest difference of a weight after 40 steps: sums over the batch have another order."""


def train(output_dir: Path, num_processes: int, *opts: Any) -> tuple[list[list[int]], Any]:
    launch(run, num_processes, args=(output_dir, list(opts)))
    samples = json.loads((output_dir / "samples.json").read_text())
    return samples, torch.load(output_dir / "model_final.pth", weights_only=True)["model"]


def test_two_processes_see_the_samples_of_one_and_end_with_its_weights(tmp_path: Path) -> None:
    one_samples, one_weights = train(tmp_path / "one", 1)
    two_samples, two_weights = train(tmp_path / "two", 2)
    assert len(one_samples) == 40
    assert two_samples == one_samples
    for name, weight in one_weights.items():
        torch.testing.assert_close(two_weights[name], weight, rtol=0, atol=TOLERANCE)


def test_metrics_of_two_processes_are_those_of_one(tmp_path: Path) -> None:
    for name, num_processes in (("one", 1), ("two", 2)):
        train(tmp_path / name, num_processes, "LOG_PERIOD", 7)
    one, two = (
        [json.loads(line) for line in (tmp_path / name / "metrics.json").read_text().splitlines()]
        for name in ("one", "two")
    )
    assert [record["iteration"] for record in two] == [record["iteration"] for record in one]
    for a, b in zip(one, two, strict=True):
        assert a.keys() == b.keys()
        for name in a.keys() - {"time", "data_time", "rank_data_time", "eta_seconds"}:
            # Between two reductions, rank 0 writes what it has seen itself.
            if (a["iteration"] + 1) % 20 == 0 or "classification" in name:
                assert b[name] == pytest.approx(a[name], abs=1e-4), (name, a["iteration"])


def test_accumulation_on_two_processes_gives_the_weights_of_one(tmp_path: Path) -> None:
    samples, weights = train(tmp_path / "one", 1)
    accumulated_samples, accumulated = train(tmp_path / "two", 2, "SOLVER.ACCUMULATE", 3)
    flat = [list(chain(*accumulated_samples[i : i + 3])) for i in range(0, 120, 3)]
    assert flat == samples
    for name, weight in weights.items():
        torch.testing.assert_close(accumulated[name], weight, rtol=0, atol=TOLERANCE)
