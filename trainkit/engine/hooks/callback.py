"""`CallbackHook`: a hook made of functions."""

from collections.abc import Callable
from typing import Any

from trainkit.engine.hook_base import HookBase

Callback = Callable[[Any], None]


class CallbackHook(HookBase):
    """Calls functions of the trainer where a hook's methods would be called.

    A callback that itself refers to the trainer, other than by its argument, keeps it alive.

    Args:
        before_train: Called with the trainer before the first iteration.
        after_train: Called with the trainer at the end.
        before_step: Called with the trainer before each step.
        after_backward: Called with the trainer when a step's gradients are complete.
        after_step: Called with the trainer after each step.
    """

    def __init__(
        self,
        *,
        before_train: Callback | None = None,
        after_train: Callback | None = None,
        before_step: Callback | None = None,
        after_backward: Callback | None = None,
        after_step: Callback | None = None,
    ) -> None:
        self._before_train = before_train
        self._after_train = after_train
        self._before_step = before_step
        self._after_backward = after_backward
        self._after_step = after_step

    def _call(self, callback: Callback | None) -> None:
        if callback is not None:
            callback(self.trainer)

    def before_train(self) -> None:
        """Calls the callback."""
        self._call(self._before_train)

    def after_train(self) -> None:
        """Calls the callback."""
        self._call(self._after_train)

    def before_step(self) -> None:
        """Calls the callback."""
        self._call(self._before_step)

    def after_backward(self) -> None:
        """Calls the callback."""
        self._call(self._after_backward)

    def after_step(self) -> None:
        """Calls the callback."""
        self._call(self._after_step)
