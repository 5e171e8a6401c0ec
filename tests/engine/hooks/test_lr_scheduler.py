import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from fvcore.common.param_scheduler import LinearParamScheduler, ParamScheduler
from torch import nn

from trainkit.engine.hooks.lr_scheduler import LRScheduler
from trainkit.engine.train_loop import SimpleTrainer
from trainkit.solver.lr_scheduler import LRMultiplier

MakeTrainer = Callable[..., SimpleTrainer]


def rates(trainer: SimpleTrainer) -> list[float]:
    return [value for value, _ in trainer.storage.history("lr").values()]


def linear(lr: float, start: int, max_iter: int) -> Any:
    return pytest.approx([lr * (1 - i / max_iter) for i in range(start, max_iter)])


def test_a_param_scheduler_multiplies_the_rate_over_the_run(simple: MakeTrainer) -> None:
    trainer = simple(lr=0.5)
    trainer.register_hooks([LRScheduler(scheduler=LinearParamScheduler(1.0, 0.0))])
    trainer.train(0, 4)
    # The rate of the step just made is put, and not that of the next one.
    assert rates(trainer) == linear(0.5, 0, 4)
    assert [i for _, i in trainer.storage.history("lr").values()] == [0, 1, 2, 3]


def test_a_torch_scheduler_is_stepped(simple: MakeTrainer) -> None:
    trainer = simple(lr=1.0)
    scheduler = torch.optim.lr_scheduler.StepLR(trainer.optimizer, step_size=2, gamma=0.5)
    trainer.register_hooks([LRScheduler(scheduler=scheduler)])
    trainer.train(0, 5)
    assert rates(trainer) == [1.0, 1.0, 0.5, 0.5, 0.25]


def test_the_trainers_scheduler_is_the_default(simple: MakeTrainer) -> None:
    trainer: Any = simple(lr=0.5)
    trainer.scheduler = LRMultiplier(trainer.optimizer, LinearParamScheduler(1.0, 0.0), 4)
    trainer.register_hooks([LRScheduler()])
    trainer.train(0, 4)
    assert rates(trainer) == linear(0.5, 0, 4)


def test_a_second_run_begins_the_schedule_again(simple: MakeTrainer) -> None:
    given, owned = simple(lr=0.5), simple(lr=0.5)
    given.register_hooks([LRScheduler(scheduler=LinearParamScheduler(1.0, 0.0))])
    multiplier = LRMultiplier(owned.optimizer, LinearParamScheduler(1.0, 0.0), 4)
    owned.register_hooks([LRScheduler(scheduler=multiplier)])
    for trainer in (given, owned):
        trainer.train(0, 4)
        trainer.train(0, 4)
        assert rates(trainer) == linear(0.5, 0, 4)


def test_a_second_run_with_a_param_scheduler_may_have_another_length(simple: MakeTrainer) -> None:
    trainer = simple(lr=0.5)
    trainer.register_hooks([LRScheduler(scheduler=LinearParamScheduler(1.0, 0.0))])
    trainer.train(0, 2)
    trainer.train(0, 5)
    assert rates(trainer) == linear(0.5, 0, 5)
    trainer.train(5, 10)
    assert rates(trainer) == linear(0.5, 5, 10)


def as_given(trainer: SimpleTrainer) -> ParamScheduler:
    return LinearParamScheduler(1.0, 0.0)


def as_multiplier(trainer: SimpleTrainer) -> LRMultiplier:
    return LRMultiplier(trainer.optimizer, LinearParamScheduler(1.0, 0.0), 6)


@pytest.mark.parametrize("make_scheduler", [as_given, as_multiplier])
def test_a_resumed_run_goes_on_with_the_rates_of_the_unbroken_one(
    simple: MakeTrainer, make_scheduler: Any
) -> None:
    unbroken, first, resumed = simple(lr=0.5), simple(lr=0.5), simple(lr=0.5)
    for trainer in (unbroken, first, resumed):
        trainer.register_hooks([LRScheduler(scheduler=make_scheduler(trainer))])
    unbroken.train(0, 6)
    hook = first._hooks[0]
    hook.before_step = lambda: first.request_stop("test") if first.iter == 2 else None  # type: ignore[method-assign]  # short
    first.train(0, 6)
    resumed.load_state_dict(copy.deepcopy(first.state_dict()))
    resumed.train(resumed.iter + 1, 6)
    assert rates(resumed) == rates(unbroken)
    assert resumed.optimizer.param_groups[0]["lr"] == unbroken.optimizer.param_groups[0]["lr"]


def test_a_state_before_the_first_run_is_possible(simple: MakeTrainer) -> None:
    trainer = simple()
    trainer.register_hooks([LRScheduler(scheduler=LinearParamScheduler(1.0, 0.0))])
    assert trainer.state_dict()["hooks"] == {}


@pytest.mark.parametrize(
    ("groups", "expected"),
    [
        # The largest group.
        ([(1, 0.1), (3, 0.2), (2, 0.3)], 0.2),
        # All alike in size: the most common rate.
        ([(1, 0.1), (1, 0.2), (1, 0.2)], 0.2),
    ],
)
def test_the_most_telling_rate_is_put(
    simple: MakeTrainer, groups: list[tuple[int, float]], expected: float
) -> None:
    trainer = simple()
    trainer.optimizer = torch.optim.SGD(
        [{"params": [nn.Parameter(torch.ones(1)) for _ in range(n)], "lr": lr} for n, lr in groups]
    )
    scheduler = torch.optim.lr_scheduler.ConstantLR(trainer.optimizer, factor=1.0)
    trainer.register_hooks([LRScheduler(scheduler=scheduler)])
    trainer.train(0, 1)
    assert rates(trainer) == [expected]
