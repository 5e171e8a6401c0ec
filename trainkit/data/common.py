"""Fetching: a sample and a batch as functions of the data set, the seed and the position."""

import contextlib
import functools
import multiprocessing.connection
import os
import pickle
import select
import signal
import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from copy import deepcopy
from types import FrameType
from typing import Any

import numpy as np
import torch
from torch.utils.data import (
    ConcatDataset,
    DataLoader,
    Dataset,
    IterableDataset,
    Subset,
    get_worker_info,
)

from trainkit.data.samplers.order import EpochOrder, EpochSampler, SampleKey
from trainkit.utils.errors import ConfigError
from trainkit.utils.random import hash64, seed_generators
from trainkit.utils.serialize import PicklableWrapper
from trainkit.utils.stop_signals import SIGNALS, StopRequested

_SAMPLE_TAG = int.from_bytes(b"sample", "big")
_COLLATE_TAG = int.from_bytes(b"collate", "big")

MAX_ATTEMPTS = 100
"""Draws at one position before a data set that keeps returning None is given up."""


def worker_init_fn(then: Callable[[int], None] | None = None) -> Callable[[int], None]:
    """Returns what a worker of this process calls first, with its number, and before `then`."""
    return functools.partial(_tie_to, os.getpid(), then)


def _tie_to(trainer_pid: int, then: Callable[[int], None] | None, worker: int) -> None:
    """Ties a worker to the process that trains: it outlives no kill, and ends at nothing less.

    Signals reach every process of a terminal, or of a scheduler's job. The training process
    finishes its step and saves; a worker that ended at once would make that step fail.
    """
    for signum in SIGNALS:
        if signum != signal.SIGTERM:
            signal.signal(signum, signal.SIG_IGN)
    if hasattr(signal, "sigwaitinfo"):
        # The trainer itself ends its workers by SIGTERM.
        signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})
        threading.Thread(target=_end_by_signal_of, args=(trainer_pid,), daemon=True).start()
    if hasattr(os, "pidfd_open"):
        # torch's workers watch for their parent, which is another process with a fork server.
        with contextlib.suppress(OSError):  # A kernel before 5.3 has none.
            descriptor = os.pidfd_open(trainer_pid)
            threading.Thread(target=_end_with, args=(descriptor,), daemon=True).start()
    if then is not None:
        then(worker)


def _end_by_signal_of(trainer_pid: int) -> None:
    while signal.sigwaitinfo({signal.SIGTERM}).si_pid != trainer_pid:
        continue
    os._exit(0)


def _end_with(process_descriptor: int) -> None:
    select.select([process_descriptor], [], [])
    os._exit(1)


class WorkerDiedError(RuntimeError):
    """A worker of a data loader that ended before its time."""


class WatchedLoader(DataLoader[Any]):
    """A DataLoader whose workers are tied to this process, and whose death is told as such.

    Args:
        dataset: As for DataLoader.
        kwargs: Further arguments of DataLoader.
    """

    def __init__(self, dataset: Any, **kwargs: Any) -> None:
        own = kwargs.pop("worker_init_fn", None)
        super().__init__(dataset, worker_init_fn=worker_init_fn(own), **kwargs)

    def __iter__(self) -> Any:
        """Yields the batches.

        Raises:
            WorkerDiedError: If a worker has died; a resume goes on exactly.
        """
        with _sigterm_blocked():
            batches = super().__iter__()
        workers = getattr(batches, "_workers", [])
        _explain_deaths()
        try:
            yield from batches
        except StopRequested:
            # Else the save would wait five seconds for each that waits for its storage.
            for worker in workers:
                worker.terminate()
            raise
        except Exception:
            # Its connections break a moment before it is gone.
            sentinels = [worker.sentinel for worker in workers]
            if sentinels and multiprocessing.connection.wait(sentinels, timeout=0.5):
                raise _died("A worker process of the data loader died.") from None
            raise


@contextlib.contextmanager
def _sigterm_blocked() -> Iterator[None]:
    """Has workers that are started here live through a signal that comes before they are tied."""
    if not hasattr(signal, "sigwaitinfo"):
        yield
        return
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def _died(cause: str) -> WorkerDiedError:
    return WorkerDiedError(
        f"{cause} Usually the machine ran out of memory, or of room in /dev/shm: lower "
        "DATALOADER.NUM_WORKERS, and go on with --resume."
    )


