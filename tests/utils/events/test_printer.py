import itertools
import logging
import math
import re

import pytest

from trainkit.utils.events.printer import CommonMetricPrinter
from trainkit.utils.events.storage import EventStorage


@pytest.fixture(autouse=True)
def _capture_info(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)


@pytest.fixture
def _clock(monkeypatch: pytest.MonkeyPatch) -> None:
    """A clock that goes on by 10 seconds whenever it is read."""
    ticks = itertools.count(100.0, 10.0)
    monkeypatch.setattr("time.perf_counter", lambda: next(ticks))


def lines(caplog: pytest.LogCaptureFixture) -> list[str]:
    return [re.sub(r"  max_mem: \d+M", "", message) for message in caplog.messages]


def test_line_holds_everything_a_person_wants_to_know(caplog: pytest.LogCaptureFixture) -> None:
    with EventStorage() as storage:
        for i in range(20):
            storage.iter = i
            storage.put_scalar("total_loss", 100.0 - i)
            storage.put_scalar("[metric]iou", 0.5)
            storage.put_scalar("top1", 0.75, smoothing_hint=False)
            storage.put_scalar("time", 0.25 if i < 19 else 0.5)
            storage.put_scalar("data_time", 0.125 if i % 2 else 0.375)
            storage.put_scalar("lr", 0.0123456, smoothing_hint=False)
        CommonMetricPrinter(max_iter=100).write()
    assert lines(caplog) == [
        " eta: 0:00:20  iter: 19  total_loss: 90.5  [metric]iou: 0.5  "
        "time: 0.2625  last_time: 0.5000  data_time: 0.2500  last_data_time: 0.1250  lr: 0.012346"
    ]


def test_d35_every_smoothed_metric_is_shown(caplog: pytest.LogCaptureFixture) -> None:
    with EventStorage() as storage:
        storage.put_scalars(accuracy=0.5, grad_norm=2.0, rank_data_time=0.1)
        storage.put_scalar("[metric]scale", 8.0, smoothing_hint=False)
        storage.put_scalar("val/top1", 0.75, smoothing_hint=False)
        CommonMetricPrinter().write()
    assert lines(caplog) == [" iter: 0  accuracy: 0.5  grad_norm: 2  [metric]scale: 8"]


def test_eta_is_the_median_time_of_the_iterations_to_come() -> None:
    with EventStorage() as storage:
        for i, seconds in enumerate([60.0, 2.0, 2.0, 3.0, 60.0]):
            storage.iter = i
            storage.put_scalar("time", seconds)
        CommonMetricPrinter(max_iter=1005).write()
    # After iteration 4, 1000 iterations of 3 seconds each are to come.
    assert storage.latest()["eta_seconds"] == (3000.0, 4)
    assert storage.smoothing_hints()["eta_seconds"] is False


def test_long_eta_names_the_days(caplog: pytest.LogCaptureFixture) -> None:
    with EventStorage() as storage:
        storage.put_scalar("time", 90.0)
        CommonMetricPrinter(max_iter=1961).write()
    assert "eta: 2 days, 1:00:00  iter: 0" in lines(caplog)[0]


@pytest.mark.usefixtures("_clock")
def test_eta_before_the_timer_counts_is_the_pace_of_the_printer() -> None:
    printer = CommonMetricPrinter(max_iter=100)
    with EventStorage() as storage:
        printer.write()
        assert "eta_seconds" not in storage.histories()
        storage.iter = 5
        printer.write()
    # 5 iterations took 10 seconds, and 94 are to come.
    assert storage.latest()["eta_seconds"] == (188.0, 5)


def test_d35_two_lines_in_one_iteration_without_times(caplog: pytest.LogCaptureFixture) -> None:
    printer = CommonMetricPrinter(max_iter=100)
    with EventStorage(3):
        printer.write()
        printer.write()
    assert lines(caplog) == [" iter: 3", " iter: 3"]


def test_run_that_is_over_prints_nothing(caplog: pytest.LogCaptureFixture) -> None:
    printer = CommonMetricPrinter(max_iter=20)
    with EventStorage() as storage:
        storage.put_scalar("total_loss", 1.0)
        storage.iter = 19
        printer.write()
        storage.iter = 20
        printer.write()
    assert lines(caplog) == [" iter: 19  total_loss: 1"]


def test_without_the_length_of_the_run_there_is_no_eta(caplog: pytest.LogCaptureFixture) -> None:
    with EventStorage() as storage:
        storage.put_scalar("time", 1.0)
        CommonMetricPrinter().write()
        CommonMetricPrinter().write()
    assert set(lines(caplog)) == {" iter: 0  time: 1.0000  last_time: 1.0000"}
    assert "eta_seconds" not in storage.histories()


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_loss_that_is_not_finite_is_shown_as_such(
    caplog: pytest.LogCaptureFixture, value: float
) -> None:
    with EventStorage() as storage:
        for i in range(3):
            storage.put_scalar("total_loss", value, cur_iter=i)
        CommonMetricPrinter(max_iter=9).write()
    assert lines(caplog) == [f" iter: 0  total_loss: {value}"]


def test_losses_are_medians_over_the_window(caplog: pytest.LogCaptureFixture) -> None:
    with EventStorage() as storage:
        for i, value in enumerate([1000.0, 1.0, 5.0, 3.0]):
            storage.put_scalar("loss_cls", value, cur_iter=i)
        CommonMetricPrinter(window_size=3).write()
    assert lines(caplog) == [" iter: 0  loss_cls: 3"]


def test_lines_come_from_the_logger_of_the_events(caplog: pytest.LogCaptureFixture) -> None:
    with EventStorage():
        CommonMetricPrinter().write()
    assert [record.name for record in caplog.records] == ["trainkit.utils.events"]
