"""`SimpleTrainer`'s step, and `AMPTrainer`'s."""

import copy
import inspect
import logging
import math
import os
import random
import signal
import threading
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, Dataset

from trainkit.data.build import TrainLoader
from trainkit.data.samplers.distributed_sampler import TrainingSampler
from trainkit.data.samplers.order import Position
from trainkit.engine.hook_base import HookBase
from trainkit.engine.hooks.callback import CallbackHook
from trainkit.engine.non_finite import NonFiniteError
from trainkit.engine.preemption import PreemptedExit
from trainkit.engine.train_loop import AMPTrainer, SimpleTrainer
from trainkit.solver.clip import GradientClipper
from trainkit.utils.errors import CheckpointError, ConfigError
from trainkit.utils.events.storage import EventStorage

MakeTrainer = Callable[..., SimpleTrainer]


def gradients(trainer: SimpleTrainer) -> list[torch.Tensor]:
    """Trains for one step and returns the gradients before clipping."""
    seen: list[torch.Tensor] = []
    hook = CallbackHook(
        after_backward=lambda t: seen.extend(p.grad.clone() for p in t.model.parameters())
    )
    trainer.register_hooks([hook])
    trainer.train(0, 1)
    return seen


def weights(trainer: SimpleTrainer) -> list[torch.Tensor]:
    return [p.detach().clone() for p in trainer.model.parameters()]


def same(found: list[torch.Tensor], expected: list[torch.Tensor]) -> bool:
    return all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))


def batches_of(samples: list[Any], *sizes: int) -> list[Any]:
    """Cuts the samples into batches of these sizes."""
    rest = iter(samples)
    return [torch.utils.data.default_collate([next(rest) for _ in range(n)]) for n in sizes]


@pytest.mark.parametrize("sizes", [(4, 4), (3, 3, 2), (6, 2), (1, 7)])
def test_accumulated_gradients_are_those_of_the_large_batch(
    simple: MakeTrainer, samples: list[Any], sizes: tuple[int, ...]
) -> None:
    large = simple(data_loader=batches_of(samples, 8))
    accumulated = simple(data_loader=batches_of(samples, *sizes), accumulate=len(sizes))
    for a, b in zip(gradients(accumulated), gradients(large), strict=True):
        torch.testing.assert_close(a, b)
    found, expected = (t.storage.history("loss_mse").latest() for t in (accumulated, large))
    assert found == pytest.approx(expected)


def test_precision_bf16_runs_forward_in_bf16_and_keeps_fp32_weights(simple: MakeTrainer) -> None:
    trainer = simple(precision="bf16")
    dtypes: list[torch.dtype] = []
    model: Any = trainer.model
    model.linear.register_forward_hook(lambda m, args, out: dtypes.append(out.dtype))
    trainer.train(0, 2)
    assert dtypes == [torch.bfloat16] * 2
    assert {p.dtype for p in trainer.model.parameters()} == {torch.float32}


@pytest.mark.parametrize("precision", ["fp64", "half"])
def test_an_unknown_precision_is_an_error_at_once(simple: MakeTrainer, precision: str) -> None:
    with pytest.raises(ConfigError, match=rf"SOLVER.PRECISION\) is '{precision}'; known: fp32"):
        simple(precision=precision)


def test_accumulate_below_1_is_an_error(simple: MakeTrainer) -> None:
    with pytest.raises(ConfigError, match=r"accumulate \(SOLVER.ACCUMULATE\) is 0"):
        simple(accumulate=0)


def test_amp_trainer_takes_a_dtype(simple: MakeTrainer) -> None:
    plain = simple()
    own = (plain.model, plain.data_loader, plain.optimizer)
    trainer = AMPTrainer(*own, precision=torch.bfloat16, accumulate=2)
    assert (trainer.precision, trainer.accumulate) == ("bf16", 2)
    trainer.train(0, 1)
    assert AMPTrainer(*own).precision == "fp16"
    with pytest.raises(ConfigError, match=r"is torch.float64; known: fp32, bf16, fp16"):
        AMPTrainer(*own, precision=torch.float64)


