from pathlib import Path

import pytest
import torch
from torch import nn

from tests.engine.hooks.normed_run import make_trainer, resumed, training
from tests.engine.run_processes import assert_same
from trainkit.engine.hooks.callback import CallbackHook
from trainkit.engine.hooks.ema import EMA, averaged_weights
from trainkit.engine.train_loop import SimpleTrainer
from trainkit.utils.errors import CheckpointError, ConfigError


def with_ema(decay: float = 0.7) -> tuple[SimpleTrainer, EMA]:
    trainer = make_trainer()
    ema = EMA(trainer.model, decay)
    trainer.register_hooks([ema])
    return trainer, ema


def floats(model: nn.Module) -> dict[str, torch.Tensor]:
    return {n: t.clone() for n, t in model.state_dict().items() if t.is_floating_point()}


def test_the_average_follows_its_formula_with_a_decay_that_warms_up() -> None:
    trainer, ema = with_ema(decay=0.2)
    expected = floats(trainer.model)
    steps: list[dict[str, torch.Tensor]] = []
    trainer.register_hooks([CallbackHook(after_step=lambda t: steps.append(floats(t.model)))])
    trainer.train(0, 5)
    for decay, weights in zip((1 / 10, 2 / 11, 0.2, 0.2, 0.2), steps, strict=True):
        expected = {n: decay * t + (1 - decay) * weights[n] for n, t in expected.items()}
    averages = ema.state_dict()["averages"]
    assert "norm.running_var" in averages
    torch.testing.assert_close(averages, expected)


def test_training_does_not_feel_it() -> None:
    plain = make_trainer()
    plain.train(0, 7)
    averaged, _ = with_ema()
    averaged.train(0, 7)
    assert_same(training(averaged), training(plain))


@pytest.mark.parametrize("fails", [False, True])
def test_averages_are_applied_for_a_while_in_the_tensors_that_others_hold(fails: bool) -> None:
    trainer, ema = with_ema()
    trainer.train(0, 4)
    own = trainer.model.state_dict(keep_vars=True)
    before = {name: tensor.clone() for name, tensor in own.items()}
    try:
        with ema.applied():
            assert_same(floats(trainer.model), ema.state_dict()["averages"])
            assert not torch.equal(own["last.weight"], before["last.weight"])
            with ema.applied():
                pass
            if fails:
                raise KeyboardInterrupt
    except KeyboardInterrupt:
        assert fails
    assert_same(dict(trainer.model.state_dict()), before)
    now = trainer.model.state_dict(keep_vars=True)
    assert all(now[name] is tensor for name, tensor in own.items())


def test_training_goes_on_as_ever_after_an_evaluation() -> None:
    plain = make_trainer()
    plain.train(0, 6)
    trainer, ema = with_ema()

    def evaluate(trainer: SimpleTrainer) -> None:
        with ema.applied(), torch.no_grad():
            trainer.model.eval()({"x": torch.ones(1, 4)})
        trainer.model.train()

    trainer.register_hooks([CallbackHook(after_step=evaluate)])
    trainer.train(0, 6)
    assert_same(training(trainer), training(plain))


def test_until_there_is_an_average_the_model_stays_as_it_is() -> None:
    trainer, ema = with_ema()
    before = floats(trainer.model)
    with ema.applied():
        assert_same(floats(trainer.model), before)
    assert ema.state_dict() == {}


class Buffered(nn.Module):
    center: torch.Tensor
    cache: torch.Tensor

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(1, 1)
        self.register_buffer("center", torch.zeros(1))
        self.register_buffer("cache", torch.zeros(1), persistent=False)
        self.register_buffer("empty", None)

    def forward(self, batch: torch.Tensor) -> torch.Tensor:
        self.center = self.center + 1
        self.cache = torch.cat([self.cache, self.cache])
        loss: torch.Tensor = self.linear(batch).mean()
        return loss


def test_a_buffer_that_is_replaced_is_followed_and_one_that_is_not_saved_left_out() -> None:
    model = Buffered()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    trainer = SimpleTrainer(nn.DataParallel(model), [torch.ones(2, 1)], optimizer)
    ema = EMA(trainer.model)
    trainer.register_hooks([ema])
    trainer.train(0, 2)
    averages = ema.state_dict()["averages"]
    assert averages.keys() == {"center", "linear.weight", "linear.bias"}
    assert averages["center"].item() == pytest.approx(2 / 11 * 0.9 + 9 / 11 * 2)
    with ema.applied():
        assert model.center.item() == averages["center"].item()
    assert model.center.item() == 2


@pytest.mark.parametrize("at", [0, 3, 5])
def test_a_resumed_run_has_the_averages_of_an_unbroken_one(tmp_path: Path, at: int) -> None:
    unbroken, _ = with_ema()
    unbroken.train(0, 7)
    again = resumed(lambda t: [EMA(t.model, 0.7)], tmp_path, at, 7)
    assert_same(training(again), training(unbroken))
    assert_same(again.state_dict()["hooks"], unbroken.state_dict()["hooks"])
    assert again.state_dict()["hooks"]["EMA"]["num_updates"] == 7


def test_a_second_run_goes_on_and_a_new_one_begins_anew() -> None:
    trainer, ema = with_ema()
    trainer.train(0, 2)
    trainer.train(2, 4)
    assert ema.state_dict()["num_updates"] == 4
    trainer.train(0, 1)
    assert ema.state_dict()["num_updates"] == 1


def test_averages_of_another_model_are_refused() -> None:
    trainer, ema = with_ema()
    trainer.train(0, 1)
    state = ema.state_dict()
    other = EMA(nn.ModuleDict({"last": nn.Linear(6, 2), "new": nn.Linear(1, 1, bias=False)}))
    with pytest.raises(CheckpointError, match=r"another model. .* last\.bias, last\.weight, lin"):
        other.load_state_dict(state)
    with pytest.raises(CheckpointError, match=r"new\.weight, norm\.bias, .*MODEL\.EMA\.ENABLED"):
        other.load_state_dict(state)


@pytest.mark.parametrize("decay", [-0.1, 1.0, float("nan")])
def test_an_impossible_decay_is_an_error(decay: float) -> None:
    with pytest.raises(ConfigError, match=rf"MODEL\.EMA\.DECAY\) is {decay}; .* in \[0, 1\)"):
        EMA(nn.Linear(1, 1), decay)


def test_averages_of_a_checkpoint_are_found_by_what_they_hold() -> None:
    model = nn.Linear(1, 1, bias=False)
    averages = {"num_updates": 3, "averages": {"weight": torch.full((1, 1), 7.0)}}
    checkpoint = {"trainer": {"hooks": {"MyEMA": averages, "Other": {"x": 1}}}}
    before = model.weight.item()
    with averaged_weights(model, checkpoint):
        assert model.weight.item() == 7.0
    assert model.weight.item() == before
