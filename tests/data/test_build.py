import functools
import itertools
import random
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch
from torch.utils.data import ConcatDataset, DataLoader, Dataset, IterableDataset, RandomSampler

from tests.data.noisy import SIZE, Noisy, as_rank, assert_same, rng_is_untouched, take
from trainkit.config.config import CfgNode
from trainkit.config.defaults import get_cfg
from trainkit.data.build import (
    build_batch_data_loader,
    build_detection_test_loader,
    build_detection_train_loader,
    build_test_loader,
    build_train_loader,
    build_train_mapper,
    trivial_batch_collator,
    worker_init_reset_seed,
)
from trainkit.data.catalog import DatasetCatalog
from trainkit.data.common import DatasetFromList
from trainkit.data.samplers.distributed_sampler import (
    SAMPLER_REGISTRY,
    RandomSubsetTrainingSampler,
    RepeatFactorTrainingSampler,
    TrainingSampler,
)
from trainkit.data.samplers.order import EpochOrder
from trainkit.data.train_loader import TrainLoader
from trainkit.data.transforms import ImageMapper
from trainkit.utils import comm
from trainkit.utils.errors import ConfigError, UnknownNameError
from trainkit.utils.random import get_rng_state


@pytest.fixture
def cfg() -> CfgNode:
    return CfgNode(
        {
            "DATASETS": {"TRAIN": ("build_test_a",), "TEST": ("build_test_b",)},
            "INPUT": {"CROP_PADDING": 2, "FLIP_PROB": 0.5, "ERASE_PROB": 0.5},
            "SOLVER": {"IMS_PER_BATCH": 8, "ACCUMULATE": 2},
            "DATALOADER": {
                "NUM_WORKERS": 0,
                "SAMPLER_TRAIN": "TrainingSampler",
                "RANDOM_SUBSET_RATIO": 1.0,
                "REPEAT_THRESHOLD": 0.0,
                "REPEAT_SQRT": True,
            },
            "TEST": {"IMS_PER_BATCH": 3},
            "SEED": 4,
            "MODEL": {"DEVICE": "cpu"},
        }
    )


def image_list(size: int, label: int) -> list[dict[str, Any]]:
    image = torch.arange(64, dtype=torch.uint8).reshape(1, 8, 8)
    return [{"image": image, "label": label} for _ in range(size)]


@pytest.fixture(autouse=True)
def _registered() -> Iterator[None]:
    DatasetCatalog.register("build_test_a", functools.partial(image_list, 10, 0))
    DatasetCatalog.register("build_test_b", functools.partial(image_list, 6, 1))
    DatasetCatalog.register("build_test_empty", list)
    yield
    for name in ("build_test_a", "build_test_b", "build_test_empty"):
        DatasetCatalog.remove(name)


def test_the_train_loader_is_built_from_the_config(cfg: CfgNode) -> None:
    loader = build_train_loader(cfg)
    batch = next(iter(loader))
    assert batch["image"].shape == (4, 1, 8, 8)
    assert batch["image"].dtype == torch.uint8
    assert len(batch["image"].unique(dim=0)) > 1
    assert (loader.seed, loader.accumulate, loader.pin_memory) == (4, 2, False)


def test_several_data_sets_are_trained_on_as_one(cfg: CfgNode) -> None:
    cfg.DATASETS.TRAIN = ("build_test_a", "build_test_b")
    loader = build_train_loader(cfg)
    assert isinstance(loader.dataset.dataset, ConcatDataset)
    labels = torch.cat([batch["label"] for batch in itertools.islice(loader, 4)])
    assert labels.bincount().tolist() == [10, 6]


def test_a_mapper_replaces_the_configs_transforms(cfg: CfgNode) -> None:
    loader = build_train_loader(cfg, list(range(20)), mapper=lambda sample: sample + 100)
    assert next(iter(loader)).min() >= 100


