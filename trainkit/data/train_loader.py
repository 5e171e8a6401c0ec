"""The training loader, whose state is a position."""

import contextlib
import copy
import itertools
import logging
from collections import deque
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch.utils.data import DataLoader, default_collate

from trainkit.data.common import SeededBatches, WatchedLoader
from trainkit.data.samplers.grouped_batch_sampler import GroupedBatchSampler
from trainkit.data.samplers.order import EndlessOrder, EpochSampler, Position, SampleKey
from trainkit.utils import comm
from trainkit.utils.errors import ConfigError
from trainkit.utils.random import isolated_rng
from trainkit.utils.stop_signals import interruptible

logger = logging.getLogger(__name__)


class TrainLoader:
    """Yields this rank's micro-batches of an endless order of samples, from any position on.

    Each optimizer step consumes the next `batch_size` positions of the order; micro-batch m of rank
    r is their contiguous chunk m * world size + r. A batch depends on the data set, the seed and
    its positions alone: not on workers, prefetching, restarts, or on how ranks and micro-batches
    share a step. Randomness has to come from the global generators, or from objects with
    `set_random_seed` (see `SeededBatches`).

    `iter()` goes on from the current position and ends the iterator made before, whose next use is
    an error.

    Args:
        dataset: Anything with `__len__` and `__getitem__`.
        sampler: The order of each epoch; its seed is set to `seed`.
        batch_size: Samples per optimizer step, over all ranks and micro-batches together.
        accumulate: Micro-batches per optimizer step.
        seed: Decides the order and all randomness in fetching; the same on every rank.
        num_workers: Processes that fetch; 0 fetches in this one.
        collate_fn: Turns a list of samples into a batch.
        pin_memory: Whether batches come in pinned memory, for faster copies to CUDA.
        loader_options: Further arguments of DataLoader, such as `prefetch_factor`.

    Raises:
        ConfigError: If the data set is empty, or `batch_size` is not a multiple of ranks times
            micro-batches, or does not fit that of a `GroupedBatchSampler`.
    """

    isolates_randomness = True
    """Iterating leaves the global generators as they were."""

    def __init__(
        self,
        dataset: Any,
        sampler: EpochSampler,
        batch_size: int,
        *,
        accumulate: int = 1,
        seed: int,
        num_workers: int = 0,
        collate_fn: Callable[[list[Any]], Any] = default_collate,
        pin_memory: bool = False,
        **loader_options: Any,
    ) -> None:
        check_not_empty(dataset, type(dataset).__name__)
        check_batch_size(batch_size, comm.get_world_size(), accumulate)
        group_size = sampler.batch_size if isinstance(sampler, GroupedBatchSampler) else batch_size
        if group_size % (batch_size // (comm.get_world_size() * accumulate)) != 0:
            raise ConfigError(
                f"GroupedBatchSampler's batch_size is {group_size}, of which the TrainLoader's "
                f"{batch_size} would mix groups. Give both the same."
            )
        self.dataset = dataset
        # A copy: another loader may have the same one, and another seed.
        self.sampler = copy.copy(sampler)
        self.batch_size = batch_size
        self.accumulate = accumulate
        self.seed = seed
        self.num_workers = num_workers
        self.collate_fn = collate_fn
        self.pin_memory = pin_memory
        self.loader_options = loader_options
        self._position = Position(epoch=0, offset=0)
        self._passed_over: list[tuple[Position, Position]] = []
        self._live_iterator = 0
        self.sampler.seed = seed

    def __iter__(self) -> Iterator[Any]:
        self._live_iterator += 1
        return self._micro_batches(self._live_iterator)

    @property
    def position(self) -> Position:
        """Where the next step begins."""
        return self._position

    def samples_at(self, position: Position, rank: int | None = None) -> list[SampleKey]:
        """Returns the samples of the step that begins at a position: one rank's share, or all."""
        order = EndlessOrder(self.sampler)
        start = self._start_of_step(order, position)
        if rank is None:
            return order.take(start, self.batch_size)
        chunks = [self._chunk(order, start, number, rank) for number in range(self.accumulate)]
        return list(itertools.chain.from_iterable(chunks))

    def pass_over(self, position: Position) -> None:
        """Leaves out the samples of the step that begins there; the state holds that too."""
        order = EndlessOrder(self.sampler)
        start = self._start_of_step(order, position)
        end = order.advance(start, self.batch_size)
        self._passed_over = sorted({*self._passed_over, (start, end)})
        self._live_iterator += 1

    def state_dict(self) -> dict[str, Any]:
        """Returns the seed, and the position behind the last step that was yielded whole."""
        state: dict[str, Any] = {"seed": self.seed, **self._position._asdict()}
        if self._passed_over:
            state["passed_over"] = [[*begin, *end] for begin, end in self._passed_over]
        return state

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Makes the next `iter()` start where `state` was taken, with its seed; O(1)."""
        if state["seed"] != self.seed:
            logger.warning(
                "The checkpoint's order of samples has seed %d, this run has %d. Continuing with "
                "the checkpoint's.",
                state["seed"],
                self.seed,
            )
        self.seed = self.sampler.seed = state["seed"]
        self._position = Position(state["epoch"], state["offset"])
        # What this process has passed over since that state was taken stays passed over.
        loaded = [(Position(*p[:2]), Position(*p[2:])) for p in state.get("passed_over", [])]
        self._passed_over = sorted({*self._passed_over, *loaded})
        self._live_iterator += 1

    def _micro_batches(self, number: int) -> Iterator[Any]:
        # The keys run ahead of the batches by what is prefetched; this queue keeps, in their order,
        # the position to store once each batch has been yielded.
        positions: deque[Position] = deque()
        batches: Iterator[Any] | None = None
        while True:
            if number != self._live_iterator:
                raise RuntimeError(
                    "This iterator ended when its TrainLoader loaded a state or made another "
                    "iterator. Use the newest iter(loader)."
                )
            if batches is None:
                batches = iter(self._data_loader(positions))
            # Fetching in this process must not be felt by the one who trains in it.
            isolation = isolated_rng() if self.num_workers == 0 else contextlib.nullcontext()
            # Nothing is lost here by a signal: the position moves on once the batch is there.
            with isolation, interruptible():
                batch = next(batches)
            self._position = positions.popleft()
            yield batch

    def _data_loader(self, positions: deque[Position]) -> DataLoader[Any]:
        return WatchedLoader(
            SeededBatches(self.dataset, self.sampler, self.seed, self.collate_fn),
            batch_size=None,  # The sampler's entries are batches already.
            sampler=self._keys(self._position, positions),
            num_workers=self.num_workers,
            collate_fn=_identity,
            pin_memory=self.pin_memory,
            # Without one, the seed of the workers would be drawn from the global generator.
            generator=torch.Generator(),
            **self.loader_options,
        )

    def _keys(self, start: Position, positions: deque[Position]) -> Iterator[list[SampleKey]]:
        order = EndlessOrder(self.sampler)
        while True:
            start = self._start_of_step(order, start)
            end = order.advance(start, self.batch_size)
            for number in range(self.accumulate):
                positions.append(end if number == self.accumulate - 1 else start)
                yield self._chunk(order, start, number, comm.get_rank())
            start = end

    def _start_of_step(self, order: EndlessOrder, position: Position) -> Position:
        """Returns where the next step draws from: behind what is passed over."""
        for begin, end in self._passed_over:
            if position < end and begin < order.advance(position, self.batch_size):
                position = end
        return position

    def _chunk(
        self, order: EndlessOrder, start: Position, micro_batch: int, rank: int
    ) -> list[SampleKey]:
        """Returns what a rank takes in one micro-batch of the step that begins at `start`."""
        world_size = comm.get_world_size()
        size = self.batch_size // (world_size * self.accumulate)
        return order.take(order.advance(start, (micro_batch * world_size + rank) * size), size)


def _identity(batch: Any) -> Any:
    return batch


def check_not_empty(dataset: Any, name: str) -> None:
    """Refuses a data set without samples, by its name."""
    if len(dataset) == 0:
        raise ConfigError(f"The data set {name} is empty. Check its files, or name another.")


def check_batch_size(batch_size: int, world_size: int, accumulate: int) -> None:
    """Refuses a batch that ranks and micro-batches cannot share, with the nearest that they can."""
    if accumulate < 1:
        raise ConfigError(f"SOLVER.ACCUMULATE is {accumulate}, but it is at least 1.")
    parts = world_size * accumulate
    if batch_size < 1 or batch_size % parts != 0:
        below = batch_size // parts * parts
        nearest = f"{below} or {below + parts}" if below > 0 else f"{parts}"
        raise ConfigError(
            f"SOLVER.IMS_PER_BATCH is {batch_size}, which {world_size} process(es) times "
            f"SOLVER.ACCUMULATE = {accumulate} cannot share evenly. Use {nearest}."
        )
