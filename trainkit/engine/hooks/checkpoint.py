"""Hooks that save: now and then, at the end, on interruption, and when the model is the best."""

import logging
import math
import operator
from typing import Any

from trainkit.checkpoint.checkpointer import Checkpointer
from trainkit.checkpoint.periodic import PeriodicCheckpointer as _PeriodicCheckpointer
from trainkit.engine.hook_base import HookBase
from trainkit.utils import comm
from trainkit.utils.period import is_due

logger = logging.getLogger(__name__)


class PeriodicCheckpointer(HookBase):
    """Saves every `period` iterations, after the last one, and when the run is interrupted.

    Register it on every rank; rank 0 writes. It runs before evaluation and writing, which a resume
    makes up for.

    Args:
        checkpointer: Saves to `{file_prefix}_{iteration:07d}.pth`, and `{file_prefix}_final.pth`.
        period: Iterations between two checkpoints; 0 saves only at the end.
        max_iter: Ignored: the trainer knows it. Kept for detectron2's callers.
        max_to_keep: Periodic checkpoints to keep, earlier processes' included; None keeps all.
        file_prefix: Beginning of the file names.
    """

    is_collective = True

    def __init__(
        self,
        checkpointer: Checkpointer,
        period: int,
        max_iter: int | None = None,
        max_to_keep: int | None = None,
        file_prefix: str = "model",
    ) -> None:
        self._periodic = _PeriodicCheckpointer(
            checkpointer, period, max_iter, max_to_keep, file_prefix
        )
        self._has_final = False

    def before_train(self) -> None:
        """Forgets an earlier run."""
        self._has_final = False

    def after_step(self) -> None:
        """Saves if it is due, and after the last step."""
        trainer = self.trainer
        self._periodic.max_iter = trainer.max_iter
        self._has_final = trainer.iter == trainer.max_iter - 1
        self._periodic.step(trainer.iter)

    def after_train(self) -> None:
        """Saves a run that was interrupted, and one that was ended early after its last save."""
        trainer = self.trainer
        iteration = trainer.iter - 1
        if self._has_final or iteration < 0:
            return
        if trainer.interruption is not None:
            if iteration >= trainer.start_iter:
                self._periodic.save_numbered(iteration)
        elif trainer.iter == trainer.max_iter:
            # Also where an earlier process was killed between its last two saves.
            self._periodic.save_final(iteration)


class BestCheckpointer(HookBase):
    """Saves the model whenever an evaluation's metric is the best so far.

    Register it on every rank, after the `EvalHook`. The best value travels in checkpoints, so that
    a resumed run never replaces a better model by a worse one.

    Args:
        eval_period: The `EvalHook`'s period.
        checkpointer: Saves to `{file_prefix}.pth`.
        val_metric: Name of the metric in the storage, such as "classification/top1".
        mode: "max" if larger is better, "min" if smaller is.
        file_prefix: Name of the file.
    """

    is_collective = True

    def __init__(
        self,
        eval_period: int,
        checkpointer: Checkpointer,
        val_metric: str,
        mode: str = "max",
        file_prefix: str = "model_best",
    ) -> None:
        if mode not in ("max", "min"):
            raise ValueError(f"mode is {mode!r}; BestCheckpointer's mode must be 'max' or 'min'.")
        self._period = eval_period
        self._checkpointer = checkpointer
        self._metric = val_metric
        self._is_better = operator.gt if mode == "max" else operator.lt
        self._file_prefix = file_prefix
        self._best: float | None = None
        self._best_iter: int | None = None

    def after_step(self) -> None:
        """Looks at the metric if an evaluation was due; after the last step, `after_train` does."""
        trainer = self.trainer
        if is_due(trainer.iter, self._period) and trainer.iter != trainer.max_iter - 1:
            self._save_if_best(trainer.iter)

    def after_train(self) -> None:
        """Looks at the final evaluation if the run came to its end."""
        trainer = self.trainer
        if trainer.iter == trainer.max_iter and trainer.interruption is None:
            self._save_if_best(trainer.iter - 1)

    def state_dict(self) -> dict[str, Any]:
        """Returns the best value so far and its iteration."""
        return {"best": self._best, "best_iter": self._best_iter}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Goes on from the best value so far."""
        self._best = state["best"]
        self._best_iter = state["best_iter"]

    def _save_if_best(self, iteration: int) -> None:
        value = comm.on_main(lambda: self._fresh_value(iteration))
        if value is None or (self._best is not None and not self._is_better(value, self._best)):
            return
        logger.info(
            "%s is %.5g after iteration %d, the best so far (before: %s)",
            self._metric,
            value,
            iteration,
            "none" if self._best is None else f"{self._best:.5g} after {self._best_iter}",
        )
        # Set first: the checkpoint holds this hook's state.
        self._best, self._best_iter = value, iteration
        self._checkpointer.save_untagged(self._file_prefix, iteration=iteration)

    def _fresh_value(self, iteration: int) -> float | None:
        """Returns the metric if it was put after this very step and is finite."""
        storage = self.trainer.storage
        if self._metric not in storage.histories():
            logger.warning(
                "%s was not put by any evaluation, so no best model is kept. There are: %s",
                self._metric,
                ", ".join(sorted(storage.histories())),
            )
            return None
        value, put_iter = storage.history(self._metric).last(1)[0]
        # A hook may put the last one in after_step, or in after_train, where iter is one more.
        return value if put_iter >= iteration and math.isfinite(value) else None
