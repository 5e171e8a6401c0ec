"""A run that is killed again and again ends like one that is not."""

import random
import signal
from collections.abc import Sequence
from itertools import chain
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch

from tests.engine.killed_run import PLAIN, Kill, Setup
from tests.engine.run_processes import (
    assert_same,
    assert_same_end,
    assert_same_run,
    metrics,
    records,
    start,
    start_ranks,
    steps,
)

__all__ = ["assert_same", "assert_same_end", "metrics", "start"]

pytestmark = pytest.mark.faults

SHORT: list[Any] = [
    *("SOLVER.MAX_ITER", 36, "SOLVER.IMS_PER_BATCH", 36, "SOLVER.WARMUP_ITERS", 6),
    *("SOLVER.CHECKPOINT_PERIOD", 4, "TEST.EVAL_PERIOD", 8, "TEST.IMS_PER_BATCH", 15),
    *("LOG_PERIOD", 4, "GATHER_METRIC_PERIOD", 6),
]
PLACES: list[Kill] = [
    ("step", 2),
    ("inside a save", 7),
    ("evaluation", 7),
    ("before the best", 7),
    ("before publishing", 11),
    ("between save and evaluation", 15),
    # While the step that the last kill cut is finished.
    ("evaluation", 15),
    ("backward", 18),
    ("after publishing", 19),
    ("before writing", 23),
    ("step", 28),
    ("inside a save", 35),
    ("between save and evaluation", 35),
    ("evaluation", 36),
    ("before the end is noted", 36),
]
"""In the order in which a run of `SHORT` comes to them; 35 is its last iteration."""

ON_MAIN = (
    *("inside a save", "before publishing", "before the best", "after publishing"),
    "before the end is noted",
)
"""Places that only rank 0 comes to."""

BF16 = (
    *("SOLVER.ACCUMULATE", 3, "SOLVER.PRECISION", "bf16", "SOLVER.CLIP_GRADIENTS.ENABLED", True),
    *("SOLVER.OPTIMIZER", "AdamW", "SOLVER.BASE_LR", 0.003),
)


AVERAGED = (
    *("MODEL.EMA.ENABLED", True, "MODEL.EMA.DECAY", 0.9, "DATASETS.VAL", ("tiny_test",)),
    *("TEST.PRECISE_BN.ENABLED", True, "TEST.PRECISE_BN.NUM_ITER", 2),
    *("TEST.EARLY_STOPPING.METRIC", "val/total_loss", "TEST.EARLY_STOPPING.PATIENCE", 100),
)
FP16 = ("SOLVER.PRECISION", "fp16", "SOLVER.ACCUMULATE", 2)

ASYNC = ("CHECKPOINT.ASYNC", True)


class Variant(NamedTuple):
    world_size: int
    num_workers: int
    opts: tuple[Any, ...] = ()
    setup: Setup = PLAIN
    kills: Sequence[Kill] = PLACES


NO_SEED = Setup(is_seeded=False)
MEMORY = Setup(has_memory=True)
# The net has 6 KB of parameters.
BUCKETS = ("DDP.BUCKET_CAP_MB", 0.001)
VIEWS = (*BUCKETS, "DDP.GRADIENT_AS_BUCKET_VIEW", True)
# Saves often, so that the first kill leaves a single step.
STATIC = ("DDP.STATIC_GRAPH", True, "SOLVER.CHECKPOINT_PERIOD", 1)
VARIANTS = {
    "one rank": Variant(1, 0),
    "one rank, 2 workers": Variant(1, 2),
    "one rank, accumulation, bf16": Variant(1, 0, BF16),
    "one rank, no seed": Variant(1, 0, setup=NO_SEED),
    "one rank, averages, early stopping": Variant(1, 0, AVERAGED),
    "one rank, asynchronous saves": Variant(1, 0, ASYNC),
    "two ranks, asynchronous saves": Variant(2, 2, ASYNC, kills=PLACES[1::3]),
    "two ranks, averages, fp16": Variant(2, 0, AVERAGED + FP16, kills=PLACES[::3]),
    "two ranks, accumulation, bf16": Variant(2, 0, BF16, kills=PLACES[::2]),
    "two ranks, 2 workers, no seed": Variant(2, 2, setup=NO_SEED, kills=PLACES[1::2]),
    "two ranks, buffers of their own": Variant(2, 0, setup=MEMORY, kills=PLACES[1::4]),
    "three ranks, buckets": Variant(3, 0, BUCKETS),
    "three ranks, 2 workers, accumulation, bf16": Variant(3, 2, BF16 + VIEWS, kills=PLACES[1::2]),
    "three ranks, no seed": Variant(3, 0, setup=NO_SEED, kills=PLACES[::4]),
    "three ranks, static graph": Variant(3, 0, STATIC, kills=[("step", 1), *PLACES[::4]]),
}


