"""F14: a poisoned sample in the batch of one rank, under each policy of SOLVER.NON_FINITE."""

import functools
import json
import re
import signal
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.engine.faulty_run import (
    BATCH,
    Fault,
    Sample,
    assert_same_end,
    get,
    kill,
    printed,
    saved,
    start,
)
from tests.engine.run_processes import assert_same

pytestmark = pytest.mark.faults

SKIP, ROLLBACK = (("SOLVER.NON_FINITE", policy) for policy in ("skip", "rollback"))

Unbroken = Callable[[tuple[Any, ...], int], Path]
"""Returns the folder of a run with a sample poisoned in iteration 8, by its options and ranks."""


@pytest.fixture(scope="module")
def unbroken(tmp_path_factory: pytest.TempPathFactory) -> Unbroken:
    folder = tmp_path_factory.mktemp("unbroken")

    @functools.cache
    def run(opts: tuple[Any, ...], world_size: int) -> Path:
        run_folder = folder / str(len(list(folder.iterdir())))
        codes = start(run_folder, opts, sample=poisoned(8, world_size), world_size=world_size)
        assert set(codes) == {0}
        return run_folder

    return run


def poisoned(iteration: int, world_size: int) -> Sample:
    """Returns a sample of the last rank."""
    return Sample(iteration, world_size - 1, "poisoned")


def ends(output_dir: Path, world_size: int) -> list[dict[str, torch.Tensor]]:
    """Returns the model of each rank at its end, which must be finite, buffers included."""
    states = [torch.load(output_dir / f"end.{rank}.pth") for rank in range(world_size)]
    assert all(value.isfinite().all() for state in states for value in state.values())
    return states


def records(output_dir: Path) -> dict[int, dict[str, Any]]:
    """Returns the lines of metrics.json by iteration."""
    lines = map(json.loads, (output_dir / "metrics.json").read_text().splitlines())
    return {line["iteration"]: line for line in lines}


@pytest.mark.parametrize("world_size", [1, 2, 3])
def test_f14_all_ranks_stop_and_name_iteration_rank_and_samples(
    tmp_path: Path, world_size: int
) -> None:
    sample = poisoned(8, world_size)
    assert start(tmp_path, sample=sample, world_size=world_size) == [1] * world_size
    share = BATCH // world_size
    first = 8 * BATCH + sample.rank * share
    told = set()
    for rank in range(world_size):
        text = printed(tmp_path, rank)
        assert "Traceback" not in text
        # At once, and not when metrics are next brought together.
        assert re.search(r"Training failed in iteration 8\b", text)
        told |= set(re.findall(r"NonFiniteError.*: (Iteration .*)", text))
    (message,) = told
    assert message.startswith(f"Iteration 8 on rank {sample.rank} is not finite: ")
    assert re.search(r"loss_cls=nan, .*total_loss=nan", message)
    offsets = re.findall(r"0:(\d+)=\d+", message)
    assert [int(offset) for offset in offsets] == list(range(first, first + share))
    # The best model is that of iteration 3.
    assert saved(tmp_path) == [3, 5]


@pytest.mark.parametrize(("world_size", "iteration"), [(1, 0), (1, 8), (2, 8), (3, 0)])
def test_f14_all_ranks_skip_alike_and_end_finite(
    tmp_path: Path, world_size: int, iteration: int
) -> None:
    sample = poisoned(iteration, world_size)
    codes = start(tmp_path, SKIP, sample=sample, world_size=world_size)
    assert codes == [0] * world_size
    states = ends(tmp_path, world_size)
    for state in states:
        seen = [value for name, value in state.items() if name.endswith("batches_tracked")]
        assert seen == [17] * len(seen)
        for name, parameter in state.items():
            if "running" not in name:
                assert torch.equal(parameter, states[0][name]), name
    assert saved(tmp_path)[-1] == 17
    counts = [
        line["skipped_steps"] for line in records(tmp_path).values() if "skipped_steps" in line
    ]
    assert counts == [1]
    for rank in range(world_size):
        (said,) = re.findall(r"The gradient of iteration .*", printed(tmp_path, rank))
        assert said.startswith(f"The gradient of iteration {iteration} is not finite. The losses")
        assert said.endswith("The update is skipped, 1 so far.")


@pytest.mark.parametrize(("world_size", "killed_in"), [(1, 8), (1, 13), (2, 9)])
def test_f14_a_run_that_skipped_and_was_killed_ends_like_one_that_was_not(
    tmp_path: Path, unbroken: Unbroken, world_size: int, killed_in: int
) -> None:
    sample, opts = poisoned(8, world_size), (*SKIP, "SOLVER.CHECKPOINT_PERIOD", 3)
    fault = Fault("before writing", killed_in, kill, tuple(range(world_size)))
    codes = start(tmp_path, opts, fault, sample=sample, world_size=world_size)
    assert set(codes) == {-signal.SIGKILL}
    codes = start(tmp_path, opts, sample=sample, world_size=world_size, resume=True)
    assert set(codes) == {0}
    assert_same_end(tmp_path, unbroken(opts, world_size))