def test_transforms_that_are_off_are_not_built(cfg: CfgNode) -> None:
    cfg.INPUT.update(CROP_PADDING=0, FLIP_PROB=0.0, ERASE_PROB=0.0)
    assert build_train_mapper(cfg) is None
    dataset = Noisy()
    assert build_train_loader(cfg, dataset).dataset is dataset
    cfg.INPUT.FLIP_PROB = 1.0
    mapper = build_train_mapper(cfg)
    assert isinstance(mapper, ImageMapper)
    assert mapper({"image": torch.tensor([[[1, 2]]])})["image"].tolist() == [[[2, 1]]]


def test_d16_a_negative_seed_gives_each_run_an_order_of_its_own(
    cfg: CfgNode, monkeypatch: pytest.MonkeyPatch
) -> None:
    cfg.SEED = -1
    dataset = Noisy()
    first, second = (build_train_loader(cfg, dataset) for _ in range(2))
    resumed = build_train_loader(cfg, dataset)
    seen = take(first, 2)
    assert not torch.equal(seen[0]["index"], next(iter(second))["index"])
    # A resume takes the order up where the run left it; it is no second run.
    resumed.load_state_dict(first.state_dict())
    assert_same(take(resumed, 4), take(first, 4))
    # A sampler of the user's takes the seed as it comes.
    monkeypatch.setitem(SAMPLER_REGISTRY._obj_map, "Reversed", Reversed)
    cfg.DATALOADER.SAMPLER_TRAIN = "Reversed"
    assert build_train_loader(cfg, dataset).seed != build_train_loader(cfg, dataset).seed
    # Ranks share the seed.
    monkeypatch.setattr(comm, "shared_random_seed", lambda: 99)
    assert build_train_loader(cfg, dataset).state_dict()["seed"] == 99


@pytest.mark.parametrize("name", [name for name, _ in SAMPLER_REGISTRY])
def test_d40_each_sampler_builds_from_the_default_config(name: str) -> None:
    cfg = get_cfg()
    cfg.DATALOADER.SAMPLER_TRAIN = name
    cfg.DATALOADER.NUM_WORKERS = 0
    loader = build_train_loader(cfg)
    assert type(loader.sampler).__name__ == name
    assert len(next(iter(loader))["label"]) == cfg.SOLVER.IMS_PER_BATCH


def test_d40_samplers_take_their_keys(cfg: CfgNode) -> None:
    cfg.DATASETS.TRAIN = ("build_test_a", "build_test_b")
    cfg.DATALOADER.SAMPLER_TRAIN = "RandomSubsetTrainingSampler"
    cfg.DATALOADER.RANDOM_SUBSET_RATIO = 0.5
    subset = build_train_loader(cfg).sampler
    assert isinstance(subset, RandomSubsetTrainingSampler)
    assert len(subset.indices(0)) == 8
    cfg.DATALOADER.SAMPLER_TRAIN = "RepeatFactorTrainingSampler"
    cfg.DATALOADER.REPEAT_THRESHOLD = 0.75
    for sqrt in (False, True):
        cfg.DATALOADER.REPEAT_SQRT = sqrt
        repeating = build_train_loader(cfg).sampler
        assert isinstance(repeating, RepeatFactorTrainingSampler)
        ratios = torch.tensor([0.75 / (10 / 16)] * 10 + [0.75 / (6 / 16)] * 6, dtype=torch.float64)
        assert torch.allclose(repeating.repeat_factors, ratios.sqrt() if sqrt else ratios)


class Reversed:
    def __init__(self, size: int, seed: int) -> None:
        self.size = size
        self.seed = seed

    def indices(self, epoch: int) -> EpochOrder:
        return range(self.size)[::-1]