def test_d02_amp_trainer_takes_and_keeps_every_argument_of_simple_trainer(
    simple: MakeTrainer,
) -> None:
    plain = simple()
    kept = {
        "gather_metric_period": 3,
        "accumulate": 2,
        "seed": 5,
        "grad_clipper": GradientClipper("value", 1.0),
    }
    without_effect = {"zero_grad_before_forward": False, "async_write_metrics": True}
    given: dict[str, Any] = {**kept, **without_effect, "non_finite": "skip"}
    known = set(inspect.signature(SimpleTrainer).parameters)
    assert known == {*given, "model", "data_loader", "optimizer", "precision"}
    trainer = AMPTrainer(
        plain.model, plain.data_loader, plain.optimizer, precision=torch.bfloat16, **given
    )
    assert {name: getattr(trainer, name) for name in kept} == kept
    assert trainer._guard.policy == "skip"
    trainer.train(0, 2)


def test_d05_metrics_are_put_by_no_thread_and_into_the_trainers_own_storage(
    simple: MakeTrainer,
) -> None:
    before, threads = set[threading.Thread](), set[threading.Thread]()
    # One that a hook forgot to close, or that a thread would find open.
    other = EventStorage()
    trainer = simple(async_write_metrics=True)

    def open_other(trainer: SimpleTrainer) -> None:
        other.__enter__()

    def close_other(trainer: SimpleTrainer) -> None:
        threads.update(threading.enumerate())
        other.__exit__(None, None, None)

    watching = CallbackHook(
        # What waits for signals is there by then.
        before_train=lambda t: before.update(threading.enumerate()),
        before_step=open_other,
        after_step=close_other,
    )
    trainer.register_hooks([watching])
    trainer.train(0, 3)
    assert threads <= before
    assert [i for _, i in trainer.storage.history("total_loss").values()] == [0, 1, 2]
    assert other.histories() == {}


def test_move_batch_may_be_overridden(samples: list[Any], simple: MakeTrainer) -> None:
    class Wrapped:
        def __init__(self, batch: Any) -> None:
            self.batch = batch

    class Unwrapping(SimpleTrainer):
        def move_batch(self, batch: Any) -> Any:
            return super().move_batch(batch.batch)

    loader = [Wrapped(batch) for batch in batches_of(samples, 2, 2)]
    plain = simple()
    Unwrapping(plain.model, loader, plain.optimizer).train(0, 2)


def test_a_scalar_loss_is_the_total(simple: MakeTrainer, samples: list[Any]) -> None:
    class Scalar(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.ones(()))

        def forward(self, batch: Any) -> torch.Tensor:
            return self.weight * 2.0

    trainer = simple(Scalar())
    trainer.train(0, 1)
    assert trainer.storage.history("total_loss").latest() == 2.0
    (weight,) = weights(trainer)
    assert weight.item() == pytest.approx(0.8)


