"""What every writer is, and which values a writer has yet to write."""

from typing import Any

from trainkit.utils.events.storage import EventStorage, get_event_storage, has_event_storage


class EventWriter:
    """Brings the storage's metrics to a file, a screen or a service.

    A writer whose output must continue after a resume as if nothing had happened also overrides
    `state_dict` and `load_state_dict`; its state travels in checkpoints.
    """

    def write(self) -> None:
        """Writes what is new in the current storage.

        Raises:
            NotImplementedError: If a writer does not say how.
        """
        raise NotImplementedError

    def close(self) -> None:
        """Writes nothing more; the next `write` opens again."""

    def reset(self) -> None:
        """Forgets what was written, because another run starts from its beginning."""

    def state_dict(self) -> dict[str, Any]:
        """Returns where the output stands, after making what was written durable."""
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continues from where the output stood."""


class NewValues:
    """Picks the values that were not written yet, each one once.

    Smoothed scalars, and those put at every iteration such as the learning rate, give their latest
    value; those put now and then, such as evaluation results, give every value.

    Args:
        window_size: Iterations that the median of a smoothed scalar covers.
    """

    def __init__(self, window_size: int) -> None:
        self._window_size = window_size
        self.reset()

    def reset(self) -> None:
        """Takes nothing for written."""
        self._written: dict[str, int] = {}
        self._start_iter: int | None = None

    def next_iter(self, storage: EventStorage) -> int:
        """Returns the iteration after the newest that was written; at first, where the run starts.

        Args:
            storage: The run's, which says where it starts.
        """
        if self._start_iter is None:
            self._start_iter = storage.start_iter
        return max(self._written.values(), default=self._start_iter - 1) + 1

    def state_dict(self) -> dict[str, Any]:
        """Returns what was written, and since when."""
        # A run that was cut before its first write still has to write all since its own start.
        if self._start_iter is None and has_event_storage():
            self._start_iter = get_event_storage().start_iter
        return {"written": dict(self._written), "start_iter": self._start_iter}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continues after what was written."""
        self._written = dict(state["written"])
        self._start_iter = state["start_iter"]

    def take(self, storage: EventStorage) -> dict[int, dict[str, float]]:
        """Returns the new values by iteration and name, and counts them as written."""
        if self._start_iter is None:
            self._start_iter = storage.start_iter
        taken: dict[int, dict[str, float]] = {}
        hints = storage.smoothing_hints()
        latest = storage.latest_with_smoothing_hint(self._window_size)
        for name, (value, iteration) in latest.items():
            last_written = self._written.get(name, self._start_iter - 1)
            if iteration <= last_written:
                continue
            values = [(value, iteration)]
            if not hints[name]:
                new = [v for v in storage.history(name).values() if v[1] > last_written]
                if len(new) < iteration - last_written:
                    values = new
            for v, i in values:
                taken.setdefault(i, {})[name] = v
            self._written[name] = iteration
        return dict(sorted(taken.items()))
