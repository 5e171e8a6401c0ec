"""`EarlyStopping`: ends a run that no longer gets better."""

import logging
import math
from typing import Any

from trainkit.engine.hook_base import HookBase
from trainkit.engine.hooks.evaluation import EvalHook
from trainkit.utils import comm
from trainkit.utils.errors import ConfigError
from trainkit.utils.period import is_due

logger = logging.getLogger(__name__)


class EarlyStopping(HookBase):
    """Ends the run as a success once a metric has not improved for some evaluations.

    An evaluation is an iteration in which the metric was put; a value that is not finite improves
    nothing. Rank 0 decides. With several ranks, all end where they next bring metrics together.
    Register it behind what puts the metric.

    Args:
        metric: Name in the storage, such as "classification/top1" or "val/total_loss".
        patience: Evaluations in a row without improvement that end the run, at least 1.
        mode: "max" if larger is better, "min" if smaller is.
        min_delta: What improves the best value by no more than this does not count, at least 0.
        threshold: A value that is good enough: reaching it ends the run at once.

    Raises:
        ConfigError: If mode, patience or min_delta is impossible.
    """

    def __init__(
        self,
        metric: str,
        patience: int,
        mode: str = "max",
        min_delta: float = 0.0,
        threshold: float | None = None,
    ) -> None:
        if mode not in ("max", "min") or patience < 1 or not min_delta >= 0:
            raise ConfigError(
                f"EarlyStopping (TEST.EARLY_STOPPING) has mode {mode!r}, patience {patience} and "
                f"min_delta {min_delta}; mode must be 'max' or 'min', patience at least 1, and "
                "min_delta at least 0."
            )
        self._metric = metric
        self._patience = patience
        self._sign = 1 if mode == "max" else -1
        self._min_delta = min_delta
        self._threshold = math.inf if threshold is None else self._sign * threshold
        self._state: dict[str, Any] = {}

    def before_train(self) -> None:
        """Forgets an earlier run if this is a new one."""
        if self.trainer.iter == 0 or not self._state:
            self._state = {"best": None, "num_bad": 0, "last_iter": -1}

    def after_step(self) -> None:
        """Judges the metric if it was put since the last time."""
        # The request to stop reaches the other ranks, which may not have the metric.
        if not comm.is_main_process():
            return
        history = self.trainer.storage.histories().get(self._metric)
        if history is None:
            self._warn_if_evaluated()
            return
        value, iteration = history.last(1)[0]
        if iteration > self._state["last_iter"]:
            self._state["last_iter"] = iteration
            self._judge(value)

    def state_dict(self) -> dict[str, Any]:
        """Returns the best value, the evaluations since then, and the last one's iteration."""
        return dict(self._state)

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Goes on counting."""
        self._state = dict(state)

    def _judge(self, value: float) -> None:
        state, best = self._state, self._state["best"]
        is_finite = math.isfinite(value)
        if is_finite and (best is None or self._sign * (value - best) > self._min_delta):
            state.update(best=value, num_bad=0)
        else:
            state["num_bad"] += 1
        if is_finite and self._sign * value >= self._threshold:
            self._stop(f"{self._metric} is {value:.5g}, which is good enough")
        elif state["num_bad"] >= self._patience:
            self._stop(
                f"{self._metric} is {value:.5g} and has not improved on {best} by more than "
                f"{self._min_delta:g} in {state['num_bad']} evaluations"
            )

    def _stop(self, reason: str) -> None:
        logger.info("Stopping early: %s.", reason)
        self.trainer.request_stop(reason, finished=True)

    def _warn_if_evaluated(self) -> None:
        trainer = self.trainer
        periods = [hook._period for hook in trainer._hooks if isinstance(hook, EvalHook)]
        # The evaluation after the last step is yet to come.
        if trainer.iter < trainer.max_iter - 1 and any(is_due(trainer.iter, p) for p in periods):
            logger.warning(
                "%s was not put by any evaluation, so it cannot stop the run. There are: %s",
                self._metric,
                ", ".join(sorted(trainer.storage.histories())),
            )
