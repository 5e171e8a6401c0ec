import weakref
from typing import Any

import pytest

from trainkit.engine.step_view import StepView
from trainkit.engine.train_loop import SimpleTrainer


def test_attributes_are_the_trainers_own_read_and_set(simple: Any) -> None:
    trainer = simple()
    view = StepView(trainer, SimpleTrainer.run_step)
    assert view.model is trainer.model
    assert view.iter == 0
    view.iter = 5
    assert trainer.iter == 5
    with pytest.raises(AttributeError, match="nothing_of_this_name"):
        _ = view.nothing_of_this_name


def test_run_step_is_the_given_step_and_not_the_subclasss(simple: Any) -> None:
    plain = simple()
    losses: list[float] = []

    class Wrapping(SimpleTrainer):
        def run_step(self) -> None:
            StepView(weakref.proxy(self), SimpleTrainer.run_step).run_step()
            losses.append(self.storage.history("total_loss").latest())

    trainer = Wrapping(plain.model, plain.data_loader, plain.optimizer)
    trainer.train(0, 3)
    assert len(losses) == 3
