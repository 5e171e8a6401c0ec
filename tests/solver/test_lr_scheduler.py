import gc
import logging
import math
import weakref

import pytest
import torch
from fvcore.common.param_scheduler import (
    ConstantParamScheduler,
    CosineParamScheduler,
    LinearParamScheduler,
)
from torch import nn

from trainkit.solver.lr_scheduler import (
    LRMultiplier,
    WarmupCosineLR,
    WarmupMultiStepLR,
    WarmupParamScheduler,
    multi_step_schedule,
)
from trainkit.utils.errors import CheckpointError, ConfigError, UnknownNameError


def make_optimizer(*lrs: float) -> torch.optim.Optimizer:
    groups = [{"params": [nn.Parameter(torch.zeros(1))], "lr": lr} for lr in lrs or (1.0,)]
    return torch.optim.SGD(groups, lr=1.0)


def lrs_of_run(scheduler: LRMultiplier, iterations: int) -> list[float]:
    """The first group's learning rate in each iteration."""
    lrs = []
    for _ in range(iterations):
        lrs.append(float(scheduler.get_last_lr()[0]))
        scheduler.step()
    return lrs


class Recording:
    """Remembers the progress it was asked for."""

    def __init__(self) -> None:
        self.asked: list[float] = []

    def __call__(self, where: float) -> float:
        self.asked.append(where)
        return 1.0 - where


def test_linear_warmup_rises_evenly_to_where_the_schedule_goes_on() -> None:
    cosine = CosineParamScheduler(1.0, 0.0)
    schedule = WarmupParamScheduler(cosine, 0.1, warmup_length=0.2)
    end = 0.5 * (1 + math.cos(math.pi * 0.2))
    assert schedule(0.0) == pytest.approx(0.1)
    assert schedule(0.1) == pytest.approx((0.1 + end) / 2)
    assert schedule(0.2) == pytest.approx(end)
    assert schedule(0.6) == pytest.approx(0.5 * (1 + math.cos(math.pi * 0.6)))


def test_constant_warmup_stays_and_then_jumps() -> None:
    schedule = WarmupParamScheduler(LinearParamScheduler(2.0, 0.0), 0.1, 0.2, "constant")
    assert [schedule(w) for w in (0.0, 0.1, 0.19)] == pytest.approx([0.2] * 3)
    assert schedule(0.2) == pytest.approx(1.6)


def test_rescaled_schedule_begins_after_the_warmup() -> None:
    line = LinearParamScheduler(1.0, 0.0)
    schedule = WarmupParamScheduler(line, 0.1, 0.2, rescale_interval=True)
    assert schedule(0.1) == pytest.approx(0.55)
    assert schedule(0.2) == pytest.approx(1.0)
    assert schedule(0.6) == pytest.approx(0.5)


def test_no_warmup_is_the_schedule_itself() -> None:
    schedule = WarmupParamScheduler(LinearParamScheduler(1.0, 0.0), 0.1, 0.0)
    assert [schedule(w) for w in (0.0, 0.5)] == [1.0, 0.5]


@pytest.mark.parametrize("rescale", [False, True])
def test_a_run_may_be_all_warmup(rescale: bool) -> None:
    constant = ConstantParamScheduler(1.0)
    schedule = WarmupParamScheduler(constant, 0.0, 1.0, rescale_interval=rescale)
    lrs = lrs_of_run(LRMultiplier(make_optimizer(), schedule, max_iter=4), 4)
    assert lrs == pytest.approx([0.0, 0.25, 0.5, 0.75])


@pytest.mark.parametrize("length", [-0.1, 1.1, math.nan])
def test_warmup_length_outside_the_run_is_refused(length: float) -> None:
    with pytest.raises(ConfigError, match=rf"warmup_length is {length}, but is a part"):
        WarmupParamScheduler(ConstantParamScheduler(1.0), 0.1, length)


def test_unknown_warmup_method_names_the_nearest() -> None:
    with pytest.raises(UnknownNameError, match=r"'liner'\. Did you mean 'linear'\?"):
        WarmupParamScheduler(ConstantParamScheduler(1.0), 0.1, 0.5, "liner")


def test_multiplier_scales_the_base_lr_of_each_group() -> None:
    optimizer = make_optimizer(1.0, 0.1)
    scheduler = LRMultiplier(optimizer, LinearParamScheduler(1.0, 0.0), max_iter=4)
    scheduler.step()
    assert [group["lr"] for group in optimizer.param_groups] == pytest.approx([0.75, 0.075])
    assert scheduler.get_last_lr() == [group["lr"] for group in optimizer.param_groups]
    assert scheduler.base_lrs == [1.0, 0.1]


def test_last_step_keeps_the_lr_of_the_last_iteration() -> None:
    recording = Recording()
    scheduler = LRMultiplier(make_optimizer(), recording, max_iter=4)
    assert lrs_of_run(scheduler, 6) == pytest.approx([1.0, 0.75, 0.5, 0.25, 0.25, 0.25])
    assert max(recording.asked) == 0.75


def test_progress_stays_below_one_in_a_run_of_ten_million() -> None:
    recording = Recording()
    scheduler = LRMultiplier(make_optimizer(), recording, max_iter=10**7)
    scheduler.step(10**7 - 1)
    # fvcore's schedules add an epsilon of 1e-6 to the progress before they look at it.
    assert 0.99999 < recording.asked[-1] < 1 - 1e-6


