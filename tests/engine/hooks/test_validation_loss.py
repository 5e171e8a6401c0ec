import math
import weakref
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

from tests.engine.hooks.normed_run import (
    NormedNet,
    Sample,
    loader,
    make_trainer,
    samples,
    training,
)
from tests.engine.run_processes import assert_same
from trainkit.engine.hooks.callback import CallbackHook
from trainkit.engine.hooks.validation_loss import ValidationLoss
from trainkit.engine.train_loop import SimpleTrainer
from trainkit.utils.errors import ConfigError
from trainkit.utils.events.storage import get_event_storage
from trainkit.utils.stop_signals import Interruption, StopRequested


def make(validates: bool = True, is_frozen: bool = True) -> SimpleTrainer:
    """Makes a trainer whose batch norm may be in evaluation mode."""

    def hooks(trainer: SimpleTrainer) -> list[ValidationLoss]:
        held_out = loader(seed=2, shuffle=True)
        return [ValidationLoss(2, trainer.model, held_out)] if validates else []

    trainer = make_trainer(hooks)
    norm_of(trainer).train(not is_frozen)
    return trainer


def norm_of(trainer: SimpleTrainer) -> nn.Module:
    assert isinstance(trainer.model, NormedNet)
    return trainer.model.norm


@pytest.mark.parametrize("is_frozen", [False, True])
def test_training_does_not_feel_it(is_frozen: bool) -> None:
    ends = []
    for validates in (False, True):
        trainer = make(validates, is_frozen)
        trainer.train(0, 7)
        assert trainer.model.training
        assert norm_of(trainer).training is not is_frozen
        assert ("val/total_loss" in trainer.storage.histories()) is validates
        ends.append(training(trainer))
    assert_same(ends[1], ends[0])


class Two(nn.Module):
    """Returns two losses and a metric, puts one more, and notes how it is run."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(4, 1)
        self.is_validating = False

    def forward(self, batch: Sample) -> dict[str, torch.Tensor]:
        error = self.linear(batch["x"]) - batch["y"]
        powers = error.exp()
        if self.is_validating:
            assert self.training
        get_event_storage().put_scalar("put", 1.0)
        mean_error = error.detach().mean()
        return {"loss_a": error.square().mean(), "loss_b": powers.mean(), "error": mean_error}


def validate(
    data_loader: Any, num_iter: int | None = None, model: Two | None = None
) -> tuple[dict[str, float], Two]:
    """Returns the values of a model that does not change, and the model."""
    model = Two() if model is None else model
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    trainer = SimpleTrainer(model, loader(), optimizer)
    validation = ValidationLoss(0, model, data_loader, num_iter)
    mark = CallbackHook(after_train=lambda t: setattr(t.model, "is_validating", True))
    trainer.register_hooks([mark, validation])
    trainer.train(0, 1)
    latest = {name: value for name, (value, _) in trainer.storage.latest().items()}
    assert len(trainer.storage.history("put").values()) == 1
    return {name: v for name, v in latest.items() if name.startswith("val/")}, model


@pytest.mark.parametrize(("num_iter", "num_samples"), [(None, 10), (1, 4), (9, 10)])
def test_each_loss_is_averaged_over_the_samples(num_iter: int | None, num_samples: int) -> None:
    values, model = validate(loader(seed=2), num_iter)
    data = samples(10, seed=2)[:num_samples]
    with torch.no_grad():
        x, y = (torch.stack([sample[name] for sample in data]) for name in ("x", "y"))
        error = model.linear(x) - y
    expected = {"val/loss_a": error.square().mean().item(), "val/loss_b": error.exp().mean().item()}
    total = sum(expected.values())
    expected |= {"val/error": error.mean().item(), "val/total_loss": total}
    assert values == pytest.approx(expected, rel=1e-5)


def test_nothing_is_kept_for_a_backward_pass() -> None:
    class Differentiating(Two):
        def forward(self, batch: Sample) -> dict[str, torch.Tensor]:
            losses = super().forward(batch)
            torch.autograd.grad(losses["loss_b"], self.linear.weight, retain_graph=True)
            return losses

    with pytest.raises(RuntimeError, match="keeps nothing for a backward pass, but the model diff"):
        validate(loader(), model=Differentiating())


def test_batches_whose_size_cannot_be_told_count_alike() -> None:
    class Item:
        def __init__(self, size: int) -> None:
            self.size = size

        def __getitem__(self, name: str) -> torch.Tensor:
            return torch.full((self.size, 4 if name == "x" else 1), float(self.size))

    values, model = validate([Item(1), Item(3)])
    each = [(sum(model.linear.weight[0]) + model.linear.bias / n - 1) * n for n in (1, 3)]
    assert values["val/error"] == pytest.approx(sum(e.item() for e in each) / 2, rel=1e-5)


def test_it_runs_when_an_evaluation_would_and_at_the_end() -> None:
    trainer = make_trainer(lambda t: [ValidationLoss(2, t.model, loader(seed=2), prefix="held")])
    trainer.train(0, 5)
    history = trainer.storage.history("held/total_loss").values()
    assert [iteration for _, iteration in history] == [1, 3, 5]
    assert all(math.isfinite(value) for value, _ in history)
    assert not trainer.storage.smoothing_hints()["held/total_loss"]


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_batches_come_in_the_way_and_precision_of_training(precision: str) -> None:
    class Moving(SimpleTrainer):
        def move_batch(self, batch: Any) -> Any:
            return {"x": batch["x"] * 2, "y": batch["y"]}

    class Net(Two):
        def forward(self, batch: Sample) -> dict[str, torch.Tensor]:
            seen.append((batch["x"].mean().item(), str(self.linear(batch["x"]).dtype)))
            return super().forward(batch)

    seen: list[tuple[float, str]] = []
    model = Net()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    trainer = Moving(model, loader(), optimizer, precision=precision)
    trainer.register_hooks([ValidationLoss(1, model, loader(), 1)])
    trainer.train(0, 1)
    assert len(seen) == 2
    assert seen[1] == seen[0]


def test_a_loader_without_a_batch_is_an_error() -> None:
    with pytest.raises(ConfigError, match=r"ValidationLoss \(DATASETS\.VAL\) yields no batch"):
        validate([])


def test_a_validation_that_is_cut_short_leaves_no_trace_and_is_made_up_for() -> None:
    class Stopping:
        def __iter__(self) -> Any:
            yield from list(loader(seed=2))[:1]
            raise StopRequested(Interruption("limit of time"))

    unbroken = make(validates=False, is_frozen=False)
    unbroken.train(0, 2)
    trainer = make_trainer(lambda t: [ValidationLoss(2, t.model, Stopping())])
    trainer.train(0, 4)
    assert trainer.state_dict()["pending"] == ["ValidationLoss"]
    assert_same(training(trainer), training(unbroken))


def test_it_dies_with_its_trainer(no_gc: Callable[..., list[weakref.ref[Any]]]) -> None:
    trainer = make()
    trainer.train(0, 2)
    alive = no_gc(trainer, trainer.model, trainer._hooks[0])
    del trainer
    assert [reference() for reference in alive] == [None, None, None]
