import logging
from collections.abc import Callable, Iterator
from itertools import pairwise
from typing import Any

import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, Dataset, IterableDataset

from trainkit.data.build import TrainLoader
from trainkit.data.samplers.distributed_sampler import TrainingSampler
from trainkit.engine.batch_stream import BatchStream
from trainkit.engine.train_loop import SimpleTrainer
from trainkit.utils.errors import ConfigError


class Noisy(Dataset[torch.Tensor]):
    """Sample i is i plus noise from the global generator."""

    def __len__(self) -> int:
        return 10

    def __getitem__(self, index: int) -> torch.Tensor:
        return index + torch.rand(())


class Shuffled:
    """A loader of the user's own, which draws its order when its first batch is asked for."""

    def __iter__(self) -> Iterator[torch.Tensor]:
        yield from torch.randperm(7)


class Counting(IterableDataset[torch.Tensor]):
    def __iter__(self) -> Iterator[torch.Tensor]:
        yield from torch.arange(7.0)


class Doubling(DataLoader[torch.Tensor]):
    """A subclass with an `__iter__` of its own."""

    def __iter__(self) -> Iterator[Any]:  # type: ignore[override]  # as users write it
        return (2 * batch for batch in super().__iter__())


class Stateful:
    """Has the protocol of trainkit's and torchdata's loaders."""

    def __init__(self) -> None:
        self.position = 0

    def __iter__(self) -> Iterator[int]:
        while True:
            self.position += 1
            yield self.position

    def state_dict(self) -> dict[str, int]:
        return {"position": self.position}

    def load_state_dict(self, state: dict[str, int]) -> None:
        self.position = state["position"]


class NoisyStateful(Stateful):
    """Draws noise in this process, as torchdata's loader does without workers."""

    def __iter__(self) -> Iterator[Any]:
        return (position + torch.rand(4, 3) for position in super().__iter__())


class DrawnEndless:
    """An endless sampler, whose seed is drawn when its first index is asked for."""

    def __iter__(self) -> Iterator[int]:
        yield from TrainingSampler(10, seed=int(torch.randint(1 << 30, ())))


def with_generator() -> DataLoader[torch.Tensor]:
    return DataLoader(Noisy(), 3, shuffle=True, generator=torch.Generator().manual_seed(5))


LOADERS: dict[str, Callable[[], Any]] = {
    "in order": lambda: DataLoader(Noisy(), 3),
    "shuffled": lambda: DataLoader(Noisy(), 3, shuffle=True),
    "with a generator": with_generator,
    "drops the last": lambda: DataLoader(Noisy(), 3, shuffle=True, drop_last=True),
    "endless": lambda: DataLoader(Noisy(), 3, sampler=TrainingSampler(10, seed=3)),
    "endless with a drawn seed": lambda: DataLoader(Noisy(), 3, sampler=DrawnEndless()),
    "batched by the data set": lambda: DataLoader(Noisy(), batch_size=None, shuffle=True),
    "iterable": lambda: DataLoader(Counting(), 3),
    "a subclass": lambda: Doubling(Counting(), 3),
    "of the user's own": Shuffled,
}


def draw(stream: BatchStream, count: int) -> list[torch.Tensor]:
    return [next(stream) for _ in range(count)]


def equal(found: list[torch.Tensor], expected: list[torch.Tensor]) -> bool:
    return len(found) == len(expected) and all(
        torch.equal(a, b) for a, b in zip(found, expected, strict=True)
    )


class MeanOutput(nn.Linear):
    """The loss is the mean of the output."""

    def forward(self, batch: torch.Tensor) -> torch.Tensor:
        return super().forward(batch).mean()


def trainer_on(loader: Any) -> SimpleTrainer:
    model = MeanOutput(3, 1)
    nn.init.ones_(model.weight)
    return SimpleTrainer(model, loader, torch.optim.SGD(model.parameters(), 0.1), seed=7)


@pytest.mark.parametrize("consumed", [0, 1, 2, 3, 4, 5, 7, 8, 11])
@pytest.mark.parametrize("kind", LOADERS)
def test_a_resumed_stream_yields_what_the_unbroken_one_did(kind: str, consumed: int) -> None:
    unbroken = BatchStream(LOADERS[kind]())
    draw(unbroken, consumed)
    state, rng = unbroken.state_dict(), torch.get_rng_state()
    expected = draw(unbroken, 17)

    torch.manual_seed(99)
    resumed = BatchStream(LOADERS[kind]())
    resumed.load_state_dict(state)
    # As the trainer does, for a run without a seed.
    torch.set_rng_state(rng)
    assert equal(draw(resumed, 17), expected)


def test_d14_a_finite_loader_begins_again_in_another_order() -> None:
    stream = BatchStream(DataLoader(list(range(5)), shuffle=True))  # type: ignore[arg-type]  # list
    epochs = [[int(batch) for batch in draw(stream, 5)] for _ in range(4)]
    assert all(sorted(epoch) == list(range(5)) for epoch in epochs)
    assert any(before != after for before, after in pairwise(epochs))


def test_a_subclass_with_an_iter_of_its_own_keeps_it_after_a_resume() -> None:
    stream = BatchStream(Doubling(Counting(), 1))
    draw(stream, 2)
    resumed = BatchStream(Doubling(Counting(), 1))
    resumed.load_state_dict(stream.state_dict())
    assert next(resumed).tolist() == [4.0]


