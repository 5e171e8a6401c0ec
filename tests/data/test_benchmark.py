from typing import Any

import pytest

from trainkit.data.benchmark import DataLoaderBenchmark
from trainkit.data.samplers.distributed_sampler import TrainingSampler


class Clock:
    """Goes on only when something is done."""

    def __init__(self) -> None:
        self.seconds = 0.0

    def __call__(self) -> float:
        return self.seconds


class Slow:
    """Takes a quarter of a second for a sample."""

    def __init__(self, clock: Clock) -> None:
        self.clock = clock

    def __len__(self) -> int:
        return 10

    def __getitem__(self, index: int) -> int:
        self.clock.seconds += 0.25
        return index


def make(clock: Clock, **options: Any) -> DataLoaderBenchmark:
    def slow_mapper(sample: int) -> int:
        clock.seconds += 1.0
        return sample

    def slow_collate(samples: list[int]) -> list[int]:
        clock.seconds += 0.5
        return samples

    return DataLoaderBenchmark(
        Slow(clock),
        mapper=slow_mapper,
        total_batch_size=4,
        collate_fn=slow_collate,
        clock=clock,
        **options,
    )


def test_each_stage_adds_its_own_time() -> None:
    benchmark = make(Clock())
    assert benchmark.benchmark_dataset(20) == pytest.approx(4)
    assert benchmark.benchmark_mapper(20) == pytest.approx(1 / 1.25)
    assert benchmark.benchmark_workers(20) == pytest.approx(4 / (4 * 1.25 + 0.5))
    assert benchmark.benchmark_ipc(20) == pytest.approx(4 / 0.5)
    assert benchmark.benchmark_distributed(20) == [pytest.approx(4 / 5.5)]


def test_warming_up_is_not_measured_and_time_is_limited() -> None:
    clock = Clock()
    benchmark = make(clock, max_time_seconds=10.0)
    benchmark.benchmark_dataset(3, warmup=7)
    assert clock.seconds == 10 * 0.25
    assert benchmark.benchmark_dataset(10**9, warmup=0) == pytest.approx(4)
    assert clock.seconds == pytest.approx(2.5 + 10.25)


def test_a_finite_order_ends_the_measurement() -> None:
    assert make(Clock(), sampler=range(8)).benchmark_dataset(100, warmup=2) == pytest.approx(4)


def test_workers_are_measured_by_the_real_clock() -> None:
    benchmark = DataLoaderBenchmark(
        range(100), sampler=TrainingSampler(100, seed=0), total_batch_size=4, num_workers=1
    )
    assert benchmark.benchmark_workers(5, warmup=1) > 0
    assert benchmark.benchmark_ipc(5, warmup=1) > 0
