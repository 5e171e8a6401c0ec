"""Which samples a rank sees, in training and in evaluation."""

import itertools
from collections import Counter
from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from torch.utils.data import ConcatDataset, Sampler, Subset

from trainkit.data.samplers.order import EpochOrder
from trainkit.data.samplers.permutation import Permutation
from trainkit.utils import comm
from trainkit.utils.errors import ConfigError
from trainkit.utils.random import hash64
from trainkit.utils.registry import Registry

_ORDER_TAG = int.from_bytes(b"order", "big")
_SUBSET_TAG = int.from_bytes(b"subset", "big")
_ROUNDING_TAG = int.from_bytes(b"round", "big")

SAMPLER_REGISTRY = Registry("DATALOADER.SAMPLER_TRAIN")
"""Samplers for training, each an `EpochSampler`.

They are made with what `cls.from_config(cfg, dataset, seed)` returns where that exists, a dict of
arguments, else as `cls(size, seed=seed)`.
"""


@SAMPLER_REGISTRY.register()
class TrainingSampler(Sampler[int]):
    """Every sample once an epoch, each epoch in an order of its own, without an end.

    `TrainLoader` reads `indices`. In a plain `DataLoader` it yields this rank's share of the
    endless order: entries rank, rank + world size, rank + 2 * world size, and so on.

    Args:
        size: Number of samples in the data set.
        shuffle: False keeps the order of the data set.
        seed: Decides the order, together with the epoch; None, or a negative one, draws one that
            all ranks share.

    Raises:
        ConfigError: If there is no sample.
    """

    def __init__(self, size: int, shuffle: bool = True, seed: int | None = None) -> None:
        if size < 1:
            raise ConfigError(
                f"The size given to {type(self).__name__} is {size}. Training needs at least one "
                "sample."
            )
        self.size = size
        self.shuffle = shuffle
        self.seed = comm.shared_random_seed() if seed is None or seed < 0 else seed
        # Now, because a worker, which may iterate, belongs to no process group.
        self._rank, self._world_size = comm.get_rank(), comm.get_world_size()

    def indices(self, epoch: int) -> EpochOrder:
        """Returns the order of epoch `epoch`, counted from 0; of the whole world, not this rank."""
        return self._order(self.size, epoch)

    def _order(self, size: int, epoch: int) -> range | Permutation:
        if not self.shuffle:
            return range(size)
        return Permutation(size, hash64(self.seed, _ORDER_TAG, epoch))

    def __iter__(self) -> Iterator[int]:
        epochs = map(self.indices, itertools.count())
        # Entries of an array are no integers of Python's.
        endless = map(int, itertools.chain.from_iterable(epochs))
        return itertools.islice(endless, self._rank, None, self._world_size)


@SAMPLER_REGISTRY.register()
class RandomSubsetTrainingSampler(TrainingSampler):
    """Every sample of a fixed random subset once an epoch, without an end.

    Args:
        size: Number of samples in the data set.
        subset_ratio: Part of them to train on, in (0, 1]; rounded down to whole samples.
        shuffle: False keeps the order in which the subset was drawn.
        seed_shuffle: Decides the order, as `seed` of `TrainingSampler`.
        seed_subset: Decides the subset; None takes the seed of the order.

    Raises:
        ConfigError: If the subset is empty, or larger than the data set.
    """

    def __init__(
        self,
        size: int,
        subset_ratio: float,
        shuffle: bool = True,
        seed_shuffle: int | None = None,
        seed_subset: int | None = None,
    ) -> None:
        super().__init__(size, shuffle, seed_shuffle)
        self.seed_subset = seed_subset
        self._subset_size = int(size * subset_ratio + 1e-9)
        if not 1 <= self._subset_size <= size:
            raise ConfigError(
                f"The ratio {subset_ratio} (DATALOADER.RANDOM_SUBSET_RATIO) leaves "
                f"{self._subset_size} of {size} samples. Choose one in [{1 / size:.2g}, 1]."
            )

    @classmethod
    def from_config(cls, cfg: Any, dataset: Any, seed: int) -> dict[str, Any]:
        """Returns the arguments for a config: DATALOADER.RANDOM_SUBSET_RATIO."""
        ratio = cfg.DATALOADER.RANDOM_SUBSET_RATIO
        return {"size": len(dataset), "subset_ratio": ratio, "seed_shuffle": seed}

    def indices(self, epoch: int) -> EpochOrder:
        """Returns the order of epoch `epoch`, counted from 0; of the whole world, not this rank."""
        # Not drawn once: the seed may have come with a checkpoint since.
        seed = self.seed if self.seed_subset is None else self.seed_subset
        subset = Permutation(self.size, hash64(seed, _SUBSET_TAG))[: self._subset_size]
        order: EpochOrder = subset[np.asarray(self._order(self._subset_size, epoch)[:])]
        return order


