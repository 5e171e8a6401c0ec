"""`LRScheduler`: steps the schedule of the learning rate after each iteration."""

from collections import Counter
from typing import Any

import torch
from fvcore.common.param_scheduler import ParamScheduler

from trainkit.engine.hook_base import HookBase
from trainkit.solver.lr_scheduler import LRMultiplier


class LRScheduler(HookBase):
    """Puts the learning rate of the step just made as `lr`, then sets the next one.

    Runs before the checkpointer, so that a checkpoint holds the rate of the next step.

    Args:
        optimizer: The trainer's optimizer by default.
        scheduler: A torch scheduler, or an fvcore `ParamScheduler` of multipliers of each group's
            rate over the whole run; the trainer's `scheduler` by default.
    """

    def __init__(
        self,
        optimizer: torch.optim.Optimizer | None = None,
        scheduler: torch.optim.lr_scheduler.LRScheduler | ParamScheduler | None = None,
    ) -> None:
        self._optimizer = optimizer
        self._given = scheduler
        # Of a ParamScheduler, made anew for each run.
        self._multiplier: LRMultiplier | None = None
        self._loaded: dict[str, Any] = {}
        self._group = 0

    @property
    def scheduler(self) -> Any:
        """The torch scheduler that is stepped; a ParamScheduler becomes one when a run begins."""
        if self._multiplier is not None:
            return self._multiplier
        return self.trainer.scheduler if self._given is None else self._given

    def before_train(self) -> None:
        """Finds optimizer and scheduler, and the parameter group whose rate is put."""
        trainer = self.trainer
        self._optimizer = self._optimizer or trainer.optimizer
        self._multiplier = None
        if isinstance(self.scheduler, ParamScheduler):
            self._multiplier = LRMultiplier(
                self._optimizer, self.scheduler, trainer.max_iter, last_iter=trainer.iter - 1
            )
        if self._loaded:
            self.scheduler.load_state_dict(self._loaded)
            self._loaded = {}
        elif trainer.iter == 0 and isinstance(self.scheduler, LRMultiplier):
            # The trainer may have trained before.
            self.scheduler.step(epoch=0)
        self._group = _most_telling_group(self._optimizer)

    def after_step(self) -> None:
        """Puts the rate and steps the scheduler."""
        assert self._optimizer is not None
        lr = self._optimizer.param_groups[self._group]["lr"]
        self.trainer.storage.put_scalar("lr", lr, smoothing_hint=False)
        self.scheduler.step()

    def state_dict(self) -> dict[str, Any]:
        """Returns the scheduler's state."""
        if isinstance(self.scheduler, ParamScheduler):
            return self._loaded
        state: dict[str, Any] = self.scheduler.state_dict()
        return state

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restores the scheduler, or has it restored once it exists."""
        if isinstance(self.scheduler, ParamScheduler):
            self._loaded = state
        else:
            self.scheduler.load_state_dict(state)


def _most_telling_group(optimizer: torch.optim.Optimizer) -> int:
    """Returns the index of the largest group, or of one with the most common rate if all have 1."""
    sizes = [len(group["params"]) for group in optimizer.param_groups]
    if max(sizes) > 1:
        return sizes.index(max(sizes))
    rates = [float(group["lr"]) for group in optimizer.param_groups]
    return rates.index(Counter(rates).most_common(1)[0][0])
