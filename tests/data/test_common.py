import multiprocessing
import os
import random
import select
import signal
import subprocess
import sys
import threading
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch.utils.data import ConcatDataset, DataLoader, Dataset, Subset

from trainkit.data.common import (
    MAX_ATTEMPTS,
    MapDataset,
    SeededBatches,
    WatchedLoader,
    WorkerDiedError,
    worker_init_fn,
)
from trainkit.data.samplers.distributed_sampler import TrainingSampler
from trainkit.data.samplers.order import EpochOrder
from trainkit.utils.errors import ConfigError


def identity(batch: Any) -> Any:
    return batch


def batches_of(dataset: Any, collate_fn: Callable[[Any], Any] = identity) -> SeededBatches:
    return SeededBatches(dataset, TrainingSampler(len(dataset), seed=0), 11, collate_fn)


def draws(_: Any) -> tuple[float, float, float]:
    return random.random(), float(np.random.rand()), torch.rand(()).item()


class Drawer:
    """Draws from a generator of its own, reseeded on request."""

    def __init__(self) -> None:
        self.seeds: list[int] = []

    def set_random_seed(self, seed: int) -> None:
        self.seeds.append(seed)

    def __len__(self) -> int:
        return 10

    def __getitem__(self, index: int) -> int:
        return index

    def __call__(self, sample: int) -> int:
        return sample


def test_mapping_applies_the_function() -> None:
    dataset = MapDataset([1, 2, 3], lambda x: x * 10)
    assert len(dataset) == 3
    assert dataset[1] == 20


def test_none_passes_through_nested_maps() -> None:
    inner = MapDataset([1, 2], lambda x: None if x == 1 else x)
    outer = MapDataset(inner, lambda x: x + 1)
    assert outer[0] is None
    assert outer[1] == 3


def test_a_sample_draws_the_same_whatever_ran_before() -> None:
    batches = batches_of(MapDataset(range(10), draws))
    first = batches.fetch((3, 0, 7))
    batches.fetch((4, 0, 8))
    random.random(), np.random.rand(), torch.rand(5)
    assert batches.fetch((3, 0, 7)) == first


def test_positions_and_seeds_draw_differently() -> None:
    batches = batches_of(MapDataset(range(10), draws))
    other_seed = SeededBatches(
        MapDataset(range(10), draws), TrainingSampler(10, seed=0), 12, identity
    )
    drawn = [batches.fetch((3, 0, 7)), batches.fetch((3, 0, 8)), batches.fetch((3, 1, 7))]
    drawn.append(other_seed.fetch((3, 0, 7)))
    for values in zip(*drawn, strict=True):
        assert len(set(values)) == 4


def test_collation_draws_from_the_first_position() -> None:
    batches = batches_of(range(10), draws)
    assert batches[[(1, 0, 4), (2, 0, 5)]] == batches[[(9, 0, 4)]]
    assert batches[[(1, 0, 4)]] != batches[[(1, 0, 5)]]
    assert batches[[(1, 0, 4)]] != batches_of(MapDataset(range(10), draws)).fetch((1, 0, 4))


def test_objects_with_a_seed_of_their_own_are_reseeded_per_sample() -> None:
    parts = [Drawer() for _ in range(5)]
    nested = MapDataset(MapDataset(parts[0], parts[1]), parts[2])
    dataset: ConcatDataset[int] = ConcatDataset(
        [Subset(nested, [0, 1]), MapDataset(parts[3], parts[4])]
    )
    batches = batches_of(dataset)
    batches.fetch((0, 0, 5))
    batches.fetch((1, 0, 6))
    batches.fetch((0, 0, 5))
    first, second, again = parts[0].seeds
    assert first == again != second
    assert all(part.seeds == parts[0].seeds for part in parts)


def reject_even(sample: int) -> int | None:
    return sample if sample % 2 else None


def test_none_is_replaced_by_a_draw_that_the_position_decides() -> None:
    batches = batches_of(MapDataset(range(100), reject_even))
    replaced = [batches.fetch((0, 0, offset)) for offset in range(50)]
    assert all(sample % 2 for sample in replaced)
    assert len(set(replaced)) > 15
    assert replaced == [batches.fetch((0, 0, offset)) for offset in range(50)]
    assert batches.fetch((7, 0, 0)) == 7


def test_replacements_come_from_what_the_sampler_offers() -> None:
    class Subsampler:
        seed = 0

        def indices(self, epoch: int) -> EpochOrder:
            return [2, 3, 5]

    batches = SeededBatches(MapDataset(range(100), reject_even), Subsampler(), 0, identity)
    assert {batches.fetch((2, 0, offset)) for offset in range(40)} == {3, 5}


def test_a_replacement_draws_fresh_randomness() -> None:
    drawn: list[float] = []

    def reject_and_draw(sample: int) -> int | None:
        drawn.append(torch.rand(()).item())
        return reject_even(sample)

    batches_of(MapDataset(range(10), reject_and_draw)).fetch((0, 0, 0))
    assert len(drawn) > 1
    assert len(set(drawn)) == len(drawn)


