"""`PeriodicWriter`: brings metrics out, after everybody has put them in."""

from collections.abc import Callable, Sequence
from functools import wraps
from typing import Any

from trainkit.engine.failures import call_each, checked_policy, surviving
from trainkit.engine.hook_base import HookBase
from trainkit.utils.events.storage import get_event_storage
from trainkit.utils.events.writer import EventWriter
from trainkit.utils.period import is_due


class PeriodicWriter(HookBase):
    """Calls writers every `period` iterations, after the last one, and once more at the end.

    Runs late, after the hooks that put metrics. Only rank 0 needs it.

    Args:
        writers: The writers, in the order in which they write.
        period: Iterations between two writes; 0 writes only at the end.
        on_error: What follows a write that the storage refuses: "raise", or "warn", which trains
            on.
    """

    priority = 90

    def __init__(
        self, writers: Sequence[EventWriter], period: int = 20, *, on_error: str = "raise"
    ) -> None:
        self._writers = list(writers)
        self._period = period
        self._on_error = checked_policy(on_error)
        # A state was loaded, possibly of a run that had yet to make its first step.
        self._is_resumed = False

    def before_train(self) -> None:
        """Forgets what an earlier run of this trainer wrote, if this one starts anew."""
        if self.trainer.start_iter == 0 and not self._is_resumed:
            for writer in self._writers:
                writer.reset()
        self._is_resumed = False

    def after_step(self) -> None:
        """Writes if it is due, and after the last step."""
        trainer = self.trainer
        if is_due(trainer.iter, self._period) or trainer.iter == trainer.max_iter - 1:
            self._write()

    def after_train(self) -> None:
        """Writes what other hooks put at the end, and closes every writer."""
        call_each([self._write, *map(self._surviving, (w.close for w in self._writers))])

    def state_dict(self) -> dict[str, Any]:
        """Returns the states of the writers, by their place and class."""
        return {f"{i} {type(w).__name__}": w.state_dict() for i, w in enumerate(self._writers)}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Gives each writer its state back; one that is new, or in another place, has none."""
        self._is_resumed = True
        for i, writer in enumerate(self._writers):
            key = f"{i} {type(writer).__name__}"
            if key in state:
                writer.load_state_dict(state[key])

    def _write(self) -> None:
        call_each([self._surviving(writer.write) for writer in self._writers])
        storage = get_event_storage()
        storage.clear_images()
        storage.clear_histograms()

    def _surviving(self, write: Callable[[], None]) -> Callable[[], None]:
        what = f"METRICS, by {write.__qualname__}"
        return wraps(write)(surviving(OSError, self._on_error, what)(write))
