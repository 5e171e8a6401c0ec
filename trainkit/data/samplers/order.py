"""The endless global order of samples that every rank, worker and resume reads from."""

import functools
from collections.abc import Iterable, Iterator
from typing import NamedTuple, Protocol, overload

import numpy as np

from trainkit.utils.errors import ConfigError


class EpochOrder(Protocol):
    """The indices of one epoch in their order: a list, a range, an array or a `Permutation`."""

    def __len__(self) -> int: ...

    def __iter__(self) -> Iterator[int]: ...

    @overload
    def __getitem__(self, item: int, /) -> int: ...
    @overload
    def __getitem__(self, item: slice, /) -> Iterable[int]: ...


class EpochSampler(Protocol):
    """What chooses the samples of each epoch and their order, the same on every rank.

    Attributes:
        seed: All that the order depends on besides the epoch; the loader sets it.
    """

    seed: int

    def indices(self, epoch: int) -> EpochOrder:
        """Returns epoch `epoch`, counted from 0; epochs may differ in length, and some be empty."""
        ...


class Position(NamedTuple):
    """A place in the endless order: an epoch, counted from 0, and an offset into it."""

    epoch: int
    offset: int


# Epochs in a row without a sample, after which there is none to be expected.
_MAX_EMPTY = 1000

SampleKey = tuple[int, int, int]
"""What a fetch is told: the index of the sample, and the epoch and offset at which it stands."""


class EndlessOrder:
    """The epochs of a sampler, one after the other without an end.

    Args:
        sampler: Asked for an epoch when the order comes to it.
    """

    def __init__(self, sampler: EpochSampler) -> None:
        # A batch touches one or two epochs, and steps back at most to where it began.
        self._epoch = functools.lru_cache(maxsize=4)(sampler.indices)
        self._sampler = sampler

    def advance(self, position: Position, count: int) -> Position:
        """Returns the place `count` samples on, with an offset inside its epoch."""
        epoch, offset, num_empty = position.epoch, position.offset + count, 0
        while offset >= (size := len(self._epoch(epoch))):
            epoch, offset = epoch + 1, offset - size
            num_empty = 0 if size else num_empty + 1
            if num_empty > _MAX_EMPTY:
                raise ConfigError(
                    f"{type(self._sampler).__name__} had no sample in the {_MAX_EMPTY} epochs up "
                    f"to epoch {epoch}. Check its settings, or give it more samples."
                )
        return Position(epoch, offset)

    def take(self, position: Position, count: int) -> list[SampleKey]:
        """Returns the keys of `count` samples from a place on, which may lie in several epochs."""
        keys: list[SampleKey] = []
        while len(keys) < count:
            epoch, offset = self.advance(position, 0)
            chunk = self._epoch(epoch)[offset : offset + count - len(keys)]
            indices = np.asarray(chunk).tolist()
            keys += [(index, epoch, offset + k) for k, index in enumerate(indices)]
            position = Position(epoch, offset + len(indices))
        return keys
