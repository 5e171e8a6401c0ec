"""The metrics of steps: put without waiting, brought together and checked when they are due."""

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import torch

from trainkit.engine.metric_sync import (
    HEALTH,
    exchange,
    local_rows,
    raise_if_not_finite,
    reduce_rows,
)
from trainkit.utils import comm
from trainkit.utils.events.storage import EventStorage, get_event_storage

# What ranks exchange; the largest counts. An exit code, 128 and more, stands for itself.
_NOTHING, _FINISH, _INTERRUPT = 0, 1, 2


class StopRequest(NamedTuple):
    """What a rank asks for, as `TrainerBase.request_stop` takes it."""

    reason: str
    finished: bool = False
    exit_code: int = 0

    @property
    def code(self) -> int:
        """Stands for the request among ranks; the largest counts."""
        return _FINISH if self.finished else self.exit_code or _INTERRUPT


class StepMetrics:
    """Losses, gradient norms and waiting times of steps, since ranks last brought them together.

    Args:
        judges_now: Whether each step is judged when it is put on accelerators too, which waits.

    Attributes:
        since: The newest iteration whose metrics were brought together.
        places: Where in the data each later step began, as `BatchStream.place` tells it.
    """

    def __init__(self, judges_now: bool = False) -> None:
        self.judges_now = judges_now
        # A dict keeps the order in which names came up.
        self._names: dict[str, None] = {}
        self._layout: tuple[str, ...] = ()
        self.begin(0)

    def begin(self, start_iter: int) -> None:
        """Begins a run."""
        self.since = self._newest = start_iter - 1
        # Whether something was put that nobody has judged yet.
        self._must_read = False
        self.places: dict[int, Any] = {}
        self._request: StopRequest | None = None

    def ask(self, request: StopRequest) -> None:
        """Takes this rank's request to stop, which the next sync brings to all."""
        if self._request is None or request.code > self._request.code:
            self._request = request

    def put(
        self,
        storage: EventStorage,
        loss_dict: dict[str, torch.Tensor],
        data_time: float,
        prefix: str,
        grad_norm: torch.Tensor | float | None,
    ) -> bool:
        """Puts a step into the storage, as one row that stays on its device.

        Args:
            storage: The storage.
            loss_dict: 0-d tensors by name; their sum is added as `total_loss` if it is missing.
            data_time: Seconds spent waiting for the batch.
            prefix: Put before each name.
            grad_norm: The norm of the gradients, 0-d or a number, the same on all ranks; or None.

        Returns:
            False if the step is known not to be finite, on all ranks alike. What is on an
            accelerator, or without a gradient norm on other ranks, is known when it is synced.
        """
        row: dict[str, torch.Tensor | float] = dict(loss_dict)
        if "total_loss" not in row:
            row["total_loss"] = torch.stack([value.detach() for value in loss_dict.values()]).sum()
        if grad_norm is not None:
            row["grad_norm"] = grad_norm
        waiting = {}
        # Those on the CPU are read at once, which is free.
        for name, value in row.items():
            if isinstance(value, torch.Tensor):
                if not value.is_cpu:
                    waiting[name] = value.detach()
                    continue
                value = row[name] = value.item()
            storage.put_scalar(prefix + name, value)
        if waiting:
            _defer(storage, prefix, waiting)
        storage.put_scalar(prefix + "data_time", data_time)
        storage.put_scalar(prefix + "rank_data_time", data_time)
        if self._layout != (prefix, *row):
            self._layout = (prefix, *row)
            self._names.update(dict.fromkeys(prefix + name for name in (*row, "data_time")))
        self._newest = storage.iter
        return self._is_known_finite(row)

    def _is_known_finite(self, row: dict[str, torch.Tensor | float]) -> bool:
        is_finite = True
        for name in HEALTH:
            # What all ranks know alike.
            if name not in row or (name == "total_loss" and comm.get_world_size() > 1):
                continue
            value = row[name]
            if isinstance(value, torch.Tensor):
                if not self.judges_now:
                    self._must_read = True
                    continue
                value = value.item()
            is_finite &= math.isfinite(value)
        self._must_read |= not is_finite
        return is_finite

    def sync(self, storage: EventStorage, describe: Callable[..., str]) -> StopRequest | None:
        """Reduces what was put since the last time and checks it, on every rank.

        Args:
            storage: The storage; afterwards it holds reduced values.
            describe: Given a place and a rank, or None, tells that rank's samples, or all; asked
                about places only.

        Returns:
            The request to stop that all ranks follow, if any has one.

        Raises:
            NonFiniteError: On every rank, if a value of any rank is not finite.
        """
        own, self._request = self._request, None
        if comm.get_world_size() == 1 and not self._must_read:
            self.since = self._newest
            self.places.clear()
            return own
        names = [name for name in self._names if name in storage.histories()]
        rows = local_rows(storage, names, self.since)
        tables, codes = exchange(rows, own.code if own else _NOTHING)
        if len(tables) > 1:
            storage.replace_rows(self.since, reduce_rows(tables))
        # First, so that nobody who asks again gets a state of what is not finite.
        raise_if_not_finite(
            tables, lambda i, rank: describe(self.places[i], rank) if i in self.places else ""
        )
        self._must_read = False
        # Not the storage's iteration, whose values are yet to come if its step is.
        self.since = max((i for table in tables for i in table), default=self.since)
        self.places.clear()
        agreed = max(codes)
        if agreed == _NOTHING or (own and own.code == agreed):
            return own if agreed else None
        reason = f"request of rank {codes.index(agreed)}"
        return StopRequest(reason, agreed == _FINISH, agreed if agreed > _INTERRUPT else 0)


def _defer(storage: EventStorage, prefix: str, row: dict[str, torch.Tensor]) -> None:
    """Puts values of accelerators as rows that stay where they are."""
    for device in {value.device: None for value in row.values()}:
        here = {prefix + name: v.float() for name, v in row.items() if v.device == device}
        storage.put_row(list(here), torch.stack(list(here.values())))


def write_metrics(
    loss_dict: dict[str, torch.Tensor], data_time: float, cur_iter: int, prefix: str = ""
) -> None:
    """Puts a step's metrics into the current storage, reduced at once: a collective that waits.

    For detectron2's callers; `SimpleTrainer._write_metrics` waits for nothing.

    Args:
        loss_dict: 0-d tensors by name.
        data_time: Seconds spent waiting for the batch.
        cur_iter: The storage's iteration.
        prefix: Put before each name.

    Raises:
        NonFiniteError: On every rank, if a value of any rank is not finite.
    """
    storage, metrics = get_event_storage(), StepMetrics()
    metrics.begin(cur_iter)
    metrics.put(storage, loss_dict, data_time, prefix, None)
    metrics.sync(storage, lambda *at: "")
