"""fp16's gradient scaler: keeps small gradients from vanishing, and leaves out what overflows."""

import torch
from torch.amp.grad_scaler import GradScaler

from trainkit.engine.non_finite import NonFiniteError
from trainkit.utils.errors import ConfigError

MIN_SCALE = 2.0**-14
"""Below this scale, gradients overflow whatever it is: the model itself does, or diverges."""


def build_grad_scaler(
    precision: str, optimizer: torch.optim.Optimizer | None, non_finite: str = "raise"
) -> GradScaler:
    """Returns the scaler of a precision: torch's for "fp16", else one that does nothing.

    The scale is raised as long as gradients stay finite, and lowered when they do not, whose update
    is left out (Micikevicius et al., "Mixed Precision Training", arXiv:1710.03740, sec. 3.2).

    Raises:
        ConfigError: If it scales, and bad steps are to be rolled back.
    """
    if optimizer is None or precision != "fp16":
        return GradScaler("cpu", enabled=False)
    if non_finite == "rollback":
        raise ConfigError(
            "SOLVER.NON_FINITE is 'rollback' and SOLVER.PRECISION 'fp16', whose gradients overflow "
            "now and then as a matter of course. Choose 'skip' or 'raise', or train in bf16."
        )
    if isinstance(optimizer, torch.optim.SGD):
        # A fused SGD leaves the momentum of a first step that overflows uninitialized (torch 2.13).
        # So the scaler looks itself, and waits for an accelerator, instead of telling the kernel.
        optimizer._step_supports_amp_scaling = False
    return GradScaler(optimizer.param_groups[0]["params"][0].device.type)


def check_scale(scaler: GradScaler, iteration: int) -> None:
    """Ends a run whose every step overflows; waits for an accelerator.

    Raises:
        NonFiniteError: On all ranks, which have one scale.
    """
    if scaler.is_enabled() and scaler.get_scale() < MIN_SCALE:
        raise NonFiniteError(
            f"The gradients up to iteration {iteration} overflowed in fp16 again and again: their "
            f"scale fell to {scaler.get_scale():g}. Train in bf16 (SOLVER.PRECISION), lower the "
            "learning rate (SOLVER.BASE_LR), or check the data.",
            iteration,
        )
