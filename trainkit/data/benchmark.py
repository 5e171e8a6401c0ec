"""How fast each stage of loading is, so that the slow one can be told."""

import itertools
import time
from collections.abc import Callable, Iterable
from typing import Any

from trainkit.data.build import build_batch_data_loader
from trainkit.data.common import MapDataset
from trainkit.data.samplers.distributed_sampler import TrainingSampler
from trainkit.utils import comm


class DataLoaderBenchmark:
    """Measures the stages of loading, each in this rank's samples per second.

    Args:
        dataset: Anything with `__len__` and `__getitem__`.
        mapper: Applied to each sample; see `MapDataset`.
        sampler: Which samples; by default all in a random order.
        total_batch_size: Samples per batch, over all ranks together.
        max_time_seconds: When a measurement ends before its last iteration.
        clock: Gives the time in seconds.
        loader_options: Further arguments of `build_batch_data_loader`, such as `num_workers`.
    """

    def __init__(
        self,
        dataset: Any,
        *,
        mapper: Callable[[Any], Any] | None = None,
        sampler: Any = None,
        total_batch_size: int,
        max_time_seconds: float = 90.0,
        clock: Callable[[], float] = time.perf_counter,
        **loader_options: Any,
    ) -> None:
        self.dataset = dataset
        self.mapped = dataset if mapper is None else MapDataset(dataset, mapper)
        self.sampler = TrainingSampler(len(dataset), seed=0) if sampler is None else sampler
        self.total_batch_size = total_batch_size
        self.max_time_seconds = max_time_seconds
        self.clock = clock
        self.loader_options = loader_options

    def benchmark_dataset(self, num_iter: int, warmup: int = 5) -> float:
        """Measures the data set in this process; an iteration is a sample."""
        return self._rate((self.dataset[i] for i in self.sampler), num_iter, warmup)

    def benchmark_mapper(self, num_iter: int, warmup: int = 5) -> float:
        """Measures data set and mapper in this process; an iteration is a sample."""
        return self._rate((self.mapped[i] for i in self.sampler), num_iter, warmup)

    def benchmark_workers(self, num_iter: int, warmup: int = 10) -> float:
        """Measures the whole loader; an iteration is a batch."""
        return self._rate_of_loader(self.mapped, num_iter, warmup)

    def benchmark_ipc(self, num_iter: int, warmup: int = 10) -> float:
        """Measures a loader of one sample again and again, which is transport; as `workers`."""
        sample = self.mapped[next(iter(self.sampler))]
        return self._rate_of_loader([sample] * len(self.mapped), num_iter, warmup)

    def benchmark_distributed(self, num_iter: int, warmup: int = 10) -> list[float]:
        """Measures the whole loader on all ranks at once; returns the rates of all."""
        comm.synchronize()
        return comm.all_gather(self.benchmark_workers(num_iter, warmup))

    def _rate_of_loader(self, dataset: Any, num_iter: int, warmup: int) -> float:
        loader = build_batch_data_loader(
            dataset, self.sampler, self.total_batch_size, **self.loader_options
        )
        parts = comm.get_world_size() * self.loader_options.get("accumulate", 1)
        size: int = self.total_batch_size // parts
        return size * self._rate(loader, num_iter, warmup)

    def _rate(self, iterations: Iterable[Any], num_iter: int, warmup: int) -> float:
        iterator = iter(iterations)
        for _ in itertools.islice(iterator, warmup):
            pass
        start, count = self.clock(), 0
        for _ in itertools.islice(iterator, num_iter):
            count += 1
            if self.clock() - start > self.max_time_seconds:
                break
        return count / (self.clock() - start)
