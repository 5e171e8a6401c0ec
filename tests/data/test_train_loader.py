import gc
import itertools
import logging
import multiprocessing
import os
import signal
import threading
import time
import weakref
from collections.abc import Callable
from typing import Any

import pytest
import torch

from tests.data.noisy import SIZE, Noisy, as_rank, assert_same, indices, rng_is_untouched, take
from trainkit.data.common import MapDataset
from trainkit.data.samplers.distributed_sampler import (
    RandomSubsetTrainingSampler,
    RepeatFactorTrainingSampler,
    TrainingSampler,
)
from trainkit.data.samplers.grouped_batch_sampler import GroupedBatchSampler
from trainkit.data.samplers.order import EpochOrder, Position
from trainkit.data.train_loader import TrainLoader
from trainkit.utils.errors import ConfigError
from trainkit.utils.random import get_rng_state
from trainkit.utils.stop_signals import StopRequested, stop_signals


def make(
    batch_size: int = 12, *, dataset: Any = None, seed: int = 5, **options: Any
) -> TrainLoader:
    dataset = dataset or Noisy()
    sampler = TrainingSampler(len(dataset), seed=seed)
    return TrainLoader(dataset, sampler, batch_size, seed=seed, **options)


def test_an_epoch_holds_every_sample_once_and_batches_span_epochs() -> None:
    seen = indices(take(make(12), 25))
    epochs = [seen[start : start + SIZE] for start in range(0, 300, SIZE)]
    assert all(sorted(epoch) == list(range(SIZE)) for epoch in epochs)
    assert epochs[0] != epochs[1]


def test_a_sample_draws_anew_in_each_epoch() -> None:
    batches = take(make(SIZE), 2)
    by_index = [batch["noise"][batch["index"].argsort()] for batch in batches]
    assert not (by_index[0] == by_index[1]).any()


def test_the_loaders_seed_decides_the_order_too() -> None:
    loader = TrainLoader(Noisy(), TrainingSampler(SIZE, seed=0), 12, seed=5)
    assert_same(take(loader, 2), take(make(seed=5), 2))


def test_workers_do_not_change_the_batches() -> None:
    assert_same(take(make(num_workers=2), 9), take(make(num_workers=0), 9))


def random_collate(samples: list[Any]) -> torch.Tensor:
    return torch.rand(2)


def test_workers_do_not_change_the_randomness_of_collation() -> None:
    drawn = [
        torch.stack(list(itertools.islice(make(num_workers=n, collate_fn=random_collate), 6)))
        for n in (0, 2)
    ]
    assert torch.equal(*drawn)
    assert len(drawn[0].unique()) == 12


@pytest.mark.parametrize("steps", [0, 1, 4, 30])
def test_resume_yields_the_same_batches(steps: int) -> None:
    unbroken = make()
    batches = iter(unbroken)
    for _ in range(steps):
        next(batches)
    state = unbroken.state_dict()
    resumed = make()
    resumed.load_state_dict(state)
    assert_same(take(resumed, 9), list(itertools.islice(batches, 9)))
    assert resumed.state_dict() == unbroken.state_dict()


def test_prefetching_does_not_move_the_state() -> None:
    loader = make(num_workers=2)
    batches = iter(loader)
    assert loader.state_dict() == {"seed": 5, "epoch": 0, "offset": 0}
    states = []
    for _ in range(5):
        next(batches)
        states.append((loader.state_dict()["epoch"], loader.state_dict()["offset"]))
    assert states == [(0, 12), (0, 24), (0, 36), (0, 48), (1, 10)]


def test_the_state_counts_whole_steps_only() -> None:
    loader = make(accumulate=3)
    batches = iter(loader)
    offsets = []
    for _ in range(7):
        next(batches)
        offsets.append(loader.state_dict()["offset"])
    assert offsets == [0, 0, 12, 12, 12, 24, 24]
    assert_same(take(loader, 3), take(make(), 3)[2:])


def test_the_position_is_kept_when_the_batch_size_changes() -> None:
    first = make(12)
    seen = take(first, 3)
    second = make(7)
    second.load_state_dict(first.state_dict())
    seen += take(second, 2)
    assert_same(seen, take(make(25), 2))


