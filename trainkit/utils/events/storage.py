"""`EventStorage`: where a run puts its metrics, and where hooks and writers read them."""

import contextlib
from collections import deque
from collections.abc import Iterator, Sequence
from types import TracebackType
from typing import Any

import numpy as np
import torch

from trainkit.utils.events.history import DeferredScalars, HistoryBuffer

_CURRENT_STORAGE_STACK: "list[EventStorage]" = []

# Images and histograms that wait for a writer; a rank without writers drops the oldest.
_MAX_PICTURES = 32


def get_event_storage() -> "EventStorage":
    """Returns the storage of the innermost `with EventStorage(...)` around the caller.

    Raises:
        RuntimeError: If there is none.
    """
    if not _CURRENT_STORAGE_STACK:
        raise RuntimeError(
            "No EventStorage is open. Metrics exist while a trainer trains; elsewhere, wrap the "
            "code in `with EventStorage(): …`."
        )
    return _CURRENT_STORAGE_STACK[-1]


def has_event_storage() -> bool:
    """Whether `get_event_storage` would return one."""
    return bool(_CURRENT_STORAGE_STACK)


class EventStorage:
    """Histories of named scalars, and the images and histograms that no writer has taken yet.

    Values on the CPU are read when they are put. Values on an accelerator wait there, and no `put`
    synchronizes with it; a read brings them over.

    Args:
        start_iter: The iteration at which the run starts, 0-based.
    """

    def __init__(self, start_iter: int = 0) -> None:
        self.start_iter = start_iter
        self.iter = start_iter
        self.images: deque[tuple[str, np.ndarray[Any, Any] | torch.Tensor, int]]
        self.images = deque(maxlen=_MAX_PICTURES)
        self.raw_histograms: deque[dict[str, Any]] = deque(maxlen=_MAX_PICTURES)
        self._histories: dict[str, HistoryBuffer] = {}
        self._smoothing_hints: dict[str, bool] = {}
        self._prefix = ""
        self._deferred = DeferredScalars()

    def put_scalar(
        self,
        name: str,
        value: float | torch.Tensor,
        smoothing_hint: bool = True,
        cur_iter: int | None = None,
    ) -> None:
        """Adds a value to the history of `name`.

        Args:
            name: The metric's name; inside `name_scope` it is prefixed.
            value: A number, or a tensor with one element on any device.
            smoothing_hint: Whether the metric is noisy, so that writers show a median of recent
                values. Fixed by the first value of a name.
            cur_iter: The iteration that the value belongs to; the current one by default.

        Raises:
            ValueError: If the name's smoothing hint was another one before.
        """
        iteration = self.iter if cur_iter is None else cur_iter
        name = self._prefix + name
        # The value before its history: one that cannot be read must leave no empty history behind.
        if isinstance(value, torch.Tensor) and not value.is_cpu:
            # A copy: `value` may be a view of something large, or be written to before it is read.
            row = value.detach().reshape(1).clone()
            self._deferred.add(row, [self._history_to_fill(name, smoothing_hint)], iteration)
        else:
            number = float(value.detach() if isinstance(value, torch.Tensor) else value)
            self._history_to_fill(name, smoothing_hint).update(number, iteration)

    def put_row(
        self, names: Sequence[str], values: torch.Tensor, cur_iter: int | None = None
    ) -> None:
        """Adds one value to each of several smoothed histories, from one tensor.

        Args:
            names: The metrics' names.
            values: Shape (len(names),), on any device. The storage keeps it: it must be detached
                and nothing may write to it later, as with the result of `torch.stack`.
            cur_iter: The iteration that the values belong to; the current one by default.
        """
        assert values.shape == (len(names),), f"{len(names)} names, values of {values.shape}"
        iteration = self.iter if cur_iter is None else cur_iter
        histories = [self._history_to_fill(self._prefix + name, True) for name in names]
        if values.device.type != "cpu":
            self._deferred.add(values, histories, iteration)
            return
        for history, value in zip(histories, values.tolist(), strict=True):
            history.update(value, iteration)

    def replace_rows(self, iteration: int, rows: dict[int, dict[str, float]]) -> None:
        """Replaces smoothed scalars of later iterations, as a reduction over ranks does.

        Args:
            iteration: The newest iteration that stays as it is.
            rows: Values by iteration, in order, and name.
        """
        for name in dict.fromkeys(name for row in rows.values() for name in row):
            values = {i: row[name] for i, row in rows.items() if name in row}
            self._history_to_fill(name, True).replace_after(iteration, values)

    def put_scalars(
        self, *, smoothing_hint: bool = True, cur_iter: int | None = None, **scalars: Any
    ) -> None:
        """Adds several values, given as keyword arguments; see `put_scalar`."""
        for name, value in scalars.items():
            self.put_scalar(name, value, smoothing_hint, cur_iter)

    def put_image(self, img_name: str, img_tensor: np.ndarray[Any, Any] | torch.Tensor) -> None:
        """Keeps an image of shape (3 or 1, H, W), uint8 or float in [0, 1], for the next write."""
        self.images.append((self._prefix + img_name, img_tensor, self.iter))

    def put_histogram(self, hist_name: str, hist_tensor: torch.Tensor, bins: int = 1000) -> None:
        """Keeps a histogram of a tensor of any shape, for the next write. Reads the tensor now."""
        values = hist_tensor.detach().flatten().float().cpu()
        low, high = values.min().item(), values.max().item()
        counts = torch.histc(values, bins=bins)
        edges = torch.linspace(low, high, steps=bins + 1)
        self.raw_histograms.append(
            {
                "tag": self._prefix + hist_name,
                "min": low,
                "max": high,
                "num": values.numel(),
                "sum": values.sum().item(),
                "sum_squares": values.square().sum().item(),
                "bucket_limits": edges[1:].tolist(),
                "bucket_counts": counts.tolist(),
                "global_step": self.iter,
            }
        )

    def history(self, name: str) -> HistoryBuffer:
        """Returns the history of a scalar.

        Raises:
            KeyError: If nothing was put under this name.
        """
        if name not in self._histories:
            known = ", ".join(sorted(self._histories)) or "none"
            raise KeyError(f"No scalar {name!r} was put into the storage; there are: {known}.")
        return self._histories[name]

    def histories(self) -> dict[str, HistoryBuffer]:
        """Returns all histories by name."""
        return self._histories

    def smoothing_hints(self) -> dict[str, bool]:
        """Returns for each name whether writers smooth it."""
        return self._smoothing_hints

    def latest(self) -> dict[str, tuple[float, int]]:
        """Returns the newest value of each scalar and the iteration it belongs to."""
        return {name: history.last(1)[0] for name, history in self._histories.items()}

    def latest_with_smoothing_hint(self, window_size: int = 20) -> dict[str, tuple[float, int]]:
        """Like `latest`, but with the median over the last iterations where the hint asks for it.

        Args:
            window_size: Number of iterations, not of values, that the median covers.
        """
        latest = self.latest()
        for name, (_, iteration) in latest.items():
            if self._smoothing_hints[name]:
                smoothed = self._histories[name].median(self.count_samples(name, window_size))
                latest[name] = (smoothed, iteration)
        return latest

    def count_samples(self, name: str, window_size: int = 20) -> int:
        """Returns how many values of a scalar belong to its last `window_size` iterations."""
        history = self.history(name)
        newest = history.last(1)[0][1]
        return len(history.after(newest - window_size))

    @property
    def iteration(self) -> int:
        """The current iteration: `iter` by its other name."""
        return self.iter

    def step(self) -> None:
        """Goes on to the next iteration, for loops without a trainer."""
        self.iter += 1

    @contextlib.contextmanager
    def name_scope(self, name: str) -> Iterator[None]:
        """Prefixes every name put inside the block with `name` and a slash."""
        outer = self._prefix
        self._prefix = f"{outer}{name.rstrip('/')}/"
        try:
            yield
        finally:
            self._prefix = outer

    def clear_images(self) -> None:
        """Forgets the images, once all writers have written them."""
        self.images.clear()

    def clear_histograms(self) -> None:
        """Forgets the histograms, once all writers have written them."""
        self.raw_histograms.clear()

    def state_dict(self) -> dict[str, Any]:
        """Returns the histories, which smoothing, ETA and hooks go on from after a resume."""
        return {
            name: {**history.state_dict(), "smoothing_hint": self._smoothing_hints[name]}
            for name, history in self._histories.items()
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Puts back what `state_dict` returned."""
        for name, history_state in state.items():
            history = self._history_to_fill(name, history_state["smoothing_hint"])
            history.load_state_dict(history_state)

    def __enter__(self) -> "EventStorage":
        _CURRENT_STORAGE_STACK.append(self)
        return self

    def __exit__(
        self,
        exc_type: type[BaseException] | None,
        exc_value: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        assert _CURRENT_STORAGE_STACK[-1] is self
        _CURRENT_STORAGE_STACK.pop()

    def _history_to_fill(self, name: str, smoothing_hint: bool) -> HistoryBuffer:
        history = self._histories.get(name)
        if history is None:
            history = self._histories[name] = HistoryBuffer(deferred=self._deferred)
            self._smoothing_hints[name] = smoothing_hint
        elif self._smoothing_hints[name] != smoothing_hint:
            raise ValueError(
                f"The scalar {name!r} was put with smoothing_hint={not smoothing_hint} before and "
                f"with {smoothing_hint} now. Put it with one hint, or under two names."
            )
        return history