def test_a_data_set_of_none_gives_up_with_the_position() -> None:
    calls: list[int] = []

    def reject(sample: int) -> None:
        calls.append(sample)

    with pytest.raises(ConfigError, match=r"None for sample 4 \(epoch 2, offset 3\)"):
        batches_of(MapDataset(range(10), reject)).fetch((4, 2, 3))
    assert len(calls) == MAX_ATTEMPTS


class SlowToEnd(Dataset[int]):
    def __len__(self) -> int:
        return 10**6

    def __getitem__(self, index: int) -> int:
        return os.getpid()


def train_until_killed(start_method: str, pids: Any) -> None:
    loader = DataLoader(
        SlowToEnd(),
        num_workers=2,
        worker_init_fn=worker_init_fn(),
        multiprocessing_context=start_method,
    )
    batches = iter(loader)
    for _ in range(2):
        pids.put(next(batches).item())
    signal.pause()


@pytest.mark.faults
@pytest.mark.skipif(not hasattr(os, "pidfd_open"), reason="pidfd_open is Linux's")
@pytest.mark.parametrize("start_method", ["fork", "forkserver"])
def test_workers_end_with_a_killed_training_process(start_method: str) -> None:
    context = multiprocessing.get_context("spawn")
    pids = context.SimpleQueue()
    trainer = context.Process(target=train_until_killed, args=(start_method, pids))
    trainer.start()
    workers = [os.pidfd_open(pids.get()) for _ in range(2)]
    os.kill(trainer.pid or 0, signal.SIGKILL)
    trainer.join()
    for worker in workers:
        ended, _, _ = select.select([worker], [], [], 20)
        assert ended, "the worker lives on"
        os.close(worker)


def send_from_elsewhere(pid: int, signum: int) -> None:
    """Sends a signal to one process from another one than this."""
    code = f"import os; os.kill({pid}, {signum})"
    subprocess.run([sys.executable, "-S", "-c", code], check=True)


@pytest.mark.faults
@pytest.mark.parametrize("signum", [signal.SIGINT, signal.SIGTERM, signal.SIGUSR1])
def test_workers_leave_signals_to_the_training_process(signum: signal.Signals) -> None:
    loader = DataLoader(SlowToEnd(), num_workers=1, worker_init_fn=worker_init_fn())
    batches = iter(loader)
    worker = next(batches).item()
    send_from_elsewhere(worker, signum)
    assert [next(batches).item() for _ in range(20)] == [worker] * 20


class Early:
    """Gets a signal just before a worker is tied."""

    def __init__(self) -> None:
        self.tie = worker_init_fn()

    def __call__(self, worker: int) -> None:
        os.kill(os.getpid(), signal.SIGTERM)
        self.tie(worker)


@pytest.mark.faults
def test_workers_live_through_a_signal_to_the_group_while_they_start() -> None:
    loader = WatchedLoader(
        SlowToEnd(), num_workers=1, worker_init_fn=Early(), multiprocessing_context="fork"
    )
    batches = iter(loader)
    assert len({next(batches).item() for _ in range(20)}) == 1


def test_the_training_process_can_end_its_workers() -> None:
    batches = iter(WatchedLoader(SlowToEnd(), num_workers=1, worker_init_fn=worker_init_fn()))
    next(batches)
    (worker,) = multiprocessing.active_children()
    worker.terminate()
    worker.join(20)
    assert worker.exitcode == 0


class Dying(SlowToEnd):
    """Kills its worker, or fails, at sample 2."""

    def __init__(self, is_killed: bool) -> None:
        self.is_killed = is_killed

    def __getitem__(self, index: int) -> int:
        if index == 2 and self.is_killed:
            os.kill(os.getpid(), signal.SIGKILL)
        if index == 2:
            raise FileNotFoundError("2.png")
        return index


@pytest.mark.faults
def test_a_worker_that_died_is_told_as_such_with_the_mend() -> None:
    batches = iter(WatchedLoader(Dying(is_killed=True), batch_size=None, num_workers=1))
    assert [next(batches), next(batches)] == [0, 1]
    with pytest.raises(WorkerDiedError, match=r"data loader died\. Usually.*NUM_WORKERS.*--resume"):
        next(batches)


@pytest.mark.faults
def test_a_worker_that_dies_while_nothing_is_fetched_is_told_too() -> None:
    batches = iter(WatchedLoader(SlowToEnd(), num_workers=1))
    worker = next(batches).item()
    os.kill(worker, signal.SIGKILL)
    with pytest.raises(WorkerDiedError, match=rf"worker \(pid {worker}\) is killed.*NUM_WORKERS"):
        threading.Event().wait(20)


@pytest.mark.parametrize("num_workers", [0, 1])
def test_an_error_of_the_data_set_reaches_the_caller_as_it_is(num_workers: int) -> None:
    batches = iter(WatchedLoader(Dying(is_killed=False), batch_size=None, num_workers=num_workers))
    assert [next(batches), next(batches)] == [0, 1]
    with pytest.raises(FileNotFoundError, match=r"2\.png"):
        next(batches)