@pytest.mark.parametrize("name", VARIANTS)
def test_f08_a_run_killed_everywhere_ends_like_an_unbroken_one(tmp_path: Path, name: str) -> None:
    world_size, num_workers, variant, setup, kills = VARIANTS[name]
    opts = [*SHORT, "DATALOADER.NUM_WORKERS", num_workers, *variant]
    unbroken, killed, all_ranks = tmp_path / "unbroken", tmp_path / "killed", range(world_size)
    codes = start_ranks(world_size, unbroken, opts, None, resume=False, setup=setup)
    assert set(codes) == {0}
    draw = random.Random(name)
    for place, iteration in kills:
        one = 0 if place in ON_MAIN else draw.randrange(world_size)
        victims = draw.choice([(one,), tuple(all_ranks)])
        kill = place, iteration
        codes = start_ranks(world_size, killed, opts, kill, True, victims, setup)
        assert any(codes[rank] == -signal.SIGKILL for rank in victims), (kill, victims, codes)
        # The others have noticed; at the very end, there is nothing left to notice.
        assert all(codes) or place == "before the end is noted", (kill, victims, codes)
    codes = start_ranks(world_size, killed, opts, None, resume=True, setup=setup)
    assert set(codes) == {0}
    assert_same_run(killed, unbroken, world_size)


def test_f08_a_run_killed_in_every_step_ends_like_an_unbroken_one(tmp_path: Path) -> None:
    opts = [*SHORT, "SOLVER.MAX_ITER", 20, "SOLVER.CHECKPOINT_PERIOD", 3]
    opts += ["DATALOADER.NUM_WORKERS", 0]
    assert start(tmp_path / "unbroken", opts, None, resume=False) == 0
    for iteration in range(20):
        kill = ("step" if iteration % 2 else "backward"), iteration
        assert start(tmp_path / "killed", opts, kill, resume=True) == -signal.SIGKILL, kill
    assert start(tmp_path / "killed", opts, None, resume=True) == 0
    assert_same_run(tmp_path / "killed", tmp_path / "unbroken")


@pytest.mark.parametrize("world_size", [1, 2])
@pytest.mark.parametrize("num_workers", [0, 2])
def test_f09_five_kills_within_an_epoch_repeat_no_sample_and_miss_none(
    tmp_path: Path, num_workers: int, world_size: int
) -> None:
    # 25 iterations of 20 samples are an epoch.
    opts = [*SHORT, "SOLVER.MAX_ITER", 30, "SOLVER.IMS_PER_BATCH", 20, "TEST.EVAL_PERIOD", 0]
    opts += ["SOLVER.CHECKPOINT_PERIOD", 3, "DATALOADER.NUM_WORKERS", num_workers]
    draw = random.Random(10 * num_workers + world_size)
    for iteration in sorted(draw.sample(range(2, 25), 5)):
        kill = draw.choice(("step", "backward", "before writing")), iteration
        victims = (draw.randrange(world_size),)
        codes = start_ranks(world_size, tmp_path, opts, kill, resume=True, victims=victims)
        assert codes[victims[0]] == -signal.SIGKILL
    assert set(start_ranks(world_size, tmp_path, opts, None, resume=True)) == {0}
    ranks = range(world_size)
    parts = chain.from_iterable(steps(tmp_path, rank)[:25] for rank in ranks)
    consumed = chain.from_iterable(chain.from_iterable(part["samples"] for part in parts))
    assert sorted(consumed) == list(range(500))
    for rank in ranks:
        done = steps(tmp_path, rank)
        assert len(done) == 30
        # What a kill undid was done again with the same samples.
        for record in records(tmp_path, rank):
            assert record["samples"] == done[record["iteration"]]["samples"]


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
