import copy
import logging
import math
from typing import Any

import pytest
import torch
from fvcore.common.config import CfgNode
from torch import nn

from trainkit.solver.build import (
    NORM_MODULE_TYPES,
    build_lr_scheduler,
    build_optimizer,
    get_default_optimizer_params,
    optimizer_implementation,
    reduce_param_groups,
)
from trainkit.utils.errors import ConfigError, UnknownNameError


def make_net() -> nn.Sequential:
    return nn.Sequential(nn.Linear(3, 4), nn.LayerNorm(4), nn.Linear(4, 2))


def named_groups(model: nn.Module, groups: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The groups with names in place of parameters."""
    names = {p: name for name, p in model.named_parameters()}
    return [{**group, "params": [names[p] for p in group["params"]]} for group in groups]


def test_equal_settings_make_one_group() -> None:
    net = make_net()
    groups = get_default_optimizer_params(net, base_lr=0.1, weight_decay=0.01)
    assert named_groups(net, groups) == [
        {"params": [name for name, _ in net.named_parameters()], "lr": 0.1, "weight_decay": 0.01}
    ]


def test_norms_and_biases_have_settings_of_their_own() -> None:
    net = make_net()
    groups = get_default_optimizer_params(
        net,
        base_lr=0.1,
        weight_decay=0.01,
        weight_decay_norm=0.002,
        bias_lr_factor=2.0,
        weight_decay_bias=0.0,
    )
    assert named_groups(net, groups) == [
        {"params": ["0.weight", "2.weight"], "lr": 0.1, "weight_decay": 0.01},
        {"params": ["0.bias", "1.bias", "2.bias"], "lr": 0.2, "weight_decay": 0.0},
        {"params": ["1.weight"], "lr": 0.1, "weight_decay": 0.002},
    ]


def test_a_bias_lr_factor_of_zero_counts() -> None:
    groups = get_default_optimizer_params(nn.Linear(1, 1), base_lr=0.1, bias_lr_factor=0.0)
    assert [group["lr"] for group in groups] == [0.1, 0.0]


@pytest.mark.parametrize("norm_class", NORM_MODULE_TYPES)
def test_every_norm_of_torch_is_one(norm_class: type[nn.Module]) -> None:
    norm: nn.Module
    if norm_class is nn.GroupNorm:
        norm = nn.GroupNorm(2, 4)
    elif "Instance" in norm_class.__name__:
        norm = norm_class(4, affine=True)
    else:
        norm = norm_class(4)
    groups = get_default_optimizer_params(norm, weight_decay=0.1, weight_decay_norm=0.3)
    assert [group["weight_decay"] for group in groups] == [0.3]


def test_shared_parameters_count_once_and_frozen_ones_not_at_all() -> None:
    net = make_net()
    tied = nn.Sequential(net, net[0])
    net[2].weight.requires_grad_(False)
    (group,) = get_default_optimizer_params(tied, base_lr=0.1)
    assert len(group["params"]) == len(set(group["params"])) == 5


def test_lr_factors_see_full_names() -> None:
    net = make_net()
    asked: list[str] = []

    def factor(name: str) -> float:
        asked.append(name)
        return 0.5 if name.startswith("0.") else 1.0

    groups = get_default_optimizer_params(net, base_lr=0.1, lr_factor_func=factor)
    assert asked == [name for name, _ in net.named_parameters()]
    assert [group["lr"] for group in groups] == [0.05, 0.1]
    get_default_optimizer_params(net[0], base_lr=0.1, lr_factor_func=factor)
    assert asked[-2:] == ["weight", "bias"]


def test_overrides_win_and_are_not_changed() -> None:
    overrides = {"weight": {"weight_decay": 0.5}}
    before = copy.deepcopy(overrides)
    groups = get_default_optimizer_params(
        make_net(), weight_decay=0.1, weight_decay_bias=0.2, overrides=overrides
    )
    assert overrides == before
    assert [group["weight_decay"] for group in groups] == [0.5, 0.2]


def test_setting_biases_in_two_ways_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"overrides set 'bias' to \{'lr': 1\}"):
        get_default_optimizer_params(
            make_net(), weight_decay_bias=0.0, overrides={"bias": {"lr": 1}}
        )


def test_factors_need_a_base_lr() -> None:
    with pytest.raises(ConfigError, match="give base_lr as well"):
        get_default_optimizer_params(make_net(), bias_lr_factor=2.0)
    with pytest.raises(ConfigError, match="give base_lr as well"):
        get_default_optimizer_params(make_net(), lr_factor_func=lambda name: 1.0)


def test_reducing_groups_keeps_names_beside_their_parameters() -> None:
    groups = [
        {"params": [1, 2], "param_names": ["a", "b"], "lr": 1.0},
        {"params": [3], "param_names": ["c"], "lr": 2.0},
        {"params": [4], "param_names": ["d"], "lr": 1.0},
    ]
    before = copy.deepcopy(groups)
    assert reduce_param_groups(groups) == [
        {"params": [1, 2, 4], "param_names": ["a", "b", "d"], "lr": 1.0},
        {"params": [3], "param_names": ["c"], "lr": 2.0},
    ]
    assert groups == before


@pytest.mark.parametrize(
    ("name", "settings"),
    [
        ("SGD", {"momentum": 0.9, "nesterov": True}),
        ("Adam", {"betas": (0.9, 0.95)}),
        ("AdamW", {"betas": (0.9, 0.95)}),
    ],
)
def test_optimizer_has_the_settings_of_the_config(
    cfg: CfgNode, name: str, settings: dict[str, Any]
) -> None:
    cfg.SOLVER.OPTIMIZER = name
    cfg.SOLVER.NESTEROV = True
    cfg.SOLVER.BETAS = (0.9, 0.95)
    optimizer = build_optimizer(cfg, make_net())
    assert type(optimizer).__name__ == name
    assert optimizer_implementation(optimizer) == "fused"
    assert [group["weight_decay"] for group in optimizer.param_groups] == [0.01, 0.0]
    for group in optimizer.param_groups:
        assert {**group, **settings, "lr": 0.1} == group


@pytest.mark.parametrize("name", ["SGD", "Adam", "AdamW"])
def test_fused_and_foreach_agree_after_three_steps(cfg: CfgNode, name: str) -> None:
    cfg.SOLVER.OPTIMIZER = name
    torch.manual_seed(0)
    fused_net = make_net()
    foreach_net = copy.deepcopy(fused_net)
    fused, foreach = build_optimizer(cfg, fused_net), build_optimizer(cfg, foreach_net)
    for group in foreach.param_groups:
        group.update(fused=False, foreach=True)
    assert optimizer_implementation(foreach) == "foreach"
    images = torch.randn(8, 3)
    for net, optimizer in ((fused_net, fused), (foreach_net, foreach)):
        for _ in range(3):
            optimizer.zero_grad()
            net(images).square().mean().backward()
            optimizer.step()
    torch.testing.assert_close(fused_net.state_dict(), foreach_net.state_dict())


def test_complex_parameters_are_updated_by_foreach(cfg: CfgNode) -> None:
    model = nn.ParameterList([nn.Parameter(torch.ones(2, dtype=torch.complex64))])
    optimizer = build_optimizer(cfg, model)
    assert optimizer_implementation(optimizer) == "foreach"
    model[0].abs().sum().backward()
    optimizer.step()
    assert model[0][0].real.item() < 1.0


def test_implementation_is_what_torch_does_by_default() -> None:
    parameter = nn.Parameter(torch.zeros(1))
    assert optimizer_implementation(torch.optim.SGD([parameter], lr=0.1)) == "for-loop"
    assert optimizer_implementation(torch.optim.LBFGS([parameter])) == "for-loop"


def test_unknown_optimizer_names_the_nearest(cfg: CfgNode) -> None:
    cfg.SOLVER.OPTIMIZER = "SDG"
    with pytest.raises(UnknownNameError, match=r"SOLVER\.OPTIMIZER 'SDG'\. Did you mean 'SGD'\?"):
        build_optimizer(cfg, make_net())


def test_a_model_without_trainable_parameters_is_refused(cfg: CfgNode) -> None:
    with pytest.raises(ConfigError, match="Sequential has no parameter that is trainable"):
        build_optimizer(cfg, make_net().requires_grad_(False))


def test_settings_that_torch_refuses_are_errors_of_the_config(cfg: CfgNode) -> None:
    cfg.SOLVER.NESTEROV, cfg.SOLVER.MOMENTUM = True, 0.0
    with pytest.raises(
        ConfigError, match=r"SOLVER does not make a SGD: Nesterov momentum requires"
    ):
        build_optimizer(cfg, make_net())


def lrs_of_config(cfg: CfgNode) -> list[float]:
    """The learning rate in each iteration; stepping past the last one must not fail."""
    scheduler = build_lr_scheduler(cfg, build_optimizer(cfg, make_net()))
    lrs = []
    for _ in range(cfg.SOLVER.MAX_ITER):
        lrs.append(float(scheduler.get_last_lr()[0]))
        scheduler.step()
    return lrs


def test_cosine_of_the_config_follows_its_formula(cfg: CfgNode) -> None:
    cfg.SOLVER.BASE_LR_END = 0.02
    lrs = lrs_of_config(cfg)
    cosine = [0.02 + 0.04 * (1 + math.cos(math.pi * i / 100)) for i in range(100)]
    assert lrs[10:] == pytest.approx(cosine[10:])
    assert lrs[0] == pytest.approx(0.001)
    assert lrs[5] == pytest.approx((0.001 + cosine[10]) / 2)


def test_multi_step_of_the_config_falls_at_its_steps(cfg: CfgNode) -> None:
    cfg.SOLVER.LR_SCHEDULER_NAME = "WarmupMultiStepLR"
    lrs = lrs_of_config(cfg)
    assert lrs[:10] == pytest.approx([0.001 + 0.0099 * i for i in range(10)])
    assert lrs[10:] == pytest.approx([0.1] * 40 + [0.01] * 30 + [0.001] * 20)


def test_steps_after_the_end_are_left_out_with_a_warning(
    cfg: CfgNode, caplog: pytest.LogCaptureFixture
) -> None:
    cfg.SOLVER.LR_SCHEDULER_NAME = "WarmupMultiStepLR"
    cfg.SOLVER.STEPS = (50, 100, 200)
    with caplog.at_level(logging.WARNING):
        assert lrs_of_config(cfg)[99] == pytest.approx(0.01)
    assert "SOLVER.STEPS [100, 200] are at or after SOLVER.MAX_ITER 100" in caplog.text


def test_fixed_gamma_of_the_config_survives_its_last_step(cfg: CfgNode) -> None:
    cfg.SOLVER.LR_SCHEDULER_NAME = "WarmupStepWithFixedGammaLR"
    cfg.SOLVER.WARMUP_ITERS = 0
    lrs = lrs_of_config(cfg)
    assert lrs == pytest.approx([0.1] * 25 + [0.01] * 25 + [0.001] * 25 + [0.0001] * 25)


def test_rescaled_interval_of_the_config_starts_at_the_base_lr(cfg: CfgNode) -> None:
    cfg.SOLVER.RESCALE_INTERVAL = True
    lrs = lrs_of_config(cfg)
    assert lrs[10] == pytest.approx(0.1)
    assert lrs[55] == pytest.approx(0.05)


def test_a_warmup_longer_than_the_run_is_refused(cfg: CfgNode) -> None:
    cfg.SOLVER.WARMUP_ITERS = 101
    message = (
        r"^SOLVER\.WARMUP_ITERS is 101 but SOLVER\.MAX_ITER is only 100, so training would end "
        r"inside the warmup\. Lower WARMUP_ITERS or raise MAX_ITER\.$"
    )
    with pytest.raises(ConfigError, match=message):
        lrs_of_config(cfg)


def test_unknown_scheduler_names_the_nearest(cfg: CfgNode) -> None:
    cfg.SOLVER.LR_SCHEDULER_NAME = "WarmupCosinLR"
    with pytest.raises(UnknownNameError, match="Did you mean 'WarmupCosineLR'"):
        lrs_of_config(cfg)


@pytest.mark.parametrize(
    ("scheduler", "key", "value", "message"),
    [
        ("WarmupCosineLR", "BASE_LR_END", 0.2, "BASE_LR_END is 0.2 and SOLVER.BASE_LR is 0.1"),
        ("WarmupMultiStepLR", "STEPS", (80, 50), r"STEPS\) are \(80, 50\)"),
        ("WarmupStepWithFixedGammaLR", "NUM_DECAYS", 0, "NUM_DECAYS is 0"),
        ("WarmupCosineLR", "MAX_ITER", 0, "MAX_ITER is 0, but a run has at least 1"),
    ],
)
def test_impossible_settings_are_named(
    cfg: CfgNode, scheduler: str, key: str, value: Any, message: str
) -> None:
    cfg.SOLVER.LR_SCHEDULER_NAME = scheduler
    cfg.SOLVER[key] = value
    with pytest.raises(ConfigError, match=message):
        build_lr_scheduler(cfg, build_optimizer(cfg, make_net()))
