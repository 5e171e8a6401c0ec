"""Learning rates: a schedule over progress in [0, 1), a warmup before it, and who applies both.

The schedules themselves are fvcore's `ParamScheduler`s. They give a multiplier, not a learning
rate, so that groups of parameters may have different base learning rates.
"""

import logging
from bisect import bisect_left
from collections.abc import Sequence
from typing import Any

import torch
from fvcore.common.param_scheduler import (
    CompositeParamScheduler,
    ConstantParamScheduler,
    CosineParamScheduler,
    LinearParamScheduler,
    MultiStepParamScheduler,
    ParamScheduler,
)
from torch.optim.lr_scheduler import LRScheduler

from trainkit.utils.errors import CheckpointError, ConfigError, UnknownNameError

logger = logging.getLogger(__name__)

# fvcore's schedules look this far ahead, so they are to be called with less than 1 minus it.
_LAST_WHERE = 1 - 2 * ParamScheduler.WHERE_EPSILON


class WarmupParamScheduler(CompositeParamScheduler):
    """Prepends a warmup stage to another schedule.

    Linear warmup follows Goyal et al., "Accurate, Large Minibatch SGD" (arXiv:1706.02677), sec.
    2.2. It ends at the value with which the other schedule goes on.

    Args:
        scheduler: Schedule over progress in [0, 1) that runs after the warmup.
        warmup_factor: Initial multiplier relative to `scheduler(0.0)`; unitless.
        warmup_length: Part of the whole run spent warming up, in [0, 1].
        warmup_method: "linear" rises evenly; "constant" stays at the initial value.
        rescale_interval: Whether all of `scheduler` is squeezed into what the warmup leaves; if
            not, its beginning is hidden by the warmup.

    Raises:
        ConfigError: If `warmup_length` is outside [0, 1].
        UnknownNameError: If `warmup_method` is unknown.

    Example:
        >>> schedule = WarmupParamScheduler(ConstantParamScheduler(1.0), 0.1, warmup_length=0.5)
        >>> [round(schedule(where), 3) for where in (0.0, 0.25, 0.5, 0.99)]
        [0.1, 0.55, 1.0, 1.0]
    """

    def __init__(
        self,
        scheduler: ParamScheduler,
        warmup_factor: float,
        warmup_length: float,
        warmup_method: str = "linear",
        rescale_interval: bool = False,
    ) -> None:
        if not 0 <= warmup_length <= 1:
            raise ConfigError(
                f"warmup_length is {warmup_length}, but is a part of the whole run, in [0, 1]. For "
                "a warmup of so many iterations, divide them by max_iter."
            )
        # A run that is all warmup leaves nothing to squeeze the schedule into.
        rescale_interval = rescale_interval and warmup_length < 1
        start = warmup_factor * scheduler(0.0)
        end = scheduler(0.0 if rescale_interval else min(warmup_length, _LAST_WHERE))
        stages = {
            "constant": ConstantParamScheduler(start),
            "linear": LinearParamScheduler(start, end),
        }
        if warmup_method not in stages:
            raise UnknownNameError("warmup method", warmup_method, stages)
        super().__init__(
            schedulers=[stages[warmup_method], scheduler],
            lengths=[warmup_length, 1 - warmup_length],
            interval_scaling=["rescaled", "rescaled" if rescale_interval else "fixed"],
        )


