"""The training loader, whose state is a position, and the builders that read the config."""

import contextlib
import itertools
import logging
from collections import deque
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch.utils.data import ConcatDataset, DataLoader, default_collate

from trainkit.config.config import CfgNode
from trainkit.data.catalog import DatasetCatalog
from trainkit.data.common import MapDataset, SeededBatches, WatchedLoader
from trainkit.data.samplers.distributed_sampler import SAMPLER_REGISTRY, InferenceSampler
from trainkit.data.samplers.order import EndlessOrder, EpochSampler, Position, SampleKey
from trainkit.data.transforms import (
    Compose,
    ImageMapper,
    RandomCrop,
    RandomErasing,
    RandomHorizontalFlip,
    Transform,
)
from trainkit.utils import comm
from trainkit.utils.device import resolve_device
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

    Raises:
        ConfigError: If the data set is empty, or `batch_size` is not a multiple of ranks times
            micro-batches.
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
    ) -> None:
        _check_not_empty(dataset, type(dataset).__name__)
        _check_batch_size(batch_size, comm.get_world_size(), accumulate)
        self.dataset = dataset
        self.sampler = sampler
        self.batch_size = batch_size
        self.accumulate = accumulate
        self.seed = seed
        self.num_workers = num_workers
        self.collate_fn = collate_fn
        self.pin_memory = pin_memory
        self._position = Position(epoch=0, offset=0)
        self._passed_over: list[tuple[Position, Position]] = []
        self._live_iterator = 0
        sampler.seed = seed

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


def _check_not_empty(dataset: Any, name: str) -> None:
    if len(dataset) == 0:
        raise ConfigError(f"The data set {name} is empty. Check its files, or name another.")


def _check_batch_size(batch_size: int, world_size: int, accumulate: int) -> None:
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


def build_train_mapper(cfg: CfgNode) -> ImageMapper | None:
    """Builds the random changes of INPUT for training; None when all are off."""
    transforms: list[Transform] = []
    if cfg.INPUT.CROP_PADDING > 0:
        transforms.append(RandomCrop(cfg.INPUT.CROP_PADDING))
    if cfg.INPUT.FLIP_PROB > 0:
        transforms.append(RandomHorizontalFlip(cfg.INPUT.FLIP_PROB))
    if cfg.INPUT.ERASE_PROB > 0:
        transforms.append(RandomErasing(cfg.INPUT.ERASE_PROB))
    return ImageMapper(Compose(transforms)) if transforms else None


def build_train_loader(
    cfg: CfgNode, dataset: Any = None, *, mapper: Callable[[Any], Any] | None = None
) -> TrainLoader:
    """Builds the loader that a run trains on.

    Args:
        cfg: Gives DATASETS.TRAIN, DATALOADER, INPUT, SOLVER.IMS_PER_BATCH, SOLVER.ACCUMULATE, SEED
            and MODEL.DEVICE.
        dataset: Used instead of those that DATASETS.TRAIN names.
        mapper: Applied to each sample; see `MapDataset`. By default INPUT's transforms, but nothing
            to the samples of a given `dataset`, which need not be images.

    Raises:
        ConfigError: If no data set is named, one is empty, or the batch size cannot be shared.
        UnknownNameError: If a data set or the sampler is not registered.
    """
    if dataset is None:
        dataset = _concatenate(cfg.DATASETS.TRAIN)
        mapper = mapper or build_train_mapper(cfg)
    _check_not_empty(dataset, type(dataset).__name__)
    seed = cfg.SEED if cfg.SEED >= 0 else comm.shared_random_seed()
    return TrainLoader(
        dataset if mapper is None else MapDataset(dataset, mapper),
        SAMPLER_REGISTRY.get(cfg.DATALOADER.SAMPLER_TRAIN)(len(dataset), seed=seed),
        cfg.SOLVER.IMS_PER_BATCH,
        accumulate=cfg.SOLVER.ACCUMULATE,
        seed=seed,
        num_workers=cfg.DATALOADER.NUM_WORKERS,
        pin_memory=resolve_device(cfg.MODEL.DEVICE).type == "cuda",
    )


def _concatenate(names: tuple[str, ...]) -> Any:
    if not names:
        raise ConfigError("DATASETS.TRAIN is empty. Name at least one registered data set.")
    datasets = [DatasetCatalog.get(name) for name in names]
    for name, dataset in zip(names, datasets, strict=True):
        _check_not_empty(dataset, repr(name))
    return datasets[0] if len(datasets) == 1 else ConcatDataset(datasets)


def build_test_loader(
    cfg: CfgNode,
    dataset_name: str,
    dataset: Any = None,
    *,
    mapper: Callable[[Any], Any] | None = None,
) -> DataLoader[Any]:
    """Builds the loader of this rank's share of a data set, in order and without augmentation.

    Args:
        cfg: Gives TEST.IMS_PER_BATCH (samples per batch of each rank), DATALOADER.NUM_WORKERS and
            MODEL.DEVICE.
        dataset_name: A registered name.
        dataset: Used instead of the one of that name.
        mapper: Applied to each sample, which must not come back as None.

    Raises:
        ConfigError: If the data set is empty.
        UnknownNameError: If it is not registered.
    """
    if dataset is None:
        dataset = DatasetCatalog.get(dataset_name)
    _check_not_empty(dataset, repr(dataset_name))
    return WatchedLoader(
        dataset if mapper is None else MapDataset(dataset, mapper),
        batch_size=cfg.TEST.IMS_PER_BATCH,
        sampler=InferenceSampler(len(dataset)),
        num_workers=cfg.DATALOADER.NUM_WORKERS,
        pin_memory=resolve_device(cfg.MODEL.DEVICE).type == "cuda",
        generator=torch.Generator(),  # As in TrainLoader.
    )
