"""Fetching: a sample and a batch as functions of the data set, the seed and the position."""

import contextlib
import functools
import multiprocessing.connection
import os
import select
import signal
import threading
from collections.abc import Callable, Iterator, Sequence
from types import FrameType
from typing import Any

from torch.utils.data import ConcatDataset, DataLoader, Dataset, Subset

from trainkit.data.samplers.order import EpochSampler, SampleKey
from trainkit.utils.errors import ConfigError
from trainkit.utils.random import hash64, seed_generators
from trainkit.utils.stop_signals import SIGNALS, StopRequested

_SAMPLE_TAG = int.from_bytes(b"sample", "big")
_COLLATE_TAG = int.from_bytes(b"collate", "big")

MAX_ATTEMPTS = 100
"""Draws at one position before a data set that keeps returning None is given up."""


def worker_init_fn() -> Callable[[int], None]:
    """Returns what a worker of this process calls first, with its number."""
    return functools.partial(_tie_to, os.getpid())


def _tie_to(trainer_pid: int, worker: int) -> None:
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
        super().__init__(dataset, **{"worker_init_fn": worker_init_fn(), **kwargs})

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
    """A data set whose samples pass through a function.

    Args:
        dataset: Anything with `__len__` and `__getitem__`.
        map_func: Called with a sample; returns the mapped sample, or None to have it replaced by
            the training loader. A sample that is None already does not reach it.
    """

    def __init__(self, dataset: Any, map_func: Callable[[Any], Any]) -> None:
        self.dataset = dataset
        self.map_func = map_func

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, index: int) -> Any:
        sample = self.dataset[index]
        return None if sample is None else self.map_func(sample)


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
            order = self._sampler.indices(epoch)
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
