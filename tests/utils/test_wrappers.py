"""Wrappers of models, and lengths of what is iterated."""

from typing import Any

import pytest
from torch import nn
from torch.nn.parallel import DataParallel
from torch.utils.data import DataLoader, IterableDataset

from trainkit.utils.wrappers import known_length, unwrap


class Endless(IterableDataset[int]):
    def __iter__(self) -> Any:
        yield from iter(int, 1)


def test_a_wrapped_model_is_found_and_another_left_alone() -> None:
    net = nn.Linear(1, 1)
    assert unwrap(DataParallel(net)) is net
    assert unwrap(net) is net


@pytest.mark.parametrize(
    ("iterable", "length"),
    [([1, 2], 2), (DataLoader([1, 2, 3], batch_size=2), 2), (iter([1]), None)],  # type: ignore[arg-type]  # a list
)
def test_a_length_is_told_where_there_is_one(iterable: Any, length: int | None) -> None:
    assert known_length(iterable) == length


def test_a_loader_of_an_endless_data_set_has_no_length() -> None:
    assert known_length(DataLoader(Endless())) is None
