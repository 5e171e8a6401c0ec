import copy
import logging
import math
import re
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.optim.lr_scheduler import ReduceLROnPlateau

import trainkit.config.defaults
from trainkit.config.config import CfgNode
from trainkit.config.defaults import get_cfg
from trainkit.solver.build import (
    _SCHEDULES,
    build_lr_scheduler,
    build_optimizer,
    check_same_kind,
    get_default_optimizer_params,
    optimizer_implementation,
    reduce_param_groups,
)
from trainkit.utils.errors import CheckpointError, ConfigError, UnknownNameError


class Lion(torch.optim.Optimizer):
    """Moves by the sign of an average of gradients (Chen et al., arXiv:2302.06675, alg. 2)."""

    def __init__(
        self,
        params: Iterable[Any],
        lr: float = 1e-4,
        betas: tuple[float, float] = (0.9, 0.99),
        weight_decay: float = 0.0,
    ) -> None:
        super().__init__(params, {"lr": lr, "betas": betas, "weight_decay": weight_decay})

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> None:  # type: ignore[override]
        for group in self.param_groups:
            for p in group["params"]:
                average = self.state[p].setdefault("exp_avg", torch.zeros_like(p))
                p.mul_(1 - group["lr"] * group["weight_decay"])
                p.sub_(group["lr"] * average.lerp(p.grad, 1 - group["betas"][0]).sign())
                average.lerp_(p.grad, 1 - group["betas"][1])


class Anything(torch.optim.SGD):
    def __init__(self, params: Iterable[Any], **kwargs: Any) -> None:
        super().__init__(params, **kwargs)


def make_net() -> nn.Sequential:
    return nn.Sequential(nn.Linear(3, 4), nn.LayerNorm(4), nn.Linear(4, 2))