def _explain_deaths() -> None:
    """Has torch's handler, which raises wherever the main thread is then, raise our error."""
    handler = signal.getsignal(signal.SIGCHLD)
    is_main_thread = threading.current_thread() is threading.main_thread()
    if is_main_thread and getattr(handler, "__module__", "").startswith("torch.utils.data"):
        signal.signal(signal.SIGCHLD, functools.partial(_on_death, handler))


def _on_death(handler: Any, signum: int, frame: FrameType | None) -> None:
    try:
        handler(signum, frame)
    except RuntimeError as e:
        raise _died(str(e).strip()) from None


class MapDataset(Dataset[Any]):
    """A data set whose samples pass through a function, which may be a lambda.

    Args:
        dataset: Anything with `__len__` and `__getitem__`; an IterableDataset gives one again.
        map_func: Called with a sample; returns the mapped sample, or None to have it replaced by
            the training loader, or left out of an iterable data set. A sample that is None already
            does not reach it.
    """

    def __new__(cls, dataset: Any = None, *args: Any, **kwargs: Any) -> Any:
        """Makes a `_MapIterableDataset` where the data set is iterable."""
        if isinstance(dataset, IterableDataset):
            return _MapIterableDataset(dataset, *args, **kwargs)
        return super().__new__(cls)

    def __init__(self, dataset: Any, map_func: Callable[[Any], Any]) -> None:
        self.dataset = dataset
        self.map_func = PicklableWrapper(map_func)

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, index: int) -> Any:
        sample = self.dataset[index]
        return None if sample is None else self.map_func(sample)


class _MapIterableDataset(IterableDataset[Any]):
    """A `MapDataset` of an iterable data set."""

    def __init__(self, dataset: Iterable[Any], map_func: Callable[[Any], Any]) -> None:
        self.dataset = dataset
        self.map_func = PicklableWrapper(map_func)

    def __iter__(self) -> Iterator[Any]:
        samples = (sample for sample in self.dataset if sample is not None)
        return (mapped for mapped in map(self.map_func, samples) if mapped is not None)


class SeededBatches(Dataset[Any]):
    """Makes the batch that belongs to a list of keys, whoever asks and whatever ran before.

    Before each sample the global generators of Python, NumPy and torch's CPU are seeded from its
    position, and `set_random_seed(seed)` is called on the data set and on what it wraps (through
    `MapDataset`, and torch's `ConcatDataset` and `Subset`) where there is such a method. They are
    seeded once more before the samples are collated.

    Args:
        dataset: Anything with `__len__` and `__getitem__`.
        sampler: Where a sample that comes back as None is replaced from: a draw from its epoch.
        seed: Decides all randomness, together with the positions.
        collate_fn: Turns the list of samples into a batch.
    """

    def __init__(
        self,
        dataset: Any,
        sampler: EpochSampler,
        seed: int,
        collate_fn: Callable[[list[Any]], Any],
    ) -> None:
        self._dataset = dataset
        self._sampler = sampler
        self._seed = seed
        self._collate_fn = collate_fn
        self._last_order: tuple[int, EpochOrder] | None = None
        self._seedables = [part for part in _parts(dataset) if hasattr(part, "set_random_seed")]

    def __getitem__(self, keys: Sequence[SampleKey]) -> Any:
        samples = [self.fetch(key) for key in keys]
        _, epoch, offset = keys[0]
        seed_generators(hash64(self._seed, _COLLATE_TAG, epoch, offset))
        return self._collate_fn(samples)

    def fetch(self, key: SampleKey) -> Any:
        """Returns the sample of one key, or the first of its replacements that is not None.

        Raises:
            ConfigError: If there is none within `MAX_ATTEMPTS` draws.
        """
        index, epoch, offset = key
        position_seed = hash64(self._seed, _SAMPLE_TAG, epoch, offset)
        sample = self._fetch_seeded(index, position_seed)
        for attempt in range(1, MAX_ATTEMPTS):
            if sample is not None:
                return sample
            draw = hash64(position_seed, attempt)
            if self._last_order is None or self._last_order[0] != epoch:
                self._last_order = epoch, self._sampler.indices(epoch)
            order: Any = self._last_order[1]
            if (groups := getattr(self._sampler, "group_ids", None)) is not None:
                order = np.asarray(order[:])
                order = order[np.asarray(groups)[order] == groups[index]]
            sample = self._fetch_seeded(int(order[draw % len(order)]), draw)
        if sample is None:
            raise ConfigError(
                f"The data set returned None for sample {index} (epoch {epoch}, offset {offset}) "
                f"and for {MAX_ATTEMPTS - 1} samples drawn in its place. Check what the data set "
                "and its mapper reject."
            )
        return sample

    def _fetch_seeded(self, index: int, seed: int) -> Any:
        seed_generators(seed)
        for part in self._seedables:
            part.set_random_seed(seed)
        return self._dataset[index]