@pytest.mark.parametrize(("world_size", "accumulate"), [(2, 1), (1, 3), (2, 2)])
def test_ranks_and_micro_batches_share_the_samples_of_one_rank_in_order(
    monkeypatch: pytest.MonkeyPatch, world_size: int, accumulate: int
) -> None:
    whole = take(make(12), 10)
    shares = []
    for rank in range(world_size):
        as_rank(monkeypatch, rank, world_size)
        shares.append(take(make(12, accumulate=accumulate), 10 * accumulate))
    in_order = [batch for turn in zip(*shares, strict=True) for batch in turn]
    assert_same(in_order, whole)


def test_a_world_of_another_size_continues(monkeypatch: pytest.MonkeyPatch) -> None:
    one = make(12)
    take(one, 4)
    shares = []
    for rank in range(2):
        as_rank(monkeypatch, rank, 2)
        loader = make(12)
        loader.load_state_dict(one.state_dict())
        shares.append(next(iter(loader)))
        assert loader.state_dict() == {"seed": 5, "epoch": 1, "offset": 10}
    as_rank(monkeypatch, 0, 1)
    assert_same(shares, take(make(12), 5)[4:])


class Growing:
    """Epochs of 3, 4, 5, ... samples, some of them twice."""

    seed = 0

    def indices(self, epoch: int) -> EpochOrder:
        return [(self.seed + index) % 4 for index in range(epoch + 3)]


def test_epochs_of_differing_length_resume_exactly() -> None:
    def growing(batch_size: int) -> TrainLoader:
        return TrainLoader(Noisy(4), Growing(), batch_size, seed=1)

    expected = [(1 + index) % 4 for epoch in range(5) for index in range(epoch + 3)]
    unbroken = take(growing(5), 5)
    assert indices(unbroken) == expected
    first = growing(5)
    seen = take(first, 2)
    assert first.state_dict() == {"seed": 1, "epoch": 2, "offset": 3}
    second = growing(15)
    second.load_state_dict(first.state_dict())
    assert_same(seen + take(second, 1), unbroken)


GROUPS = [index % 7 // 5 for index in range(SIZE)]
FACTORS = [0.5 + index % 4 for index in range(SIZE)]
SAMPLERS: dict[str, Callable[[], Any]] = {
    "random subset": lambda: RandomSubsetTrainingSampler(SIZE, 0.7, seed_shuffle=0),
    "repeat factor": lambda: RepeatFactorTrainingSampler(FACTORS, seed=0),
    "grouped": lambda: GroupedBatchSampler(TrainingSampler(SIZE, seed=0), GROUPS, 12),
}


def make_with(kind: str, seed: int = 5, **options: Any) -> TrainLoader:
    return TrainLoader(Noisy(), SAMPLERS[kind](), 12, seed=seed, **options)


def resumed_after(kind: str, steps: int, **options: Any) -> list[dict[str, torch.Tensor]]:
    """Fifteen batches of a loader that is left after some, and gone on from by another one."""
    first = make_with(kind, **options)
    batches = iter(first)
    seen = [next(batches) for _ in range(steps)]
    # The seed of the checkpoint counts, for all of the order.
    second = make_with(kind, seed=6, **options)
    second.load_state_dict(first.state_dict())
    return seen + take(second, 15 - steps)


@pytest.mark.parametrize("kind", SAMPLERS)
def test_other_orders_resume_within_an_epoch_as_if_unbroken(kind: str) -> None:
    unbroken = take(make_with(kind), 15)
    for steps in (1, 7, 11):
        assert_same(resumed_after(kind, steps), unbroken)


@pytest.mark.slow
@pytest.mark.parametrize("kind", SAMPLERS)
def test_other_orders_resume_with_workers_as_if_unbroken(kind: str) -> None:
    assert_same(resumed_after(kind, 7, num_workers=2), take(make_with(kind), 15))


@pytest.mark.parametrize("kind", SAMPLERS)
def test_two_ranks_share_other_orders_and_resume_alike(
    monkeypatch: pytest.MonkeyPatch, kind: str
) -> None:
    whole = take(make_with(kind), 15)
    shares = []
    for rank in range(2):
        as_rank(monkeypatch, rank, 2)
        shares.append(resumed_after(kind, 7))
    in_order = [batch for turn in zip(*shares, strict=True) for batch in turn]
    assert_same(in_order, whole)


@pytest.mark.parametrize(("world_size", "accumulate"), [(1, 1), (2, 1), (2, 3)])
def test_all_ranks_and_micro_batches_of_a_step_have_one_group(
    monkeypatch: pytest.MonkeyPatch, world_size: int, accumulate: int
) -> None:
    as_rank(monkeypatch, 0, world_size)
    loader = make_with("grouped", accumulate=accumulate)
    groups = []
    for _ in range(20):
        step = loader.samples_at(loader.position)
        groups.append({GROUPS[index] for index, _, _ in step})
        take(loader, accumulate)
    assert all(len(group) == 1 for group in groups)
    assert {0} in groups
    assert {1} in groups


def test_a_batch_size_that_would_mix_groups_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"batch_size is 12, .* TrainLoader's 8 would mix"):
        TrainLoader(Noisy(), SAMPLERS["grouped"](), 8, seed=0)