def test_a_stateful_loader_resumes_by_its_own_state(caplog: pytest.LogCaptureFixture) -> None:
    stream = BatchStream(Stateful())
    assert [next(stream) for _ in range(3)] == [1, 2, 3]
    assert stream.state_dict() == {"loader": {"position": 3}}
    resumed = BatchStream(Stateful())
    resumed.load_state_dict(stream.state_dict())
    assert next(resumed) == 4
    assert caplog.text == ""


def train_loader(batch_size: int = 5) -> TrainLoader:
    return TrainLoader(Noisy(), TrainingSampler(10, seed=0), batch_size, seed=0)


def test_the_place_of_a_plain_loader_is_told_by_epoch_and_batch() -> None:
    stream = BatchStream([1, 2, 3])
    draw(stream, 5)
    assert stream.place == (1, 2)
    assert stream.describe(stream.place, 0) == "The step began with batch 2 of epoch 1. "
    with pytest.raises(ConfigError, match=r"'rollback', but the data loader \(list\) cannot pass"):
        stream.check_can_pass_over()


def test_the_samples_of_a_step_are_told_by_epoch_offset_and_index() -> None:
    stream = BatchStream(train_loader())
    draw(stream, 3)
    place = stream.place
    samples = [int(value) for value in next(stream).tolist()]
    listed = ", ".join(f"1:{5 + offset}={index}" for offset, index in enumerate(samples))
    assert stream.describe(place, None) == f"Its samples, as epoch:offset=index: {listed}. "


def test_of_very_many_samples_some_are_told() -> None:
    stream = BatchStream(train_loader(300))
    text = stream.describe(stream.place, 0)
    assert text.count("=") == 1 + 256
    assert text.endswith(" and 44 more. ")


def test_a_step_that_is_passed_over_is_left_out() -> None:
    whole, stream = BatchStream(train_loader()), BatchStream(train_loader())
    stream.check_can_pass_over()
    expected = draw(whole, 4)
    first = next(stream)
    stream.pass_over(stream.place)
    assert equal([first, *draw(stream, 2)], [expected[0], *expected[2:]])


def test_only_a_loader_that_says_so_is_known_not_to_draw() -> None:
    loader = train_loader()
    assert not BatchStream(loader).draws_global_randomness
    assert BatchStream(Stateful()).draws_global_randomness
    assert BatchStream([1, 2]).draws_global_randomness


def test_a_seeded_run_with_a_stateful_loader_of_the_users_resumes_exactly() -> None:
    unbroken, broken = trainer_on(NoisyStateful()), trainer_on(NoisyStateful())
    unbroken.train(0, 6)
    broken.train(0, 3)
    torch.manual_seed(99)
    resumed = trainer_on(NoisyStateful())
    resumed.model.load_state_dict(broken.model.state_dict())
    resumed.load_state_dict(broken.state_dict())
    resumed.train(3, 6)
    assert torch.equal(resumed.model.weight, unbroken.model.weight)  # type: ignore[arg-type]  # a Parameter


def test_what_a_plain_loader_cannot_restore_is_said_once(caplog: pytest.LogCaptureFixture) -> None:
    stream = BatchStream([1, 2, 3])
    assert [next(stream) for _ in range(4)] == [1, 2, 3, 1]
    with caplog.at_level(logging.WARNING):
        resumed = BatchStream([1, 2, 3])
        resumed.load_state_dict(stream.state_dict())
        assert [next(resumed) for _ in range(4)] == [2, 3, 1, 2]
    assert len(caplog.records) == 1
    assert "(list) has no state of its own: 1 batches of epoch 1 are passed over" in caplog.text


@pytest.mark.parametrize(("old", "new"), [(Stateful(), [1, 2]), ([1, 2], Stateful())])
def test_the_position_of_another_kind_of_loader_is_not_used(
    old: Any, new: Any, caplog: pytest.LogCaptureFixture
) -> None:
    stream = BatchStream(old)
    next(stream)
    resumed = BatchStream(new)
    with caplog.at_level(logging.WARNING):
        resumed.load_state_dict(stream.state_dict())
    assert "position of another kind of data loader" in caplog.text
    assert next(resumed) == 1


@pytest.mark.parametrize(
    "loader",
    [[], DataLoader(list(range(3)), batch_size=4, drop_last=True)],  # type: ignore[arg-type]  # list
)
def test_d14_a_loader_without_batches_is_an_error(loader: Any) -> None:
    with pytest.raises(ConfigError, match=r"yields no batch. Its data set may be empty"):
        next(BatchStream(loader))


def test_d14_an_exhausted_iterator_is_an_error() -> None:
    stream = BatchStream(iter([1, 2]))
    assert [next(stream), next(stream)] == [1, 2]
    with pytest.raises(ConfigError, match=r"\(list_iterator\) is an iterator that ended after 2"):
        next(stream)


def test_a_distributed_sampler_is_told_the_epoch() -> None:
    sampler: Any = torch.utils.data.DistributedSampler(Noisy(), num_replicas=1, rank=0)
    stream = BatchStream(DataLoader(Noisy(), sampler=sampler))
    epochs = [[int(batch) for batch in draw(stream, 10)] for _ in range(3)]
    assert len({tuple(epoch) for epoch in epochs}) > 1
    assert sampler.epoch == 2
