"""Histories of scalars: bounded rings, filled at once from the CPU and later from accelerators."""

import math
from array import array
from typing import Any

import torch


class DeferredScalars:
    """Values that wait on their accelerator until somebody reads a history.

    They come over in one transfer for each device and dtype: the only place where metrics
    synchronize.

    Args:
        max_waiting: Values that may wait; one more brings all of them over.
    """

    def __init__(self, max_waiting: int = 1024) -> None:
        self._max_waiting = max_waiting
        self._num_waiting = 0
        self._rows: list[tuple[torch.Tensor, list[HistoryBuffer], int]] = []

    def add(self, row: torch.Tensor, histories: "list[HistoryBuffer]", iteration: int) -> None:
        """Lets a row wait.

        Args:
            row: Shape (len(histories),), detached, and its own storage, which nothing writes to.
            histories: Where each value belongs.
            iteration: When the values were put.
        """
        self._rows.append((row, histories, iteration))
        self._num_waiting += len(histories)
        for history in histories:
            history.num_waiting += 1
        if self._num_waiting > self._max_waiting:
            self.flush()

    def flush(self) -> None:
        """Brings everything over, in the order in which it was put."""
        rows, self._rows = self._rows, []
        self._num_waiting = 0
        # By dtype too, since joined to a float16 a count of 70,000 would become infinite.
        groups: dict[tuple[torch.device, torch.dtype], list[torch.Tensor]] = {}
        for row, _, _ in rows:
            groups.setdefault((row.device, row.dtype), []).append(row)
        # `cpu` first: `tolist` alone refuses subclasses of Tensor.
        values = {key: iter(torch.cat(group).cpu().tolist()) for key, group in groups.items()}
        for row, histories, iteration in rows:
            for history in histories:
                history.num_waiting -= 1
                history.append(next(values[row.device, row.dtype]), iteration)


class HistoryBuffer:
    """The last values of one scalar and the iterations they belong to.

    Every read first brings over what still waits on an accelerator.

    Args:
        max_length: Values kept; older ones are overwritten.
        deferred: Where values of this history may wait.
    """

    def __init__(self, max_length: int = 1024, deferred: DeferredScalars | None = None) -> None:
        self.num_waiting = 0
        self._deferred = deferred
        self._max_length = max_length
        self._values = array("d")
        self._iterations = array("q")
        # Slot of the oldest value once the ring is full; 0 before.
        self._start = 0
        self._count = 0
        self._sum = 0.0

    def update(self, value: float, iteration: float | None = None) -> None:
        """Adds a value of `iteration`, which defaults to the number of values so far."""
        if self.num_waiting:
            self._settle()
        self.append(float(value), self._count if iteration is None else int(iteration))

    def append(self, value: float, iteration: int) -> None:
        """Adds a value without looking at what waits: O(1)."""
        if len(self._values) < self._max_length:
            self._values.append(value)
            self._iterations.append(iteration)
        else:
            self._values[self._start] = value
            self._iterations[self._start] = iteration
            self._start = (self._start + 1) % self._max_length
        self._count += 1
        self._sum += value

    def latest(self) -> float:
        """Returns the newest value."""
        return self.last(1)[0][0]

    def last(self, count: int) -> list[tuple[float, int]]:
        """Returns the newest `count` values, or all that are kept, as (value, iteration), in order.

        Raises:
            IndexError: If there is no value yet.
        """
        self._settle()
        kept = len(self._values)
        if not kept:
            raise IndexError("The history is empty: nothing was put into it yet.")
        slots = range(self._start + kept - min(count, kept), self._start + kept)
        return [(self._values[slot % kept], self._iterations[slot % kept]) for slot in slots]

    def after(self, iteration: int) -> list[tuple[float, int]]:
        """Returns the values of later iterations as (value, iteration), newest first."""
        self._settle()
        newer = []
        for slot in range(self._start + len(self._values) - 1, self._start - 1, -1):
            index = slot % self._max_length
            if self._iterations[index] <= iteration:
                break
            newer.append((self._values[index], self._iterations[index]))
        return newer

    def replace_after(self, iteration: int, values: dict[int, float]) -> None:
        """Replaces all values of later iterations by `values`, given by iteration, in order."""
        kept = self.values()
        earlier = [(value, i) for value, i in kept if i <= iteration]
        count = self._count - len(kept) + len(earlier)
        total = self._sum - sum(value for value, i in kept if i > iteration)
        self._restore(earlier, count, total)
        for later, value in values.items():
            self.append(value, later)

    def median(self, window_size: int) -> float:
        """Returns the median of the newest `window_size` values; NaN if one of them is."""
        values = sorted(value for value, _ in self.last(window_size))
        # A sum is NaN if one of its values is, and of opposite infinities.
        if math.isnan(sum(values)) and any(map(math.isnan, values)):
            return math.nan
        middle = len(values) // 2
        return values[middle] if len(values) % 2 else (values[middle - 1] + values[middle]) / 2

    def avg(self, window_size: int) -> float:
        """Returns the mean of the newest `window_size` values."""
        values = [value for value, _ in self.last(window_size)]
        return sum(values) / len(values)

    def global_avg(self) -> float:
        """Returns the mean of all values ever put, those no longer kept included."""
        self._settle()
        return self._sum / self._count

    def values(self) -> list[tuple[float, int]]:
        """Returns all values that are kept, as (value, iteration), oldest first."""
        self._settle()
        return self.last(self._max_length) if self._values else []

    def state_dict(self) -> dict[str, Any]:
        """Returns the kept values in order, and what `global_avg` needs."""
        kept = self.values()
        return {
            "values": torch.tensor([value for value, _ in kept], dtype=torch.float64),
            "iterations": torch.tensor([iteration for _, iteration in kept], dtype=torch.int64),
            "count": self._count,
            "sum": self._sum,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Replaces everything by what `state_dict` returned."""
        self._settle()
        kept = zip(state["values"].tolist(), state["iterations"].tolist(), strict=True)
        self._restore(list(kept)[-self._max_length :], state["count"], state["sum"])

    def _restore(self, kept: list[tuple[float, int]], count: int, total: float) -> None:
        self._values = array("d", (value for value, _ in kept))
        self._iterations = array("q", (iteration for _, iteration in kept))
        self._start = 0
        self._count = count
        self._sum = total

    def _settle(self) -> None:
        if self.num_waiting and self._deferred is not None:
            self._deferred.flush()
