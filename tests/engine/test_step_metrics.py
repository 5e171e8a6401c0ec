import math
from typing import Any

import pytest
import torch

from trainkit.engine import step_metrics
from trainkit.engine.non_finite import NonFiniteError
from trainkit.engine.step_metrics import StepMetrics, StopRequest, write_metrics
from trainkit.utils import comm
from trainkit.utils.events.storage import EventStorage


def put(
    metrics: StepMetrics,
    storage: EventStorage,
    values: dict[str, Any],
    grad_norm: torch.Tensor | None = None,
    prefix: str = "",
) -> bool:
    return metrics.put(storage, values, 0.01, prefix, grad_norm)


def describe(place: Any, rank: int | None) -> str:
    return f"Samples at {place} of rank {rank}. "


def sync(metrics: StepMetrics, storage: EventStorage) -> StopRequest | None:
    return metrics.sync(storage, describe)


def test_values_reach_the_storage_with_their_sum_and_the_waiting_time() -> None:
    storage = EventStorage()
    losses = {"a": torch.tensor(1.0, requires_grad=True), "b": torch.tensor(2.0)}
    assert put(StepMetrics(), storage, losses, torch.tensor(0.5))
    assert {name: value for name, (value, _) in storage.latest().items()} == {
        "a": 1.0,
        "b": 2.0,
        "total_loss": 3.0,
        "grad_norm": 0.5,
        "data_time": 0.01,
        "rank_data_time": 0.01,
    }


def test_a_total_that_is_given_is_not_summed_again() -> None:
    storage = EventStorage()
    put(StepMetrics(), storage, {"total_loss": torch.tensor(1.0), "accuracy": torch.tensor(0.5)})
    assert storage.history("total_loss").latest() == 1.0


def test_a_prefix_comes_before_every_name() -> None:
    storage = EventStorage()
    put(StepMetrics(), storage, {"a": torch.tensor(1.0)}, prefix="val/")
    names = {"val/a", "val/total_loss", "val/data_time", "val/rank_data_time"}
    assert storage.histories().keys() == names


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_a_bad_loss_or_gradient_norm_on_the_cpu_is_known_at_once(bad: float) -> None:
    metrics, storage = StepMetrics(), EventStorage()
    fine, broken = torch.tensor(1.0), torch.tensor(bad)
    assert put(metrics, storage, {"a": fine}, fine)
    assert not put(metrics, storage, {"a": broken})
    assert not put(metrics, storage, {"a": broken}, fine)
    assert not put(metrics, storage, {"a": fine}, broken)


def test_a_metric_that_is_nan_does_not_count() -> None:
    metrics, storage = StepMetrics(), EventStorage()
    values = {"total_loss": torch.tensor(1.0), "precision": torch.tensor(math.nan)}
    assert put(metrics, storage, values, torch.tensor(1.0))
    sync(metrics, storage)


def test_sync_raises_for_what_was_put_since_the_last_one_and_tells_the_samples() -> None:
    metrics, storage = StepMetrics(), EventStorage()
    for iteration in range(6):
        storage.iter = iteration
        metrics.places[iteration] = 10 * iteration
        put(metrics, storage, {"a": torch.tensor(1.0 if iteration != 4 else math.nan)})
        if iteration == 3:
            assert sync(metrics, storage) is None
            assert (metrics.since, metrics.places) == (3, {})
    # Whoever asks again hears the same, and gets no state.
    for _ in range(2):
        with pytest.raises(NonFiniteError, match=r"4 on rank 0 .*\. Samples at 40 of rank 0\. No"):
            sync(metrics, storage)
    assert metrics.places[4] == 40
    metrics.begin(4)
    assert metrics.places == {}
    assert sync(metrics, EventStorage(4)) is None


def test_samples_of_an_iteration_whose_place_nobody_noted_are_not_told() -> None:
    metrics, storage = StepMetrics(), EventStorage()
    put(metrics, storage, {"a": torch.tensor(math.nan)})
    with pytest.raises(NonFiniteError, match=r"data_time=0\.01\. No checkpoint"):
        sync(metrics, storage)


@pytest.mark.parametrize("iteration", [0, 5])
def test_a_sync_before_a_step_leaves_that_steps_values_to_the_next(iteration: int) -> None:
    metrics, storage = StepMetrics(), EventStorage(iteration)
    metrics.begin(iteration)
    sync(metrics, storage)
    put(metrics, storage, {"a": torch.tensor(math.nan)})
    with pytest.raises(NonFiniteError, match=f"Iteration {iteration} on rank 0"):
        sync(metrics, storage)


def test_a_request_to_stop_comes_back_once() -> None:
    metrics, storage = StepMetrics(), EventStorage()
    assert sync(metrics, storage) is None
    for request in (StopRequest("patience", finished=True), StopRequest("SIGTERM", exit_code=143)):
        metrics.ask(request)
        assert sync(metrics, storage) == request
        assert sync(metrics, storage) is None


def test_a_new_run_forgets_the_request_of_the_one_before() -> None:
    metrics, storage = StepMetrics(), EventStorage()
    metrics.ask(StopRequest("limit of time"))
    metrics.begin(0)
    assert sync(metrics, storage) is None


