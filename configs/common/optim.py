"""Optimizers; the script that trains fills in `params.model`."""

import torch

from trainkit.config import LazyCall as L
from trainkit.solver import get_default_optimizer_params

# Kernels that update all parameters at once, on the CPU too.
SGD = L(torch.optim.SGD)(
    params=L(get_default_optimizer_params)(weight_decay_norm=0.0),
    lr=0.1,
    momentum=0.9,
    nesterov=False,
    weight_decay=1e-4,
    fused=True,
)

AdamW = L(torch.optim.AdamW)(
    params=L(get_default_optimizer_params)(
        base_lr="${..lr}", weight_decay="${..weight_decay}", weight_decay_norm=0.0
    ),
    lr=1e-3,
    betas=(0.9, 0.999),
    weight_decay=0.05,
    fused=True,
)
