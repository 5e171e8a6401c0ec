import os
import signal
import threading

import pytest

from trainkit.engine import interrupt
from trainkit.engine.interrupt import interrupt_as_request


def press_ctrl_c() -> None:
    os.kill(os.getpid(), signal.SIGINT)


def press_in_block(log: list[str], times: int) -> None:
    """Writes down the requests, and "end" when the block comes to its end."""
    with interrupt_as_request(log.append):
        for _ in range(times):
            press_ctrl_c()
        log.append("end")


def test_the_first_ctrl_c_is_a_request_and_raises_after_the_block() -> None:
    log: list[str] = []
    with pytest.raises(KeyboardInterrupt):
        press_in_block(log, times=1)
    assert log == ["Ctrl-C", "end"]
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


def test_the_second_ctrl_c_interrupts_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(interrupt, "ONE_PRESS_SECONDS", 0.0)
    log: list[str] = []
    with pytest.raises(KeyboardInterrupt):
        press_in_block(log, times=2)
    assert log == ["Ctrl-C"]


def test_two_signals_of_one_press_are_one_request() -> None:
    log: list[str] = []
    with pytest.raises(KeyboardInterrupt):
        press_in_block(log, times=2)
    assert log == ["Ctrl-C", "end"]


def test_an_error_in_the_block_wins_over_the_interrupt() -> None:
    def fail(log: list[str]) -> None:
        with interrupt_as_request(log.append):
            press_ctrl_c()
            raise ValueError("mine")

    with pytest.raises(ValueError, match="mine"):
        fail([])
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


def test_without_ctrl_c_nothing_is_raised_and_the_handler_is_restored() -> None:
    with interrupt_as_request(lambda reason: None):
        assert signal.getsignal(signal.SIGINT) is not signal.default_int_handler
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


def test_a_handler_of_the_users_is_left_alone() -> None:
    caught: list[int] = []
    previous = signal.signal(signal.SIGINT, lambda signum, frame: caught.append(signum))
    reasons: list[str] = []
    try:
        with interrupt_as_request(reasons.append):
            press_ctrl_c()
    finally:
        signal.signal(signal.SIGINT, previous)
    assert (caught, reasons) == ([signal.SIGINT], [])


def test_another_thread_runs_the_block_as_it_is() -> None:
    done: list[bool] = []

    def run() -> None:
        with interrupt_as_request(lambda reason: None):
            done.append(signal.getsignal(signal.SIGINT) is signal.default_int_handler)

    thread = threading.Thread(target=run)
    thread.start()
    thread.join()
    assert done == [True]
