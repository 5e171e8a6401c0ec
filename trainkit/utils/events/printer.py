"""`CommonMetricPrinter`: one line of progress for a person, with the time still to go."""

import datetime
import logging
import time

import torch

from trainkit.utils.events.storage import EventStorage, get_event_storage
from trainkit.utils.events.writer import EventWriter

# Iterations whose median time the estimate of the time to go is based on.
_ETA_WINDOW = 1000


class CommonMetricPrinter(EventWriter):
    """Logs time to go, iteration, losses, times, learning rate and peak memory in one line.

    Shows every smoothed scalar, and those whose name contains "loss" or "[metric]". A run that is
    over prints nothing.

    Args:
        max_iter: Length of the run in iterations; without it no time to go is shown.
        window_size: Iterations that the median of a loss covers.
    """

    def __init__(self, max_iter: int | None = None, window_size: int = 20) -> None:
        self.logger = logging.getLogger("trainkit.utils.events")
        self._max_iter = max_iter
        self._window_size = window_size
        self._last_write: tuple[int, float] | None = None

    def write(self) -> None:
        """Logs the line; the estimate also becomes the scalar `eta_seconds`."""
        storage = get_event_storage()
        if storage.iter == self._max_iter:
            return
        eta_seconds = self._eta_seconds(storage)
        parts = []
        if eta_seconds is not None:
            storage.put_scalar("eta_seconds", eta_seconds, smoothing_hint=False)
            parts.append(f"eta: {datetime.timedelta(seconds=int(eta_seconds))}")
        parts.append(f"iter: {storage.iter}")
        parts += self._metrics(storage) + self._times(storage)
        histories = storage.histories()
        if "lr" in histories:
            parts.append(f"lr: {histories['lr'].latest():.5g}")
        if max_memory := getattr(torch.get_device_module(), "max_memory_allocated", None):
            parts.append(f"max_mem: {max_memory() / 2**20:.0f}M")
        self.logger.info(" %s", "  ".join(parts))

    def _eta_seconds(self, storage: EventStorage) -> float | None:
        if self._max_iter is None:
            return None
        remaining = self._max_iter - storage.iter - 1
        history = storage.histories().get("time")
        if history is not None:
            return history.median(_ETA_WINDOW) * remaining
        # The timer skips the first iterations: until it counts, this writer's own pace serves.
        now = (storage.iter, time.perf_counter())
        last, self._last_write = self._last_write, now
        if last is None or last[0] == now[0]:
            return None
        return (now[1] - last[1]) / (now[0] - last[0]) * remaining

    def _metrics(self, storage: EventStorage) -> list[str]:
        return [
            f"{name}: {history.median(storage.count_samples(name, self._window_size)):.4g}"
            for name, history in storage.histories().items()
            if "loss" in name
            or "[metric]" in name
            or (storage.smoothing_hints()[name] and not name.endswith("time"))
        ]

    def _times(self, storage: EventStorage) -> list[str]:
        parts = []
        for name in ("time", "data_time"):
            history = storage.histories().get(name)
            if history is not None:
                average = history.avg(storage.count_samples(name, self._window_size))
                parts.append(f"{name}: {average:.4f}  last_{name}: {history.latest():.4f}")
        return parts