def test_d09_metrics_without_a_gradient_are_put_and_not_trained_on(
    simple: MakeTrainer, regression: Any
) -> None:
    class WithMetric(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = regression()

        def forward(self, batch: Any) -> Any:
            return {**self.inner(batch), "accuracy": torch.tensor(1000.0), "precision": math.nan}

    plain, trainer = simple(), simple(WithMetric())
    plain.train(0, 3)
    trainer.train(0, 3)
    assert same(weights(trainer), weights(plain))
    assert trainer.storage.history("accuracy").latest() == 1000.0
    assert math.isnan(trainer.storage.history("precision").latest())
    assert trainer.storage.history("total_loss").latest() < 1000.0


@pytest.mark.parametrize(
    ("output", "text"),
    [
        (lambda x: None, "returned None"),
        (lambda x: {}, r"returned \{\}"),
        (lambda x: x, r"a tensor of shape \(2, 1\)"),
        (lambda x: {"loss": x.mean().detach()}, "requires_grad=False"),
    ],
)
def test_a_model_without_a_loss_is_a_clear_error(
    simple: MakeTrainer, output: Any, text: str
) -> None:
    class Lossless(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear = nn.Linear(4, 1)

        def forward(self, batch: Any) -> Any:
            return output(self.linear(batch["x"]))

    with pytest.raises(ConfigError, match=f"In training, the model must return.*{text}"):
        simple(Lossless()).train(0, 1)


class BadGradient(torch.autograd.Function):
    """Passes values through, and gives a gradient that is not a number."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor) -> torch.Tensor:
        return x.clone()

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> torch.Tensor:
        return grads[0] * math.nan


class Poisoned(nn.Module):
    """Is poisoned in one of its forward passes."""

    def __init__(self, inner: nn.Module, kind: str, at: int) -> None:
        super().__init__()
        self.inner = inner
        self.kind = kind
        self.at = at

    def forward(self, batch: Any) -> Any:
        loss = self.inner(batch)["loss_mse"]
        self.at -= 1
        if self.at != -1:
            return {"loss_mse": loss}
        if self.kind == "gradient":
            return {"loss_mse": BadGradient.apply(loss)}  # type: ignore[no-untyped-call]  # torch's
        if self.kind == "loss without a gradient":
            return {"loss_mse": loss, "loss_b": torch.where(loss < 0, loss, math.inf)}
        return {"loss_mse": loss * {"nan": math.nan, "inf": math.inf}[self.kind]}


KINDS = ["nan", "inf", "gradient", "loss without a gradient"]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("accumulate", [1, 2])
def test_a_bad_step_on_the_cpu_raises_before_the_update(
    simple: MakeTrainer, regression: Any, kind: str, accumulate: int
) -> None:
    model = Poisoned(regression(), kind, at=2 * accumulate)
    trainer = simple(model, accumulate=accumulate)
    seen: list[list[torch.Tensor]] = []
    trainer.register_hooks([CallbackHook(after_step=lambda t: seen.append(weights(t)))])
    with pytest.raises(FloatingPointError, match=r"Iteration 2 on rank 0 is not finite: .*=") as e:
        trainer.train(0, 5)
    assert all(f"{name}=" in str(e.value) for name in ("loss_mse", "total_loss", "grad_norm"))
    assert trainer.iter == 2
    assert len(seen) == 2
    assert same(weights(trainer), seen[-1])


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("accumulate", [1, 2])
def test_a_bad_step_is_skipped_before_the_update(
    simple: MakeTrainer, regression: Any, kind: str, accumulate: int
) -> None:
    trainer = simple(
        Poisoned(regression(), kind, at=2 * accumulate), accumulate=accumulate, non_finite="skip"
    )
    seen: list[list[torch.Tensor]] = []
    momentum: list[list[torch.Tensor]] = []

    def note(trainer: SimpleTrainer) -> None:
        states = trainer.optimizer.state.values()
        seen.append(weights(trainer))
        momentum.append([state["momentum_buffer"].clone() for state in states])

    trainer.register_hooks([CallbackHook(after_step=note)])
    trainer.train(0, 5)
    assert same(seen[2], seen[1])
    assert same(momentum[2], momentum[1])
    assert not same(seen[3], seen[2])
    # Its values stay out of the metrics, where they would linger.
    history = trainer.storage.history("total_loss").values()
    assert [iteration for _, iteration in history] == [0, 1, 3, 4]
    assert trainer.storage.history("skipped_steps").values() == [(1.0, 2)]


@pytest.mark.parametrize("kind", KINDS)
def test_a_step_to_roll_back_from_raises_before_the_update(
    simple: MakeTrainer, regression: Any, kind: str
) -> None:
    trainer = simple(Poisoned(regression(), kind, at=2), non_finite="rollback")
    seen: list[list[torch.Tensor]] = []
    trainer.register_hooks([CallbackHook(after_step=lambda t: seen.append(weights(t)))])
    with pytest.raises(NonFiniteError, match="Iteration 2 on rank 0") as e:
        trainer.train(0, 5)
    assert e.value.iteration == 2
    assert same(weights(trainer), seen[-1])


def test_steps_that_were_skipped_are_counted_over_a_resume(
    simple: MakeTrainer, regression: Any
) -> None:
    trainer = simple(Poisoned(regression(), "nan", at=1), non_finite="skip")
    trainer.train(0, 2)
    resumed = simple(Poisoned(regression(), "nan", at=1), non_finite="skip")
    resumed.load_state_dict(trainer.state_dict())
    resumed.train(2, 5)
    assert resumed.storage.history("skipped_steps").values() == [(1.0, 1), (2.0, 3)]


@pytest.mark.parametrize("policy", ["raise", "rollback"])
def test_the_error_of_a_bad_step_tells_its_samples(
    simple: MakeTrainer, regression: Any, samples: list[Any], policy: str
) -> None:
    loader = TrainLoader(samples, TrainingSampler(10, seed=3), 4, accumulate=2, seed=3)
    keys = loader.samples_at(Position(0, 8))
    listed = ", ".join(f"{epoch}:{offset}={index}" for index, epoch, offset in keys)
    model = Poisoned(regression(), "nan", at=5)
    trainer = simple(model, loader, accumulate=2, non_finite=policy)
    with pytest.raises(NonFiniteError, match=f"epoch:offset=index: {listed}\\. No checkpoint"):
        trainer.train(0, 5)


def test_of_a_plain_loader_the_batch_is_told(simple: MakeTrainer, regression: Any) -> None:
    trainer = simple(Poisoned(regression(), "nan", at=7))
    with pytest.raises(NonFiniteError, match="The step began with batch 2 of epoch 1"):
        trainer.train(0, 9)


def test_no_state_is_given_out_by_hooks_that_end_after_a_bad_step(
    simple: MakeTrainer, regression: Any
) -> None:
    trainer = simple(Poisoned(regression(), "nan", at=1))
    trainer.register_hooks([CallbackHook(after_train=lambda t: t.state_dict())])
    with pytest.raises(NonFiniteError) as e:
        trainer.train(0, 3)
    assert any("there is no whole state to save" in note for note in e.value.__notes__)


@pytest.mark.parametrize("method", ["before_train", "before_step"])
def test_a_save_before_a_step_does_not_hide_that_it_is_bad(
    simple: MakeTrainer, regression: Any, method: str
) -> None:
    trainer = simple(Poisoned(regression(), "nan", at=0))
    before = weights(trainer)
    trainer.register_hooks([CallbackHook(**{method: lambda t: t.state_dict()})])
    with pytest.raises(NonFiniteError, match="Iteration 0 on rank 0"):
        trainer.train(0, 3)
    assert same(weights(trainer), before)


class Signalling(Dataset[Any]):
    """Gets a signal while a sample of a given number is fetched, for the first time."""

    def __init__(self, samples: list[Any], at: int) -> None:
        self.samples = samples
        self.at = at

    def __len__(self) -> int:
        return len(self.samples)

    def __getitem__(self, index: int) -> Any:
        self.at -= 1
        if self.at == -1:
            os.kill(os.getpid(), signal.SIGTERM)
        return self.samples[index]


@pytest.mark.parametrize("at", [0, 5, 14])
def test_a_signal_during_a_fetch_leaves_before_the_step_and_a_resume_is_exact(
    simple: MakeTrainer, regression: Any, samples: list[Any], at: int
) -> None:
    def make(at: int) -> SimpleTrainer:
        dataset = Signalling(samples, at)
        loader = TrainLoader(dataset, TrainingSampler(10, seed=3), 4, accumulate=2, seed=3)
        return simple(regression(dropout=0.5), loader, accumulate=2, seed=3)

    unbroken, broken, resumed = make(-1), make(at), make(-1)
    unbroken.train(0, 6)
    with pytest.raises(PreemptedExit):
        broken.train(0, 6)
    assert broken.iter == at // 4
    resumed.model.load_state_dict(broken.model.state_dict())
    resumed.load_state_dict(copy.deepcopy(broken.state_dict()))
    resumed.train(broken.iter, 6)
    assert same(weights(resumed), weights(unbroken))
    # As it would in a notebook.
    broken.train(broken.iter, 6)
    assert same(weights(broken), weights(unbroken))


def test_d03_no_state_is_given_out_after_a_bad_step_that_nobody_noticed(
    simple: MakeTrainer,
) -> None:
    trainer = simple()
    trainer.train(0, 2)
    trainer.state_dict()
    # As with an accelerator, nobody hears of it until it is brought over.
    trainer.storage.iter = trainer.iter + 1
    trainer._metrics.put(trainer.storage, {"a": torch.tensor(math.nan)}, 0.0, "", None)
    with pytest.raises(FloatingPointError, match="Iteration 3 on rank 0"):
        trainer.state_dict()


@pytest.mark.parametrize("clip_type", ["full_model", "norm", "value"])
def test_gradients_are_clipped_before_the_update(simple: MakeTrainer, clip_type: str) -> None:
    trainer = simple(lr=1.0, grad_clipper=GradientClipper(clip_type, 1e-3))
    before = weights(trainer)
    trainer.train(0, 1)
    moved = [(a - b).abs().max().item() for a, b in zip(weights(trainer), before, strict=True)]
    assert 0 < max(moved) <= 1.001e-3
    assert trainer.storage.history("grad_norm").latest() > 0.1


def test_epochs_begin_again(simple: MakeTrainer, samples: list[Any]) -> None:
    trainer = simple(data_loader=DataLoader(samples, batch_size=4))  # type: ignore[arg-type]  # a list
    trainer.train(0, 7)
    assert trainer.iter == 7


def test_reset_data_loader_draws_from_the_new_one(simple: MakeTrainer, samples: list[Any]) -> None:
    trainer = simple()
    trainer.train(0, 1)
    seen: list[Any] = []
    trainer.model.register_forward_pre_hook(lambda m, args: seen.append(args[0]["x"]))
    new = batches_of(samples[5:], 2)
    trainer.reset_data_loader(new)
    trainer.train(1, 2)
    assert torch.equal(seen[0], new[0]["x"])


def test_called_without_arguments_it_only_initializes_the_loop() -> None:
    class Own(SimpleTrainer):
        def __init__(self) -> None:
            super().__init__()
            self.steps = 0

        def run_step(self) -> None:
            self.steps += 1

    trainer = Own()
    trainer.train(0, 3)
    assert trainer.steps == 3


def drawing(count: int) -> HookBase:
    """Draws random numbers before each step."""

    def draw(trainer: SimpleTrainer) -> None:
        torch.rand(count + trainer.iter)

    return CallbackHook(before_step=draw)


def saving_at(iteration: int, states: list[dict[str, Any]]) -> HookBase:
    def save(trainer: SimpleTrainer) -> None:
        if trainer.iter == iteration:
            # The states alias what the next step writes to.
            state = {"trainer": trainer.state_dict(), "model": trainer.model.state_dict()}
            states.append(copy.deepcopy(state))

    return CallbackHook(after_step=save)


def shuffled(samples: list[Any], with_generator: bool) -> DataLoader[Any]:
    generator = torch.Generator().manual_seed(3) if with_generator else None
    return DataLoader(samples, batch_size=3, shuffle=True, generator=generator)  # type: ignore[arg-type]  # a list


@pytest.mark.parametrize("with_generator", [False, True])
@pytest.mark.parametrize("seed", [None, 11])
@pytest.mark.parametrize("accumulate", [1, 3])
@pytest.mark.parametrize("cut", [0, 2, 3, 5])
def test_d15_a_plain_loader_and_dropout_resume_bit_for_bit(
    simple: MakeTrainer,
    regression: Any,
    samples: list[Any],
    with_generator: bool,
    seed: int | None,
    accumulate: int,
    cut: int,
) -> None:
    def make() -> SimpleTrainer:
        return simple(
            regression(dropout=0.5),
            shuffled(samples, with_generator),
            seed=seed,
            accumulate=accumulate,
        )

    states: list[dict[str, Any]] = []
    unbroken = make()
    unbroken.register_hooks([drawing(3), saving_at(cut, states)])
    unbroken.train(0, 12)

    torch.manual_seed(77)
    random.seed(77)
    resumed = make()
    resumed.register_hooks([drawing(3), saving_at(cut, [])])
    resumed.model.load_state_dict(states[0]["model"])
    resumed.load_state_dict(states[0]["trainer"])
    resumed.train(resumed.iter + 1, 12)
    assert same(weights(resumed), weights(unbroken))
    losses = [t.storage.history("loss_mse").values() for t in (resumed, unbroken)]
    assert losses[0] == losses[1]


def test_a_seeded_trainer_draws_dropout_whatever_its_hooks_draw(
    simple: MakeTrainer, regression: Any
) -> None:
    quiet, noisy = (simple(regression(dropout=0.5), seed=5) for _ in range(2))
    noisy.register_hooks([drawing(1)])
    other_seed = simple(regression(dropout=0.5), seed=6)
    for trainer in (quiet, noisy, other_seed):
        trainer.train(0, 6)
    assert same(weights(noisy), weights(quiet))
    assert not same(weights(other_seed), weights(quiet))


@pytest.mark.parametrize("seed", [None, 11])
def test_what_a_hook_draws_behind_the_checkpoint_is_drawn_again(
    simple: MakeTrainer, seed: int | None
) -> None:
    def put_noise(trainer: SimpleTrainer) -> None:
        trainer.storage.put_scalar("noise", torch.rand(1).item() + random.random())

    states: list[dict[str, Any]] = []
    unbroken = simple(seed=seed)
    unbroken.register_hooks([saving_at(2, states), CallbackHook(after_step=put_noise)])
    unbroken.train(0, 5)

    torch.manual_seed(77)
    resumed = simple(seed=seed)
    resumed.register_hooks([saving_at(2, []), CallbackHook(after_step=put_noise)])
    resumed.model.load_state_dict(states[0]["model"])
    resumed.load_state_dict(states[0]["trainer"])
    resumed.train(3, 5)
    noises = [t.storage.history("noise").values() for t in (resumed, unbroken)]
    assert noises[0] == noises[1]


def test_a_seed_travels_in_the_state(simple: MakeTrainer) -> None:
    trainer = simple(seed=5)
    trainer.train(0, 1)
    resumed = simple(seed=6)
    resumed.load_state_dict(trainer.state_dict())
    assert resumed.seed == 5


def test_a_resumed_run_does_not_keep_what_it_loaded(simple: MakeTrainer, no_gc: Any) -> None:
    first, resumed = simple(), simple()
    first.train(0, 2)
    state = first.state_dict()
    resumed.load_state_dict(state)
    (loaded,) = no_gc(state["rng"][0]["torch"])
    del state
    gone: list[bool] = []
    resumed.register_hooks([CallbackHook(after_step=lambda t: gone.append(loaded() is None))])
    resumed.train(2, 3)
    assert gone == [True]


def test_what_a_plain_loader_cannot_restore_is_said_once(
    simple: MakeTrainer, caplog: pytest.LogCaptureFixture
) -> None:
    trainer = simple()
    trainer.train(0, 2)
    resumed = simple()
    with caplog.at_level(logging.WARNING):
        resumed.load_state_dict(trainer.state_dict())
        resumed.train(2, 12)
    assert caplog.text.count("has no state of its own") == 1


def test_metrics_of_every_step_are_put(simple: MakeTrainer) -> None:
    trainer = simple(gather_metric_period=4)
    trainer.train(0, 6)
    names = {"loss_mse", "total_loss", "grad_norm", "data_time", "rank_data_time"}
    histories = trainer.storage.histories()
    assert histories.keys() == names
    assert all([i for _, i in h.values()] == list(range(6)) for h in histories.values())


def test_a_state_inside_the_update_is_refused(simple: MakeTrainer) -> None:
    trainer = simple()
    trainer.register_hooks([CallbackHook(after_backward=lambda t: t.state_dict())])
    with pytest.raises(RuntimeError, match="Inside the update of iteration 0 there is no whole"):
        trainer.train(0, 1)


def test_a_save_at_the_end_of_an_own_step_continues_with_the_next(simple: MakeTrainer) -> None:
    states: list[dict[str, Any]] = []
    trainer = simple()
    run_step = trainer.run_step

    def saving_run_step() -> None:
        run_step()
        states.append(copy.deepcopy(trainer.state_dict()))

    trainer.run_step = saving_run_step  # type: ignore[method-assign]  # as an override does
    trainer.train(0, 3)
    assert [state["iteration"] for state in states] == [0, 1, 2]


def test_the_state_of_another_kind_of_optimizer_is_refused(simple: MakeTrainer) -> None:
    trainer = simple()
    trainer.train(0, 1)
    state = trainer.state_dict()
    other = simple()
    other.optimizer = torch.optim.AdamW(other.model.parameters())
    with pytest.raises(CheckpointError, match="is not a AdamW: only one of the two has 'momentum'"):
        other.load_state_dict(state)
