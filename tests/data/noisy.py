"""A data set that shows what it draws, and what the tests of loaders read off its batches."""

import itertools
import random
from typing import Any

import numpy as np
import pytest
import torch
from torch.utils.data import Dataset

from trainkit.data.train_loader import TrainLoader
from trainkit.utils import comm
from trainkit.utils.random import get_rng_state

SIZE = 50


class Noisy(Dataset[Any]):
    """Samples that say which they are and draw from all generators, and from one of their own."""

    def __init__(self, size: int = SIZE) -> None:
        self.size = size
        self.generator = random.Random()

    def set_random_seed(self, seed: int) -> None:
        self.generator.seed(seed)

    def __len__(self) -> int:
        return self.size

    def __getitem__(self, index: int) -> dict[str, Any]:
        noise = [random.random(), np.random.rand(), torch.rand(()).item(), self.generator.random()]
        return {"index": index, "noise": torch.tensor(noise, dtype=torch.float64)}


def take(loader: TrainLoader, count: int) -> list[dict[str, torch.Tensor]]:
    return list(itertools.islice(loader, count))


def indices(batches: list[dict[str, torch.Tensor]]) -> list[int]:
    return torch.cat([batch["index"] for batch in batches]).tolist()


def assert_same(left: list[dict[str, torch.Tensor]], right: list[dict[str, torch.Tensor]]) -> None:
    """The same samples with the same randomness, whatever the sizes of the batches."""
    for key in ("index", "noise"):
        joined = [torch.cat([batch[key] for batch in side]) for side in (left, right)]
        assert torch.equal(*joined)


def as_rank(monkeypatch: pytest.MonkeyPatch, rank: int, world_size: int) -> None:
    monkeypatch.setattr(comm, "get_rank", lambda: rank)
    monkeypatch.setattr(comm, "get_world_size", lambda: world_size)


def rng_is_untouched(before: dict[str, Any]) -> bool:
    now = get_rng_state()
    return (
        torch.equal(now["torch"], before["torch"])
        and torch.equal(now["numpy"]["key"], before["numpy"]["key"])
        and now["numpy"]["pos"] == before["numpy"]["pos"]
        and torch.equal(now["python"][1], before["python"][1])
    )
