"""`_trainer`, for code written for detectron2, whose DefaultTrainer wraps another trainer."""

from typing import Any


class StepView:
    """A trainer seen as the inner trainer that detectron2's DefaultTrainer has.

    Attributes are the trainer's own, read and set; only `run_step` is the step of its class, so
    that a `run_step` overridden in a subclass may call it.

    Args:
        trainer: A weak proxy of the trainer, or the trainer.
        run_step: The step.
    """

    def __init__(self, trainer: Any, run_step: Any) -> None:
        object.__setattr__(self, "_viewed", trainer)
        object.__setattr__(self, "_run_step", run_step)

    def run_step(self) -> None:
        """One optimizer step of the viewed trainer."""
        self._run_step(self._viewed)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._viewed, name)

    def __setattr__(self, name: str, value: Any) -> None:
        setattr(self._viewed, name, value)