def test_d45_a_seed_beyond_32_bits_decides_in_all_its_bits() -> None:
    batches = {seed: take(make(seed=seed), 1)[0] for seed in (5, 5 + 2**32, 5 + 2**62)}
    orders = {tuple(batch["index"].tolist()) for batch in batches.values()}
    draws = {batch["noise"][0, k].item() for batch in batches.values() for k in range(3)}
    assert len(orders) == 3
    assert len(draws) == 9


def test_further_arguments_reach_the_data_loader() -> None:
    with pytest.raises(ValueError, match="timeout option should be non-negative"):
        take(make(timeout=-1), 1)


@pytest.mark.parametrize(("world_size", "accumulate"), [(1, 1), (2, 1), (1, 3), (2, 3)])
def test_the_samples_of_a_step_can_be_told_from_its_position(
    monkeypatch: pytest.MonkeyPatch, world_size: int, accumulate: int
) -> None:
    seen: dict[int, list[int]] = {}
    for rank in range(world_size):
        as_rank(monkeypatch, rank, world_size)
        loader = make(12, accumulate=accumulate, num_workers=1)
        batches = iter(loader)
        # Into the next epoch, while the workers are ahead.
        for _ in range(4 * accumulate):
            next(batches)
        position = loader.position
        assert position == (0, 48)
        seen[rank] = indices([next(batches) for _ in range(accumulate)])
        told = loader.samples_at(position, rank)
        assert [index for index, _, _ in told] == seen[rank]
        assert {(e, o) for _, e, o in told} <= {(0, 48), (0, 49), *((1, o) for o in range(10))}
        everybodys = {index for index, _, _ in loader.samples_at(position)}
    assert everybodys == {index for share in seen.values() for index in share}


@pytest.mark.parametrize("num_workers", [0, 2])
def test_samples_that_are_passed_over_are_left_out_and_nothing_else(num_workers: int) -> None:
    whole = take(make(12), 12)
    loader = make(12, num_workers=num_workers)
    take(loader, 1)
    # Steps 2 and 3; the latter begins where step 2 now does. And step 8, of epoch 1.
    for position in [(0, 24), (0, 24), (1, 46)]:
        loader.pass_over(Position(*position))
    assert_same(take(loader, 8), [whole[step] for step in (1, 4, 5, 6, 7, 9, 10, 11)])


def test_ranks_and_micro_batches_pass_over_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    whole = take(make(12), 4)
    shares = []
    for rank in range(2):
        as_rank(monkeypatch, rank, 2)
        loader = make(12, accumulate=3)
        loader.pass_over(Position(0, 12))
        shares.append(take(loader, 3 * 3))
    in_order = [batch for turn in zip(*shares, strict=True) for batch in turn]
    assert_same(in_order, [whole[step] for step in (0, 2, 3)])


def test_what_is_passed_over_travels_in_the_state() -> None:
    loader = make(12)
    loader.pass_over(Position(0, 36))
    take(loader, 2)
    state = loader.state_dict()
    assert state == {"seed": 5, "epoch": 0, "offset": 24, "passed_over": [[0, 36, 0, 48]]}
    resumed = make(12)
    resumed.load_state_dict(state)
    assert_same(take(resumed, 5), take(loader, 5))
    assert resumed.state_dict() == loader.state_dict()


