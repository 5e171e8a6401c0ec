"""Batches whose samples belong to one group, such as images that are wide, or high."""

import functools
from collections import defaultdict
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
from torch.utils.data import Sampler

from trainkit.data.samplers.distributed_sampler import RepeatFactorTrainingSampler
from trainkit.data.samplers.order import EpochOrder
from trainkit.utils.errors import ConfigError


class GroupedBatchSampler(Sampler[list[int]]):
    """Arranges the order of a sampler into batches of one group each.

    A batch stands where its last sample stood; what a group has left over at the end of an epoch
    begins its next batch. As the sampler of a `TrainLoader`, whose step then is one batch, it
    resumes exactly while the batch size stays: what was left over follows from the number of the
    epoch. In a plain `DataLoader`, as `batch_sampler`, it yields this rank's batches.

    Args:
        sampler: Gives the order; for a TrainLoader an `EpochSampler` whose epochs have the same
            samples.
        group_ids: The group of each sample of the data set.
        batch_size: Samples of each batch, at least 1: in a TrainLoader those of all ranks and
            micro-batches together, in a plain DataLoader those of this rank.
    """

    def __init__(self, sampler: Any, group_ids: Sequence[int], batch_size: int) -> None:
        self.sampler = sampler
        self.group_ids = np.asarray(group_ids)
        self.batch_size = batch_size

    @property
    def seed(self) -> int:
        """The seed of the order."""
        return int(self.sampler.seed)

    @seed.setter
    def seed(self, seed: int) -> None:
        self.sampler.seed = seed

    def indices(self, epoch: int) -> EpochOrder:
        """Returns the batches that become full in epoch `epoch`, counted from 0, in a row.

        Raises:
            ConfigError: If the sampler has no epochs, or epochs of differing length.
        """
        kind = type(self.sampler)
        if not hasattr(kind, "indices") or issubclass(kind, RepeatFactorTrainingSampler):
            raise ConfigError(
                "A GroupedBatchSampler in a TrainLoader needs epochs with the same samples, which "
                f"a {kind.__name__} has not. Give it a TrainingSampler."
            )

        @functools.lru_cache(maxsize=4)
        def order_of(epoch: int) -> Any:
            return np.asarray(self.sampler.indices(epoch)[:])

        groups, batches, ends = self.group_ids[order_of(epoch)], [], []
        for group in np.unique(groups):
            (places,) = np.nonzero(groups == group)
            left_over = epoch * len(places) % self.batch_size
            # A small group waits several epochs for a batch.
            first = epoch - -(-left_over // len(places))
            orders = map(order_of, range(first, epoch + 1))
            members = np.concatenate([o[self.group_ids[o] == group] for o in orders])
            members = members[len(members) - len(places) - left_over :]
            count = len(members) // self.batch_size
            batches.append(members[: count * self.batch_size].reshape(count, self.batch_size))
            ends.append(places[self.batch_size - left_over - 1 :: self.batch_size])
        return np.concatenate(batches)[np.argsort(np.concatenate(ends))].reshape(-1)

    def __iter__(self) -> Iterator[list[int]]:
        waiting = defaultdict[int, list[int]](list)
        for index in self.sampler:
            batch = waiting[int(self.group_ids[index])]
            batch.append(index)
            if len(batch) == self.batch_size:
                yield batch[:]
                batch.clear()
