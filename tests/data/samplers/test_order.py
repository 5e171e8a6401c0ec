from collections.abc import Callable

import numpy as np
import pytest

from trainkit.data.samplers.order import EndlessOrder, EpochOrder, Position
from trainkit.utils.errors import ConfigError


class Listed:
    """A sampler that was written down."""

    seed = 0

    def __init__(self, *epochs: EpochOrder) -> None:
        self.epochs = epochs

    def indices(self, epoch: int) -> EpochOrder:
        return self.epochs[epoch % len(self.epochs)]


@pytest.mark.parametrize("kind", [list, tuple, np.array])
def test_taking_goes_on_over_epochs_of_differing_length(
    kind: Callable[[list[int]], EpochOrder],
) -> None:
    order = EndlessOrder(Listed(kind([5, 6, 7]), kind([8]), kind([9, 5])))
    keys = order.take(Position(0, 1), 7)
    assert keys == [(6, 0, 1), (7, 0, 2), (8, 1, 0), (9, 2, 0), (5, 2, 1), (5, 3, 0), (6, 3, 1)]
    assert all(type(part) is int for key in keys for part in key)


def test_advancing_finds_where_taking_ended() -> None:
    order = EndlessOrder(Listed(range(3), range(1), range(2)))
    assert order.advance(Position(0, 1), 1) == (0, 2)
    assert order.advance(Position(0, 1), 2) == (1, 0)
    assert order.advance(Position(0, 0), 600) == (300, 0)


def test_a_place_behind_the_end_of_its_epoch_lies_in_the_next() -> None:
    order = EndlessOrder(Listed(range(3)))
    assert order.take(Position(4, 5), 1) == [(2, 5, 2)]


def test_an_empty_epoch_is_stepped_over_and_nothing_but_empty_ones_is_an_error() -> None:
    order = EndlessOrder(Listed(range(2), range(0), range(3)))
    assert [key[:2] for key in order.take(Position(0, 0), 4)] == [(0, 0), (1, 0), (0, 2), (1, 2)]
    with pytest.raises(ConfigError, match=r"Listed had no sample in the 1000 epochs up to epoch"):
        EndlessOrder(Listed(range(0))).take(Position(0, 0), 1)
