"""`LRScheduler`: steps the schedule of the learning rate after each iteration."""

import logging
from collections import Counter
from typing import Any

import torch
from fvcore.common.param_scheduler import ParamScheduler
from torch.optim.lr_scheduler import ReduceLROnPlateau

from trainkit.engine.hook_base import HookBase
from trainkit.solver.lr_scheduler import LRMultiplier
from trainkit.utils import comm
from trainkit.utils.errors import CheckpointError, ConfigError
from trainkit.utils.period import is_due

logger = logging.getLogger(__name__)


class LRScheduler(HookBase):
    """Puts the learning rate of the step just made as `lr`, then sets the next one.

    Whenever ranks bring metrics together (`gather_metric_period`), groups that differ have their
    rates put as `lr/group0`, …, and a `ReduceLROnPlateau` is told each new value that rank 0 has of
    its metric, the same on every rank.

    Runs before the checkpointer, so that a checkpoint holds the rate of the next step.

    Args:
        optimizer: The trainer's optimizer by default.
        scheduler: A torch scheduler, or an fvcore `ParamScheduler` of multipliers of each group's
            rate over the whole run; the trainer's `scheduler` by default.
        metric: Name in the storage of what a `ReduceLROnPlateau` watches, such as
            "classification/top1"; for no other scheduler.
    """

    def __init__(
        self,
        optimizer: torch.optim.Optimizer | None = None,
        scheduler: torch.optim.lr_scheduler.LRScheduler | ParamScheduler | None = None,
        metric: str = "",
    ) -> None:
        self._optimizer = optimizer
        self._given = scheduler
        self._metric = metric
        self._metric_iter = -1
        # Ranks are told the metric's values.
        self.is_collective = bool(metric)
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
        """Finds optimizer and scheduler, and the parameter group whose rate is put.

        Raises:
            ConfigError: If a `ReduceLROnPlateau` has no metric, or another scheduler has one.
        """
        trainer = self.trainer
        self._optimizer = self._optimizer or trainer.optimizer
        self._multiplier = None
        if isinstance(self.scheduler, ReduceLROnPlateau) != bool(self._metric):
            raise ConfigError(
                f"The scheduler is a {type(self.scheduler).__name__} and the metric that it is to "
                f"watch (SOLVER.PLATEAU.METRIC) {self._metric!r}. A ReduceLROnPlateau needs one, "
                "and no other scheduler takes one."
            )
        self._metric_iter = min(self._metric_iter, trainer.start_iter - 1)
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
        self._group = self.get_best_param_group_id(self._optimizer)

    def before_step(self) -> None:
        """Tells a `ReduceLROnPlateau` the new values of its metric, if ranks agreed on metrics."""
        # Not after the step: evaluation comes behind this hook.
        if self._metric and self._is_agreed(self.trainer.iter - 1):
            history = self.trainer.storage.histories().get(self._metric)
            values = history.after(self._metric_iter)[::-1] if history else []
            for value, self._metric_iter in comm.broadcast(values):
                self.scheduler.step(value)

    def after_step(self) -> None:
        """Puts the rate and steps the scheduler."""
        assert self._optimizer is not None
        trainer, groups = self.trainer, self._optimizer.param_groups
        trainer.storage.put_scalar("lr", groups[self._group]["lr"], smoothing_hint=False)
        if len(groups) > 1 and self._is_agreed(trainer.iter):
            rates = {f"lr/group{i}": float(group["lr"]) for i, group in enumerate(groups)}
            if len(set(rates.values())) > 1:
                trainer.storage.put_scalars(smoothing_hint=False, **rates)
        if not self._metric:
            self.scheduler.step()

    def after_train(self) -> None:
        """Says that a run ended without the metric by which the rate was to change."""
        trainer = self.trainer
        if self._metric and self._metric_iter < 0 and trainer.iter == trainer.max_iter:
            text = "%s was not put before the last step, so the learning rate stayed. There are: %s"
            logger.warning(text, self._metric, ", ".join(sorted(trainer.storage.histories())))

    @staticmethod
    def get_best_param_group_id(optimizer: torch.optim.Optimizer) -> int:
        """Returns the index of the largest group, or of one with the most common rate."""
        sizes = [len(group["params"]) for group in optimizer.param_groups]
        if max(sizes) > 1:
            return sizes.index(max(sizes))
        rates = [float(group["lr"]) for group in optimizer.param_groups]
        return rates.index(Counter(rates).most_common(1)[0][0])

    def state_dict(self) -> dict[str, Any]:
        """Returns the scheduler's state, and how far its metric was read."""
        if isinstance(self.scheduler, ParamScheduler):
            return self._loaded
        of_metric = {"metric_iter": self._metric_iter} if self._metric else {}
        return {**self.scheduler.state_dict(), **of_metric}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restores the scheduler, or has it restored once it exists."""
        if isinstance(self.scheduler, ParamScheduler):
            self._loaded = state
            return
        state = dict(state)
        self._metric_iter = state.pop("metric_iter", -1)
        if isinstance(self.scheduler, LRMultiplier) != ("base_lrs" in state and len(state) == 2):
            raise CheckpointError(
                f"The checkpoint's schedule is not a {type(self.scheduler).__name__}. Resume with "
                "the SOLVER.LR_SCHEDULER_NAME of the run, or take over its weights alone, by "
                "MODEL.WEIGHTS in another OUTPUT_DIR."
            )
        self.scheduler.load_state_dict(state)

    def _is_agreed(self, iteration: int) -> bool:
        return is_due(iteration, getattr(self.trainer, "gather_metric_period", 1))
