import itertools
import math
import pickle
from typing import Any

import numpy as np
import pytest
import torch
from torch.utils.data import ConcatDataset, DataLoader, Subset

from trainkit.data.common import MapDataset
from trainkit.data.samplers.distributed_sampler import (
    SAMPLER_REGISTRY,
    InferenceSampler,
    RandomSubsetTrainingSampler,
    RepeatFactorTrainingSampler,
    TrainingSampler,
)
from trainkit.utils import comm
from trainkit.utils.errors import ConfigError


def as_rank(monkeypatch: pytest.MonkeyPatch, rank: int, world_size: int) -> None:
    monkeypatch.setattr(comm, "get_rank", lambda: rank)
    monkeypatch.setattr(comm, "get_world_size", lambda: world_size)


def test_each_epoch_holds_every_index_in_another_order() -> None:
    sampler = TrainingSampler(100, seed=0)
    orders = [list(sampler.indices(epoch)) for epoch in range(3)]
    assert all(sorted(order) == list(range(100)) for order in orders)
    assert orders[0] != orders[1] != orders[2]


def test_the_order_follows_from_seed_and_epoch_alone() -> None:
    sampler = TrainingSampler(100, seed=3)
    list(sampler.indices(0))
    assert list(sampler.indices(7)) == list(TrainingSampler(100, seed=3).indices(7))
    assert list(sampler.indices(7)) != list(TrainingSampler(100, seed=4).indices(7))


def test_without_shuffling_the_order_is_the_data_sets() -> None:
    assert list(TrainingSampler(4, shuffle=False, seed=0).indices(5)) == [0, 1, 2, 3]


