"""Hooks that save: now and then, at the end, on interruption, and when the model is the best."""

import logging
import math
import operator
import os
import time
from functools import partial
from pathlib import Path
from typing import Any

from trainkit.checkpoint.background import BackgroundSaver
from trainkit.checkpoint.checkpointer import Checkpointer
from trainkit.checkpoint.periodic import PeriodicCheckpointer as _PeriodicCheckpointer
from trainkit.checkpoint.space import SpaceWatch
from trainkit.checkpoint.storable import check_storable, tensor_bytes
from trainkit.engine.failures import call_each, checked_policy, surviving
from trainkit.engine.hook_base import HookBase, hooks_state_dict
from trainkit.engine.trainer_state import local_state
from trainkit.utils import comm
from trainkit.utils.errors import CheckpointWriteError
from trainkit.utils.period import is_due
from trainkit.utils.random import get_rng_state

logger = logging.getLogger(__name__)

TORCHRUN_SECONDS = 30
"""How long torchrun waits by default after SIGTERM before it sends SIGKILL."""


class PeriodicCheckpointer(HookBase):
    """Saves every `period` iterations, after the last one, and when the run is interrupted.

    Register it on every rank; rank 0 writes. It runs before evaluation and writing, which a resume
    makes up for. After the first iteration it looks whether the state can be stored at all, and
    warns if the disk will be too small.

    Args:
        checkpointer: Saves to `{file_prefix}_{iteration:07d}.pth`, and `{file_prefix}_final.pth`.
        period: Iterations between two checkpoints; 0 saves only at the end.
        max_iter: Ignored: the trainer knows it. Kept for detectron2's callers.
        max_to_keep: Periodic checkpoints to keep, earlier processes' included; None keeps all.
        file_prefix: Beginning of the file names.
        on_error: What follows a periodic save that the storage refuses: "raise", or "warn", which
            trains on. The saves at the end and on interruption always raise.
        is_async: Whether a periodic save holds training only while the state is copied. A thread
            writes it; an error is raised at the next step, or with several ranks when they next
            gather metrics or save. Every other save, and every end of a run, first waits for it.
    """

    is_collective = True

    def __init__(
        self,
        checkpointer: Checkpointer,
        period: int,
        max_iter: int | None = None,
        max_to_keep: int | None = None,
        file_prefix: str = "model",
        on_error: str = "raise",
        is_async: bool = False,
    ) -> None:
        self._periodic = _PeriodicCheckpointer(
            checkpointer, period, max_iter, max_to_keep, file_prefix
        )
        on_error = checked_policy(on_error)
        self._surviving = partial(surviving, CheckpointWriteError, on_error, "A CHECKPOINT")
        self._is_async = is_async
        self._has_final = self._is_slow = False
        self._space: SpaceWatch | None = None

    def before_train(self) -> None:
        """Forgets an earlier run."""
        self._has_final = False

    def after_step(self) -> None:
        """Saves if it is due, and after the last step."""
        trainer, periodic = self.trainer, self._periodic
        if trainer.iter == trainer.start_iter:
            self._look_ahead()
        self._has_final = trainer.iter == trainer.max_iter - 1
        if self._is_async:
            self._ask_for_errors()
        if is_due(trainer.iter, periodic.period):
            # First, since it takes space.
            self._background.wait()
            if self._space:
                self._space.check_save(periodic.max_to_keep)
            began = time.monotonic()
            if self._is_async:
                periodic.save_numbered_in_background(trainer.iter, self._surviving)
            else:
                with self._surviving():
                    periodic.save_numbered(trainer.iter)
            self._warn_if_slow(max(time.monotonic() - began, self._background.seconds))
        if self._has_final:
            periodic.save_final(trainer.iter)

    def after_train(self) -> None:
        """Saves a run that was interrupted, and one that was ended early after its last save."""
        # Saves although an earlier save failed, for that is told all the same.
        call_each([self._wait, self._save_end])

    def _wait(self) -> None:
        trainer = self.trainer
        # After an error of this rank alone, the others may never come here.
        has_failed = trainer.interruption is None and trainer.iter < trainer.max_iter
        self._background.wait(alone=has_failed)

    def _save_end(self) -> None:
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

    @property
    def _background(self) -> BackgroundSaver:
        return self._periodic.checkpointer.background

    def _ask_for_errors(self) -> None:
        """Raises what a save in flight met, where asking costs no step a message of its own."""
        period = getattr(self.trainer, "gather_metric_period", 1)
        if comm.get_world_size() == 1 or is_due(self.trainer.iter, period):
            self._background.poll()

    def _warn_if_slow(self, seconds: float) -> None:
        """Says once that a save takes longer than a run is given that is asked to leave."""
        allowed = int(os.environ.get("TORCH_ELASTIC_SHUTDOWN_TIMEOUT", TORCHRUN_SECONDS))
        if seconds < allowed or self._is_slow or "TORCHELASTIC_RUN_ID" not in os.environ:
            return
        self._is_slow = True
        logger.warning(
            "A checkpoint took %.0f s to save, but torchrun kills processes %d s after asking them "
            "to leave: a preempted run would lose what it did since its last periodic checkpoint. "
            "Pass a longer --shutdown-timeout to torchrun, or save to a faster disk.",
            seconds,
            allowed,
        )

    def _look_ahead(self) -> None:
        """Finds out now, when there is a state of the optimizer, what the first save would find."""
        num_bytes = comm.together(self._check_state)
        checkpointer, periodic = self._periodic.checkpointer, self._periodic
        if comm.is_main_process() and checkpointer.save_dir and checkpointer.save_to_disk:
            num_due = self.trainer.max_iter // periodic.period if periodic.period else 0
            num_kept = min(num_due, periodic.max_to_keep or num_due)
            num_best = sum(isinstance(hook, BestCheckpointer) for hook in self.trainer._hooks)
            folder = Path(checkpointer.save_dir)
            self._space = SpaceWatch(folder, periodic.file_prefix, num_bytes)
            # And the final one, and the temporary file of the one that is being saved.
            self._space.check_run(num_kept + num_best + 2)

    def _check_state(self) -> int:
        """Returns the bytes of what will be saved, as far as one rank can tell.

        Raises:
            CheckpointError: If it cannot be stored.
        """
        trainer, checkpointer = self.trainer, self._periodic.checkpointer
        state: dict[str, Any] = {"model": checkpointer.model.state_dict()}
        for name, part in checkpointer.checkpointables.items():
            # Not the trainer's own state, for which all ranks' metrics and requests come together.
            state[name] = _parts(trainer) if part == trainer else part.state_dict()
        if comm.is_main_process() and checkpointer.save_dir and checkpointer.save_to_disk:
            check_storable(state)
        return tensor_bytes(state)


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
        on_error: What follows a save that the storage refuses: "raise", or "warn", which trains on
            with the best so far still to be beaten.
    """

    is_collective = True

    def __init__(
        self,
        eval_period: int,
        checkpointer: Checkpointer,
        val_metric: str,
        mode: str = "max",
        file_prefix: str = "model_best",
        on_error: str = "raise",
    ) -> None:
        if mode not in ("max", "min"):
            raise ValueError(f"mode is {mode!r}; BestCheckpointer's mode must be 'max' or 'min'.")
        self._period = eval_period
        self._checkpointer = checkpointer
        self._metric = val_metric
        self._is_better = operator.gt if mode == "max" else operator.lt
        self._file_prefix = file_prefix
        self._on_error = checked_policy(on_error)
        self._best: float | None = None
        self._best_iter: int | None = None

    def before_train(self) -> None:
        """Forgets an earlier run of this trainer."""
        if self._best_iter is not None and self._best_iter >= self.trainer.start_iter:
            self._best = self._best_iter = None

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
        before, self._best, self._best_iter = (self._best, self._best_iter), value, iteration
        with surviving(CheckpointWriteError, self._on_error, "A CHECKPOINT"):
            try:
                self._checkpointer.save_untagged(self._file_prefix, iteration=iteration)
            except CheckpointWriteError:
                self._best, self._best_iter = before
                raise

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


def _parts(trainer: Any) -> dict[str, Any]:
    """Returns the states in a trainer's state_dict that a rank can tell without the others."""
    own = local_state(trainer) if hasattr(trainer, "optimizer") else {"rng": get_rng_state()}
    return {"hooks": hooks_state_dict(trainer._hooks), **own}
