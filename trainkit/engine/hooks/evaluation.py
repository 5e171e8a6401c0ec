"""`EvalHook`: evaluates now and then, and at the end."""

from collections.abc import Callable
from typing import Any

from trainkit.engine.hook_base import HookBase
from trainkit.evaluation.testing import flatten_results_dict
from trainkit.utils import comm
from trainkit.utils.period import is_due
from trainkit.utils.stop_signals import StopRequested


class EvalHook(HookBase):
    """Runs an evaluation function and puts its results.

    All ranks run the function together. A signal that asks the run to leave is noticed inside
    `inference_on_dataset`, and in a loop of your own where it calls `raise_if_stopping` of
    `trainkit.utils.stop_signals`; a resume evaluates again.

    Args:
        eval_period: Iterations between two evaluations; 0 evaluates only at the end.
        eval_function: Returns a dict of numbers, possibly nested, which are put under names joined
            by slashes; or None. It should not hold a reference to the trainer.
        eval_after_train: Whether to evaluate at the end of a successful run.
    """

    is_collective = True

    def __init__(
        self,
        eval_period: int,
        eval_function: Callable[[], dict[str, Any] | None],
        eval_after_train: bool = True,
    ) -> None:
        self._period = eval_period
        self._function = eval_function
        self._eval_after_train = eval_after_train

    def after_step(self) -> None:
        """Evaluates if it is due; after the last step, `after_train` does."""
        trainer = self.trainer
        if is_due(trainer.iter, self._period) and trainer.iter != trainer.max_iter - 1:
            self._evaluate()

    def after_train(self) -> None:
        """Evaluates if the run came to its end."""
        trainer = self.trainer
        if not self._eval_after_train or trainer.interruption is not None:
            return
        if trainer.iter == trainer.max_iter:
            try:
                self._evaluate()
            except StopRequested as stop:
                # The other hooks finish; a resume evaluates.
                trainer.interruption = stop.interruption

    def _evaluate(self) -> None:
        # What is not finite stops the run before an evaluation of it misleads anybody.
        self.trainer.sync_metrics()
        if self.trainer.interruption is not None:
            raise StopRequested(self.trainer.interruption)
        results = self._function()
        if results is not None:
            for name, value in _numbers(results).items():
                self.trainer.storage.put_scalar(name, value, smoothing_hint=False)
        # A slow rank must not be taken for a hanging one in the next step's reduction.
        comm.synchronize()


def _numbers(results: dict[str, Any]) -> dict[str, float]:
    """Flattens nested results.

    Raises:
        TypeError: If a result is not a number.
    """
    if not isinstance(results, dict):
        raise TypeError(
            f"The evaluation function must return a dict of numbers or None, but returned "
            f"{results!r}. Return it under a name, as in {{'accuracy': 0.9}}."
        )
    numbers = {}
    for name, value in flatten_results_dict(results).items():
        try:
            numbers[name] = float(value)
        except (TypeError, ValueError):
            raise TypeError(
                f"The evaluation function must return a nested dict of numbers, but {name!r} is "
                f"{value!r}. Return numbers, and save anything else in the evaluator."
            ) from None
    return numbers
