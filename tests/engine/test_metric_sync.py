"""`exchange` runs here on two simulated ranks; runs as a script on two real ones."""

import json
import math
import os
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import trainkit
from trainkit.engine.launch import launch
from trainkit.engine.metric_sync import (
    Rows,
    exchange,
    local_rows,
    raise_if_not_finite,
    reduce_rows,
)
from trainkit.engine.non_finite import NonFiniteError
from trainkit.utils import comm
from trainkit.utils.events.storage import EventStorage

Exchanged = tuple[list[Rows], list[int]]

SAME: list[Rows] = [{3: {"loss": 1.0, "data_time": 0.1}}, {3: {"loss": 3.0, "data_time": 0.4}}]
DIFFERENT: list[Rows] = [
    {3: {"loss": 1.0}, 5: {"loss": 2.0}},
    {4: {"loss": 10.0}, 5: {"loss": 4.0, "längere": 0.5}},
]


class TwoRanks:
    """Two threads that meet in `all_gather_tensor`."""

    def __init__(self) -> None:
        self.num_gathers = 0
        self._rank = threading.local()
        self._tensors: list[torch.Tensor] = [torch.empty(0), torch.empty(0)]
        self._barrier = threading.Barrier(2, timeout=10)

    def gather(self, tensor: torch.Tensor) -> torch.Tensor:
        self._tensors[self._rank.value] = tensor
        self._barrier.wait()
        gathered = torch.stack(self._tensors)
        if self._rank.value == 0:
            self.num_gathers += 1
        self._barrier.wait()
        return gathered

    def run(self, function: Callable[[int], Exchanged]) -> list[Exchanged]:
        results: dict[int, Exchanged] = {}

        def run_rank(rank: int) -> None:
            self._rank.value = rank
            results[rank] = function(rank)

        threads = [threading.Thread(target=run_rank, args=(rank,)) for rank in range(2)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        return [results[0], results[1]]


@pytest.fixture
def two_ranks(monkeypatch: pytest.MonkeyPatch) -> TwoRanks:
    ranks = TwoRanks()
    monkeypatch.setattr(comm, "get_world_size", lambda: 2)
    monkeypatch.setattr(comm, "all_gather_tensor", ranks.gather)
    return ranks


def test_one_rank_gets_its_own_rows_back() -> None:
    assert exchange(SAME[0], 2) == ([SAME[0]], [2])


def test_both_ranks_get_the_rows_and_stop_codes_of_both(two_ranks: TwoRanks) -> None:
    results = two_ranks.run(lambda rank: exchange(SAME[rank], rank + 1))
    assert results == [(SAME, [1, 2])] * 2
    # The header and the values: names do not travel while ranks agree on them.
    assert two_ranks.num_gathers == 2


def test_d09_names_and_iterations_may_differ_between_ranks(two_ranks: TwoRanks) -> None:
    for tables, stops in two_ranks.run(lambda rank: exchange(DIFFERENT[rank], 0)):
        assert [{i: row for i, row in table.items() if row} for table in tables] == DIFFERENT
        assert stops == [0, 0]


def test_a_rank_without_rows_takes_part(two_ranks: TwoRanks) -> None:
    rows: list[Rows] = [{}, {7: {"loss": 1.5}}]
    for tables, _ in two_ranks.run(lambda rank: exchange(rows[rank], 0)):
        assert tables == [{7: {}}, rows[1]]


def test_not_finite_values_arrive_as_they_are(two_ranks: TwoRanks) -> None:
    rows: list[Rows] = [{0: {"a": math.nan, "b": math.inf}}, {0: {"a": 1.0, "b": -math.inf}}]
    for tables, _ in two_ranks.run(lambda rank: exchange(rows[rank], 0)):
        assert math.isnan(tables[0][0]["a"])
        assert [tables[0][0]["b"], tables[1][0]["b"]] == [math.inf, -math.inf]


def test_rows_are_reduced_to_means_and_the_slowest_data_time() -> None:
    assert reduce_rows(SAME) == {3: {"loss": 2.0, "data_time": 0.4}}
    assert reduce_rows(DIFFERENT) == {
        3: {"loss": 1.0},
        4: {"loss": 10.0},
        5: {"loss": 3.0, "längere": 0.5},
    }
    assert reduce_rows([{0: {"val/data_time": 1.0}}, {0: {"val/data_time": 3.0}}]) == {
        0: {"val/data_time": 3.0}
    }


def test_local_rows_are_those_of_later_iterations_in_order() -> None:
    with EventStorage() as storage:
        for iteration in range(4):
            storage.iter = iteration
            storage.put_scalar("loss", 10.0 + iteration)
            if iteration == 2:
                storage.put_scalar("rare", 0.5)
        assert local_rows(storage, ["loss", "rare"], since=1) == {
            2: {"loss": 12.0, "rare": 0.5},
            3: {"loss": 13.0},
        }


def test_the_first_bad_iteration_and_its_rank_are_named() -> None:
    tables: list[Rows] = [
        {4: {"total_loss": 1.0}, 5: {"total_loss": math.nan}},
        {4: {"total_loss": math.inf, "loss_a": 0.25}},
    ]
    with pytest.raises(
        FloatingPointError,
        match=r"Iteration 4 on rank 1 is not finite: total_loss=inf, loss_a=0\.25\..*BASE_LR",
    ):
        raise_if_not_finite(tables)


def test_the_rank_whose_loss_it_was_is_named_and_not_one_with_the_common_gradient() -> None:
    bad, fine = {"grad_norm": math.nan, "total_loss": math.nan}, {"total_loss": 1.0}
    with pytest.raises(FloatingPointError, match=r"Iteration 2 on rank 1 .*total_loss=nan"):
        raise_if_not_finite([{2: {"grad_norm": math.nan, **fine}}, {2: bad}])


@pytest.mark.parametrize(
    ("bad", "asked"),
    [
        ({"total_loss": math.nan, "grad_norm": math.nan}, (2, 1)),
        # It is the same on all ranks, and blames none of them.
        ({"total_loss": 1.0, "grad_norm": math.nan}, (2, None)),
    ],
)
def test_the_error_tells_samples_of_the_rank_to_blame_or_of_all(
    bad: dict[str, float], asked: tuple[int, int | None]
) -> None:
    norm = {"total_loss": 1.0, "grad_norm": bad["grad_norm"]}
    questions: list[tuple[int, int | None]] = []

    def describe(iteration: int, rank: int | None) -> str:
        questions.append((iteration, rank))
        return "Its samples: 7. "

    with pytest.raises(NonFiniteError, match=r"\. Its samples: 7\. No checkpoint holds") as e:
        raise_if_not_finite([{1: {"total_loss": 1.0}, 2: norm}, {2: bad}], describe)
    assert (questions, e.value.iteration) == ([asked], 2)


@pytest.mark.parametrize("name", ["grad_norm", "total_loss", "val/total_loss"])
def test_losses_and_gradient_norm_must_be_finite(name: str) -> None:
    with pytest.raises(FloatingPointError, match=f"Iteration 0 on rank 0 .*{name}=nan"):
        raise_if_not_finite([{0: {name: math.nan}}])


def test_a_metric_may_be_nan() -> None:
    raise_if_not_finite([{0: {"total_loss": 1.0, "precision": math.nan}}])


@pytest.mark.slow
def test_two_real_processes_exchange_like_the_simulated_ones(tmp_path: Path) -> None:
    root = str(Path(trainkit.__file__).parents[1])
    subprocess.run(
        [sys.executable, __file__, str(tmp_path)],
        env={**os.environ, "PYTHONPATH": root, "GLOO_SOCKET_IFNAME": "lo"},
        check=True,
        timeout=60,
    )
    results = [json.loads((tmp_path / f"{rank}.json").read_text("utf-8")) for rank in range(2)]
    assert results[0] == results[1]
    assert results[0]["stops"] == [0, 10]
    assert results[0]["reduced"] == {
        "3": {"loss": 1.0},
        "4": {"loss": 10.0},
        "5": {"loss": 3.0, "längere": 0.5},
    }
    assert results[0]["error"].startswith("Iteration 9 on rank 1 is not finite: total_loss=nan")


def report(folder: str) -> None:
    rank = comm.get_rank()
    tables, stops = exchange(DIFFERENT[rank], 10 * rank)
    result: dict[str, Any] = {"stops": stops, "reduced": reduce_rows(tables)}
    try:
        raise_if_not_finite(exchange({9: {"total_loss": [1.0, math.nan][rank]}}, 0)[0])
    except FloatingPointError as e:
        result["error"] = str(e)
    Path(folder, f"{rank}.json").write_text(json.dumps(result), "utf-8")


if __name__ == "__main__":
    torch.set_num_threads(1)
    launch(report, 2, args=(sys.argv[1],))