def test_d16_without_a_seed_ranks_share_a_random_one(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(comm, "shared_random_seed", lambda: 77)
    assert TrainingSampler(10).seed == TrainingSampler(10, seed=-1).seed == 77
    assert TrainingSampler(10, seed=0).seed == 0


def test_d45_seeds_count_in_all_their_bits() -> None:
    sampler, larger = TrainingSampler(100, seed=5), TrainingSampler(100, seed=5 + 2**62)
    assert list(sampler.indices(0)) != list(larger.indices(0))
    repeating = [RepeatFactorTrainingSampler([0.5] * 100, seed=s) for s in (5, 5 + 2**62)]
    assert len({tuple(sorted(sampler.indices(0))) for sampler in repeating}) == 2


def test_a_worker_iterates_the_share_of_the_rank_that_made_the_sampler(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    with monkeypatch.context() as patch:
        as_rank(patch, 1, 2)
        pickled = pickle.dumps(TrainingSampler(10, shuffle=False, seed=0))
    # As in a worker, which belongs to no process group.
    assert comm.get_world_size() == 1
    assert list(itertools.islice(pickle.loads(pickled), 3)) == [1, 3, 5]


@pytest.mark.parametrize("world_size", [2, 3])
def test_ranks_share_the_endless_order_in_turns(
    monkeypatch: pytest.MonkeyPatch, world_size: int
) -> None:
    whole = list(itertools.islice(TrainingSampler(10, seed=1), 36))
    shares = []
    for rank in range(world_size):
        as_rank(monkeypatch, rank, world_size)
        shares.append(list(itertools.islice(TrainingSampler(10, seed=1), 36 // world_size)))
    assert [index for turn in zip(*shares, strict=True) for index in turn] == whole


def test_a_plain_data_loader_takes_it() -> None:
    sampler = TrainingSampler(6, seed=0)
    dataset = MapDataset(range(6), torch.tensor)
    loader = DataLoader(dataset, batch_size=4, sampler=sampler)
    batches = list(itertools.islice(loader, 3))
    expected = [*sampler.indices(0), *sampler.indices(1)]
    assert torch.cat(batches).tolist() == expected


def test_training_on_nothing_is_refused() -> None:
    with pytest.raises(ConfigError, match="size given to TrainingSampler is 0"):
        TrainingSampler(0)


def test_a_config_can_name_it() -> None:
    assert SAMPLER_REGISTRY.get("TrainingSampler") is TrainingSampler


def test_a_random_subset_is_the_same_in_each_epoch_in_another_order() -> None:
    sampler = RandomSubsetTrainingSampler(100, 0.255, seed_shuffle=3)
    epochs = [list(sampler.indices(epoch)) for epoch in (0, 1, 2)]
    subsets = {tuple(sorted(epoch)) for epoch in epochs}
    assert len(subsets) == 1
    assert len(set(epochs[0])) == 25
    assert epochs[0] != epochs[1]
    assert subsets != {tuple(range(25))}


def test_the_seeds_of_a_subset_and_of_its_order_are_two() -> None:
    def order(*seeds: int | None, shuffle: bool = True) -> list[int]:
        sampler = RandomSubsetTrainingSampler(100, 0.3, shuffle, *seeds)
        return list(sampler.indices(1))

    assert set(order(1, 5)) == set(order(2, 5)) != set(order(1, 6))
    assert order(1, 5) != order(2, 5)
    assert set(order(1, None)) != set(order(2, None))
    assert order(1, 5, shuffle=False) == order(2, 5, shuffle=False)


def test_a_seed_that_comes_with_a_checkpoint_decides_the_subset() -> None:
    sampler = RandomSubsetTrainingSampler(100, 0.3, seed_shuffle=1)
    list(sampler.indices(0))
    sampler.seed = 2
    expected = RandomSubsetTrainingSampler(100, 0.3, seed_shuffle=2).indices(0)
    assert list(sampler.indices(0)) == list(expected)


@pytest.mark.parametrize("ratio", [0.0, 0.009, -0.5, 1.01])
def test_an_impossible_subset_is_refused(ratio: float) -> None:
    with pytest.raises(ConfigError, match=r"RANDOM_SUBSET_RATIO.* of 100 samples.*\[0.01, 1\]"):
        RandomSubsetTrainingSampler(100, ratio)


def test_samples_are_repeated_by_their_factors_rounded_anew_in_each_epoch() -> None:
    factors = [1.0, 2.25, 0.0, 0.5]
    sampler = RepeatFactorTrainingSampler(torch.tensor(factors), seed=7)
    epochs = [np.bincount(list(sampler.indices(epoch)), minlength=4) for epoch in range(400)]
    assert all(count in ({1}, {2, 3}, {0}, {0, 1})[k] for e in epochs for k, count in enumerate(e))
    # Four standard deviations of 400 draws.
    assert np.mean(epochs, axis=0) == pytest.approx(factors, abs=4 * 0.5 / math.sqrt(400))
    assert len({epoch.sum() for epoch in epochs}) > 1


def test_repeated_samples_are_shuffled_unless_that_is_off() -> None:
    factors = [2.0] * 50
    in_order = RepeatFactorTrainingSampler(factors, shuffle=False, seed=0)
    assert list(in_order.indices(3)) == sorted([*range(50), *range(50)])
    shuffled, twin = (RepeatFactorTrainingSampler(factors, seed=0) for _ in range(2))
    assert sorted(shuffled.indices(3)) == list(in_order.indices(3))
    assert list(shuffled.indices(3)) != list(in_order.indices(3)) != list(shuffled.indices(4))
    assert list(shuffled.indices(3)) == list(twin.indices(3))


@pytest.mark.parametrize("factors", [[1.0, -0.1], [1.0, math.nan], [math.inf, 1.0]])
def test_impossible_factors_are_refused(factors: list[float]) -> None:
    with pytest.raises(ConfigError, match=r"repeat factors lie between .* finite and at least 0"):
        RepeatFactorTrainingSampler(factors)


def test_ranks_share_repeated_samples_in_turns(monkeypatch: pytest.MonkeyPatch) -> None:
    def sampler() -> RepeatFactorTrainingSampler:
        return RepeatFactorTrainingSampler([1.5, 2.5, 0.5], seed=1)

    whole = list(itertools.islice(sampler(), 40))
    shares = []
    for rank in range(2):
        as_rank(monkeypatch, rank, 2)
        shares.append(list(itertools.islice(sampler(), 20)))
    assert [index for turn in zip(*shares, strict=True) for index in turn] == whole
    assert all(type(index) is int for index in whole)


# Category 0 is in all 4 samples, 1 in two of them, 2 in one.
ANNOTATED = [
    {"annotations": [{"category_id": 0}, {"category_id": 1}]},
    {"annotations": [{"category_id": 0}]},
    {"annotations": [{"category_id": 0}, {"category_id": 0}, {"category_id": 1}]},
    {"annotations": [{"category_id": 2}, {"category_id": 0}]},
]
factors_of = RepeatFactorTrainingSampler.repeat_factors_from_category_frequency


def test_the_rarest_category_of_a_sample_decides_its_factor() -> None:
    root = math.sqrt
    expected = [root(0.8 / 0.5), 1, root(0.8 / 0.5), root(0.8 / 0.25)]
    assert factors_of(ANNOTATED, 0.8).tolist() == pytest.approx(expected)
    assert factors_of(ANNOTATED, 0.8, sqrt=False).tolist() == pytest.approx([1.6, 1, 1.6, 3.2])
    assert factors_of(ANNOTATED, 0.0).tolist() == [1, 1, 1, 1]
    assert factors_of([*ANNOTATED, {"annotations": []}], 0.8).tolist()[-1] == 1


class Unread:
    """Knows its categories and cannot be read."""

    def __init__(self, **categories: Any) -> None:
        vars(self).update(categories)

    def __len__(self) -> int:
        return 4

    def __getitem__(self, index: int) -> Any:
        raise AssertionError("a sample was fetched")


@pytest.mark.parametrize(
    "dataset",
    [
        Unread(labels=[7, 7, 7, 8]),
        Unread(targets=torch.tensor([7, 7, 7, 8])),
        Unread(labels=[[7], (7,), torch.tensor([7]), [8]]),
        MapDataset(Unread(labels=[7, 7, 7, 8]), lambda sample: None),
        Subset(Unread(labels=[8, 7, 7, 7, 9]), [3, 2, 1, 0]),  # type: ignore[arg-type]  # a list
        ConcatDataset([Unread(labels=[7, 7]), Unread(labels=[7, 8])]),  # type: ignore[list-item]
        [{"label": 7}, {"label": 7}, {"label": torch.tensor(7)}, {"label": "8"}],
    ],
)
def test_categories_are_found_without_fetching_samples_where_they_are_known(dataset: Any) -> None:
    factors = factors_of(dataset, 0.5, sqrt=False)
    assert factors.tolist() == pytest.approx([1, 1, 1, 2])


@pytest.mark.parametrize("sample", [(torch.zeros(1), 3), {"target": 3}])
def test_samples_without_a_category_are_refused(sample: Any) -> None:
    with pytest.raises(ConfigError, match=r"Sample 0 has no category.*`labels`"):
        factors_of([sample], 0.5)


@pytest.mark.parametrize(("size", "world_size"), [(10, 1), (10, 3), (11, 4), (2, 4), (0, 2)])
def test_inference_shares_are_exact_and_contiguous(
    monkeypatch: pytest.MonkeyPatch, size: int, world_size: int
) -> None:
    shares = []
    for rank in range(world_size):
        as_rank(monkeypatch, rank, world_size)
        sampler = InferenceSampler(size)
        shares.append(list(sampler))
        assert len(sampler) == len(shares[-1])
    assert list(itertools.chain(*shares)) == list(range(size))
    assert max(map(len, shares)) - min(map(len, shares)) <= 1


def test_a_wrapper_of_the_users_is_asked_sample_by_sample() -> None:
    class Filtered:
        def __init__(self) -> None:
            self.dataset = [{"label": 0}, {"label": 1}, {"label": 1}, {"label": 1}]

        def __len__(self) -> int:
            return 2

        def __getitem__(self, index: int) -> dict[str, int]:
            return self.dataset[2 * index]

    assert factors_of(Filtered(), 0.5).tolist() == [1.0, 1.0]


def test_factors_that_leave_no_sample_are_refused() -> None:
    with pytest.raises(ConfigError, match=r"between 0 and 0.*one above 0"):
        RepeatFactorTrainingSampler([0.0, 0.0])


def test_a_ratio_takes_what_it_says() -> None:
    assert len(RandomSubsetTrainingSampler(100, 0.29, seed_shuffle=0).indices(0)) == 29
