"""`TrainerBase`; the steps of `SimpleTrainer` are tested in test_train_loop_step.py."""

import os
import signal
import sys
from types import FrameType
from typing import Any

import pytest

from trainkit.engine.hook_base import HookBase
from trainkit.engine.hooks.callback import CallbackHook
from trainkit.engine.preemption import PreemptedExit
from trainkit.engine.train_loop import TrainerBase
from trainkit.utils import stop_signals
from trainkit.utils.stop_signals import Interruption, StopRequested, raise_if_stopping

LEAVING = {
    signal.SIGINT: KeyboardInterrupt,
    signal.SIGTERM: PreemptedExit,
    signal.SIGUSR1: PreemptedExit,
}


class Signalled(HookBase):
    """Gets signals in one of its methods, in one iteration."""

    def __init__(self, at: int, *signals: int, method: str = "before_step") -> None:
        self.at = at
        self.signals = signals
        setattr(self, method, self._get)

    def _get(self) -> None:
        if self.trainer.iter == self.at:
            for signum in self.signals:
                os.kill(os.getpid(), signum)


class Stop(HookBase):
    def __init__(self, at: int, finished: bool) -> None:
        self.at = at
        self.finished = finished

    def after_step(self) -> None:
        if self.trainer.iter == self.at:
            self.trainer.request_stop("enough", self.finished)


def after_trains(log: list[str]) -> list[str]:
    return [call for call in log if "after_train" in call]


def test_hooks_are_called_around_the_steps(loop: Any, recorder: Any) -> None:
    log: list[str] = []
    trainer = loop()
    trainer.register_hooks([recorder(log, "a"), None, recorder(log, "b")])
    trainer.train(3, 5)
    assert trainer.steps == [3, 4]
    assert log == [
        *("a.before_train 3", "b.before_train 3"),
        *("a.before_step 3", "b.before_step 3", "a.after_step 3", "b.after_step 3"),
        *("a.before_step 4", "b.before_step 4", "a.after_step 4", "b.after_step 4"),
        *("a.after_train 5", "b.after_train 5"),
    ]


@pytest.mark.parametrize("fail_at", [0, 2, 4])
def test_a_failing_step_leaves_iter_there_and_hooks_end(
    loop: Any, recorder: Any, fail_at: int
) -> None:
    log: list[str] = []
    trainer = loop(fail_at)
    trainer.register_hooks([recorder(log, "a"), recorder(log, "b")])
    with pytest.raises(RuntimeError, match=f"step {fail_at}"):
        trainer.train(0, 5)
    assert (trainer.iter, trainer.max_iter) == (fail_at, 5)
    assert after_trains(log) == [f"a.after_train {fail_at}", f"b.after_train {fail_at}"]


def test_a_failing_after_step_leaves_iter_there(loop: Any, recorder: Any) -> None:
    log: list[str] = []
    trainer = loop()
    trainer.register_hooks([recorder(log, "a", ("a.after_step 4",)), recorder(log, "b")])
    with pytest.raises(ValueError, match=r"a\.after_step 4"):
        trainer.train(0, 5)
    assert trainer.iter == 4
    assert after_trains(log) == ["a.after_train 4", "b.after_train 4"]


@pytest.mark.parametrize(("failing", "ended"), [("a", []), ("b", ["a"]), ("c", ["a", "b"])])
@pytest.mark.parametrize("max_iter", [0, 3])
def test_only_hooks_whose_before_train_ran_through_are_ended(
    loop: Any, recorder: Any, failing: str, ended: list[str], max_iter: int
) -> None:
    log: list[str] = []
    trainer = loop()
    trainer.register_hooks([recorder(log, n, (f"{failing}.before_train",)) for n in "abc"])
    with pytest.raises(ValueError, match=f"{failing}.before_train 0"):
        trainer.train(0, max_iter)
    assert [call.split(".")[0] for call in after_trains(log)] == ended
    # Else it would read as success.
    assert trainer.iter != trainer.max_iter
    assert trainer.steps == []


def test_d12_every_after_train_runs_and_the_first_error_carries_the_others(
    loop: Any, recorder: Any
) -> None:
    log: list[str] = []
    trainer = loop()
    trainer.register_hooks([recorder(log, n, ("a.after_train", "c.after_train")) for n in "abcd"])
    with pytest.raises(ValueError, match=r"a\.after_train 2") as raised:
        trainer.train(0, 2)
    assert after_trains(log) == [f"{n}.after_train 2" for n in "abcd"]
    assert ["c.after_train 2" in note for note in raised.value.__notes__] == [True]


