"""The builders of loaders: those that read the config, and detectron2's."""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch.utils.data import ConcatDataset, DataLoader, IterableDataset, default_collate

from trainkit.config.config import CfgNode
from trainkit.config.configurable import configurable
from trainkit.data.catalog import DatasetCatalog
from trainkit.data.common import (
    AspectRatioGroupedDataset,
    DatasetFromList,
    MapDataset,
    WatchedLoader,
)
from trainkit.data.samplers.distributed_sampler import (
    SAMPLER_REGISTRY,
    InferenceSampler,
    TrainingSampler,
)
from trainkit.data.train_loader import TrainLoader, check_batch_size, check_not_empty
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
from trainkit.utils.random import hash64, seed_generators

__all__ = [
    "TrainLoader",
    "build_batch_data_loader",
    "build_detection_test_loader",
    "build_detection_train_loader",
    "build_test_loader",
    "build_train_loader",
    "build_train_mapper",
    "trivial_batch_collator",
    "worker_init_reset_seed",
]


# The decorator with a type: what it returns takes a config or the arguments.
_takes_config: Callable[..., Callable[[Callable[..., Any]], Callable[..., Any]]] = configurable


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
    arguments = _train_loader_from_config(cfg, mapper, dataset)
    arguments["dataset"] = _mapped(arguments["dataset"], arguments.pop("mapper"))
    loader: TrainLoader = build_batch_data_loader(**arguments, collate_fn=default_collate)
    return loader


def _train_loader_from_config(
    cfg: Any, mapper: Callable[[Any], Any] | None = None, dataset: Any = None, sampler: Any = None
) -> dict[str, Any]:
    if dataset is None:
        dataset = _concatenate("DATASETS.TRAIN", cfg.DATASETS.TRAIN)
        mapper = mapper or build_train_mapper(cfg)
    seed = cfg.SEED if cfg.SEED >= 0 else comm.shared_random_seed()
    if sampler is None and not isinstance(dataset, IterableDataset):
        check_not_empty(dataset, type(dataset).__name__)
        kind = SAMPLER_REGISTRY.get(cfg.DATALOADER.SAMPLER_TRAIN)
        if hasattr(kind, "from_config"):
            sampler = kind(**kind.from_config(cfg, dataset, seed))
        else:
            sampler = kind(len(dataset), seed=seed)
    return {
        "dataset": dataset,
        "mapper": mapper,
        "sampler": sampler,
        "total_batch_size": cfg.SOLVER.IMS_PER_BATCH,
        "accumulate": cfg.SOLVER.ACCUMULATE,
        "seed": seed,
        "num_workers": cfg.DATALOADER.NUM_WORKERS,
        "pin_memory": resolve_device(cfg.MODEL.DEVICE).type == "cuda",
    }


def _concatenate(key: str, names: Sequence[str]) -> Any:
    if not names:
        raise ConfigError(f"{key} is empty. Name at least one registered data set.")
    datasets = [_from_list(DatasetCatalog.get(name)) for name in names]
    for name, dataset in zip(names, datasets, strict=True):
        check_not_empty(dataset, repr(name))
    return datasets[0] if len(datasets) == 1 else ConcatDataset(datasets)


def _mapped(dataset: Any, mapper: Callable[[Any], Any] | None) -> Any:
    return dataset if mapper is None else MapDataset(dataset, mapper)


def _from_list(dataset: Any) -> Any:
    """Has the workers share a list."""
    return DatasetFromList(dataset, copy=False) if isinstance(dataset, list) else dataset


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
        dataset = _concatenate("DATASETS.TEST", (dataset_name,))
    check_not_empty(dataset, repr(dataset_name))
    return WatchedLoader(
        _mapped(dataset, mapper),
        batch_size=cfg.TEST.IMS_PER_BATCH,
        sampler=InferenceSampler(len(dataset)),
        num_workers=cfg.DATALOADER.NUM_WORKERS,
        pin_memory=resolve_device(cfg.MODEL.DEVICE).type == "cuda",
        generator=torch.Generator(),  # As in TrainLoader.
    )


def trivial_batch_collator(batch: list[Any]) -> list[Any]:
    """Returns the list of samples as the batch."""
    return batch


def worker_init_reset_seed(worker_id: int) -> None:
    """Seeds all generators of a DataLoader's worker, as its `worker_init_fn`."""
    seed_generators(hash64(torch.initial_seed(), worker_id))


