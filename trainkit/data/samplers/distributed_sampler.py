"""Which samples a rank sees, in training and in evaluation."""

import itertools
from collections.abc import Iterator

from torch.utils.data import Sampler

from trainkit.data.samplers.order import EpochOrder
from trainkit.data.samplers.permutation import Permutation
from trainkit.utils import comm
from trainkit.utils.errors import ConfigError
from trainkit.utils.random import hash64
from trainkit.utils.registry import Registry

_ORDER_TAG = int.from_bytes(b"order", "big")

SAMPLER_REGISTRY = Registry("DATALOADER.SAMPLER_TRAIN")
"""Samplers for training, called as `cls(size, seed=seed)`; each is an `EpochSampler`."""


@SAMPLER_REGISTRY.register()
class TrainingSampler(Sampler[int]):
    """Every sample once an epoch, each epoch in an order of its own, without an end.

    `TrainLoader` reads `indices`. In a plain `DataLoader` it yields this rank's share of the
    endless order: entries rank, rank + world size, rank + 2 * world size, and so on.

    Args:
        size: Number of samples in the data set.
        shuffle: False keeps the order of the data set.
        seed: Decides the order, together with the epoch; None draws one that all ranks share.

    Raises:
        ConfigError: If there is no sample.
    """

    def __init__(self, size: int, shuffle: bool = True, seed: int | None = None) -> None:
        if size < 1:
            raise ConfigError(
                f"The size given to TrainingSampler is {size}. Training needs at least one sample."
            )
        self.size = size
        self.shuffle = shuffle
        self.seed = comm.shared_random_seed() if seed is None else seed

    def indices(self, epoch: int) -> EpochOrder:
        """Returns the order of epoch `epoch`, counted from 0; of the whole world, not this rank."""
        if not self.shuffle:
            return range(self.size)
        return Permutation(self.size, hash64(self.seed, _ORDER_TAG, epoch))

    def __iter__(self) -> Iterator[int]:
        epochs = map(self.indices, itertools.count())
        endless = itertools.chain.from_iterable(epochs)
        return itertools.islice(endless, comm.get_rank(), None, comm.get_world_size())


class InferenceSampler(Sampler[int]):
    """This rank's contiguous share of the samples; each sample goes to exactly one rank.

    Shares differ by at most one sample. They are exact, so metrics need no correction.

    Args:
        size: Number of samples in the data set.
    """

    def __init__(self, size: int) -> None:
        rank, world_size = comm.get_rank(), comm.get_world_size()
        self._share = range(size * rank // world_size, size * (rank + 1) // world_size)

    def __iter__(self) -> Iterator[int]:
        return iter(self._share)

    def __len__(self) -> int:
        return len(self._share)
