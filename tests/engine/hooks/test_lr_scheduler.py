import copy
import io
import logging
from collections.abc import Callable
from typing import Any

import pytest
import torch
from fvcore.common.param_scheduler import (
    ConstantParamScheduler,
    LinearParamScheduler,
    ParamScheduler,
)
from torch import nn
from torch.optim.lr_scheduler import ReduceLROnPlateau

from trainkit.engine.hooks.callback import CallbackHook
from trainkit.engine.hooks.lr_scheduler import LRScheduler
from trainkit.engine.launch import launch
from trainkit.engine.train_loop import SimpleTrainer
from trainkit.solver.lr_scheduler import LRMultiplier
from trainkit.utils import comm
from trainkit.utils.errors import CheckpointError, ConfigError

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


def evaluating(values: dict[int, float]) -> CallbackHook:
    """Puts "val/loss" after some iterations, behind the scheduler as an EvalHook does."""

    def put(trainer: SimpleTrainer) -> None:
        if trainer.iter in values:
            trainer.storage.put_scalar("val/loss", values[trainer.iter], smoothing_hint=False)

    return CallbackHook(after_step=put)


def on_plateau(
    trainer: SimpleTrainer, values: dict[int, float], between: CallbackHook | None = None
) -> None:
    scheduler = ReduceLROnPlateau(trainer.optimizer, factor=0.5, patience=0)
    hook = LRScheduler(scheduler=scheduler, metric="val/loss")
    trainer.register_hooks([hook, between, evaluating(values)])


def test_d47_a_plateau_lowers_the_rate_once_for_each_value_that_is_no_better(
    simple: MakeTrainer,
) -> None:
    trainer = simple(lr=1.0, gather_metric_period=1)
    on_plateau(trainer, {1: 3.0, 3: 2.0, 5: 2.0, 8: 4.0, 9: 1.0})
    trainer.train(0, 12)
    # The step after a value has the new rate.
    assert rates(trainer) == [1.0] * 6 + [0.5] * 3 + [0.25] * 3


def test_d47_values_wait_until_ranks_bring_metrics_together_and_none_is_lost(
    simple: MakeTrainer,
) -> None:
    trainer = simple(lr=1.0, gather_metric_period=4)
    on_plateau(trainer, {0: 1.0, 1: 2.0, 2: 3.0, 7: 4.0})
    trainer.train(0, 12)
    assert rates(trainer) == [1.0] * 4 + [0.25] * 4 + [0.125] * 4


@pytest.mark.parametrize("gather_metric_period", [1, 3])
@pytest.mark.parametrize("cut", range(11))
def test_d47_a_resumed_plateau_goes_on_like_the_unbroken_one(
    simple: MakeTrainer, cut: int, gather_metric_period: int
) -> None:
    values = {1: 3.0, 3: 2.0, 5: 2.0, 8: 4.0, 9: 1.0}
    saved = io.BytesIO()

    def save(trainer: SimpleTrainer) -> None:
        # Inside a step, before its evaluation, as the checkpointer does.
        if trainer.iter == cut:
            state = {"trainer": trainer.state_dict(), "model": trainer.model.state_dict()}
            torch.save(state, saved)

    unbroken, resumed = (
        simple(lr=0.1, gather_metric_period=gather_metric_period) for _ in range(2)
    )
    on_plateau(unbroken, values, CallbackHook(after_step=save))
    on_plateau(resumed, values, CallbackHook(after_step=lambda _: None))
    unbroken.train(0, 12)
    saved.seek(0)
    state = torch.load(saved, weights_only=True)
    resumed.model.load_state_dict(state["model"])
    resumed.load_state_dict(state["trainer"])
    resumed.train(resumed.iter + 1, 12)
    assert rates(resumed) == rates(unbroken)
    ours, theirs = (t.state_dict()["hooks"]["LRScheduler"] for t in (resumed, unbroken))
    assert ours == theirs
    for a, b in zip(resumed.model.parameters(), unbroken.model.parameters(), strict=True):
        assert torch.equal(a, b)


def test_d47_a_second_run_reads_the_metric_anew(simple: MakeTrainer) -> None:
    trainer = simple(lr=1.0, gather_metric_period=1)
    on_plateau(trainer, {0: 1.0})
    trainer.train(0, 2)
    trainer.train(0, 2)
    assert rates(trainer) == [1.0, 0.5]


