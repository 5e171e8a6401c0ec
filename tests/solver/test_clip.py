import math

import pytest
import torch
from torch import nn

from trainkit.config.config import CfgNode
from trainkit.solver.clip import (
    GradientClipper,
    build_grad_clipper,
    maybe_add_gradient_clipping,
    total_grad_norm,
)
from trainkit.utils.errors import ConfigError, UnknownNameError


def parameters(*grads: list[float] | None) -> list[nn.Parameter]:
    """One parameter for each gradient; None makes one that has no gradient."""
    result = []
    for grad in grads:
        parameter = nn.Parameter(torch.zeros(len(grad or [0.0])))
        parameter.grad = None if grad is None else torch.tensor(grad)
        result.append(parameter)
    return result


def grads(params: list[nn.Parameter]) -> list[list[float]]:
    return [p.grad.tolist() for p in params if p.grad is not None]


def test_total_norm_is_that_of_one_long_vector() -> None:
    params = parameters([3.0, 4.0], None, [12.0])
    assert total_grad_norm(params).item() == pytest.approx(13.0)
    assert total_grad_norm(params, 1.0).item() == pytest.approx(19.0)
    assert total_grad_norm(params, math.inf).item() == 12.0


def test_d41_full_model_scales_all_gradients_by_one_factor() -> None:
    params = parameters([3.0, 4.0], [12.0])
    assert GradientClipper("full_model", 1.3)(params).item() == pytest.approx(13.0)
    assert grads(params)[0] == pytest.approx([0.3, 0.4])
    assert grads(params)[1] == pytest.approx([1.2])
    assert total_grad_norm(params).item() == pytest.approx(1.3)


def test_norm_limits_each_parameter_on_its_own() -> None:
    params = parameters([3.0, 4.0], [0.5], None, [12.0])
    assert GradientClipper("norm", 1.0)(params).item() == pytest.approx(math.sqrt(25 + 0.25 + 144))
    assert grads(params)[0] == pytest.approx([0.6, 0.8])
    assert grads(params)[1:] == [[0.5], pytest.approx([1.0])]


def test_norm_equals_torchs_clipping_of_each_parameter() -> None:
    generator = torch.Generator().manual_seed(0)
    values = [torch.randn(7, generator=generator).tolist() for _ in range(5)]
    ours, theirs = parameters(*values), parameters(*values)
    GradientClipper("norm", 2.0, norm_type=1.0)(ours)
    for parameter in theirs:
        torch.nn.utils.clip_grad_norm_(parameter, 2.0, norm_type=1.0)
    torch.testing.assert_close(grads(ours), grads(theirs))


def test_value_clamps_each_entry() -> None:
    params = parameters([3.0, -4.0], [0.5])
    assert GradientClipper("value", 1.0)(params).item() == pytest.approx(math.sqrt(25.25))
    assert grads(params) == [[1.0, -1.0], [0.5]]


@pytest.mark.parametrize("clip_type", ["full_model", "norm", "value"])
def test_small_gradients_stay_as_they_are(clip_type: str) -> None:
    params = parameters([0.3, 0.4], [0.1])
    before = grads(params)
    GradientClipper(clip_type, 1.0)(params)
    assert grads(params) == before


@pytest.mark.parametrize("clip_type", ["full_model", "norm", "value"])
@pytest.mark.parametrize("bad", [math.inf, -math.inf, math.nan])
def test_clipping_does_not_hide_a_gradient_that_is_not_finite(clip_type: str, bad: float) -> None:
    params = parameters([1.0, bad], [0.5])
    assert not math.isfinite(GradientClipper(clip_type, 1.0)(params).item())


@pytest.mark.parametrize("clip_type", ["full_model", "norm", "value"])
def test_without_gradients_the_norm_is_zero(clip_type: str) -> None:
    assert GradientClipper(clip_type, 1.0)(parameters(None, None)).item() == 0.0


def test_norm_takes_gradients_of_several_dtypes() -> None:
    params = parameters([3.0, 4.0])
    half = nn.Parameter(torch.zeros(1, dtype=torch.bfloat16))
    half.grad = torch.tensor([12.0], dtype=torch.bfloat16)
    assert GradientClipper("norm", 1.0)([*params, half]).item() == pytest.approx(13.0)
    assert half.grad.dtype == torch.bfloat16
    assert half.grad.item() == 1.0


def test_unknown_type_names_the_nearest() -> None:
    with pytest.raises(UnknownNameError, match=r"CLIP_TYPE 'values'\. Did you mean 'value'\?"):
        GradientClipper("values", 1.0)


@pytest.mark.parametrize(("value", "norm", "key"), [(0.0, 2.0, "CLIP_VALUE"), (1, -1, "NORM_TYPE")])
def test_limits_not_above_zero_are_refused(value: float, norm: float, key: str) -> None:
    with pytest.raises(ConfigError, match=rf"{key} is (0.0|-1), but has to be above 0"):
        GradientClipper("norm", value, norm)


