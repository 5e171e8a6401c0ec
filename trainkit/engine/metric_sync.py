"""How ranks bring their metrics together: one matrix of iterations and names, never pickled."""

import itertools
import json
import math
import zlib
from collections.abc import Callable, Iterable

import torch

from trainkit.engine.non_finite import NonFiniteError
from trainkit.utils import comm
from trainkit.utils.events.storage import EventStorage

HEALTH = ("total_loss", "grad_norm")
"""What must be finite in a step; names may have a prefix.

The gradient's norm is the same on all ranks, so that it blames one only if no rank's own loss does.
"""

Rows = dict[int, dict[str, float]]
"""Values by iteration and name."""


def local_rows(storage: EventStorage, names: Iterable[str], since: int) -> Rows:
    """Reads the values of later iterations than `since`; the one point that may synchronize."""
    rows: Rows = {}
    histories = storage.histories()
    for name in names:
        for value, iteration in reversed(histories[name].after(since)):
            rows.setdefault(iteration, {})[name] = value
    return dict(sorted(rows.items()))


def exchange(rows: Rows, stop: int) -> tuple[list[Rows], list[int]]:
    """Gives every rank the rows and the stop code of every rank, in rank order.

    Ranks may hold different names and iterations; the layout itself travels only when it differs.
    """
    if comm.get_world_size() == 1:
        return [rows], [stop]
    iterations = list(rows)
    names = sorted({name for row in rows.values() for name in row})
    layout = json.dumps([iterations, names]).encode()
    header = torch.tensor([zlib.crc32(layout), len(layout), stop])
    headers = comm.all_gather_tensor(header)
    if (headers[:, :2] != headers[0, :2]).any():
        iterations, names = _common_layout(layout, int(headers[:, 1].max()))
    values = torch.full((len(iterations), len(names), 2), math.nan, dtype=torch.float64)
    for i, iteration in enumerate(iterations):
        for n, name in enumerate(names):
            present = name in rows.get(iteration, {})
            values[i, n, 0] = rows[iteration][name] if present else 0.0
            values[i, n, 1] = present
    tables = [
        {
            iteration: {name: v for name, (v, here) in zip(names, row, strict=True) if here}
            for iteration, row in zip(iterations, table, strict=True)
        }
        for table in comm.all_gather_tensor(values).tolist()
    ]
    return tables, headers[:, 2].tolist()


def _common_layout(layout: bytes, length: int) -> tuple[list[int], list[str]]:
    """Returns the iterations and names that any rank has."""
    padded = torch.tensor(list(layout.ljust(length)), dtype=torch.uint8)
    layouts = [json.loads(bytes(row)) for row in comm.all_gather_tensor(padded).tolist()]
    iterations = sorted({i for rank_iterations, _ in layouts for i in rank_iterations})
    return iterations, sorted({n for _, rank_names in layouts for n in rank_names})


def reduce_rows(tables: list[Rows]) -> Rows:
    """Returns the mean over the ranks that have a value; the slowest rank's for `data_time`."""
    reduced: Rows = {}
    for iteration in sorted({i for table in tables for i in table}):
        by_name: dict[str, list[float]] = {}
        for table in tables:
            for name, value in table.get(iteration, {}).items():
                by_name.setdefault(name, []).append(value)
        reduced[iteration] = {
            name: max(values) if name.endswith("data_time") else sum(values) / len(values)
            for name, values in by_name.items()
        }
    return reduced


def raise_if_not_finite(
    tables: list[Rows], describe: Callable[[int, int | None], str] = lambda iteration, rank: ""
) -> None:
    """Raises for the first iteration in which a rank's total loss or gradient norm is not finite.

    Other values may be NaN, such as a precision without predictions; a loss among them shows in the
    total.

    Args:
        tables: Each rank's values.
        describe: Given an iteration and a rank, or None, tells that rank's samples, or all.

    Raises:
        NonFiniteError: The same on every rank, with iteration, rank, samples and all values.
    """
    for iteration in sorted({i for table in tables for i in table}):
        for suffix, (rank, table) in itertools.product(HEALTH, enumerate(tables)):
            values = table.get(iteration, {})
            health = [v for name, v in values.items() if name.endswith(suffix)]
            if not all(math.isfinite(value) for value in health):
                listed = ", ".join(f"{name}={value:g}" for name, value in values.items())
                # The norm is the same everywhere: it blames no rank.
                samples = describe(iteration, rank if suffix == HEALTH[0] else None)
                raise NonFiniteError(
                    f"Iteration {iteration} on rank {rank} is not finite: {listed}. {samples}No "
                    "checkpoint holds anything later. Lower the learning rate (SOLVER.BASE_LR), "
                    "lengthen the warmup, or clip gradients (SOLVER.CLIP_GRADIENTS), and check the "
                    "data. SOLVER.NON_FINITE can leave such batches out.",
                    iteration,
                )