@SAMPLER_REGISTRY.register()
class RepeatFactorTrainingSampler(TrainingSampler):
    """Each sample several times an epoch, as often as its factor says, without an end.

    A factor of 2.3 is two occurrences in each epoch and, drawn from (seed, epoch), a third in three
    of ten, so epochs differ in length. It repeats images of rare categories in Gupta, Dollár and
    Girshick, "LVIS" (arXiv:1908.03195), appendix B.2.

    Args:
        repeat_factors: Mean number of occurrences of each sample in an epoch, at least 0.
        shuffle: False keeps the order of the data set.
        seed: As for `TrainingSampler`.

    Raises:
        ConfigError: If a factor is negative or not finite.
    """

    def __init__(
        self, repeat_factors: Any, *, shuffle: bool = True, seed: int | None = None
    ) -> None:
        self.repeat_factors = torch.as_tensor(repeat_factors, dtype=torch.float64)
        super().__init__(len(self.repeat_factors), shuffle, seed)
        low, high = self.repeat_factors.min(), self.repeat_factors.max()
        if not (low >= 0 and 0 < high < float("inf")):
            raise ConfigError(
                f"The repeat factors lie between {low:g} and {high:g}. Each must be finite and at "
                "least 0, and one above 0."
            )

    @classmethod
    def from_config(cls, cfg: Any, dataset: Any, seed: int) -> dict[str, Any]:
        """Returns the arguments for a config: DATALOADER.REPEAT_THRESHOLD and REPEAT_SQRT."""
        factors = cls.repeat_factors_from_category_frequency(
            dataset, cfg.DATALOADER.REPEAT_THRESHOLD, cfg.DATALOADER.REPEAT_SQRT
        )
        return {"repeat_factors": factors, "seed": seed}

    @staticmethod
    def repeat_factors_from_category_frequency(
        dataset_dicts: Any, repeat_thresh: float, sqrt: bool = True
    ) -> torch.Tensor:
        """Computes factors that repeat samples of rare categories (LVIS, appendix B.2).

        A sample's factor is the largest of its categories', max(1, sqrt(threshold / frequency)).

        Args:
            dataset_dicts: The data set. Its `labels` or `targets`, or those of what `MapDataset`,
                `Subset` or `ConcatDataset` wraps, hold each sample's category, or several. Without
                them each sample is fetched once, for its "label" or the `category_id` of each of
                its "annotations".
            repeat_thresh: Categories that a smaller part of all samples has are repeated.
            sqrt: False leaves out the root.

        Returns:
            float64 tensor of shape (samples,), at least 1.

        Raises:
            ConfigError: If a sample has no category.
        """
        found = (c.tolist() if hasattr(c, "tolist") else c for c in _categories(dataset_dicts))
        categories = [tuple(set(c)) if isinstance(c, (list, tuple)) else (c,) for c in found]
        counts = Counter(itertools.chain.from_iterable(categories))
        ratios = {c: repeat_thresh * len(categories) / count for c, count in counts.items()}
        power = 0.5 if sqrt else 1.0
        factors = [max((ratios[c] for c in own), default=1.0) ** power for own in categories]
        return torch.tensor(factors, dtype=torch.float64).clamp(min=1.0)

    def indices(self, epoch: int) -> EpochOrder:
        """Returns the order of epoch `epoch`, counted from 0; of the whole world, not this rank."""
        generator = torch.Generator().manual_seed(hash64(self.seed, _ROUNDING_TAG, epoch))
        draws = torch.rand(self.size, generator=generator, dtype=torch.float64)
        # The factor, rounded up with the probability of its fraction.
        repeats = (self.repeat_factors + draws).floor().long()
        repeated = torch.arange(self.size).repeat_interleave(repeats).numpy()
        order = self._order(len(repeated), epoch) if len(repeated) else range(0)
        return repeated[np.asarray(order[:], dtype=np.int64)]


def _categories(dataset: Any) -> list[Any]:
    """Returns the category, or the categories, of each sample."""
    if isinstance(dataset, ConcatDataset):
        return list(itertools.chain.from_iterable(map(_categories, dataset.datasets)))
    if isinstance(dataset, Subset):
        found = _categories(dataset.dataset)
        return [found[index] for index in dataset.indices]
    for name in ("labels", "targets"):
        if hasattr(dataset, name):
            return list(getattr(dataset, name))
    if hasattr(dataset, "map_func"):  # A MapDataset, whose samples are those of its data set.
        return _categories(dataset.dataset)
    return [_categories_of(dataset[index], index) for index in range(len(dataset))]


def _categories_of(sample: Any, index: int) -> Any:
    if isinstance(sample, dict) and "annotations" in sample:
        return [annotation["category_id"] for annotation in sample["annotations"]]
    if isinstance(sample, dict) and "label" in sample:
        return sample["label"]
    raise ConfigError(
        f"Sample {index} has no category for RepeatFactorTrainingSampler. Give the data set "
        '`labels` or `targets`, or its samples, as dicts, a "label".'
    )


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
