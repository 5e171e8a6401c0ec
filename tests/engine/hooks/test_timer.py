import logging
import re
import time
from typing import Any

import pytest

from trainkit.engine.hooks.callback import CallbackHook
from trainkit.engine.hooks.timer import IterationTimer


class Clock:
    """`time.perf_counter`, put forward by the test."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.now = 100.0
        monkeypatch.setattr(time, "perf_counter", lambda: self.now)
        monkeypatch.setattr("fvcore.common.timer.perf_counter", lambda: self.now)

    def advance(self, seconds: float) -> None:
        self.now += seconds


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    return Clock(monkeypatch)


def timed_loop(loop: Any, clock: Clock, **kwargs: Any) -> Any:
    """A loop of steps of 2 s, 10 s in the first two, and 5 s of another hook after each."""

    class Timed(loop):  # type: ignore[misc]  # the fixture's class
        def run_step(self) -> None:
            clock.advance(10.0 if self.iter - self.start_iter < 2 else 2.0)

    trainer = Timed()
    slow = CallbackHook(
        before_step=lambda t: clock.advance(0), after_step=lambda t: clock.advance(5)
    )
    trainer.register_hooks([slow, IterationTimer(**kwargs)])
    return trainer


def test_seconds_of_the_step_alone_are_put_after_the_warmup(loop: Any, clock: Clock) -> None:
    trainer = timed_loop(loop, clock)
    trainer.train(0, 5)
    assert trainer.storage.history("time").values() == [(2.0, 2), (2.0, 3), (2.0, 4)]


def test_a_resumed_run_puts_its_first_seconds_but_does_not_count_them_as_speed(
    loop: Any, clock: Clock, caplog: pytest.LogCaptureFixture
) -> None:
    trainer = timed_loop(loop, clock, warmup_iter=4)
    with caplog.at_level(logging.INFO):
        trainer.train(10, 15)
    assert [i for _, i in trainer.storage.history("time").values()] == [10, 11, 12, 13, 14]
    assert "Overall training speed: 2 iterations" in caplog.text


def test_speed_and_share_of_hooks_are_logged(
    loop: Any, clock: Clock, caplog: pytest.LogCaptureFixture
) -> None:
    trainer = timed_loop(loop, clock)
    with caplog.at_level(logging.INFO):
        trainer.train(0, 5)
    assert "Overall training speed: 3 iterations in 0:00:06 (2.0000 s / it)" in caplog.text
    assert "Total training time: 0:00:51 (0:00:25 on hooks)" in caplog.text


def test_a_second_run_counts_anew(
    loop: Any, clock: Clock, caplog: pytest.LogCaptureFixture
) -> None:
    trainer = timed_loop(loop, clock)
    trainer.train(0, 5)
    with caplog.at_level(logging.INFO):
        trainer.train(0, 5)
    assert len(re.findall(r"Total training time: 0:00:51", caplog.text)) == 1


def test_a_run_shorter_than_the_warmup_logs_no_speed(
    loop: Any, clock: Clock, caplog: pytest.LogCaptureFixture
) -> None:
    trainer = timed_loop(loop, clock)
    with caplog.at_level(logging.INFO):
        trainer.train(0, 2)
    assert "Overall training speed" not in caplog.text
    assert "Total training time: 0:00:30" in caplog.text
    assert "time" not in trainer.storage.histories()
