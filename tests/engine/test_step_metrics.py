import math
from typing import Any

import pytest
import torch

from trainkit.engine.step_metrics import StepMetrics
from trainkit.utils.events.storage import EventStorage


def put(
    metrics: StepMetrics,
    storage: EventStorage,
    values: dict[str, Any],
    grad_norm: torch.Tensor | None = None,
    prefix: str = "",
) -> bool:
    return metrics.put(storage, values, 0.01, prefix, grad_norm)


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
    metrics.sync(storage, None)


def test_sync_raises_for_what_was_put_since_the_last_one() -> None:
    metrics, storage = StepMetrics(), EventStorage()
    for iteration in range(6):
        storage.iter = iteration
        put(metrics, storage, {"a": torch.tensor(1.0 if iteration != 4 else math.nan)})
        if iteration == 3:
            assert metrics.sync(storage, None) == [0]
    with pytest.raises(FloatingPointError, match="Iteration 4 on rank 0"):
        metrics.sync(storage, None)


def test_requests_to_stop_come_back_as_codes() -> None:
    metrics, storage = StepMetrics(), EventStorage()
    assert metrics.sync(storage, None) == [0]
    assert metrics.sync(storage, ("patience", True)) == [1]
    assert metrics.sync(storage, ("signal", False)) == [2]


def test_values_of_a_device_stay_there_until_they_are_read(fake_cuda: Any) -> None:
    metrics, storage = StepMetrics(), EventStorage()
    for iteration in range(20):
        storage.iter = iteration
        losses = {"a": fake_cuda(torch.tensor(1.0)), "b": fake_cuda(torch.tensor(2.0))}
        assert put(metrics, storage, losses, fake_cuda(torch.tensor(0.5)))
        storage.put_scalar("lr", 0.1)
    assert fake_cuda.num_transfers == 0
    with fake_cuda.transfers_allowed():
        metrics.sync(storage, None)
    assert fake_cuda.num_transfers == 1
    assert storage.history("total_loss").values() == [(3.0, i) for i in range(20)]
    assert storage.history("grad_norm").latest() == 0.5


def test_a_bad_value_of_a_device_is_found_when_it_is_read(fake_cuda: Any) -> None:
    metrics, storage = StepMetrics(), EventStorage()
    assert put(metrics, storage, {"a": fake_cuda(torch.tensor(math.nan))})
    with fake_cuda.transfers_allowed(), pytest.raises(FloatingPointError, match=r"0 on rank 0"):
        metrics.sync(storage, None)


def test_a_metric_from_the_cpu_may_stand_beside_losses_of_a_device(fake_cuda: Any) -> None:
    metrics, storage = StepMetrics(), EventStorage()
    values = {"total_loss": fake_cuda(torch.tensor(1.0)), "accuracy": torch.tensor(0.25)}
    put(metrics, storage, values)
    assert storage.history("accuracy").latest() == 0.25
    assert fake_cuda.num_transfers == 0
    with fake_cuda.transfers_allowed():
        assert storage.history("total_loss").latest() == 1.0