def build_batch_data_loader(
    dataset: Any,
    sampler: Any,
    total_batch_size: int | None,
    *,
    aspect_ratio_grouping: bool = False,
    num_workers: int = 0,
    collate_fn: Callable[[list[Any]], Any] | None = None,
    drop_last: bool = True,
    single_gpu_batch_size: int | None = None,
    prefetch_factor: int = 2,
    persistent_workers: bool = False,
    pin_memory: bool = False,
    seed: int | None = None,
    accumulate: int = 1,
    **kwargs: Any,
) -> Any:
    """Builds a loader of this rank's batches, by default lists, with detectron2's arguments.

    With an `EpochSampler`, as trainkit's for training are, it is a `TrainLoader`, endless and
    resumed exactly. Anything else (another sampler, an IterableDataset without one,
    `aspect_ratio_grouping`) makes a plain loader, for which `drop_last` and `persistent_workers`
    are: a resume passes over its batches, and samples that are None are not replaced.

    `total_batch_size` counts the samples of a step, over all ranks and `accumulate` micro-batches;
    `single_gpu_batch_size` instead those of one batch. `seed` decides all randomness of a
    TrainLoader (by default, or negative, it is the sampler's), and what the workers of a plain
    loader draw, which differs between ranks. `kwargs` go to DataLoader.
    """
    total = _total_batch_size(total_batch_size, single_gpu_batch_size, accumulate)
    batch_size = total // (comm.get_world_size() * accumulate)
    collate_fn = collate_fn or trivial_batch_collator
    seed = None if seed is None or seed < 0 else seed
    kwargs |= {"num_workers": num_workers, "pin_memory": pin_memory}
    kwargs |= {"prefetch_factor": prefetch_factor} if num_workers > 0 else {}
    if callable(getattr(sampler, "indices", None)) and not aspect_ratio_grouping:
        kwargs |= {"accumulate": accumulate, "collate_fn": collate_fn}
        seed = sampler.seed if seed is None else seed
        return TrainLoader(dataset, sampler, total, seed=seed, **kwargs)
    kwargs |= {"sampler": sampler, "persistent_workers": persistent_workers and num_workers > 0}
    if seed is not None:
        kwargs["generator"] = torch.Generator().manual_seed(hash64(seed, comm.get_rank()))
    if aspect_ratio_grouping:
        kwargs |= {"batch_size": None, "collate_fn": trivial_batch_collator}
        grouped = AspectRatioGroupedDataset(WatchedLoader(dataset, **kwargs), batch_size)
        return MapDataset(grouped, collate_fn)
    kwargs |= {"batch_size": batch_size, "collate_fn": collate_fn, "drop_last": drop_last}
    return WatchedLoader(dataset, **kwargs)


def _total_batch_size(total: int | None, of_one_rank: int | None, accumulate: int) -> int:
    if bool(total) == bool(of_one_rank):
        raise ConfigError(
            f"total_batch_size is {total} and single_gpu_batch_size is {of_one_rank}. Give one of "
            "them, at least 1."
        )
    world_size = comm.get_world_size()
    total = total or (of_one_rank or 0) * world_size * accumulate
    check_batch_size(total, world_size, accumulate)
    return total


@_takes_config(from_config=_train_loader_from_config)
def build_detection_train_loader(
    dataset: Any,
    *,
    mapper: Callable[[Any], Any] | None = None,
    sampler: Any = None,
    total_batch_size: int | None = None,
    **options: Any,
) -> Any:
    """Builds a training loader whose batches are lists.

    It takes a config too, `(cfg, mapper=None, dataset=None, sampler=None)`, which gives the rest as
    to `build_train_loader`. Without one, the sampler is a `TrainingSampler`. `options` are those of
    `build_batch_data_loader`.
    """
    dataset = _from_list(dataset)
    if sampler is None and not isinstance(dataset, IterableDataset):
        sampler = TrainingSampler(len(dataset), seed=options.get("seed"))
    return build_batch_data_loader(_mapped(dataset, mapper), sampler, total_batch_size, **options)


def _test_loader_from_config(
    cfg: Any,
    dataset_name: str | Sequence[str] = (),
    mapper: Callable[[Any], Any] | None = None,
    dataset: Any = None,
) -> dict[str, Any]:
    if dataset is None:
        names = (dataset_name,) if isinstance(dataset_name, str) else dataset_name
        dataset = _concatenate("dataset_name", names)
    return {
        "dataset": dataset,
        "mapper": mapper,
        "num_workers": cfg.DATALOADER.NUM_WORKERS,
        "pin_memory": resolve_device(cfg.MODEL.DEVICE).type == "cuda",
    }


@_takes_config(from_config=_test_loader_from_config)
def build_detection_test_loader(
    dataset: Any,
    *,
    mapper: Callable[[Any], Any] | None = None,
    sampler: Any = None,
    batch_size: int = 1,
    collate_fn: Callable[[list[Any]], Any] | None = None,
    **options: Any,
) -> DataLoader[Any]:
    """Builds a loader of this rank's share of a data set, in order, whose batches are lists.

    It takes a config too, `(cfg, dataset_name, mapper=None, dataset=None)`, with one name or
    several. By default the sampler is an `InferenceSampler`. `options`, such as `num_workers`, go
    to DataLoader.
    """
    dataset = _from_list(dataset)
    if sampler is None and not isinstance(dataset, IterableDataset):
        check_not_empty(dataset, type(dataset).__name__)
        sampler = InferenceSampler(len(dataset))
    return WatchedLoader(
        _mapped(dataset, mapper),
        batch_size=batch_size,
        sampler=sampler,
        collate_fn=collate_fn or trivial_batch_collator,
        # As in TrainLoader.
        **{"generator": torch.Generator(), **options},
    )