def test_f14_a_run_in_which_all_steps_are_skipped_ends(tmp_path: Path) -> None:
    # After the first step the weights are so large that all losses overflow.
    opts = [*SKIP, "SOLVER.MAX_ITER", 40, "SOLVER.BASE_LR", 1e30, "TEST.EVAL_PERIOD", 0]
    opts += ["SOLVER.WARMUP_ITERS", 0, "SOLVER.CHECKPOINT_PERIOD", 0]
    assert start(tmp_path, opts, world_size=2) == [1, 1]
    text = printed(tmp_path)
    assert re.search(r"So were those of the 19 steps before.*lower the learning rate", text)


@pytest.mark.parametrize(("world_size", "iteration"), [(1, 0), (1, 8), (2, 8)])
def test_f14_a_run_goes_back_and_passes_the_samples_over(
    tmp_path: Path, world_size: int, iteration: int
) -> None:
    sample = poisoned(iteration, world_size)
    codes = start(tmp_path, ROLLBACK, sample=sample, world_size=world_size)
    assert codes == [0] * world_size
    ends(tmp_path, world_size)
    assert saved(tmp_path)[-1] == 17
    back_to = 6 if iteration else 0
    text = f"Rolled back from iteration {iteration} to {back_to}; the samples of the former"
    assert printed(tmp_path).count(text) == 1
    data = torch.load(tmp_path / "model_final.pth", weights_only=True)["trainer"]["data"]
    start_of_step, end_of_step = BATCH * iteration, BATCH * (iteration + 1)
    expected = {
        "epoch": 0,
        "offset": BATCH * 19,
        "passed_over": [[0, start_of_step, 0, end_of_step]],
    }
    assert [rank["loader"] for rank in data] == [{"seed": 3, **expected}] * world_size
    # As if nothing had happened: one line for each iteration, none of them of the bad step.
    assert sorted(records(tmp_path)) == [2, 3, 5, 7, 8, 11, 14, 15, 17, 18]
    assert all(record.get("total_loss", 0) is not None for record in records(tmp_path).values())


@pytest.mark.parametrize(
    ("world_size", "place", "killed_in"),
    [(1, "rolled back", 5), (1, "before_step", 10), (2, "before_step", 13)],
)
def test_f14_a_run_that_went_back_and_was_killed_ends_like_one_that_was_not(
    tmp_path: Path, unbroken: Unbroken, world_size: int, place: str, killed_in: int
) -> None:
    sample = poisoned(8, world_size)
    fault = Fault(place, killed_in, kill, tuple(range(world_size)))
    codes = start(tmp_path, ROLLBACK, fault, sample=sample, world_size=world_size)
    assert set(codes) == {-signal.SIGKILL}
    codes = start(tmp_path, ROLLBACK, sample=sample, world_size=world_size, resume=True)
    assert set(codes) == {0}
    expected = unbroken(ROLLBACK, world_size)
    assert_same_end(tmp_path, expected)
    assert_same(ends(tmp_path, world_size), ends(expected, world_size))


@pytest.mark.parametrize(
    ("world_size", "place", "iteration"),
    [(1, "before_step", 8), (1, "rolled back", 5), (2, "before_step", 8)],
)
def test_f14_a_signal_is_not_forgotten_when_a_run_goes_back(
    tmp_path: Path, unbroken: Unbroken, world_size: int, place: str, iteration: int
) -> None:
    sample = poisoned(8, world_size)
    fault = Fault(place, iteration, partial(get, signal.SIGTERM), ranks=(sample.rank,))
    codes = start(tmp_path, ROLLBACK, fault, sample=sample, world_size=world_size)
    assert codes == [143] * world_size
    codes = start(tmp_path, ROLLBACK, sample=sample, world_size=world_size, resume=True)
    assert set(codes) == {0}
    assert_same_end(tmp_path, unbroken(ROLLBACK, world_size))


def test_f14_a_run_that_goes_back_in_vain_gives_up(tmp_path: Path) -> None:
    opts = [*ROLLBACK, "SOLVER.BASE_LR", 1e30, "SOLVER.WARMUP_ITERS", 0]
    assert start(tmp_path, opts) == [1]
    text = printed(tmp_path)
    assert text.count("Rolled back from iteration 1 to 0") == 5
    assert "Rolled back 5 times to one checkpoint: giving up." in text
    assert saved(tmp_path) == [-1]
