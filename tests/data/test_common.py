import multiprocessing
import os
import pickle
import random
import select
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch.utils.data import ConcatDataset, DataLoader, Dataset, IterableDataset, Subset

from trainkit.data.common import (
    MAX_ATTEMPTS,
    AspectRatioGroupedDataset,
    DatasetFromList,
    MapDataset,
    SeededBatches,
    ToIterableDataset,
    WatchedLoader,
    WorkerDiedError,
    set_default_dataset_from_list_serialize_method,
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


class Stream(IterableDataset[Any]):
    def __iter__(self) -> Iterator[Any]:
        yield from (1, None, 2, 3)


def test_mapping_an_iterable_data_set_gives_one_and_leaves_none_out() -> None:
    dataset = MapDataset(Stream(), lambda x: None if x == 2 else x * 10)
    assert isinstance(dataset, IterableDataset)
    assert list(dataset) == list(dataset) == [10, 30]
    assert list(DataLoader(dataset, batch_size=None, num_workers=1)) == [10, 30]


class Adding(MapDataset):
    """A subclass with an argument of its own."""

    def __init__(self, dataset: Any, summand: int) -> None:
        super().__init__(dataset, lambda x: x + summand)


def test_mapping_can_be_subclassed() -> None:
    assert Adding([1, 2], summand=3)[1] == 5
    by_name: Any = MapDataset(dataset=Stream(), map_func=str)
    assert list(by_name) == ["1", "2", "3"]


@pytest.mark.parametrize("dataset", [[1, 2, 3], Stream()])
def test_a_lambda_travels_to_workers(dataset: Any) -> None:
    mapped = pickle.loads(pickle.dumps(MapDataset(dataset, lambda x: x * 10)))
    values = list(mapped) if isinstance(mapped, IterableDataset) else [mapped[i] for i in range(3)]
    assert values == [10, 20, 30]


class CountingSampler(TrainingSampler):
    num_calls = 0

    def indices(self, epoch: int) -> EpochOrder:
        self.num_calls += 1
        return super().indices(epoch)


def test_an_epoch_is_computed_once_for_all_that_is_replaced_in_it() -> None:
    sampler = CountingSampler(100, seed=0)
    batches = SeededBatches(MapDataset(range(100), reject_even), sampler, 0, identity)
    for epoch in (3, 4):
        for offset in range(20):
            batches.fetch((0, epoch, offset))
    assert sampler.num_calls == 2


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
    # Fetched further ahead, sample 1 might die with its worker.
    loader = WatchedLoader(Dying(is_killed=True), batch_size=None, num_workers=1, prefetch_factor=1)
    batches = iter(loader)
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


SAMPLES: list[Any] = [{"id": index, "text": "x" * (index * 37 % 1000)} for index in range(2000)]


@pytest.mark.parametrize("serialize", [True, False, tuple])
def test_a_list_becomes_a_data_set(serialize: Any) -> None:
    dataset = DatasetFromList(SAMPLES, serialize=serialize)
    assert len(dataset) == len(SAMPLES)
    assert [dataset[index] for index in range(len(SAMPLES))] == SAMPLES
    assert dataset[-1] == SAMPLES[-1]
    with pytest.raises(IndexError):
        dataset[len(SAMPLES)]
    assert len(DatasetFromList([], serialize=serialize)) == 0


@pytest.mark.parametrize(
    ("copy", "serialize", "is_copied"),
    [(True, True, True), (False, True, True), (True, False, True), (False, False, False)],
)
def test_samples_are_copies_unless_that_is_off(
    copy: bool, serialize: bool, is_copied: bool
) -> None:
    samples: list[Any] = [{"box": [1, 2]}]
    dataset = DatasetFromList(samples, copy=copy, serialize=serialize)
    dataset[0]["box"].append(3)
    assert dataset[0]["box"] == ([1, 2] if is_copied else [1, 2, 3])


def test_another_way_to_hold_lists_can_be_the_default_for_a_while() -> None:
    def use_it() -> None:
        with set_default_dataset_from_list_serialize_method(lambda items: [i * 2 for i in items]):
            assert DatasetFromList([1, 2])[1] == 4
            assert DatasetFromList([1, 2], serialize=False)[1] == 2
            raise LookupError("an error inside")

    with pytest.raises(LookupError, match="an error inside"):
        use_it()
    assert DatasetFromList([1, 2])[1] == 2


class Mapped(Dataset[Any]):
    """Says how much of the buffer of a `DatasetFromList` is this process's own memory, in bytes."""

    def __init__(self, dataset: DatasetFromList) -> None:
        self.dataset = dataset

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, index: int) -> tuple[Any, int]:
        samples = [self.dataset[i] for i in range(len(self.dataset))]
        assert len(samples) == len(self.dataset)
        return self.dataset[index], private_bytes(self.dataset._samples.buffer.data_ptr())


def private_bytes(address: int) -> int:
    """Memory of this process alone in the mapping that holds an address."""
    found = False
    total = 0
    for line in Path("/proc/self/smaps").read_text().splitlines():
        head = line.split()[0]
        if not head.endswith(":"):
            start, end = (int(part, 16) for part in head.split("-"))
            found = start <= address < end
        elif found and head.startswith("Private_"):
            total += int(line.split()[1]) * 1024
    return total


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/smaps").exists(), reason="smaps is Linux's")
@pytest.mark.parametrize("start_method", ["fork", "spawn"])
def test_workers_share_the_memory_of_a_list(start_method: str) -> None:
    # One sample takes more than glibc's largest threshold for a mapping of its own.
    dataset = DatasetFromList([*SAMPLES, "x" * (40 << 20)])
    assert private_bytes(dataset._samples.buffer.data_ptr()) > 40 << 20
    loader = DataLoader(
        Mapped(dataset),
        batch_size=None,
        sampler=range(4),
        num_workers=2,
        multiprocessing_context=start_method,
    )
    fetched = list(loader)
    assert [sample for sample, _ in fetched] == SAMPLES[:4]
    assert max(private for _, private in fetched) < 1 << 20
    assert dataset._samples.buffer.is_shared() == (start_method == "spawn")


@pytest.mark.parametrize("num_workers", [0, 1, 2])
@pytest.mark.parametrize("chunk", [1, 3])
def test_workers_that_take_turns_give_the_order_of_one_process(
    num_workers: int, chunk: int
) -> None:
    dataset = MapDataset(range(10), lambda index: index * 10)
    iterable = ToIterableDataset(dataset, TrainingSampler(10, seed=1), shard_chunk_size=chunk)
    batches = islice(DataLoader(iterable, batch_size=chunk, num_workers=num_workers), 8)
    expected = [index * 10 for index in islice(TrainingSampler(10, seed=1), 8 * chunk)]
    assert torch.cat(list(batches)).tolist() == expected


def test_a_sampler_that_shards_itself_is_left_alone() -> None:
    iterable = ToIterableDataset(range(10), range(3), shard_sampler=False)
    batches: DataLoader[Any] = DataLoader(iterable, batch_size=None, num_workers=2)
    assert sorted(batches) == [0, 0, 1, 1, 2, 2]


def test_batches_are_wide_or_high() -> None:
    shapes = [(4, 3), (3, 4), (2, 1), (3, 3), (9, 1)]
    dataset = [{"width": width, "height": height} for width, height in shapes]
    batches = [
        [(sample["width"], sample["height"]) for sample in batch]
        for batch in AspectRatioGroupedDataset(dataset, 2)
    ]
    assert batches == [[(4, 3), (2, 1)], [(3, 4), (3, 3)]]
