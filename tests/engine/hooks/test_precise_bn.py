import logging
from collections.abc import Callable, Iterator
from functools import partial
from itertools import cycle, islice
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from tests.engine.hooks.normed_run import (
    NormedNet,
    Sample,
    loader,
    make_trainer,
    resumed,
    samples,
    training,
)
from tests.engine.run_processes import assert_same
from trainkit.data.build import TrainLoader
from trainkit.data.samplers.distributed_sampler import TrainingSampler
from trainkit.engine.hooks.callback import CallbackHook
from trainkit.engine.hooks.precise_bn import PreciseBN
from trainkit.engine.train_loop import SimpleTrainer
from trainkit.utils.errors import ConfigError
from trainkit.utils.stop_signals import Interruption, StopRequested


def net(trainer: SimpleTrainer) -> NormedNet:
    assert isinstance(trainer.model, NormedNet)
    return trainer.model


def with_hook(period: int = 2, num_iter: int = 3, batches: Any = None) -> SimpleTrainer:
    batches = loader(seed=5) if batches is None else batches
    return make_trainer(lambda t: [PreciseBN(period, t.model, batches, num_iter)])


def expected_statistics(model: NormedNet, batches: list[Sample]) -> dict[str, torch.Tensor]:
    """Computed without the layer: its input does not depend on dropout."""
    with torch.no_grad():
        features = [model.linear(batch["x"]) for batch in batches]
    means, variances = zip(*((f.mean(0), f.var(0)) for f in features), strict=True)
    return {
        "running_mean": torch.stack(means).mean(0),
        "running_var": torch.stack(variances).mean(0),
    }


def assert_statistics(model: NormedNet, batches: list[Sample]) -> None:
    for name, expected in expected_statistics(model, batches).items():
        torch.testing.assert_close(getattr(model.norm, name), expected)


def test_statistics_are_those_of_the_weights_as_they_are_over_the_next_batches() -> None:
    # 3 batches of 4, 4 and 2 samples, endlessly.
    stream = cycle(list(loader(seed=5)))
    trainer = with_hook(period=2, num_iter=4)
    exact: list[int] = []

    def check(trainer: SimpleTrainer) -> None:
        if trainer.iter in (1, 3, 4):
            assert_statistics(net(trainer), list(islice(stream, 4)))
            exact.append(trainer.iter)

    trainer.register_hooks([CallbackHook(after_step=check)])
    trainer.train(0, 5)
    assert exact == [1, 3, 4]
    assert net(trainer).norm.momentum == 0.1
    assert net(trainer).norm.num_batches_tracked == 5


def test_it_runs_when_due_and_after_the_last_step(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO):
        with_hook(period=3, num_iter=1).train(0, 7)
        assert caplog.text.count("statistics of 1 batch norm") == 3
        with_hook(period=0, num_iter=1).train(0, 7)
    assert caplog.text.count("statistics of 1 batch norm") == 4


def test_training_does_not_feel_it_but_for_the_statistics() -> None:
    plain = make_trainer()
    plain.train(0, 7)
    trainer = with_hook(batches=loader(seed=5, shuffle=True))
    trainer.train(0, 7)
    found, expected = training(trainer), training(plain)
    for state in (found, expected):
        del state["model"]["norm.running_mean"], state["model"]["norm.running_var"]
    assert_same(found, expected)
    assert trainer.storage.histories().keys() == plain.storage.histories().keys()


class Failing:
    """Yields batches, and once raises an error instead of the second one."""

    def __init__(self, error: BaseException) -> None:
        self.errors = [error]

    def __iter__(self) -> Iterator[Sample]:
        for number, batch in enumerate(loader(seed=5)):
            if number == 1 and self.errors:
                raise self.errors.pop()
            yield batch


def test_d36_an_error_within_leaves_no_trace() -> None:
    trainer = with_hook(batches=Failing(ValueError("no data")))
    norm, before = net(trainer).norm, {}

    def keep(trainer: SimpleTrainer) -> None:
        if trainer.iter == 1:
            before.update({n: b.clone() for n, b in norm.named_buffers()})

    hooks = trainer._hooks
    trainer._hooks = []
    trainer.register_hooks([CallbackHook(after_step=keep), *hooks])
    with pytest.raises(ValueError, match="no data"):
        trainer.train(0, 5)
    assert_same(dict(norm.named_buffers()), before)
    assert norm.momentum == 0.1
    assert not norm._forward_hooks
    assert not norm._forward_pre_hooks
    assert hooks[0].state_dict()["num_consumed"] == 0


def test_without_a_layer_that_trains_it_does_nothing_and_says_so(
    caplog: pytest.LogCaptureFixture,
) -> None:
    trainer = with_hook(period=1)
    net(trainer).norm.eval()
    with caplog.at_level(logging.INFO):
        trainer.train(0, 2)
    assert "PreciseBN does nothing: no batch norm layer is in training mode" in caplog.text
    assert torch.equal(net(trainer).norm.running_mean, torch.zeros(6))  # type: ignore[arg-type]  # has statistics
    assert trainer.state_dict()["hooks"]["PreciseBN"]["num_consumed"] == 0


def test_a_frozen_layer_and_one_without_statistics_are_passed_over() -> None:
    trainer = make_trainer()
    norm = net(trainer).norm
    net(trainer).linear = nn.Sequential(  # type: ignore[assignment]  # as good as a Linear
        nn.Linear(4, 6), nn.BatchNorm1d(6).eval(), nn.BatchNorm1d(6, track_running_stats=False)
    )
    trainer.register_hooks([PreciseBN(1, trainer.model, loader(), 2)])
    trainer.train(0, 1)
    assert torch.equal(net(trainer).linear[1].running_mean, torch.zeros(6))  # type: ignore[index]  # a Sequential
    assert_statistics(net(trainer), list(islice(loader(), 2)))
    assert norm.num_batches_tracked == 1


def accumulating() -> TrainLoader:
    data = samples(11, seed=5)
    return TrainLoader(data, TrainingSampler(len(data)), 4, accumulate=2, seed=5)


@pytest.mark.parametrize("at", [2, 3, 6])
@pytest.mark.parametrize("make_loader", [partial(loader, seed=5, shuffle=True), accumulating])
def test_a_resumed_run_measures_what_an_unbroken_one_does(
    tmp_path: Path, at: int, make_loader: Callable[[], Any]
) -> None:
    def hooks(trainer: SimpleTrainer) -> list[PreciseBN]:
        return [PreciseBN(2, trainer.model, make_loader(), 1)]

    unbroken = make_trainer(hooks)
    unbroken.train(0, 8)
    again = resumed(hooks, tmp_path, at, 8)
    assert_same(training(again), training(unbroken))


def test_a_measurement_that_is_cut_short_is_made_up_for_with_the_same_batches() -> None:
    unbroken = with_hook()
    unbroken.train(0, 5)
    trainer = with_hook(batches=Failing(StopRequested(Interruption("limit of time"))))
    trainer.train(0, 5)
    assert trainer.interruption == Interruption("limit of time")
    state, model = trainer.state_dict(), trainer.model.state_dict()
    assert (state["iteration"], state["pending"]) == (1, ["PreciseBN"])
    again = with_hook()
    again.model.load_state_dict(model)
    again.load_state_dict(state)
    again.train(2, 5)
    assert_same(training(again), training(unbroken))


def test_no_batches_are_an_error() -> None:
    with pytest.raises(ConfigError, match=r"TEST\.PRECISE_BN\.NUM_ITER\) is 0; it is at least 1"):
        PreciseBN(1, NormedNet(), loader(), 0)