class LRMultiplier(LRScheduler):
    """Gives every parameter group its base learning rate times a schedule's multiplier.

    Created with an optimizer, it sets the learning rates of iteration 0; `step`, called after each
    iteration, sets those of the next one. After the last iteration they stay as they were in it.

    Args:
        optimizer: Its groups' learning rates are the base learning rates, as they were when it got
            its first scheduler.
        multiplier: Multiplier over progress, `iteration / max_iter`, in [0, 1).
        max_iter: Number of iterations of the whole run, at least 1.
        last_iter: The 0-based iteration that was done last; -1 before the first.

    Raises:
        ConfigError: If `max_iter` is below 1.
    """

    def __init__(
        self,
        optimizer: torch.optim.Optimizer,
        multiplier: ParamScheduler,
        max_iter: int,
        last_iter: int = -1,
    ) -> None:
        if max_iter < 1:
            raise ConfigError(f"max_iter is {max_iter}, but a schedule needs at least 1 iteration.")
        self._multiplier = multiplier
        self._max_iter = max_iter
        self._max_where = min((max_iter - 1) / max_iter, _LAST_WHERE)
        super().__init__(optimizer, last_epoch=last_iter)

    def step(self, epoch: int | None = None) -> None:
        """Sets the learning rates of the next iteration.

        Args:
            epoch: Go to this 0-based iteration instead; for tests and plots.
        """
        # torch's own step rebuilds lists and warns about orders that a resumed run needs.
        self.last_epoch = self.last_epoch + 1 if epoch is None else epoch
        self._apply()

    def get_lr(self) -> list[float | torch.Tensor]:
        """Returns each group's learning rate for the current iteration."""
        factor = self._multiplier(min(self.last_epoch / self._max_iter, self._max_where))
        return [base_lr * factor for base_lr in self.base_lrs]

    def get_last_lr(self) -> list[float | torch.Tensor]:
        """Returns each group's learning rate as it is set in the optimizer."""
        return [group["lr"] for group in self.optimizer.param_groups]

    def state_dict(self) -> dict[str, Any]:
        """Returns the base learning rates and the iteration, not the schedule."""
        return {"base_lrs": list(self.base_lrs), "last_epoch": self.last_epoch}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restores what `state_dict` returned, and sets the learning rates accordingly.

        Raises:
            CheckpointError: If the state is of an optimizer with another number of groups.
        """
        base_lrs = list(state_dict["base_lrs"])
        if len(base_lrs) != len(self.optimizer.param_groups):
            raise CheckpointError(
                f"The scheduler's state has {len(base_lrs)} base learning rates but the optimizer "
                f"has {len(self.optimizer.param_groups)} parameter groups. Resume with the SOLVER "
                "settings that the checkpoint was made with, or load only the model from it."
            )
        if base_lrs != self.base_lrs:
            logger.warning(
                "The learning rates (SOLVER.BASE_LR) are %s, but the run goes on with those of the "
                "checkpoint, %s. To change them, start from its weights by MODEL.WEIGHTS.",
                self.base_lrs,
                base_lrs,
            )
        self.base_lrs = base_lrs
        self.last_epoch = state_dict["last_epoch"]
        self._apply()

    def _apply(self) -> None:
        for group, lr in zip(self.optimizer.param_groups, self.get_lr(), strict=True):
            if isinstance(group["lr"], torch.Tensor):
                # A compiled or captured optimizer step reads this very tensor.
                group["lr"].fill_(lr)
            else:
                group["lr"] = lr


class WarmupMultiStepLR(LRMultiplier):
    """Multiplies the learning rate by `gamma` at each milestone, after a warmup.

    Args:
        optimizer: As of `LRMultiplier`.
        milestones: 0-based iterations, rising.
        gamma: Factor at each milestone.
        warmup_factor: Multiplier at iteration 0.
        warmup_iters: Number of iterations of warmup.
        warmup_method: "linear" or "constant".
        last_epoch: The 0-based iteration that was done last; -1 before the first.

    Raises:
        ConfigError: If the milestones do not rise.
    """

    def __init__(
        self,
        optimizer: torch.optim.Optimizer,
        milestones: Sequence[int],
        gamma: float = 0.1,
        warmup_factor: float = 0.001,
        warmup_iters: int = 1000,
        warmup_method: str = "linear",
        last_epoch: int = -1,
    ) -> None:
        # Nothing changes any more after the last of them, and LRMultiplier stays at its last value.
        max_iter = max(*milestones, warmup_iters, 0) + 1
        schedule = WarmupParamScheduler(
            multi_step_schedule(milestones, gamma, max_iter),
            warmup_factor,
            warmup_iters / max_iter,
            warmup_method,
        )
        super().__init__(optimizer, schedule, max_iter, last_epoch)


class WarmupCosineLR(LRMultiplier):
    """Lowers the learning rate to 0 along half a cosine, after a warmup.

    The cosine is Loshchilov and Hutter, "SGDR" (arXiv:1608.03983), eq. 5, without restarts.

    Args:
        max_iters: Number of iterations of the whole run, at least `warmup_iters`.
        optimizer, warmup_factor, warmup_iters, warmup_method, last_epoch: See above.
    """

    def __init__(
        self,
        optimizer: torch.optim.Optimizer,
        max_iters: int,
        warmup_factor: float = 0.001,
        warmup_iters: int = 1000,
        warmup_method: str = "linear",
        last_epoch: int = -1,
    ) -> None:
        schedule = WarmupParamScheduler(
            CosineParamScheduler(1.0, 0.0), warmup_factor, warmup_iters / max_iters, warmup_method
        )
        super().__init__(optimizer, schedule, max_iters, last_epoch)


def multi_step_schedule(
    milestones: Sequence[int], gamma: float, max_iter: int
) -> MultiStepParamScheduler:
    """Returns the multiplier `gamma ** (number of milestones reached)` of a run of `max_iter`.

    Args:
        milestones: 0-based iterations, rising; those at or after `max_iter` have no effect.
        gamma: Factor at each milestone.
        max_iter: Number of iterations of the whole run.

    Raises:
        ConfigError: If the milestones do not rise, or do not start above 0.
    """
    steps = list(milestones)
    if any(after <= before for before, after in zip([0, *steps], steps, strict=False)):
        raise ConfigError(
            f"The milestones (SOLVER.STEPS) are {tuple(steps)}, but have to be above 0 and rise "
            "from one to the next. Sort them and leave out what stands there twice."
        )
    steps = steps[: bisect_left(steps, max_iter)]
    values = [gamma**count for count in range(len(steps) + 1)]
    return MultiStepParamScheduler(values, num_updates=max_iter, milestones=steps)