def test_going_back_to_an_older_state_passes_over_what_came_since_too() -> None:
    loader = make(12)
    loader.pass_over(Position(0, 12))
    take(loader, 1)
    older = loader.state_dict()
    loader.pass_over(Position(0, 36))
    loader.load_state_dict(older)
    assert loader.state_dict()["passed_over"] == [[0, 12, 0, 24], [0, 36, 0, 48]]


def test_what_is_passed_over_stays_so_with_another_batch_size() -> None:
    loader = make(12)
    bad = {(epoch, offset) for _, epoch, offset in loader.samples_at(Position(0, 12))}
    loader.pass_over(Position(0, 12))
    other = make(10)
    other.load_state_dict(loader.state_dict())
    position = other.position
    for _ in other:
        seen = {(epoch, offset) for _, epoch, offset in other.samples_at(position)}
        assert not seen & bad
        position = other.position
        if position.epoch == 1:
            break


def test_passing_over_ends_the_iterator_made_before() -> None:
    loader = make()
    batches = iter(loader)
    next(batches)
    loader.pass_over(loader.position)
    with pytest.raises(RuntimeError, match="Use the newest"):
        next(batches)


def stopped(requests: list[str]) -> Callable[..., None]:
    return lambda reason, exit_code: requests.append(reason)


class Interrupted(Noisy):
    """Gets a signal while its sample 12 is fetched for the first time."""

    def __getitem__(self, index: int) -> dict[str, Any]:
        self.size -= 1
        if self.size == SIZE - 13:
            os.kill(os.getpid(), signal.SIGTERM)
        return {"index": index, "noise": torch.zeros(1)}

    def __len__(self) -> int:
        return SIZE


def test_a_signal_leaves_a_fetch_at_once_and_loses_nothing() -> None:
    loader, whole = make(dataset=Interrupted()), take(make(), 4)
    before = get_rng_state()
    batches = iter(loader)
    requests: list[str] = []
    with stop_signals(stopped(requests)):
        seen = [next(batches)]
        with pytest.raises(StopRequested):
            next(batches)
    assert requests == ["SIGTERM"]
    assert loader.position == (0, 12)
    assert rng_is_untouched(before)
    assert indices(seen + take(loader, 3)) == indices(whole)


class Hanging(Noisy):
    """Waits for a storage that does not answer."""

    def __getitem__(self, index: int) -> Any:
        threading.Event().wait()


@pytest.mark.faults
def test_a_signal_does_not_wait_for_workers_that_hang() -> None:
    batches = iter(make(dataset=Hanging(), num_workers=2))
    start = time.monotonic()
    threading.Timer(0.2, os.kill, (os.getpid(), signal.SIGTERM)).start()
    with stop_signals(stopped([])), pytest.raises(StopRequested):
        next(batches)
    for worker in multiprocessing.active_children():
        worker.join()
    # It would be five seconds for each if they were asked to finish their work.
    assert time.monotonic() - start < 5


def test_a_huge_position_is_reached_at_once() -> None:
    loader = make(dataset=range(10**8), batch_size=4)
    loader.load_state_dict({"seed": 5, "epoch": 10**6, "offset": 10**8 - 2})
    assert len(set(next(iter(loader)).tolist())) == 4
    assert loader.state_dict() == {"seed": 5, "epoch": 10**6 + 1, "offset": 2}


def test_the_checkpoints_seed_is_used_and_said(caplog: pytest.LogCaptureFixture) -> None:
    original = make(seed=5)
    take(original, 2)
    resumed = make(seed=6)
    with caplog.at_level(logging.WARNING):
        resumed.load_state_dict(original.state_dict())
    assert "has seed 5, this run has 6" in caplog.text
    assert_same(take(resumed, 3), take(original, 3))
    assert resumed.state_dict()["seed"] == 5


def test_the_same_seed_is_not_worth_a_warning(caplog: pytest.LogCaptureFixture) -> None:
    loader = make()
    loader.load_state_dict(loader.state_dict())
    assert caplog.text == ""