def named_groups(model: nn.Module, groups: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The groups with names in place of parameters, and not beside them."""
    names = {p: name for name, p in model.named_parameters()}
    named = [{**group, "params": [names[p] for p in group["params"]]} for group in groups]
    assert all(group.pop("param_names") == group["params"] for group in named)
    return named


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


# Local response normalization has no parameters.
NORMS = [v for name, v in vars(nn).items() if re.search(r"^(?!Lazy|Local).*Norm(\dd)?$", name)]


@pytest.mark.parametrize("norm_class", NORMS)
def test_d41_every_norm_of_torch_is_one(norm_class: type[nn.Module]) -> None:
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


def test_factors_of_layers_and_biases_multiply() -> None:
    groups = get_default_optimizer_params(
        nn.Linear(1, 1), base_lr=0.5, bias_lr_factor=2.0, lr_factor_func=lambda name: 0.25
    )
    assert [group["lr"] for group in groups] == [0.125, 0.25]


def test_overrides_of_an_unknown_parameter_name_the_nearest() -> None:
    with pytest.raises(UnknownNameError, match=r"\(overrides\) 'wieght'\. Did you mean 'weight'\?"):
        get_default_optimizer_params(make_net(), overrides={"wieght": {"lr": 1.0}})
    frozen = make_net().requires_grad_(False)
    assert get_default_optimizer_params(frozen, overrides={"weight": {"lr": 1.0}}) == []


def test_d41_overrides_win_and_are_not_changed() -> None:
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


@pytest.mark.parametrize("name", ["NAdam", "torch.optim.NAdam"])
def test_d41_any_optimizer_of_torch_is_built_with_its_arguments(cfg: CfgNode, name: str) -> None:
    cfg.merge_from_list(["SOLVER.OPTIMIZER", name, "SOLVER.OPTIMIZER_ARGS.eps", "1e-6"])
    cfg.merge_from_list(["SOLVER.OPTIMIZER_ARGS.betas", "(0.8, 0.95)"])
    optimizer = build_optimizer(cfg, make_net())
    assert type(optimizer) is torch.optim.NAdam
    assert [group["weight_decay"] for group in optimizer.param_groups] == [0.01, 0.0]
    for group in optimizer.param_groups:
        assert (group["lr"], group["eps"], group["betas"]) == (0.1, 1e-6, (0.8, 0.95))


def test_an_optimizer_of_another_package_is_built_by_its_name(cfg: CfgNode, tmp_path: Path) -> None:
    path = tmp_path / "lion.yaml"
    text = f"SOLVER: {{OPTIMIZER: {__name__}.Lion, OPTIMIZER_ARGS: {{betas: [0.5, 0.75]}}}}"
    path.write_text(text, encoding="utf-8")
    cfg.merge_from_file(str(path))
    net = make_net()
    optimizer = build_optimizer(cfg, net)
    assert type(optimizer) is Lion
    assert optimizer.param_groups[0]["betas"] == [0.5, 0.75]
    bias = net.get_parameter("2.bias")
    before = bias.detach().clone()
    net(torch.ones(1, 3)).sum().backward()
    optimizer.step()
    # A gradient of 1, and weight decay before.
    torch.testing.assert_close(bias.detach(), before * (1 - 0.1 * 0.01) - 0.1)


def test_arguments_may_choose_another_implementation(cfg: CfgNode) -> None:
    cfg.SOLVER.OPTIMIZER_ARGS.foreach = True
    cfg.SOLVER.OPTIMIZER_ARGS.momentum = 0.5
    optimizer = build_optimizer(cfg, make_net())
    assert optimizer_implementation(optimizer) == "foreach"
    assert optimizer.param_groups[0]["momentum"] == 0.5


def test_an_argument_that_the_optimizer_does_not_take_is_named(cfg: CfgNode) -> None:
    cfg.SOLVER.OPTIMIZER = "torch.optim.NAdam"
    cfg.SOLVER.OPTIMIZER_ARGS.momentum_dekay = 0.1
    message = (
        r"^Unknown argument \(SOLVER\.OPTIMIZER_ARGS\) of torch\.optim\.NAdam 'momentum_dekay'\. "
        r"Did you mean 'momentum_decay'\? Known: betas, .*maximize, momentum_decay\.$"
    )
    with pytest.raises(UnknownNameError, match=message):
        build_optimizer(cfg, make_net())


def test_an_optimizer_that_takes_any_argument_may_refuse_it(cfg: CfgNode) -> None:
    cfg.SOLVER.OPTIMIZER = f"{__name__}.Anything"
    cfg.SOLVER.OPTIMIZER_ARGS.momentum = 0.5
    assert build_optimizer(cfg, make_net()).param_groups[0]["momentum"] == 0.5
    cfg.SOLVER.OPTIMIZER_ARGS.mometum = 0.5
    with pytest.raises(ConfigError, match=r"SOLVER does not make a .*Anything: .*'mometum'"):
        build_optimizer(cfg, make_net())


def test_weight_decay_that_the_optimizer_does_not_have_is_refused(cfg: CfgNode) -> None:
    cfg.SOLVER.OPTIMIZER = "Rprop"
    with pytest.raises(ConfigError, match=r"WEIGHT_DECAY is 0\.01, but Rprop has no weight decay"):
        build_optimizer(cfg, make_net())
    cfg.SOLVER.WEIGHT_DECAY = 0.0
    assert type(build_optimizer(cfg, make_net())) is torch.optim.Rprop


@pytest.mark.parametrize(
    ("saved", "setting"), [("SGD", "momentum"), ("Adam", "amsgrad"), ("RMSprop", "momentum")]
)
def test_the_state_of_another_optimizer_is_refused(cfg: CfgNode, saved: str, setting: str) -> None:
    cfg.SOLVER.OPTIMIZER = saved
    state = build_optimizer(cfg, make_net()).state_dict()
    cfg.SOLVER.OPTIMIZER = "NAdam"
    with pytest.raises(
        CheckpointError, match=r"is not a NAdam: only one of the two has '" + setting
    ):
        check_same_kind(build_optimizer(cfg, make_net()), state)


def test_the_state_of_an_optimizer_of_another_version_of_torch_is_taken(cfg: CfgNode) -> None:
    optimizer = build_optimizer(cfg, make_net())
    state = optimizer.state_dict()
    for group in state["param_groups"]:
        del group["differentiable"], group["param_names"]
    check_same_kind(optimizer, state)
    for group in state["param_groups"]:
        group.update(differentiable=False, new_setting=1)
    check_same_kind(optimizer, state)


def test_unknown_optimizer_names_the_nearest(cfg: CfgNode) -> None:
    cfg.SOLVER.OPTIMIZER = "SDG"
    with pytest.raises(UnknownNameError, match=r"SOLVER\.OPTIMIZER 'SDG'\. Did you mean 'SGD'\?"):
        build_optimizer(cfg, make_net())
    cfg.SOLVER.OPTIMIZER = "torch.optim.NAdan"
    with pytest.raises(ConfigError, match=r"Did you mean 'torch\.optim\.NAdam'\?"):
        build_optimizer(cfg, make_net())


@pytest.mark.parametrize(
    "name", ["torch.nn.Linear", "os.system", "torch.optim.Optimizer", "math.pi"]
)
def test_what_is_no_optimizer_is_never_called(cfg: CfgNode, name: str) -> None:
    cfg.SOLVER.OPTIMIZER = name
    with pytest.raises(
        ConfigError, match=rf"'{name}', which is .* a subclass of torch\.optim\.Opt"
    ):
        build_optimizer(cfg, make_net())


def test_layer_decay_multiplies_with_a_function_of_your_own(cfg: CfgNode) -> None:
    cfg.SOLVER.LAYER_DECAY = 0.5
    net = make_net()
    optimizer = build_optimizer(cfg, net, lambda name: 4.0 if name == "2.weight" else 1.0)
    rates = {name: g["lr"] for g in optimizer.param_groups for name in g["param_names"]}
    assert rates == {
        "0.weight": 0.05,
        "0.bias": 0.05,
        "1.weight": 0.05,
        "1.bias": 0.05,
        "2.weight": 0.4,
        "2.bias": 0.1,
    }


def test_a_model_without_trainable_parameters_is_refused(cfg: CfgNode) -> None:
    with pytest.raises(ConfigError, match="Sequential has no parameter that is trainable"):
        build_optimizer(cfg, make_net().requires_grad_(False))


def test_settings_that_torch_refuses_are_errors_of_the_config(cfg: CfgNode) -> None:
    cfg.SOLVER.NESTEROV, cfg.SOLVER.MOMENTUM = True, 0.0
    with pytest.raises(
        ConfigError, match=r"SOLVER does not make a SGD: Nesterov momentum requires"
    ):
        build_optimizer(cfg, make_net())


def _comment_of(key: str) -> str:
    """What the defaults say about a key."""
    source = Path(trainkit.config.defaults.__file__).read_text(encoding="utf-8")
    return source.partition(f".{key} =")[0].rpartition(" = ")[2]


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


@pytest.mark.parametrize("warmup_iters", [0, 10])
@pytest.mark.parametrize("name", _SCHEDULES)
def test_d24_every_schedule_survives_its_last_step(
    cfg: CfgNode, name: str, warmup_iters: int
) -> None:
    cfg.SOLVER.LR_SCHEDULER_NAME = name
    cfg.SOLVER.BASE_LR_END = 0.01
    cfg.SOLVER.WARMUP_ITERS = warmup_iters
    lrs = lrs_of_config(cfg)
    assert all(0 < lr <= 0.1 for lr in lrs)


@pytest.mark.parametrize("name", [*_SCHEDULES, "ReduceLROnPlateau"])
def test_d40_the_default_config_has_every_key_of_every_schedule(name: str) -> None:
    cfg = get_cfg()
    assert name in _comment_of("LR_SCHEDULER_NAME")
    cfg.SOLVER.merge_from_list(["LR_SCHEDULER_NAME", name, "BASE_LR_END", 0.01])
    cfg.SOLVER.merge_from_list(["WARMUP_ITERS", 0, "PLATEAU.METRIC", "classification/top1"])
    build_lr_scheduler(cfg, build_optimizer(cfg, make_net()))


def test_d24_fixed_gamma_of_the_config_falls_evenly(cfg: CfgNode) -> None:
    cfg.SOLVER.LR_SCHEDULER_NAME = "WarmupStepWithFixedGammaLR"
    cfg.SOLVER.WARMUP_ITERS = 0
    lrs = lrs_of_config(cfg)
    assert lrs == pytest.approx([0.1] * 25 + [0.01] * 25 + [0.001] * 25 + [0.0001] * 25)


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("WarmupConstantLR", lambda where: 0.1),
        ("WarmupLinearLR", lambda where: 0.1 * (1 - where) + 0.02 * where),
        ("WarmupExponentialLR", lambda where: 0.1 * 0.2**where),
        ("WarmupPolyLR", lambda where: 0.1 * (1 - where) ** 0.9),
    ],
)
def test_schedule_of_the_config_follows_its_formula(
    cfg: CfgNode, name: str, expected: Callable[[float], float]
) -> None:
    cfg.SOLVER.LR_SCHEDULER_NAME = name
    cfg.SOLVER.BASE_LR_END = 0.02
    lrs = lrs_of_config(cfg)
    assert lrs[10:] == pytest.approx([expected(i / 100) for i in range(10, 100)])
    assert lrs[0] == pytest.approx(0.001)


def test_a_plateau_of_the_metric_lowers_the_rate(cfg: CfgNode) -> None:
    cfg.SOLVER.merge_from_list(["LR_SCHEDULER_NAME", "ReduceLROnPlateau", "WARMUP_ITERS", 0])
    cfg.SOLVER.PLATEAU.merge_from_list(["METRIC", "classification/top1", "PATIENCE", 1])
    cfg.SOLVER.PLATEAU.FACTOR = 0.5
    scheduler = build_lr_scheduler(cfg, build_optimizer(cfg, make_net()))
    assert isinstance(scheduler, ReduceLROnPlateau)
    rates = []
    for accuracy in (0.5, 0.6, 0.6, 0.6, 0.7):
        scheduler.step(accuracy)
        rates.append(scheduler.get_last_lr()[0])
    assert rates == [0.1, 0.1, 0.1, 0.05, 0.05]


@pytest.mark.parametrize(("warmup_iters", "metric"), [(10, "classification/top1"), (0, "")])
def test_a_plateau_has_no_warmup_and_needs_a_metric(
    cfg: CfgNode, warmup_iters: int, metric: str
) -> None:
    cfg.SOLVER.merge_from_list(["LR_SCHEDULER_NAME", "ReduceLROnPlateau"])
    cfg.SOLVER.merge_from_list(["WARMUP_ITERS", warmup_iters, "PLATEAU.METRIC", metric])
    message = (
        rf"WARMUP_ITERS is {warmup_iters} and SOLVER\.PLATEAU\.METRIC is '{metric}', but Reduce"
    )
    with pytest.raises(ConfigError, match=message):
        build_lr_scheduler(cfg, build_optimizer(cfg, make_net()))


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
        ("WarmupLinearLR", "BASE_LR_END", 0.2, "but WarmupLinearLR falls"),
        ("WarmupExponentialLR", "BASE_LR_END", 0.0, "for an exponential above 0"),
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
