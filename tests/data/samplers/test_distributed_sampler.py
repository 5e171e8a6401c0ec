import itertools

import pytest
import torch
from torch.utils.data import DataLoader

from trainkit.data.common import MapDataset
from trainkit.data.samplers.distributed_sampler import (
    SAMPLER_REGISTRY,
    InferenceSampler,
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


def test_without_a_seed_ranks_share_a_random_one(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(comm, "shared_random_seed", lambda: 77)
    assert TrainingSampler(10).seed == 77
    assert TrainingSampler(10, seed=0).seed == 0


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