def test_a_steps_error_wins_over_those_of_after_train(loop: Any, recorder: Any) -> None:
    log: list[str] = []
    trainer = loop(fail_at=1)
    trainer.register_hooks([recorder(log, n, ("a.after_train", "c.after_train")) for n in "abc"])
    with pytest.raises(RuntimeError, match="step 1") as raised:
        trainer.train(0, 2)
    notes = " ".join(raised.value.__notes__)
    assert "a.after_train 1" in notes
    assert "c.after_train 1" in notes
    assert after_trains(log) == [f"{n}.after_train 1" for n in "abc"]


def test_an_error_of_after_train_is_raised_inside_an_except_block_too(
    loop: Any, recorder: Any
) -> None:
    trainer = loop()
    trainer.register_hooks([recorder([], "a", ("a.after_train",))])
    try:
        raise MemoryError
    except MemoryError:
        with pytest.raises(ValueError, match=r"a\.after_train"):
            trainer.train(0, 1)


def test_iter_reaches_max_iter_on_success_only(loop: Any) -> None:
    trainer = loop()
    trainer.train(0, 4)
    assert trainer.iter == trainer.max_iter == 4
    trainer.train(4, 4)
    assert trainer.iter == trainer.max_iter == 4
    assert trainer.steps == [0, 1, 2, 3]


def test_no_steps_still_call_before_and_after_train(loop: Any, recorder: Any) -> None:
    log: list[str] = []
    trainer = loop()
    trainer.register_hooks([recorder(log)])
    trainer.train(7, 7)
    assert log == ["a.before_train 7", "a.after_train 7"]


def test_train_may_be_called_twice(loop: Any, recorder: Any) -> None:
    log: list[str] = []
    trainer = loop()
    trainer.register_hooks([recorder(log)])
    trainer.train(0, 2)
    first, second = log.copy(), log
    log.clear()
    trainer.train(0, 2)
    assert first == second
    assert trainer.steps == [0, 1, 0, 1]


def test_a_second_run_that_fails_early_ends_no_hook_of_the_first(loop: Any, recorder: Any) -> None:
    log: list[str] = []
    trainer = loop()
    hook = recorder(log)
    trainer.register_hooks([hook])
    trainer.train(0, 1)
    log.clear()
    hook.fail = ("a.before_train",)
    with pytest.raises(ValueError, match=r"a\.before_train"):
        trainer.train(0, 1)
    assert log == ["a.before_train 0"]


def test_hooks_run_by_priority_and_ties_by_registration(loop: Any, recorder: Any) -> None:
    log: list[str] = []
    trainer = loop()
    hooks = {name: recorder(log, name) for name in ("writer", "timer", "one", "two", "late")}
    hooks["writer"].priority = 90
    hooks["timer"].priority = "HIGHEST"
    trainer.register_hooks([hooks[name] for name in ("writer", "one", "timer", "two")])
    trainer.register_hooks([hooks["late"]])
    trainer.train(0, 0)
    assert [call.split(".")[0] for call in after_trains(log)] == [
        *("timer", "one", "two", "late", "writer")
    ]


def count_calls(trainer: TrainerBase, num_steps: int) -> int:
    """Counts Python's calls, from the second step on."""
    calls = 0

    def profile(frame: FrameType, event: str, arg: Any) -> None:
        nonlocal calls
        calls += event == "call"

    class Profiler(HookBase):
        def after_step(self) -> None:
            if self.trainer.iter == 0:
                sys.setprofile(profile)
            if self.trainer.iter == num_steps:
                sys.setprofile(None)

    trainer.register_hooks([Profiler()])
    try:
        trainer.train(0, num_steps + 1)
    finally:
        sys.setprofile(None)
    return calls


def test_hooks_that_override_nothing_cost_no_call_in_the_loop(loop: Any) -> None:
    bare, with_hooks = loop(), loop()
    with_hooks.register_hooks([HookBase() for _ in range(10)])
    num_calls = count_calls(bare, 50)
    assert num_calls > 50
    assert count_calls(with_hooks, 50) == num_calls


def test_a_finished_stop_reads_as_success(loop: Any, recorder: Any) -> None:
    log: list[str] = []
    trainer = loop()
    trainer.register_hooks([Stop(at=2, finished=True), recorder(log)])
    trainer.train(0, 10)
    assert trainer.steps == [0, 1, 2]
    assert trainer.iter == trainer.max_iter == 3
    assert trainer.interruption is None
    assert after_trains(log) == ["a.after_train 3"]


