import logging
import math
import weakref
from pathlib import Path
from typing import Any

import pytest

from tests.engine.hooks.normed_run import make_trainer, resumed, training
from tests.engine.run_processes import assert_same
from trainkit.checkpoint.checkpointer import Checkpointer
from trainkit.engine.hook_base import HookBase
from trainkit.engine.hooks.callback import CallbackHook
from trainkit.engine.hooks.checkpoint import PeriodicCheckpointer
from trainkit.engine.hooks.early_stopping import EarlyStopping
from trainkit.engine.hooks.evaluation import EvalHook
from trainkit.utils.errors import ConfigError

NAN, INF = math.nan, math.inf


def putting(values: list[float], period: int = 1) -> CallbackHook:
    """Puts one value after another as the metric; the last one stays."""

    def put(trainer: Any) -> None:
        if (trainer.iter + 1) % period == 0:
            value = values[min(trainer.iter // period, len(values) - 1)]
            trainer.storage.put_scalar("task/score", value, smoothing_hint=False)

    return CallbackHook(after_step=put)


def done(loop: Any, values: list[float], period: int = 1, max_iter: int = 20, **kwargs: Any) -> int:
    """Returns how many iterations a run does."""
    trainer = loop()
    trainer.register_hooks([putting(values, period), EarlyStopping("task/score", **kwargs)])
    trainer.train(0, max_iter)
    assert trainer.iter == trainer.max_iter
    assert trainer.interruption is None
    return len(trainer.steps)


@pytest.mark.parametrize(
    ("values", "kwargs", "expected"),
    [
        ([1, 2, 3, 3, 3], {"patience": 2}, 5),
        ([3, 2, 1, 1, 1], {"patience": 2, "mode": "min"}, 5),
        ([1, 2, 1, 3, 2, 2], {"patience": 2}, 6),
        ([5], {"patience": 1}, 2),
        (list(range(30)), {"patience": 1}, 20),
        # Bettered by min_delta and no more.
        ([1.0, 1.5, 1.5], {"patience": 2, "min_delta": 0.5}, 3),
        ([1.0, 1.4, 1.8, 1.9, 1.9], {"patience": 2, "min_delta": 0.5}, 5),
        ([2.0, 1.6, 1.2, 1.1, 1.1], {"patience": 2, "min_delta": 0.5, "mode": "min"}, 5),
        # Not finite: no improvement, and none is measured from it.
        ([1, NAN, NAN, 2], {"patience": 2}, 3),
        ([1, NAN, 2, NAN, 3, 3, 3], {"patience": 2}, 7),
        ([NAN], {"patience": 3}, 3),
        ([INF, 1, 2, 2, 2], {"patience": 2}, 5),
        ([-INF, 1, 0.5, 0.5], {"patience": 2, "mode": "min"}, 5),
        # Good enough.
        ([1, 2, 3, 4], {"patience": 9, "threshold": 3}, 3),
        ([1, INF, 3, 4], {"patience": 9, "threshold": 3}, 3),
        ([4, 3, 2, 1], {"patience": 9, "threshold": 2.5, "mode": "min"}, 3),
    ],
)
def test_a_run_ends_after_so_many_evaluations_without_improvement(
    loop: Any, values: list[float], kwargs: dict[str, Any], expected: int
) -> None:
    assert done(loop, values, **kwargs) == expected


def test_evaluations_are_counted_not_iterations(
    loop: Any, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.INFO):
        assert done(loop, [1, 2, 0], period=3, patience=2) == 12
    assert "Stopping early: task/score is 0 and has not improved on 2.0 by more than 0" in (
        caplog.text
    )


def test_an_evaluation_after_the_last_step_ends_nothing(loop: Any) -> None:
    assert done(loop, [1], period=4, max_iter=7, patience=1) == 7


@pytest.mark.parametrize("at", [1, 2, 4, 6, 7])
def test_a_resumed_run_ends_where_an_unbroken_one_does(tmp_path: Path, at: int) -> None:
    def hooks(trainer: Any) -> list[HookBase]:
        return [putting([5, 6, 6, 6, 6], period=2), EarlyStopping("task/score", 3)]

    unbroken = make_trainer(hooks)
    unbroken.train(0, 30)
    assert unbroken.iter == 10
    again = resumed(hooks, tmp_path, at, 30)
    assert (again.iter, again.max_iter) == (10, 10)
    assert_same(training(again), training(unbroken))


def test_a_run_that_ended_early_is_finished_after_a_resume(tmp_path: Path) -> None:
    def make() -> Any:
        trainer = make_trainer(lambda t: [putting([1]), EarlyStopping("task/score", 3)])
        checkpointer = Checkpointer(trainer.model, tmp_path, trainer=weakref.proxy(trainer))
        trainer.register_hooks([PeriodicCheckpointer(checkpointer, 0)])
        return trainer, checkpointer

    trainer, _ = make()
    trainer.train(0, 30)
    again, checkpointer = make()
    checkpointer.resume_or_load("")
    again.train(again.iter + 1, 30)
    assert (trainer.iter, again.iter, again.start_iter) == (4, 4, 4)


def test_a_new_run_begins_to_count_anew_and_a_second_one_goes_on(loop: Any) -> None:
    trainer = loop()
    hook = EarlyStopping("task/score", 3)
    trainer.register_hooks([putting([1]), hook])
    trainer.train(0, 2)
    trainer.train(2, 9)
    assert trainer.iter == 4
    trainer.train(0, 9)
    assert (trainer.iter, hook.state_dict()["num_bad"]) == (4, 3)


def test_a_metric_that_no_evaluation_puts_is_named(
    loop: Any, caplog: pytest.LogCaptureFixture
) -> None:
    trainer = loop()
    trainer.register_hooks([EvalHook(2, lambda: {"task": {"other": 1}})])
    trainer.register_hooks([EarlyStopping("task/score", 1)])
    with caplog.at_level(logging.WARNING):
        trainer.train(0, 6)
    text = "task/score was not put by any evaluation, so it cannot stop the run. There are: "
    assert caplog.text.count(f"{text}task/other") == 2


@pytest.mark.parametrize(
    "kwargs",
    [{"patience": 0}, {"mode": "maximum"}, {"min_delta": -1.0}, {"min_delta": NAN}],
)
def test_impossible_arguments_are_an_error(kwargs: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match=r"EARLY_STOPPING\) has mode .* at least 0\."):
        EarlyStopping("task/score", **{"patience": 1, **kwargs})