FINISHED = StopRequest("patience", finished=True)
INTERRUPTED = StopRequest("limit of time")
USR1, TERM = StopRequest("SIGUSR1", exit_code=138), StopRequest("SIGTERM", exit_code=143)


@pytest.mark.parametrize(
    ("asked", "kept"),
    [
        ([FINISHED, INTERRUPTED], INTERRUPTED),
        ([INTERRUPTED, FINISHED], INTERRUPTED),
        ([USR1, INTERRUPTED], USR1),
        ([USR1, TERM], TERM),
        ([TERM, USR1], TERM),
    ],
)
def test_of_several_requests_of_a_rank_the_stronger_one_is_kept(
    asked: list[StopRequest], kept: StopRequest
) -> None:
    metrics = StepMetrics()
    for request in asked:
        metrics.ask(request)
    assert sync(metrics, EventStorage()) == kept


@pytest.mark.parametrize(
    ("own", "other", "agreed"),
    [
        (None, None, None),
        (FINISHED, None, FINISHED),
        (None, FINISHED, StopRequest("request of rank 1", finished=True)),
        (None, INTERRUPTED, StopRequest("request of rank 1")),
        # An interrupted run is resumed and can still finish; a finished one cannot be resumed.
        (FINISHED, INTERRUPTED, StopRequest("request of rank 1")),
        (FINISHED, TERM, StopRequest("request of rank 1", exit_code=143)),
        (TERM, USR1, TERM),
        (USR1, USR1, USR1),
    ],
)
def test_ranks_agree_on_the_strongest_request(
    own: StopRequest | None,
    other: StopRequest | None,
    agreed: StopRequest | None,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(comm, "get_world_size", lambda: 2)
    code = other.code if other else 0
    monkeypatch.setattr(step_metrics, "exchange", lambda rows, stop: ([rows, rows], [stop, code]))
    metrics = StepMetrics()
    if own:
        metrics.ask(own)
    assert sync(metrics, EventStorage()) == agreed


@pytest.mark.parametrize(("loss", "norm", "known"), [(math.nan, 1.0, True), (1.0, math.nan, False)])
def test_of_several_ranks_only_what_all_know_alike_is_judged_at_once(
    loss: float, norm: float, known: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(comm, "get_world_size", lambda: 2)
    values = {"a": torch.tensor(loss)}
    assert put(StepMetrics(), EventStorage(), values, torch.tensor(norm)) is known


def test_d06_values_of_a_device_stay_there_until_they_are_read(fake_cuda: Any) -> None:
    metrics, storage = StepMetrics(), EventStorage()
    for iteration in range(20):
        storage.iter = iteration
        losses = {"a": fake_cuda(torch.tensor(1.0)), "b": fake_cuda(torch.tensor(2.0))}
        assert put(metrics, storage, losses, fake_cuda(torch.tensor(0.5)))
        storage.put_scalar("lr", 0.1)
    assert fake_cuda.num_transfers == 0
    with fake_cuda.transfers_allowed():
        sync(metrics, storage)
    assert fake_cuda.num_transfers == 1
    assert storage.history("total_loss").values() == [(3.0, i) for i in range(20)]
    assert storage.history("grad_norm").latest() == 0.5


def test_a_bad_value_of_a_device_is_found_when_it_is_read(fake_cuda: Any) -> None:
    metrics, storage = StepMetrics(), EventStorage()
    assert put(metrics, storage, {"a": fake_cuda(torch.tensor(math.nan))})
    with fake_cuda.transfers_allowed(), pytest.raises(NonFiniteError, match=r"0 on rank 0"):
        sync(metrics, storage)


def test_a_bad_value_of_a_device_is_known_at_once_where_each_step_is_judged(fake_cuda: Any) -> None:
    metrics, storage = StepMetrics(judges_now=True), EventStorage()
    with fake_cuda.transfers_allowed():
        assert put(metrics, storage, {"a": fake_cuda(torch.tensor(1.0))})
        assert not put(metrics, storage, {"a": fake_cuda(torch.tensor(math.nan))})


def test_a_metric_from_the_cpu_may_stand_beside_losses_of_a_device(fake_cuda: Any) -> None:
    metrics, storage = StepMetrics(), EventStorage()
    values = {"total_loss": fake_cuda(torch.tensor(1.0)), "accuracy": torch.tensor(0.25)}
    put(metrics, storage, values)
    assert storage.history("accuracy").latest() == 0.25
    assert fake_cuda.num_transfers == 0
    with fake_cuda.transfers_allowed():
        assert storage.history("total_loss").latest() == 1.0


def test_metrics_of_a_step_of_ones_own_are_reduced_and_judged_at_once() -> None:
    with EventStorage(4) as storage:
        write_metrics({"a": torch.tensor(1.0), "b": torch.tensor(2.0)}, 0.01, 4, prefix="val_")
        assert storage.latest()["val_total_loss"] == (3.0, 4)
        storage.iter = 5
        with pytest.raises(NonFiniteError, match="Iteration 5 on rank 0"):
            write_metrics({"a": torch.tensor(math.nan)}, 0.01, 5)