def test_stepping_before_the_optimizer_does_not_warn(recwarn: pytest.WarningsRecorder) -> None:
    scheduler = LRMultiplier(make_optimizer(), ConstantParamScheduler(1.0), max_iter=9)
    for _ in range(3):
        scheduler.step()
    assert not recwarn.list


def test_resumed_schedule_goes_on_where_it_was() -> None:
    schedule = CosineParamScheduler(1.0, 0.0)
    unbroken = LRMultiplier(make_optimizer(), schedule, max_iter=10)
    expected = lrs_of_run(unbroken, 10)
    first = LRMultiplier(make_optimizer(), schedule, max_iter=10)
    lrs_of_run(first, 4)
    state = first.state_dict()
    assert state == {"base_lrs": [1.0], "last_epoch": 4}
    # Also when the optimizer's own state was not restored.
    second = LRMultiplier(make_optimizer(0.3), schedule, max_iter=10)
    second.load_state_dict(state)
    assert lrs_of_run(second, 6) == expected[4:]


def test_last_iter_starts_in_the_middle() -> None:
    optimizer = make_optimizer(1.0)
    optimizer.param_groups[0]["initial_lr"] = 2.0
    scheduler = LRMultiplier(optimizer, LinearParamScheduler(1.0, 0.0), max_iter=10, last_iter=4)
    assert scheduler.get_last_lr() == [1.0]


def test_state_of_another_number_of_groups_is_refused() -> None:
    scheduler = LRMultiplier(make_optimizer(1.0, 0.1), ConstantParamScheduler(1.0), max_iter=10)
    with pytest.raises(CheckpointError, match="has 1 base learning rates but the optimizer has 2"):
        scheduler.load_state_dict({"base_lrs": [1.0], "last_epoch": 3})


def test_other_base_rates_than_the_checkpoints_are_said(caplog: pytest.LogCaptureFixture) -> None:
    state = LRMultiplier(make_optimizer(0.1), ConstantParamScheduler(1.0), 10).state_dict()
    resumed = LRMultiplier(make_optimizer(0.2), ConstantParamScheduler(1.0), 10)
    with caplog.at_level(logging.WARNING):
        resumed.load_state_dict(state)
    assert "are [0.2], but the run goes on with those of the checkpoint, [0.1]" in caplog.text
    assert resumed.get_last_lr() == [0.1]


def test_a_tensor_lr_stays_the_same_tensor() -> None:
    lr = torch.tensor(1.0)
    optimizer = torch.optim.Adam([nn.Parameter(torch.zeros(1))], lr=lr)
    scheduler = LRMultiplier(optimizer, LinearParamScheduler(1.0, 0.0), max_iter=4)
    scheduler.step()
    scheduler.step()
    assert optimizer.param_groups[0]["lr"] is lr
    assert lr.item() == 0.5


def test_max_iter_below_one_is_refused() -> None:
    with pytest.raises(ConfigError, match="max_iter is 0, but a schedule needs at least 1"):
        LRMultiplier(make_optimizer(), ConstantParamScheduler(1.0), max_iter=0)


def test_optimizer_dies_with_its_scheduler_without_the_garbage_collector() -> None:
    make_optimizer()  # The first one of a process imports modules that keep its frame.
    gc.collect()
    gc.disable()
    try:
        optimizer = make_optimizer()
        scheduler = LRMultiplier(optimizer, CosineParamScheduler(1.0, 0.0), max_iter=10)
        scheduler.step()
        scheduler.load_state_dict(scheduler.state_dict())
        dead: list[weakref.ref[object]] = [weakref.ref(optimizer), weakref.ref(scheduler)]
        del optimizer, scheduler
        assert [reference() for reference in dead] == [None, None]
    finally:
        gc.enable()


def test_multi_step_schedule_counts_milestones() -> None:
    schedule = multi_step_schedule([3, 5, 12], 0.5, max_iter=10)
    assert [schedule(i / 10) for i in range(10)] == [1.0] * 3 + [0.5] * 2 + [0.25] * 5


@pytest.mark.parametrize("milestones", [[5, 3], [3, 3], [0, 3]])
def test_milestones_that_do_not_rise_are_refused(milestones: list[int]) -> None:
    with pytest.raises(
        ConfigError, match=r"SOLVER\.STEPS\) are \(\d, \d\), but have to be above 0"
    ):
        multi_step_schedule(milestones, 0.1, max_iter=10)


def test_legacy_multi_step_needs_no_length_of_the_run() -> None:
    scheduler = WarmupMultiStepLR(make_optimizer(), [6, 8], warmup_factor=0.2, warmup_iters=4)
    warmup = [0.2, 0.4, 0.6, 0.8]
    assert lrs_of_run(scheduler, 12) == pytest.approx(warmup + [1.0] * 2 + [0.1] * 2 + [0.01] * 4)


def test_legacy_multi_step_without_milestones_only_warms_up() -> None:
    scheduler = WarmupMultiStepLR(make_optimizer(), [], warmup_iters=2, warmup_factor=0.5)
    assert lrs_of_run(scheduler, 4) == pytest.approx([0.5, 0.75, 1.0, 1.0])


def test_legacy_cosine_falls_to_zero() -> None:
    scheduler = WarmupCosineLR(
        make_optimizer(), max_iters=20, warmup_factor=0.1, warmup_iters=5, warmup_method="constant"
    )
    cosine = [0.5 * (1 + math.cos(math.pi * i / 20)) for i in range(5, 20)]
    assert lrs_of_run(scheduler, 20) == pytest.approx([0.1] * 5 + cosine)