def test_config_builds_a_clipper_only_when_enabled(cfg: CfgNode) -> None:
    assert build_grad_clipper(cfg) is None
    cfg.SOLVER.CLIP_GRADIENTS.ENABLED = True
    cfg.SOLVER.CLIP_GRADIENTS.CLIP_VALUE = 2.6
    clipper = build_grad_clipper(cfg)
    assert clipper is not None
    params = parameters([5.0, 12.0])
    clipper(params)
    assert grads(params)[0] == pytest.approx([1.0, 2.4])


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")
@pytest.mark.parametrize("clip_type", ["full_model", "norm", "value"])
def test_clipping_does_not_wait_for_the_device(clip_type: str) -> None:
    params = [nn.Parameter(torch.zeros(3, device="cuda")) for _ in range(4)]
    for parameter in params:
        parameter.grad = torch.ones_like(parameter)
    clipper = GradientClipper(clip_type, 1.0)
    torch.cuda.set_sync_debug_mode("error")
    try:
        norm = clipper(params)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert norm.item() == pytest.approx(math.sqrt(12))


@pytest.fixture
def clip_cfg(cfg: CfgNode) -> CfgNode:
    cfg.SOLVER.CLIP_GRADIENTS.ENABLED = True
    return cfg


def test_d41_an_optimizer_with_clipping_clips_the_norm_of_the_whole_model(
    clip_cfg: CfgNode,
) -> None:
    (a, b) = parameters([3.0, 4.0], [12.0])
    optimizer = torch.optim.SGD([{"params": [a]}, {"params": [b]}], lr=1.0)
    assert maybe_add_gradient_clipping(clip_cfg, optimizer) is optimizer
    optimizer.step()
    assert torch.cat([a, b]).tolist() == pytest.approx([-3 / 13, -4 / 13, -12 / 13])


@pytest.mark.parametrize("optimizer_class", [torch.optim.SGD, torch.optim.LBFGS])
def test_d41_a_class_with_clipping_keeps_what_step_returns(
    clip_cfg: CfgNode, optimizer_class: type[torch.optim.Optimizer]
) -> None:
    clipping: type[torch.optim.Optimizer] = maybe_add_gradient_clipping(clip_cfg, optimizer_class)
    weight = nn.Parameter(torch.tensor([3.0, 4.0]))
    optimizer = clipping([weight], lr=1.0)  # type: ignore[call-arg]  # of the base class

    def closure() -> float:
        optimizer.zero_grad()
        loss = weight.square().sum()
        loss.backward()
        return loss.item()

    assert isinstance(optimizer, optimizer_class)
    assert optimizer.step(closure) == 25.0
    # The gradient that the closure computed, (6, 8), was clipped to a norm of 1.
    if optimizer_class is torch.optim.SGD:
        assert weight.tolist() == pytest.approx([2.4, 3.2])


def test_d41_a_class_with_clipping_can_be_subclassed(clip_cfg: CfgNode) -> None:
    class Counting(maybe_add_gradient_clipping(clip_cfg, torch.optim.SGD)):  # type: ignore[misc]
        count = 0

        def step(self, closure: None = None) -> None:
            self.count += 1
            super().step(closure)

    (weight,) = parameters([3.0, 4.0])
    optimizer = Counting([weight], lr=1.0)
    optimizer.step()
    assert optimizer.count == 1
    # Both steps clip, and the second time finds a norm of 1.
    assert weight.tolist() == pytest.approx([-0.6, -0.8], rel=1e-5)


def test_without_clipping_optimizers_stay_as_they_are(cfg: CfgNode) -> None:
    assert maybe_add_gradient_clipping(cfg, torch.optim.SGD) is torch.optim.SGD
    optimizer = torch.optim.SGD(parameters([3.0]), lr=1.0)
    maybe_add_gradient_clipping(cfg, optimizer).step()
    assert optimizer.param_groups[0]["params"][0].item() == -3.0


@pytest.mark.parametrize("how", [{"fused": True}, {"foreach": True}])
def test_a_scaled_gradient_is_clipped_without_its_scale(
    clip_cfg: CfgNode, how: dict[str, bool]
) -> None:
    weight = nn.Parameter(torch.tensor([3.0, 4.0]))
    optimizer = maybe_add_gradient_clipping(clip_cfg, torch.optim.SGD([weight], lr=1.0, **how))
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    scaler.scale(weight.square().sum()).backward()
    scaler.step(optimizer)
    # Of the gradient (6, 8), clipped to a norm of 1.
    assert weight.tolist() == pytest.approx([2.4, 3.2], abs=1e-5)
