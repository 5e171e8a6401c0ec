import copy
import time
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

from trainkit.engine.hooks.callback import CallbackHook
from trainkit.engine.hooks.time_limit import TimeLimit
from trainkit.engine.launch import launch
from trainkit.engine.train_loop import SimpleTrainer
from trainkit.utils import comm
from trainkit.utils.errors import ConfigError


class Clock:
    """A clock that goes on when it is told to."""

    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    clock = Clock()
    monkeypatch.setattr("time.perf_counter", clock)
    return clock


def slow(clock: Clock, seconds: Callable[[int], float]) -> CallbackHook:
    """Steps that take as long as given by iteration."""

    def pass_time(trainer: Any) -> None:
        clock.now += seconds(trainer.iter)

    return CallbackHook(before_step=pass_time)


def test_a_run_leaves_while_another_step_and_a_save_fit(loop: Any, clock: Clock) -> None:
    trainer = loop()
    trainer.register_hooks([TimeLimit(100.0), slow(clock, lambda i: 10.0)])
    trainer.train(0, 1000)
    # After 8 steps of 10 s there are 20 s left; after 9 there would be 10.
    assert trainer.steps == list(range(9))
    assert trainer.interruption.reason == "the time limit of 100 s"
    assert trainer.interruption.exit_code == 0
    assert clock.now - 1000.0 <= 100.0


def test_room_is_left_for_the_longest_pause_so_far(loop: Any, clock: Clock) -> None:
    trainer = loop()
    # A save of 29 s behind step 3 shows before step 4.
    trainer.register_hooks([TimeLimit(100.0), slow(clock, lambda i: 30.0 if i == 4 else 1.0)])
    trainer.train(0, 1000)
    left = 100.0 - (clock.now - 1000.0)
    assert 30.0 < left < 33.0


def test_time_before_training_counts(loop: Any, clock: Clock) -> None:
    trainer = loop()
    trainer.register_hooks([TimeLimit(100.0), slow(clock, lambda i: 10.0)])
    clock.now += 50.0
    trainer.train(0, 1000)
    assert trainer.steps == list(range(4))
    # Going back, and going on, gives no more time.
    trainer.train(0, 1000)
    assert trainer.steps == [*range(4), 0]


def test_a_run_that_ends_in_time_is_not_interrupted(loop: Any, clock: Clock) -> None:
    trainer = loop()
    trainer.register_hooks([TimeLimit(100.0), slow(clock, lambda i: 10.0)])
    trainer.train(0, 5)
    assert (trainer.iter, trainer.interruption) == (5, None)


def test_a_resumed_run_goes_on_and_ends_like_an_unbroken_one(
    simple: Callable[..., SimpleTrainer], clock: Clock
) -> None:
    unbroken, first = simple(seed=1), simple(seed=1)
    unbroken.train(0, 12)
    first.register_hooks([TimeLimit(50.0), slow(clock, lambda i: 10.0)])
    first.train(0, 12)
    assert first.iter == 4
    resumed = simple(seed=1)
    resumed.register_hooks([TimeLimit(500.0), slow(clock, lambda i: 10.0)])
    resumed.model.load_state_dict(first.model.state_dict())
    resumed.load_state_dict(copy.deepcopy(first.state_dict()))
    resumed.train(resumed.iter + 1, 12)
    assert resumed.iter == 12
    for ours, theirs in zip(resumed.model.parameters(), unbroken.model.parameters(), strict=True):
        assert torch.equal(ours, theirs)


@pytest.mark.parametrize("seconds", [0.0, -1.0, float("nan")])
def test_a_limit_that_is_not_above_0_is_refused(seconds: float) -> None:
    with pytest.raises(ConfigError, match=r"The time limit \(SOLVER.MAX_SECONDS\) is .*above 0 s"):
        TimeLimit(seconds)


class _Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(1, 1)

    def forward(self, batch: torch.Tensor) -> dict[str, torch.Tensor]:
        return {"loss": self.linear(batch).square().mean()}


def leave_on_two_ranks() -> list[Any]:
    """Runs on each rank: the clock of rank 1 is far ahead, and must not matter."""
    clock = Clock()
    time.perf_counter = clock  # This process is the rank's own.
    model = _Net()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    trainer = SimpleTrainer(model, [torch.ones(1, 1)], optimizer, gather_metric_period=5)
    pace = 1.0 if comm.is_main_process() else 1000.0
    trainer.register_hooks([TimeLimit(40.0), slow(clock, lambda i: pace)])
    trainer.train(0, 1000)
    return comm.all_gather((trainer.iter, trainer.interruption is not None))


@pytest.mark.slow
def test_the_clock_of_rank_0_decides_for_all_ranks() -> None:
    # Asked for after 34 s, since 5 steps and a save of 1 s may be to come; agreed on after 35.
    assert launch(leave_on_two_ranks, 2) == [(35, True)] * 2