def test_an_interrupted_run_is_not_at_its_end(loop: Any, recorder: Any) -> None:
    log: list[str] = []
    trainer = loop()
    trainer.register_hooks([Stop(at=2, finished=False), recorder(log)])
    trainer.train(0, 10)
    assert trainer.steps == [0, 1, 2]
    assert (trainer.iter, trainer.max_iter) == (3, 10)
    assert trainer.interruption == Interruption("enough")
    assert log[-2:] == ["a.after_step 2", "a.after_train 3"]
    trainer.register_hooks([])
    trainer.train(3, 4)
    assert trainer.interruption is None


@pytest.mark.parametrize(
    ("max_iter", "end"),
    [(10, 3), (12, 12)],
    ids=["as planned before", "planned to be longer"],
)
def test_a_run_that_ended_early_stays_at_its_end_unless_it_is_made_longer(
    loop: Any, max_iter: int, end: int
) -> None:
    trainer = loop()
    trainer.register_hooks([Stop(at=2, finished=True)])
    trainer.train(0, 10)
    resumed = loop()
    resumed.load_state_dict(trainer.state_dict())
    assert resumed.iter == 2
    resumed.train(3, max_iter)
    assert resumed.iter == resumed.max_iter == end
    assert resumed.steps == list(range(3, end))


def test_a_state_taken_inside_a_step_has_the_resume_finish_that_step(
    loop: Any, recorder: Any
) -> None:
    states: list[dict[str, Any]] = []

    class Saver(HookBase):
        def after_step(self) -> None:
            self.trainer.storage.put_scalar("seen", self.trainer.iter)
            if self.trainer.iter == 1:
                states.append(self.trainer.state_dict())

    log: list[str] = []
    trainer = loop()
    trainer.register_hooks([recorder([], "before"), Saver(), recorder([], "behind")])
    trainer.train(0, 3)

    resumed = loop()
    resumed.register_hooks([recorder(log, "before"), Saver(), recorder(log, "behind")])
    resumed.load_state_dict(states[0])
    resumed.train(resumed.iter + 1, 3)
    assert resumed.steps == [2]
    assert log[:4] == [
        *("before.before_train 2", "behind.before_train 2"),
        *("behind.after_step 1", "before.before_step 2"),
    ]
    assert resumed.storage.history("seen").values() == [(0.0, 0), (1.0, 1), (2.0, 2)]


def test_a_state_is_not_used_by_a_run_that_starts_elsewhere(loop: Any) -> None:
    trainer = loop()
    trainer.register_hooks([Stop(at=2, finished=True)])
    trainer.train(0, 10)
    other = loop()
    other.load_state_dict(trainer.state_dict())
    other.train(0, 10)
    assert other.steps == list(range(10))


@pytest.mark.parametrize("signum", LEAVING)
@pytest.mark.parametrize("method", ["before_step", "after_step"])
def test_a_signal_finishes_the_step_and_the_hooks(
    loop: Any, recorder: Any, signum: signal.Signals, method: str
) -> None:
    log: list[str] = []
    trainer = loop()
    trainer.register_hooks([Signalled(2, signum, method=method), recorder(log)])
    handler = signal.getsignal(signum)
    with pytest.raises(LEAVING[signum]):
        trainer.train(0, 10)
    assert trainer.steps == [0, 1, 2]
    assert (trainer.iter, trainer.interruption) == (3, Interruption(signum.name, 128 + signum))
    assert log[-2:] == ["a.after_step 2", "a.after_train 3"]
    assert signal.getsignal(signum) is handler


def test_a_signal_before_the_first_step_leaves_before_it(loop: Any, recorder: Any) -> None:
    log: list[str] = []
    trainer = loop()
    trainer.register_hooks([Signalled(4, signal.SIGTERM, method="before_train"), recorder(log)])
    with pytest.raises(PreemptedExit):
        trainer.train(4, 10)
    assert (trainer.steps, trainer.iter) == ([], 4)
    assert log == ["a.before_train 4", "a.after_train 4"]


def test_a_signal_in_the_last_step_leaves_an_interrupted_run(loop: Any, recorder: Any) -> None:
    log: list[str] = []
    trainer = loop()
    trainer.register_hooks([Signalled(4, signal.SIGTERM), recorder(log)])
    with pytest.raises(PreemptedExit):
        trainer.train(0, 5)
    assert (trainer.iter, trainer.max_iter) == (5, 5)
    assert trainer.interruption is not None
    assert log[-1] == "a.after_train 5"


