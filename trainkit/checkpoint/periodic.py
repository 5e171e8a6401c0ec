"""`PeriodicCheckpointer`: which iterations are saved, under which name, and which are kept."""

import contextlib
from collections.abc import Iterator
from functools import partial
from typing import Any

from trainkit.checkpoint.background import Surviving
from trainkit.checkpoint.checkpointer import Checkpointer
from trainkit.utils.errors import CheckpointWriteError
from trainkit.utils.period import is_due


class PeriodicCheckpointer:
    """Saves every `period` iterations and after the last one, and keeps the newest.

    Args:
        checkpointer: Saves.
        period: Iterations between two checkpoints; 0 saves only at the end.
        max_iter: Length of the run; None for one without an end.
        max_to_keep: Periodic checkpoints to keep, earlier processes' included; None keeps all.
        file_prefix: Beginning of the file names.
    """

    def __init__(
        self,
        checkpointer: Checkpointer,
        period: int,
        max_iter: int | None = None,
        max_to_keep: int | None = None,
        file_prefix: str = "model",
    ) -> None:
        if max_to_keep is not None and max_to_keep < 1:
            raise ValueError(f"max_to_keep is {max_to_keep}; keep at least 1, or None for all.")
        self.checkpointer = checkpointer
        self.period = period
        self.max_iter = max_iter
        self.max_to_keep = max_to_keep
        self.file_prefix = file_prefix

    def step(self, iteration: int, **extra: Any) -> None:
        """Saves what is due after 0-based `iteration`, with extra data."""
        if is_due(iteration, self.period):
            self.save_numbered(iteration, **extra)
        if self.max_iter is not None and iteration >= self.max_iter - 1:
            self.save_final(iteration, **extra)

    def save_numbered(self, iteration: int, **extra: Any) -> None:
        """Saves now, under the name of the iteration."""
        self.save(f"{self.file_prefix}_{iteration:07d}", iteration=iteration, **extra)

    def save_numbered_in_background(self, iteration: int, surviving: Surviving) -> None:
        """Like `save_numbered`, but returns once the state is copied.

        Args:
            iteration: 0-based.
            surviving: Makes the context in which every rank later learns of an error.
        """
        name, telling = (
            f"{self.file_prefix}_{iteration:07d}",
            partial(_telling, iteration, surviving),
        )
        self.checkpointer.save_in_background(name, self._retain, telling, iteration=iteration)

    def save_final(self, iteration: int, **extra: Any) -> None:
        """Saves now, under the name of a run's end."""
        self.save(f"{self.file_prefix}_final", iteration=iteration, **extra)

    def save(self, name: str, **extra: Any) -> None:
        """Saves now, under a name of its own, and deletes what is no longer to be kept."""
        self.checkpointer.save(name, **extra)
        self._retain()

    def _retain(self) -> None:
        if self.max_to_keep is not None:
            self.checkpointer.keep_newest(self.file_prefix, self.max_to_keep)


@contextlib.contextmanager
def _telling(iteration: int, surviving: Surviving) -> Iterator[None]:
    """Has an error that comes later say which iteration it is about."""
    with surviving():
        try:
            yield
        except CheckpointWriteError as e:
            raise CheckpointWriteError(
                f"While training went on after iteration {iteration}: {e}"
            ) from e
