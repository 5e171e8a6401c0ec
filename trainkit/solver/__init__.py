"""Optimizers, learning rate schedules and gradient clipping, from a config or by hand."""

from trainkit.solver.build import (
    build_lr_scheduler,
    build_optimizer,
    get_default_optimizer_params,
    optimizer_implementation,
    reduce_param_groups,
)
from trainkit.solver.clip import (
    GradientClipper,
    build_grad_clipper,
    maybe_add_gradient_clipping,
    total_grad_norm,
)
from trainkit.solver.layer_decay import layer_decay_func
from trainkit.solver.lr_scheduler import (
    LRMultiplier,
    WarmupCosineLR,
    WarmupMultiStepLR,
    WarmupParamScheduler,
)

__all__ = [
    "GradientClipper",
    "LRMultiplier",
    "WarmupCosineLR",
    "WarmupMultiStepLR",
    "WarmupParamScheduler",
    "build_grad_clipper",
    "build_lr_scheduler",
    "build_optimizer",
    "get_default_optimizer_params",
    "layer_decay_func",
    "maybe_add_gradient_clipping",
    "optimizer_implementation",
    "reduce_param_groups",
    "total_grad_norm",
]