def test_an_error_in_the_step_of_a_signal_reaches_the_caller(loop: Any, recorder: Any) -> None:
    log: list[str] = []
    trainer = loop(fail_at=2)
    trainer.register_hooks([Signalled(2, signal.SIGTERM), recorder(log)])
    with pytest.raises(RuntimeError, match="step 2"):
        trainer.train(0, 10)
    # Nothing whole is there, so no hook may take it for an interruption worth saving.
    assert (trainer.iter, trainer.interruption) == (2, None)
    assert log[-1] == "a.after_train 2"


def test_a_second_ctrl_c_leaves_inside_the_step(
    loop: Any, recorder: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(stop_signals, "COPY_SECONDS", 0.0)
    log: list[str] = []
    trainer = loop()
    trainer.register_hooks([Signalled(2, signal.SIGINT, signal.SIGINT), recorder(log)])
    with pytest.raises(KeyboardInterrupt):
        trainer.train(0, 10)
    assert trainer.steps == [0, 1]
    # Nothing whole is there, so no hook may take it for an interruption worth saving.
    assert (trainer.iter, trainer.interruption) == (2, None)
    assert log[-1] == "a.after_train 2"


@pytest.mark.parametrize("at", [0, 3])
def test_a_step_that_is_left_at_once_is_not_done(loop: Any, recorder: Any, at: int) -> None:
    log: list[str] = []
    trainer = loop()

    def leave(trainer: Any) -> None:
        if trainer.iter == at:
            raise StopRequested(Interruption("SIGTERM", 143))

    trainer.register_hooks([recorder(log), CallbackHook(before_step=leave)])
    with pytest.raises(PreemptedExit):
        trainer.train(0, 10)
    assert trainer.steps == list(range(at))
    assert (trainer.iter, trainer.storage.iter) == (at, at)
    assert log[-2:] == [f"a.before_step {at}", f"a.after_train {at}"]
    state = trainer.state_dict()
    assert (state["iteration"], state["pending"]) == (at - 1, [])


def test_hooks_that_a_resume_makes_up_for_may_be_left_at_once_too(loop: Any) -> None:
    class Leaving(HookBase):
        __qualname__ = "Leaving"

        def after_step(self) -> None:
            os.kill(os.getpid(), signal.SIGTERM)
            raise_if_stopping()

    states: list[dict[str, Any]] = []
    for start_iter in (0, 1):
        trainer = loop()
        trainer.register_hooks([Leaving(), Stop(at=0, finished=True)])
        if states:
            trainer.load_state_dict(states[-1])
        with pytest.raises(PreemptedExit):
            trainer.train(start_iter, 5)
        assert trainer.iter == 1
        states.append(trainer.state_dict())
    assert [(state["iteration"], state["pending"]) for state in states] == [
        (0, ["Leaving", "Stop"]),
        (0, ["Leaving", "Stop"]),
    ]


def test_work_at_the_end_that_is_left_at_once_lets_the_other_hooks_end(
    loop: Any, recorder: Any
) -> None:
    log: list[str] = []

    def evaluate(trainer: Any) -> None:
        os.kill(os.getpid(), signal.SIGTERM)
        raise_if_stopping()

    trainer = loop()
    trainer.register_hooks([CallbackHook(after_train=evaluate), recorder(log)])
    with pytest.raises(PreemptedExit):
        trainer.train(0, 2)
    assert log[-1] == "a.after_train 2"


def test_a_trainer_without_a_step_says_so() -> None:
    class Empty(TrainerBase):
        pass

    with pytest.raises(NotImplementedError, match=r"Empty must define run_step"):
        Empty().train(0, 1)


def test_a_finish_request_in_the_last_step_leaves_a_success(loop: Any) -> None:
    class Finishing(HookBase):
        def after_step(self) -> None:
            if self.trainer.iter == 4:
                self.trainer.request_stop("reached its aim", finished=True)

        def after_train(self) -> None:
            self.trainer.request_stop("too late to matter", finished=True)

    trainer = loop()
    trainer.register_hooks([Finishing()])
    trainer.train(0, 5)
    assert trainer.iter == trainer.max_iter == 5


def test_a_state_taken_after_the_step_has_all_hooks_pending(loop: Any) -> None:
    class Noting(HookBase):
        def after_step(self) -> None:
            """Does something after a step."""

    states: list[dict[str, Any]] = []
    trainer = loop()
    after_step = trainer.after_step

    def saving_after_step() -> None:
        states.append(trainer.state_dict())
        after_step()
        states.append(trainer.state_dict())

    trainer.after_step = saving_after_step
    trainer.register_hooks([Noting()])
    trainer.train(0, 1)
    before, after = states
    assert before["iteration"] == after["iteration"] == 0
    assert len(before["pending"]) == 1
    assert after["pending"] == []