def _parts(dataset: Any) -> Iterator[Any]:
    yield dataset
    if isinstance(dataset, ConcatDataset):
        for inner in dataset.datasets:
            yield from _parts(inner)
    elif isinstance(dataset, (MapDataset, Subset)):
        yield from _parts(dataset.dataset)
    if isinstance(dataset, MapDataset):
        yield dataset.map_func


class ToIterableDataset(IterableDataset[Any]):
    """The samples of a data set in the order of a sampler, which runs in each worker.

    Args:
        dataset: Anything with `__getitem__`.
        sampler: Gives the same indices in every worker, as `TrainingSampler` does and a sampler
            that draws from the global generator does not.
        shard_sampler: Whether workers take turns with the indices.
        shard_chunk_size: Indices in one turn. With the batch size of the DataLoader, and with 1 for
            one that makes no batches, the order is that of a single process.
    """

    def __init__(
        self,
        dataset: Any,
        sampler: Iterable[int],
        shard_sampler: bool = True,
        shard_chunk_size: int = 1,
    ) -> None:
        self.dataset = dataset
        self.sampler = sampler
        self.shard_sampler = shard_sampler
        self.shard_chunk_size = shard_chunk_size

    def __iter__(self) -> Iterator[Any]:
        worker = get_worker_info()
        number, count = (worker.id, worker.num_workers) if worker and self.shard_sampler else (0, 1)
        for place, index in enumerate(self.sampler):
            if place // self.shard_chunk_size % count == number:
                yield self.dataset[index]


class AspectRatioGroupedDataset(IterableDataset[list[Any]]):
    """Lists of `batch_size` samples, dicts with "width" and "height", all wide or all not."""

    def __init__(self, dataset: Iterable[Any], batch_size: int) -> None:
        self.dataset = dataset
        self.batch_size = batch_size

    def __iter__(self) -> Iterator[list[Any]]:
        waiting: dict[bool, list[Any]] = {True: [], False: []}
        for sample in self.dataset:
            if sample is None:
                continue
            batch = waiting[sample["width"] > sample["height"]]
            batch.append(sample)
            if len(batch) == self.batch_size:
                yield batch[:]
                batch.clear()


class _SerializedList:
    """The items of a list as pickles, one behind another in one buffer.

    Python counts the references to an object where the object lies, so a worker that only reads a
    list of dicts copies its pages all the same. It leaves a buffer alone: forked workers share it,
    and for others torch moves it into shared memory, once, when the first one starts.
    """

    def __init__(self, items: Sequence[Any]) -> None:
        pickles = [pickle.dumps(item, pickle.HIGHEST_PROTOCOL) for item in items]
        # Not empty, which torch refuses.
        self.buffer = torch.frombuffer(bytearray().join(pickles) or bytearray(1), dtype=torch.uint8)
        self.ends = torch.tensor([0, *map(len, pickles)]).cumsum(0)

    def __len__(self) -> int:
        return len(self.ends) - 1

    def __getitem__(self, index: int) -> Any:
        start, end = self.ends[range(len(self))[index] :][:2].tolist()
        return pickle.loads(self.buffer[start:end].numpy().data)


_default_serialize: Callable[[Sequence[Any]], Any] = _SerializedList


@contextlib.contextmanager
def set_default_dataset_from_list_serialize_method(
    serialize: Callable[[Sequence[Any]], Any],
) -> Iterator[None]:
    """Has each new `DatasetFromList` hold its list in what `serialize` makes of it, for a while."""
    global _default_serialize
    before, _default_serialize = _default_serialize, serialize
    try:
        yield
    finally:
        _default_serialize = before


class DatasetFromList(Dataset[Any]):
    """A list as a data set.

    Args:
        lst: The samples.
        copy: Whether a sample comes as a deep copy; one that was serialized is new anyway.
        serialize: True holds the samples in a buffer that workers share; a function makes what
            holds them of the list; False keeps the list.
    """

    def __init__(
        self,
        lst: Sequence[Any],
        copy: bool = True,
        serialize: bool | Callable[[Sequence[Any]], Any] = True,
    ) -> None:
        method = serialize if callable(serialize) else _default_serialize
        self._samples: Any = method(lst) if serialize else lst
        self._copies = copy and not serialize

    def __len__(self) -> int:
        return len(self._samples)

    def __getitem__(self, index: int) -> Any:
        sample = self._samples[index]
        return deepcopy(sample) if self._copies else sample
