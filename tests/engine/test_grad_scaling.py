"""fp16 with a gradient scaler, on the CPU."""

import copy
import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch.amp.grad_scaler import GradScaler

from trainkit.engine.grad_scaling import build_grad_scaler, check_scale
from trainkit.engine.hooks.callback import CallbackHook
from trainkit.engine.non_finite import NonFiniteError
from trainkit.engine.train_loop import AMPTrainer, SimpleTrainer
from trainkit.utils.errors import ConfigError

MakeTrainer = Callable[..., SimpleTrainer]


def optimizer(**settings: Any) -> torch.optim.Optimizer:
    return torch.optim.SGD([torch.nn.Parameter(torch.ones(2))], lr=0.1, **settings)


def fp16(simple: MakeTrainer, **settings: Any) -> SimpleTrainer:
    """Makes a trainer with a scale at which these gradients do not overflow."""
    trainer = simple(precision="fp16", **settings)
    trainer.grad_scaler = GradScaler("cpu", init_scale=256.0)
    return trainer


def weights(trainer: SimpleTrainer) -> list[torch.Tensor]:
    return [p.detach().clone() for p in trainer.model.parameters()]


def poison_gradient_in(trainer: SimpleTrainer, *iterations: int) -> None:
    """Has a gradient overflow, as seen by the scaler, though the loss is fine."""
    parameter = next(trainer.model.parameters())

    def overflow(grad: torch.Tensor) -> torch.Tensor:
        return grad * math.inf if trainer.iter in iterations else grad

    parameter.register_hook(overflow)


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_only_fp16_has_a_scaler_that_scales(precision: str) -> None:
    assert not build_grad_scaler(precision, optimizer()).is_enabled()
    assert build_grad_scaler("fp16", optimizer()).is_enabled()


def test_fp16_trains_like_fp32_but_for_rounding(simple: MakeTrainer) -> None:
    plain = simple()
    scaled = fp16(simple)
    scaled.model.load_state_dict(plain.model.state_dict())
    plain.train(0, 8)
    scaled.train(0, 8)
    assert scaled.grad_scaler.get_scale() == 256.0
    for found, expected in zip(weights(scaled), weights(plain), strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-2, atol=1e-3)
    assert not torch.equal(weights(scaled)[0], weights(plain)[0])


def test_d28_hooks_see_gradients_without_their_scale(simple: MakeTrainer) -> None:
    plain = simple()
    scaled = fp16(simple)
    scaled.model.load_state_dict(plain.model.state_dict())
    seen: list[torch.Tensor] = []
    for trainer in (plain, scaled):
        take = CallbackHook(
            after_backward=lambda t: seen.append(next(t.model.parameters()).grad.clone())
        )
        trainer.register_hooks([take])
        trainer.train(0, 1)
    torch.testing.assert_close(seen[1], seen[0], rtol=1e-2, atol=1e-3)


@pytest.mark.parametrize("policy", ["raise", "skip"])
def test_an_overflow_leaves_the_update_out_and_lowers_the_scale(
    simple: MakeTrainer, policy: str
) -> None:
    trainer = fp16(simple, non_finite=policy)
    poison_gradient_in(trainer, 2)
    states: list[list[torch.Tensor]] = []
    trainer.register_hooks([CallbackHook(after_step=lambda t: states.append(weights(t)))])
    trainer.train(0, 5)
    assert all(torch.equal(a, b) for a, b in zip(states[1], states[2], strict=True))
    assert not torch.equal(states[2][0], states[3][0])
    assert trainer.grad_scaler.get_scale() == 128.0
    norms = {i: value for value, i in trainer.storage.history("grad_norm").values()}
    if policy == "raise":
        assert norms[2] == 0.0 < norms[3]


def test_a_loss_that_is_not_finite_still_ends_the_run(simple: MakeTrainer) -> None:
    trainer = simple(precision="fp16")
    with torch.no_grad():
        next(trainer.model.parameters()).fill_(math.nan)
    with pytest.raises(NonFiniteError, match="Iteration 0 on rank 0 is not finite"):
        trainer.train(0, 3)


def test_gradients_that_always_overflow_end_the_run(simple: MakeTrainer) -> None:
    trainer = simple(precision="fp16", gather_metric_period=4)
    poison_gradient_in(trainer, *range(100))
    with pytest.raises(NonFiniteError, match=r"overflowed in fp16.*scale fell to .*Train in bf16"):
        trainer.train(0, 100)
    assert 30 <= trainer.iter < 40


def test_the_scale_is_resumed(simple: MakeTrainer) -> None:
    unbroken = fp16(simple, seed=3)
    poison_gradient_in(unbroken, 1)
    cut: dict[str, Any] = {}

    def take(trainer: SimpleTrainer) -> None:
        if trainer.iter == 2:
            cut.update(copy.deepcopy(trainer.state_dict()), model=trainer.model.state_dict())
            cut["model"] = copy.deepcopy(cut["model"])

    unbroken.register_hooks([CallbackHook(after_step=take)])
    unbroken.train(0, 6)
    resumed = fp16(simple, seed=3)
    resumed.model.load_state_dict(cut.pop("model"))
    resumed.load_state_dict(cut)
    assert resumed.grad_scaler.get_scale() == 128.0
    resumed.train(3, 6)
    for found, expected in zip(weights(resumed), weights(unbroken), strict=True):
        assert torch.equal(found, expected)


def test_amp_trainer_takes_detectron2s_arguments(simple: MakeTrainer) -> None:
    plain = simple()
    scaler = GradScaler("cpu", init_scale=1024.0)
    trainer = AMPTrainer(
        plain.model, plain.data_loader, plain.optimizer, 20, False, scaler, torch.float16, True
    )
    trainer.train(0, 2)
    assert trainer.precision == "fp16"
    assert trainer.storage.latest()["[metric]grad_scaler"] == (1024.0, 1)


def test_rolling_back_does_not_go_with_a_scaler() -> None:
    with pytest.raises(ConfigError, match=r"NON_FINITE is 'rollback' and .*'fp16'.*Choose 'skip'"):
        build_grad_scaler("fp16", optimizer(), "rollback")


def test_an_overflow_in_the_first_step_does_no_harm_to_a_fused_momentum(
    simple: MakeTrainer,
) -> None:
    trainer = simple(precision="fp16")
    fused = torch.optim.SGD(trainer.model.parameters(), lr=0.1, momentum=0.9, fused=True)
    trainer = SimpleTrainer(trainer.model, trainer.data_loader, fused, precision="fp16")
    trainer.grad_scaler = GradScaler("cpu", init_scale=256.0)
    poison_gradient_in(trainer, 0)
    before = weights(trainer)
    states: list[list[torch.Tensor]] = []
    trainer.register_hooks([CallbackHook(after_step=lambda t: states.append(weights(t)))])
    trainer.train(0, 3)
    assert all(torch.equal(a, b) for a, b in zip(states[0], before, strict=True))
    momenta = [state["momentum_buffer"] for state in fused.state.values()]
    assert all(momentum.abs().max() < 100 for momentum in momenta)


def test_a_scale_that_is_gone_is_an_error_only_where_there_is_one() -> None:
    check_scale(GradScaler("cpu", enabled=False), 0)
    with pytest.raises(NonFiniteError, match="up to iteration 7 overflowed"):
        check_scale(GradScaler("cpu", init_scale=2.0**-20), 7)
