"""The metrics of steps: put without waiting, brought together and checked when they are due."""

import math

import torch

from trainkit.engine.metric_sync import exchange, local_rows, raise_if_not_finite, reduce_rows
from trainkit.utils import comm
from trainkit.utils.events.storage import EventStorage

# What a rank asks for when ranks agree; the larger request wins.
FINISH, INTERRUPT = 1, 2


class StepMetrics:
    """Losses, gradient norms and waiting times of steps, since ranks last brought them together.

    Attributes:
        since: The newest iteration whose metrics were brought together.
    """

    def __init__(self) -> None:
        self.since = -1
        # A dict keeps the order in which names came up.
        self._names: dict[str, None] = {}

    def put(
        self,
        storage: EventStorage,
        loss_dict: dict[str, torch.Tensor],
        data_time: float,
        prefix: str,
        grad_norm: torch.Tensor | None,
    ) -> bool:
        """Puts a step into the storage, as one row that stays on its device.

        Args:
            storage: The storage.
            loss_dict: 0-d tensors by name; their sum is added as `total_loss` if it is missing.
            data_time: Seconds spent waiting for the batch.
            prefix: Put before each name.
            grad_norm: The norm of the gradients, 0-d and the same on all ranks, or None.

        Returns:
            False if the step is known not to be finite, on all ranks alike. What is on an
            accelerator, or without a gradient norm on other ranks, is known when it is synced.
        """
        row = {name: value.detach() for name, value in loss_dict.items()}
        if "total_loss" not in row:
            row["total_loss"] = torch.stack(list(row.values())).sum()
        # What all ranks know alike.
        health = [row["total_loss"]] if comm.get_world_size() == 1 else []
        if grad_norm is not None:
            row["grad_norm"] = grad_norm.detach()
            health.append(row["grad_norm"])
        self._names.update(dict.fromkeys(prefix + name for name in (*row, "data_time")))
        # Metrics may come from the CPU beside losses from an accelerator.
        for device in {value.device: None for value in row.values()}:
            here = {prefix + name: v.float() for name, v in row.items() if v.device == device}
            storage.put_row(list(here), torch.stack(list(here.values())))
        storage.put_scalar(prefix + "data_time", data_time)
        storage.put_scalar(prefix + "rank_data_time", data_time)
        return all(v.device.type != "cpu" or math.isfinite(v.item()) for v in health)

    def sync(self, storage: EventStorage, request: tuple[str, bool] | None) -> list[int]:
        """Reduces what was put since the last time and checks it, on every rank.

        Args:
            storage: The storage; afterwards it holds reduced values.
            request: This rank's request to stop, as (reason, whether it is finished).

        Returns:
            Every rank's request, in rank order: 0, FINISH or INTERRUPT.

        Raises:
            FloatingPointError: On every rank, if a value of any rank is not finite.
        """
        stop = 0 if request is None else FINISH if request[1] else INTERRUPT
        names = [name for name in self._names if name in storage.histories()]
        tables, stops = exchange(local_rows(storage, names, self.since), stop)
        if len(tables) > 1:
            storage.replace_rows(self.since, reduce_rows(tables))
        self.since = storage.iter
        raise_if_not_finite(tables)
        return stops