def test_d47_a_plateau_without_a_metric_is_refused_before_the_first_step(
    simple: MakeTrainer,
) -> None:
    trainer = simple()
    trainer.register_hooks([LRScheduler(scheduler=ReduceLROnPlateau(trainer.optimizer))])
    with pytest.raises(ConfigError, match="ReduceLROnPlateau needs one, and no other scheduler"):
        trainer.train(0, 2)
    assert rates_or_none(trainer) is None


def test_a_metric_for_another_scheduler_is_refused(simple: MakeTrainer) -> None:
    trainer = simple()
    hook = LRScheduler(scheduler=LinearParamScheduler(1.0, 0.0), metric="val/loss")
    trainer.register_hooks([hook])
    with pytest.raises(
        ConfigError, match=r"LinearParamScheduler and .* \(SOLVER.PLATEAU.METRIC\) 'val/loss'"
    ):
        trainer.train(0, 2)


def rates_or_none(trainer: SimpleTrainer) -> Any:
    return trainer.storage.histories().get("lr")


@pytest.mark.parametrize("values", [{}, {1: 1.0}])
def test_a_metric_that_never_comes_is_said(
    simple: MakeTrainer, caplog: pytest.LogCaptureFixture, values: dict[int, float]
) -> None:
    trainer = simple(gather_metric_period=1)
    on_plateau(trainer, values)
    with caplog.at_level(logging.WARNING):
        trainer.train(0, 3)
    said = "val/loss was not put before the last step, so the learning rate stayed."
    assert (said in caplog.text) is not bool(values)


def two_groups(trainer: SimpleTrainer, *lrs: float) -> None:
    groups = [{"params": [nn.Parameter(torch.ones(1))], "lr": lr} for lr in lrs]
    trainer.optimizer = torch.optim.SGD(groups)
    scheduler = torch.optim.lr_scheduler.LambdaLR(
        trainer.optimizer, [lambda i: 0.5**i, lambda i: 1.0]
    )
    trainer.register_hooks([LRScheduler(scheduler=scheduler)])


def test_d47_rates_of_groups_that_differ_are_all_put_now_and_then(simple: MakeTrainer) -> None:
    trainer = simple(gather_metric_period=2)
    two_groups(trainer, 1.0, 1.0)
    trainer.train(0, 4)
    histories = trainer.storage.histories()
    assert histories["lr/group0"].values() == [(0.5, 1), (0.125, 3)]
    assert histories["lr/group1"].values() == [(1.0, 1), (1.0, 3)]
    assert not trainer.storage.smoothing_hints()["lr/group0"]


def test_rates_of_groups_that_are_equal_are_put_once(simple: MakeTrainer) -> None:
    trainer = simple(gather_metric_period=1)
    two_groups(trainer, 1.0, 1.0)
    trainer.train(0, 1)
    assert [name for name in trainer.storage.histories() if name.startswith("lr")] == ["lr"]


def train_on_two_ranks() -> list[Any]:
    """Runs on each rank; only rank 0 has results of the evaluation."""
    torch.manual_seed(0)
    model = _Net()
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
    trainer = SimpleTrainer(model, [torch.ones(1, 1)], optimizer, gather_metric_period=3)
    on_plateau(trainer, {1: 3.0, 3: 4.0, 6: 5.0} if comm.is_main_process() else {})
    trainer.train(0, 10)
    return comm.all_gather((rates(trainer), trainer.state_dict()["hooks"]["LRScheduler"]))


class _Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(1, 1)

    def forward(self, batch: torch.Tensor) -> dict[str, torch.Tensor]:
        return {"loss": self.linear(batch).tanh().mean()}


@pytest.mark.slow
def test_d47_ranks_follow_the_metric_of_rank_0_together() -> None:
    (of_0, state_0), (of_1, state_1) = launch(train_on_two_ranks, 2)
    assert of_0 == of_1 == [1.0] * 6 + [0.5] * 3 + [0.25]
    assert state_0 == state_1


@pytest.mark.parametrize("is_plateau", [True, False])
def test_a_schedule_of_another_kind_is_refused(
    simple: Callable[..., Any], is_plateau: bool
) -> None:
    trainer = simple()
    schedules = [
        LRMultiplier(trainer.optimizer, ConstantParamScheduler(1.0), 10),
        torch.optim.lr_scheduler.ReduceLROnPlateau(trainer.optimizer),
    ]
    saved, wanted = schedules if is_plateau else reversed(schedules)
    hook = LRScheduler(trainer.optimizer, wanted)
    with pytest.raises(CheckpointError, match=r"schedule is not a .*LR_SCHEDULER_NAME of the run"):
        hook.load_state_dict(dict(saved.state_dict()))