def test_each_iterator_continues_and_ends_the_one_before() -> None:
    loader = make()
    first = iter(loader)
    seen = [next(first)]
    second = iter(loader)
    seen.append(next(second))
    with pytest.raises(RuntimeError, match="made another iterator"):
        next(first)
    loader.load_state_dict(loader.state_dict())
    with pytest.raises(RuntimeError, match="Use the newest"):
        next(second)
    assert_same(seen + take(loader, 1), take(make(), 3))


@pytest.mark.parametrize("num_workers", [0, 1])
def test_the_callers_generators_are_left_alone(num_workers: int) -> None:
    before = get_rng_state()
    take(make(num_workers=num_workers), 3)
    assert rng_is_untouched(before)


def test_a_failed_fetch_leaves_the_callers_generators_alone() -> None:
    def fail(sample: Any) -> None:
        raise LookupError("no such file")

    before = get_rng_state()
    with pytest.raises(LookupError, match="no such file"):
        take(make(dataset=MapDataset(Noisy(), fail)), 1)
    assert rng_is_untouched(before)


def reject_small(sample: dict[str, Any]) -> dict[str, Any] | None:
    return None if sample["index"] < 25 else sample


def test_none_samples_are_replaced_the_same_way_by_workers_and_after_a_resume() -> None:
    dataset = MapDataset(Noisy(), reject_small)
    unbroken = make(dataset=dataset)
    start = take(unbroken, 2)
    assert min(indices(start)) >= 25
    resumed = make(dataset=dataset, num_workers=2)
    resumed.load_state_dict(unbroken.state_dict())
    assert_same(take(resumed, 4), take(unbroken, 4))


def test_reference_counts_alone_free_the_loader() -> None:
    for num_workers in (0, 1):
        loader = make(num_workers=num_workers)
        batches = iter(loader)
        next(batches)
        gone = weakref.ref(loader), weakref.ref(loader.dataset)
        gc.disable()
        try:
            del loader, batches
            assert [ref() for ref in gone] == [None, None]
        finally:
            gc.enable()


def test_an_empty_data_set_is_refused() -> None:
    with pytest.raises(ConfigError, match="The data set list is empty"):
        TrainLoader([], Growing(), 4, seed=0)


@pytest.mark.parametrize(
    ("batch_size", "world_size", "accumulate", "words"),
    [
        (10, 4, 1, r"IMS_PER_BATCH is 10, which 4 process\(es\).* Use 8 or 12\."),
        (128, 1, 3, "SOLVER.ACCUMULATE = 3 cannot share evenly. Use 126 or 129"),
        (5, 2, 4, r"Use 8\."),
        (0, 2, 1, r"IMS_PER_BATCH is 0.* Use 2\."),
        (8, 1, 0, "SOLVER.ACCUMULATE is 0"),
    ],
)
def test_a_batch_that_cannot_be_shared_is_refused_with_the_nearest_sizes(
    monkeypatch: pytest.MonkeyPatch,
    batch_size: int,
    world_size: int,
    accumulate: int,
    words: str,
) -> None:
    as_rank(monkeypatch, 0, world_size)
    with pytest.raises(ConfigError, match=words):
        make(batch_size, accumulate=accumulate)


def test_a_replaced_sample_comes_from_the_same_group() -> None:
    groups = [index % 2 for index in range(20)]
    sampler = GroupedBatchSampler(TrainingSampler(20, seed=1), groups, 4)
    dataset = MapDataset(list(range(20)), lambda x: None if x in (3, 8) else x)
    loader = TrainLoader(dataset, sampler, 4, seed=1, collate_fn=list)
    for batch in itertools.islice(loader, 30):
        assert len({groups[index] for index in batch}) == 1


def test_two_loaders_of_one_sampler_do_not_change_each_others_order() -> None:
    sampler = TrainingSampler(20, seed=0)
    first = TrainLoader(list(range(20)), sampler, 5, seed=1, collate_fn=list)
    alone = [list(batch) for batch in itertools.islice(first, 4)]
    first = TrainLoader(list(range(20)), sampler, 5, seed=1, collate_fn=list)
    TrainLoader(list(range(20)), sampler, 5, seed=2, collate_fn=list)
    assert [list(batch) for batch in itertools.islice(first, 4)] == alone
