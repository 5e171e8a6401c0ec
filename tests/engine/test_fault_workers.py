"""F16: a worker of a data loader is killed."""

import signal
from pathlib import Path

import pytest

from tests.engine.faulty_run import (
    Fault,
    Sample,
    assert_same_end,
    kill_workers,
    printed,
    saved,
    start,
)

pytestmark = pytest.mark.faults

WORKERS = ["DATALOADER.NUM_WORKERS", 2]


@pytest.fixture(scope="module")
def unbroken(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("runs") / "unbroken"
    assert start(folder, WORKERS) == [0]
    return folder


@pytest.mark.parametrize("iteration", [0, 8])
def test_f16_a_worker_that_dies_is_told_with_the_mend_and_a_resume_is_exact(
    tmp_path: Path, unbroken: Path, iteration: int
) -> None:
    assert start(tmp_path, WORKERS, sample=Sample(iteration, 0, "deadly")) == [1]
    assert "lower DATALOADER.NUM_WORKERS, and go on with --resume." in printed(tmp_path)
    # Workers are ahead by some batches.
    assert set(saved(tmp_path)) <= {3, 5, 7}
    assert start(tmp_path, WORKERS, resume=True) == [0]
    assert_same_end(tmp_path, unbroken)


@pytest.mark.parametrize("place", ["before_step", "evaluation", "save"])
def test_f16_workers_may_die_at_any_time(tmp_path: Path, unbroken: Path, place: str) -> None:
    fault = Fault(place, {"save": 11}.get(place, 7), kill_workers)
    assert start(tmp_path, WORKERS, fault) == [1]
    assert "lower DATALOADER.NUM_WORKERS, and go on with --resume." in printed(tmp_path)
    assert start(tmp_path, WORKERS, resume=True) == [0]
    assert_same_end(tmp_path, unbroken)


def test_f16_of_several_ranks_all_leave(tmp_path: Path) -> None:
    sample = Sample(8, 1, "deadly")
    codes = start(tmp_path, WORKERS, sample=sample, world_size=2)
    assert all(code not in (0, -signal.SIGKILL) for code in codes)
    assert "lower DATALOADER.NUM_WORKERS, and go on with --resume." in printed(tmp_path, rank=1)
    assert set(saved(tmp_path)) <= {3, 5, 7}
