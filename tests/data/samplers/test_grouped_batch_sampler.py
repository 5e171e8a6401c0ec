import itertools
from typing import Any

import numpy as np
import pytest
import torch
from torch.utils.data import DataLoader, RandomSampler

from trainkit.data.samplers.distributed_sampler import (
    RandomSubsetTrainingSampler,
    RepeatFactorTrainingSampler,
    TrainingSampler,
)
from trainkit.data.samplers.grouped_batch_sampler import GroupedBatchSampler
from trainkit.utils.errors import ConfigError

GROUPS = [0] * 11 + [1] * 7 + [2] * 2 + [3]


def grouped(batch_size: int = 4, seed: int = 3) -> GroupedBatchSampler:
    return GroupedBatchSampler(TrainingSampler(len(GROUPS), seed=seed), GROUPS, batch_size)


def batches_of(sampler: GroupedBatchSampler, num_epochs: int) -> list[list[int]]:
    entries = itertools.chain(*(sampler.indices(epoch) for epoch in range(num_epochs)))
    return np.array([int(index) for index in entries]).reshape(-1, sampler.batch_size).tolist()


@pytest.mark.parametrize("batch_size", [1, 4, 5, 13])
def test_epochs_are_what_filling_batches_in_turn_gives(batch_size: int) -> None:
    # The reference keeps what is left over; `indices` computes it.
    computed = batches_of(grouped(batch_size), 50)
    assert computed == list(itertools.islice(grouped(batch_size), len(computed)))
    assert len(computed) > 50 * len(GROUPS) // batch_size - 4


def test_each_batch_has_one_group_and_none_is_forgotten() -> None:
    batches = batches_of(grouped(), 50)
    assert all(len({GROUPS[index] for index in batch}) == 1 for batch in batches)
    seen = np.bincount(np.concatenate(batches), minlength=len(GROUPS))
    # At most three samples of each group wait for a batch.
    assert seen.max() <= 50
    for group in range(4):
        assert 0 <= 50 * GROUPS.count(group) - seen[np.array(GROUPS) == group].sum() < 4


def test_an_epoch_is_computed_without_those_before() -> None:
    sampler = grouped()
    list(sampler.indices(0))
    assert list(sampler.indices(57)) == list(grouped().indices(57))
    sampler.seed = 9
    assert sampler.seed == sampler.sampler.seed == 9
    assert list(sampler.indices(57)) == list(grouped(seed=9).indices(57))


def test_a_subset_is_grouped_too() -> None:
    def subset() -> GroupedBatchSampler:
        inner = RandomSubsetTrainingSampler(len(GROUPS), 0.5, seed_shuffle=1)
        return GroupedBatchSampler(inner, GROUPS, 4)

    assert batches_of(subset(), 30)[:20] == list(itertools.islice(subset(), 20))


@pytest.mark.parametrize(
    "inner", [RepeatFactorTrainingSampler([1.5] * len(GROUPS)), RandomSampler(GROUPS)]
)
def test_an_order_without_equal_epochs_has_none_in_groups(inner: Any) -> None:
    sampler = GroupedBatchSampler(inner, GROUPS, 4)
    with pytest.raises(ConfigError, match=f"epochs with the same samples.*{type(inner).__name__}"):
        sampler.indices(0)
    assert all(len({GROUPS[i] for i in batch}) == 1 for batch in itertools.islice(sampler, 3))


def test_a_plain_data_loader_takes_it_as_batch_sampler() -> None:
    dataset: Any = [torch.tensor(index) for index in range(len(GROUPS))]
    batches = list(itertools.islice(DataLoader(dataset, batch_sampler=grouped()), 12))
    assert [batch.tolist() for batch in batches] == batches_of(grouped(), 9)[:12]