def test_a_config_can_name_a_sampler_of_the_users(
    cfg: CfgNode, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(SAMPLER_REGISTRY._obj_map, "Reversed", Reversed)
    cfg.DATALOADER.SAMPLER_TRAIN = "Reversed"
    loader = build_train_loader(cfg, list(range(6)), mapper=lambda sample: sample)
    assert next(iter(loader)).tolist() == [5, 4, 3, 2]


def test_names_with_a_typo_are_refused_with_the_nearest(cfg: CfgNode) -> None:
    cfg.DATALOADER.SAMPLER_TRAIN = "TraningSampler"
    with pytest.raises(UnknownNameError, match=r"DATALOADER.SAMPLER_TRAIN.*'TrainingSampler'"):
        build_train_loader(cfg)
    cfg.DATASETS.TRAIN = ("build_tset_a",)
    with pytest.raises(UnknownNameError, match="Did you mean 'build_test_a'"):
        build_train_loader(cfg)
    with pytest.raises(UnknownNameError, match="Did you mean 'build_test_b'"):
        build_test_loader(cfg, "build_tset_b")


def test_data_sets_that_are_empty_or_not_named_are_refused(cfg: CfgNode) -> None:
    with pytest.raises(ConfigError, match="'build_test_empty' is empty"):
        build_test_loader(cfg, "build_test_empty")
    with pytest.raises(ConfigError, match="The data set list is empty"):
        build_train_loader(cfg, [])
    cfg.DATASETS.TRAIN = ("build_test_a", "build_test_empty")
    with pytest.raises(ConfigError, match="'build_test_empty' is empty"):
        build_train_loader(cfg)
    cfg.DATASETS.TRAIN = ()
    with pytest.raises(ConfigError, match=r"DATASETS\.TRAIN is empty"):
        build_train_loader(cfg)


def test_the_test_loader_yields_the_samples_unchanged_and_in_order(cfg: CfgNode) -> None:
    loader = build_test_loader(cfg, "build_test_b")
    batches = list(loader)
    assert [len(batch["label"]) for batch in batches] == [3, 3]
    original = image_list(1, 1)[0]["image"]
    assert all(torch.equal(image, original) for batch in batches for image in batch["image"])


def test_ranks_share_the_test_data_exactly(cfg: CfgNode, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[int] = []
    for rank in range(3):
        as_rank(monkeypatch, rank, 3)
        loader = build_test_loader(cfg, "tens", range(7), mapper=lambda sample: sample * 10)
        seen += torch.cat(list(loader)).tolist()
    assert seen == [0, 10, 20, 30, 40, 50, 60]


def test_the_test_loader_does_not_draw_from_the_global_generator(cfg: CfgNode) -> None:
    before = get_rng_state()
    list(build_test_loader(cfg, "range", list(range(5))))
    assert rng_is_untouched(before)


class Draws(Dataset[list[float]]):
    """Samples of what the worker's generators draw."""

    def __len__(self) -> int:
        return 8

    def __getitem__(self, index: int) -> list[float]:
        return [random.random(), float(np.random.rand()), torch.rand(()).item()]


class Sizes(Dataset[dict[str, int]]):
    def __len__(self) -> int:
        return 20

    def __getitem__(self, index: int) -> dict[str, int]:
        return {"index": index, "width": 1 + index % 3, "height": 2}


class Count(IterableDataset[int]):
    def __iter__(self) -> Iterator[int]:
        yield from range(10)


def test_batches_of_a_training_sampler_resume_exactly() -> None:
    def build(seed: int = 3) -> Any:
        return build_batch_data_loader(Noisy(), TrainingSampler(SIZE, seed=seed), 12)

    loader = build()
    assert isinstance(loader, TrainLoader)
    batches = list(itertools.islice(loader, 3))
    order = TrainingSampler(SIZE, seed=3).indices(0)
    assert [sample["index"] for sample in batches[0]] == list(order[:12])
    resumed = build(seed=4)
    resumed.load_state_dict(loader.state_dict())
    expected = itertools.islice(loader, 5)
    found = itertools.islice(resumed, 5)
    for left, right in zip(found, expected, strict=True):
        assert [s["index"] for s in left] == [s["index"] for s in right]
        assert all(torch.equal(a["noise"], b["noise"]) for a, b in zip(left, right, strict=True))


def test_a_seed_takes_the_place_of_the_samplers_and_a_negative_one_does_not() -> None:
    def first(**options: Any) -> Any:
        loader = build_batch_data_loader(range(50), TrainingSampler(50, seed=3), 50, **options)
        return next(iter(loader))

    assert first(seed=-1) == first() == list(TrainingSampler(50, seed=3).indices(0))
    assert first(seed=7) == list(TrainingSampler(50, seed=7).indices(0))


@pytest.mark.parametrize("num_workers", [0, 1])
def test_other_samplers_get_a_plain_loader_of_the_ranks_batches(
    monkeypatch: pytest.MonkeyPatch, num_workers: int
) -> None:
    as_rank(monkeypatch, 1, 2)
    for drop_last, sizes in ((True, [3, 3, 3]), (False, [3, 3, 3, 1])):
        loader = build_batch_data_loader(
            range(10),
            RandomSampler(range(10)),
            6,
            drop_last=drop_last,
            num_workers=num_workers,
            persistent_workers=True,
        )
        assert isinstance(loader, DataLoader)
        assert [len(batch) for batch in loader] == sizes


def test_iterable_data_sets_have_no_sampler() -> None:
    batches = list(build_batch_data_loader(Count(), None, 4, collate_fn=sum, drop_last=False))
    assert batches == [0 + 1 + 2 + 3, 4 + 5 + 6 + 7, 8 + 9]
    mapped = build_detection_train_loader(Count(), mapper=reject_odd, total_batch_size=2)
    assert list(mapped) == [[0, 2], [4, 6]]


def reject_odd(sample: int) -> int | None:
    return None if sample % 2 else sample


def test_the_batch_of_a_rank_can_be_given_instead(monkeypatch: pytest.MonkeyPatch) -> None:
    as_rank(monkeypatch, 0, 2)
    sampler = TrainingSampler(10, seed=0)
    loader = build_batch_data_loader(
        range(10), sampler, None, single_gpu_batch_size=3, accumulate=2
    )
    assert loader.batch_size == 12
    assert len(next(iter(loader))) == 3
    for total, single in ((8, 4), (None, None), (0, None)):
        with pytest.raises(ConfigError, match=f"size is {total} and .* is {single}. Give one"):
            build_batch_data_loader(range(10), sampler, total, single_gpu_batch_size=single)


def test_batches_can_be_wide_or_high() -> None:
    sampler = TrainingSampler(20, seed=0)
    loader = build_batch_data_loader(
        Sizes(), sampler, 4, aspect_ratio_grouping=True, num_workers=1, collate_fn=first_and_all
    )
    batches = list(itertools.islice(loader, 10))
    assert all(len({s["width"] > 2 for s in samples}) == 1 for _, samples in batches)
    assert {len(samples) for _, samples in batches} == {4}
    # Samples come in the sampler's order.
    assert batches[0][0]["index"] in list(sampler.indices(0)[:7])


def first_and_all(samples: list[Any]) -> Any:
    return samples[0], samples


def drawn(rank: int, monkeypatch: pytest.MonkeyPatch, sampler: Any) -> set[float]:
    with monkeypatch.context() as patch:
        as_rank(patch, rank, 2)
        loader = build_batch_data_loader(Draws(), sampler, 4, num_workers=2, seed=5)
        batches = list(itertools.islice(loader, 2))
    return {value for batch in batches for sample in batch for value in sample}


@pytest.mark.parametrize("sampler", [range(8), TrainingSampler(8, seed=0)])
def test_d45_workers_of_different_ranks_draw_differently(
    monkeypatch: pytest.MonkeyPatch, sampler: Any
) -> None:
    first, second = (drawn(rank, monkeypatch, sampler) for rank in range(2))
    assert len(first) == len(second) == 2 * 2 * 3
    assert not first & second
    assert drawn(1, monkeypatch, sampler) == second


def test_workers_of_a_plain_data_loader_can_be_seeded_in_all_generators() -> None:
    def first(seed: int) -> Any:
        generator = torch.Generator().manual_seed(seed)
        options: Any = {"worker_init_fn": worker_init_reset_seed, "generator": generator}
        return next(iter(DataLoader(Draws(), batch_size=None, num_workers=1, **options)))

    assert first(1) == first(1)
    assert not set(first(1)) & set(first(2))
    assert trivial_batch_collator([1, 2]) == [1, 2]


def double(sample: Any) -> Any:
    return {"label": sample["label"] * 2}


def test_detectron2s_training_loader_takes_a_config_or_arguments(cfg: CfgNode) -> None:
    cfg.DATASETS.TRAIN = ("build_test_b",)
    by_config = build_detection_train_loader(cfg, mapper=double)
    assert (by_config.batch_size, by_config.accumulate, by_config.seed) == (8, 2, 4)
    assert next(iter(by_config)) == [{"label": 2}] * 4
    assert next(iter(build_detection_train_loader(cfg)))[0]["image"].shape == (1, 8, 8)
    changed = build_detection_train_loader(
        cfg, dataset=[{"label": 5}] * 3, mapper=double, total_batch_size=6, num_workers=0
    )
    assert next(iter(changed)) == [{"label": 10}] * 3
    sampler = TrainingSampler(3, shuffle=False, seed=0)
    dataset = [{"label": label} for label in (3, 4, 5)]
    for loader in (
        build_detection_train_loader(dataset, mapper=double, sampler=sampler, total_batch_size=2),
        build_detection_train_loader(
            dataset=dataset, mapper=double, sampler=sampler, total_batch_size=2
        ),
    ):
        assert next(iter(loader)) == [{"label": 6}, {"label": 8}]
        assert isinstance(loader.dataset.dataset, DatasetFromList)
    with pytest.raises(ConfigError, match="total_batch_size is None"):
        build_detection_train_loader(dataset)


def test_detectron2s_test_loader_takes_a_config_or_arguments(cfg: CfgNode) -> None:
    one_by_one = build_detection_test_loader(cfg, "build_test_b", mapper=double)
    assert list(one_by_one) == [[{"label": 2}]] * 6
    several = build_detection_test_loader(cfg, ["build_test_a", "build_test_b"], batch_size=16)
    (batch,) = several
    assert [sample["label"] for sample in batch] == [0] * 10 + [1] * 6
    dataset = [{"label": label} for label in range(4)]
    for loader in (
        build_detection_test_loader(dataset, batch_size=3, sampler=range(4)),
        build_detection_test_loader(dataset=dataset, batch_size=3, num_workers=1),
        build_detection_test_loader(cfg, "named", dataset=dataset, batch_size=3),
    ):
        assert list(loader) == [dataset[:3], dataset[3:]]
    assert list(build_detection_test_loader(Count(), batch_size=10)) == [list(range(10))]
    summed = build_detection_test_loader(range(4), batch_size=4, collate_fn=sum)
    assert list(summed) == [6]
    with pytest.raises(ConfigError, match="The data set DatasetFromList is empty"):
        build_detection_test_loader([])
    with pytest.raises(ConfigError, match="dataset_name is empty"):
        build_detection_test_loader(cfg)


def test_a_sampler_of_torchs_that_lists_its_indices_gets_a_plain_loader() -> None:
    sampler = torch.utils.data.SubsetRandomSampler(range(10))
    loader = build_batch_data_loader(list(range(20)), sampler, 2)
    assert sorted(index for batch in loader for index in batch) == list(range(10))


def test_a_generator_of_the_users_is_taken() -> None:
    generator = torch.Generator().manual_seed(3)
    loader = build_detection_test_loader([1, 2, 3], generator=generator)
    assert loader.generator is generator
