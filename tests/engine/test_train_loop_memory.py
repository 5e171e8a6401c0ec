"""`del trainer` frees model and optimizer at once, without the garbage collector."""

import logging
from collections.abc import Callable, Iterator
from typing import Any

import pytest
from fvcore.common.param_scheduler import LinearParamScheduler
from torch import nn

from trainkit.engine.hooks.callback import CallbackHook
from trainkit.engine.hooks.evaluation import EvalHook
from trainkit.engine.hooks.lr_scheduler import LRScheduler
from trainkit.engine.hooks.timer import IterationTimer
from trainkit.engine.hooks.writer import PeriodicWriter
from trainkit.engine.train_loop import SimpleTrainer
from trainkit.utils.events.json_writer import JSONWriter


@pytest.fixture(autouse=True)
def _no_log() -> Iterator[None]:
    """pytest keeps log records, which hold the exceptions and so the frames."""
    logging.disable()
    yield
    logging.disable(logging.NOTSET)


class FailingAt(nn.Module):
    def __init__(self, inner: nn.Module, at: int, error: BaseException) -> None:
        super().__init__()
        self.inner = inner
        self.at = at
        self.error_type = type(error)

    def forward(self, batch: Any) -> Any:
        self.at -= 1
        if self.at == -1:
            raise self.error_type("now")
        return self.inner(batch)


def with_hooks(trainer: SimpleTrainer, folder: Any) -> None:
    trainer.register_hooks(
        [
            IterationTimer(),
            LRScheduler(scheduler=LinearParamScheduler(1.0, 0.0)),
            EvalHook(2, lambda: {"a": 1.0}),
            CallbackHook(after_step=lambda t: t.storage.put_scalar("b", 1.0)),
            PeriodicWriter([JSONWriter(folder / "metrics.json")], period=2),
        ]
    )


def test_a_trained_trainer_dies_by_reference_count(
    simple: Callable[..., SimpleTrainer], no_gc: Any, tmp_path: Any
) -> None:
    trainer = simple()
    with_hooks(trainer, tmp_path)
    trainer.train(0, 5)
    trainer.state_dict()
    alive = no_gc(trainer.model, trainer.optimizer, trainer)
    del trainer
    assert [ref() for ref in alive] == [None, None, None]


@pytest.mark.parametrize("error", [RuntimeError(), KeyboardInterrupt(), None])
def test_a_trainer_that_failed_dies_by_reference_count(
    simple: Callable[..., SimpleTrainer],
    regression: Any,
    no_gc: Any,
    tmp_path: Any,
    error: BaseException | None,
) -> None:
    model = FailingAt(regression(), at=3 if error else 9, error=error or RuntimeError())
    trainer = simple(model)
    with_hooks(trainer, tmp_path)

    def fail(trainer: SimpleTrainer) -> None:
        raise ValueError("at the end")

    trainer.register_hooks([CallbackHook(after_train=fail), CallbackHook(after_train=fail)])
    failed = False
    # pytest.raises would hold the traceback, and with it the frames.
    try:
        trainer.train(0, 5)
    except BaseException as e:
        failed = isinstance(e, type(error) if error else ValueError)
    assert failed
    alive = no_gc(trainer.model, trainer.optimizer, trainer)
    del trainer, model
    assert [ref() for ref in alive] == [None, None, None]


def test_a_trainer_stopped_by_a_nan_dies_by_reference_count(
    simple: Callable[..., SimpleTrainer], no_gc: Any, tmp_path: Any
) -> None:
    trainer = simple(lr=1e30)
    with_hooks(trainer, tmp_path)
    failed = False
    try:
        trainer.train(0, 50)
    except FloatingPointError:
        failed = True
    assert failed
    alive = no_gc(trainer.model, trainer.optimizer)
    del trainer
    assert [ref() for ref in alive] == [None, None]
