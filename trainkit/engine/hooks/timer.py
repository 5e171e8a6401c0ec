"""`IterationTimer`: how long a step takes, and the whole run."""

import datetime
import logging
import time

from fvcore.common.timer import Timer

from trainkit.engine.hook_base import HookBase

logger = logging.getLogger(__name__)


class IterationTimer(HookBase):
    """Puts the seconds of each step, without the other hooks, as `time`; sums up at the end.

    Runs first, so that no other hook's `before_step` or `after_step` counts as the step's time.

    Args:
        warmup_iter: Iterations at the start, slower than the rest, that do not count: of a run
            for the metric, and of each resume for the speed that is logged.
    """

    priority = 0

    def __init__(self, warmup_iter: int = 3) -> None:
        self._warmup_iter = warmup_iter
        self._step_start = 0.0
        # Of all steps, and of those after the warmup.
        self._all_seconds = 0.0
        self._step_seconds = 0.0
        self._num_timed = 0
        self._total_timer = Timer()

    def before_train(self) -> None:
        """Starts the clock."""
        self._all_seconds = 0.0
        self._step_seconds = 0.0
        self._num_timed = 0
        self._total_timer.reset()

    def before_step(self) -> None:
        """Notes the time."""
        self._step_start = time.perf_counter()

    def after_step(self) -> None:
        """Puts the time that the step took, once the warmup is over."""
        seconds = time.perf_counter() - self._step_start
        self._all_seconds += seconds
        trainer = self.trainer
        # Of a run, not of a resume: its lines in metrics.json are those of an unbroken run.
        if trainer.iter + 1 >= self._warmup_iter:
            trainer.storage.put_scalar("time", seconds)
        if trainer.iter - trainer.start_iter + 1 >= self._warmup_iter:
            self._step_seconds += seconds
            self._num_timed += 1

    def after_train(self) -> None:
        """Logs the speed, and the share of the time that went into hooks."""
        total_seconds = self._total_timer.seconds()
        if self._num_timed > 0:
            logger.info(
                "Overall training speed: %d iterations in %s (%.4f s / it)",
                self._num_timed,
                datetime.timedelta(seconds=int(self._step_seconds)),
                self._step_seconds / self._num_timed,
            )
        logger.info(
            "Total training time: %s (%s on hooks)",
            datetime.timedelta(seconds=int(total_seconds)),
            datetime.timedelta(seconds=int(total_seconds - self._all_seconds)),
        )
