import math
from collections.abc import Callable
from typing import Any

import pytest
import torch

from trainkit.engine.hook_base import HookBase
from trainkit.engine.hooks.callback import CallbackHook
from trainkit.engine.hooks.evaluation import EvalHook
from trainkit.utils.stop_signals import Interruption, StopRequested


class Evaluation:
    """Counts its calls, and returns their number."""

    def __init__(self, trainer: Any) -> None:
        self.iters: list[int] = []
        self.trainer = trainer

    def __call__(self) -> dict[str, Any]:
        self.iters.append(self.trainer.iter)
        return {"task": {"score": len(self.iters)}}


@pytest.mark.parametrize(
    ("period", "max_iter", "expected"),
    [(2, 6, [1, 3, 6]), (2, 5, [1, 3, 5]), (0, 3, [3]), (10, 3, [3]), (1, 1, [1])],
)
def test_it_runs_when_due_and_the_last_time_in_after_train(
    loop: Any, period: int, max_iter: int, expected: list[int]
) -> None:
    trainer = loop()
    function = Evaluation(trainer)
    trainer.register_hooks([EvalHook(period, function)])
    trainer.train(0, max_iter)
    assert function.iters == expected
    history = trainer.storage.history("task/score").values()
    assert history == [(float(n + 1), i) for n, i in enumerate(expected)]
    assert not trainer.storage.smoothing_hints()["task/score"]


def test_the_end_may_be_left_out(loop: Any) -> None:
    trainer = loop()
    function = Evaluation(trainer)
    trainer.register_hooks([EvalHook(2, function, eval_after_train=False)])
    trainer.train(0, 4)
    assert function.iters == [1]


@pytest.mark.parametrize("fail_at", [0, 3])
def test_d13_a_failed_run_is_not_evaluated_at_the_end(loop: Any, fail_at: int) -> None:
    trainer = loop(fail_at)
    function = Evaluation(trainer)
    trainer.register_hooks([EvalHook(0, function)])
    with pytest.raises(RuntimeError, match="step"):
        trainer.train(0, 4)
    assert function.iters == []


@pytest.mark.parametrize("at", [1, 3])
@pytest.mark.parametrize(("finished", "expected"), [(False, []), (True, [True])])
def test_a_stopped_run_is_evaluated_at_its_end_only_if_it_is_finished(
    loop: Any, at: int, finished: bool, expected: list[bool]
) -> None:
    trainer = loop()
    function = Evaluation(trainer)

    def stop(trainer: Any) -> None:
        if trainer.iter == at:
            trainer.request_stop("test", finished)

    trainer.register_hooks([EvalHook(0, function), CallbackHook(before_step=stop)])
    trainer.train(0, 4)
    assert [i == at + 1 for i in function.iters] == expected


def test_nested_results_are_put_flat_and_none_puts_nothing(loop: Any) -> None:
    results: Any = {"a": {"b": {"c": torch.tensor(1.5)}, "d": 2}, "e": True}
    trainer = loop()
    trainer.register_hooks([EvalHook(0, lambda: results), EvalHook(0, lambda: None)])
    trainer.train(0, 1)
    latest = {name: value for name, (value, _) in trainer.storage.latest().items()}
    assert latest == {"a/b/c": 1.5, "a/d": 2.0, "e": 1.0}


@pytest.mark.parametrize("value", ["great", [1, 2], None])
def test_a_result_that_is_no_number_is_an_error(loop: Any, value: Any) -> None:
    trainer = loop()
    trainer.register_hooks([EvalHook(0, lambda: {"task": {"best": value}})])
    with pytest.raises(TypeError, match=r"nested dict of numbers, but 'task/best' is "):
        trainer.train(0, 1)


class Stopped(Evaluation):
    """Is cut short by a signal at the first evaluation in a given iteration."""

    def __init__(self, trainer: Any, at: int) -> None:
        super().__init__(trainer)
        self.at = at

    def __call__(self) -> dict[str, Any]:
        if self.trainer.iter == self.at and self.at not in self.iters:
            self.iters.append(self.at)
            raise StopRequested(Interruption("limit of time"))
        return super().__call__()


class Later(HookBase):
    """Notes in which iterations it ran, behind the evaluation."""

    def __init__(self) -> None:
        self.iters: list[int] = []

    def after_step(self) -> None:
        self.iters.append(self.trainer.iter)

    def after_train(self) -> None:
        self.iters.append(-self.trainer.iter)


def test_an_evaluation_that_is_cut_short_is_made_up_for_by_a_resume(loop: Any) -> None:
    trainer, later = loop(), Later()
    stopped = Stopped(trainer, at=3)
    trainer.register_hooks([EvalHook(2, stopped), later])
    trainer.train(0, 6)
    assert (trainer.steps, trainer.iter) == ([0, 1, 2, 3], 4)
    assert trainer.interruption == Interruption("limit of time")
    assert (stopped.iters, later.iters) == ([1, 3], [0, 1, 2, -4])
    state = trainer.state_dict()
    assert (state["iteration"], state["pending"]) == (3, ["EvalHook", "Later"])

    resumed, later = loop(), Later()
    function = Evaluation(resumed)
    resumed.register_hooks([EvalHook(2, function), later])
    resumed.load_state_dict(state)
    resumed.train(4, 6)
    assert (function.iters, later.iters, resumed.steps) == ([3, 6], [3, 4, 5, -6], [4, 5])


def test_a_final_evaluation_that_is_cut_short_lets_the_other_hooks_end(loop: Any) -> None:
    trainer, later = loop(), Later()
    function = Stopped(trainer, at=2)
    trainer.register_hooks([EvalHook(0, function), later])
    trainer.train(0, 2)
    assert trainer.interruption == Interruption("limit of time")
    assert (function.iters, later.iters) == ([2], [0, 1, -2])


def test_a_run_that_is_asked_to_leave_does_not_begin_an_evaluation(loop: Any) -> None:
    trainer, later = loop(), Later()
    function = Evaluation(trainer)
    leave = CallbackHook(before_step=lambda t: t.request_stop("test") if t.iter == 1 else None)
    trainer.register_hooks([leave, EvalHook(2, function), later])
    trainer.train(0, 4)
    assert (function.iters, later.iters) == ([], [0, -2])
    assert trainer.state_dict()["pending"] == ["EvalHook", "Later"]


def test_d11_a_second_run_evaluates_again(loop: Any) -> None:
    trainer = loop()
    function = Evaluation(trainer)
    trainer.register_hooks([EvalHook(0, function)])
    trainer.train(0, 2)
    trainer.train(2, 4)
    assert function.iters == [2, 4]


def test_nothing_is_evaluated_after_a_bad_step(simple: Callable[..., Any]) -> None:
    trainer = simple()
    function = Evaluation(trainer)

    def poison(trainer: Any) -> None:
        # As with an accelerator, nobody hears of it until it is brought over.
        trainer._metrics.put(trainer.storage, {"a": torch.tensor(math.nan)}, 0.0, "", None)

    trainer.register_hooks([CallbackHook(after_step=poison), EvalHook(1, function)])
    with pytest.raises(FloatingPointError, match="Iteration 0"):
        trainer.train(0, 5)
    assert function.iters == []
