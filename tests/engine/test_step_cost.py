"""What a step costs, counted in calls of Python functions: times are too noisy to be tested.

To look at times, run `tools/benchmark.py --task loop`.
"""

import gc
import itertools
import statistics
import sys
import tracemalloc
from collections.abc import Callable, Iterator
from pathlib import Path
from types import FrameType
from typing import Any

import pytest
import torch
from fvcore.common.param_scheduler import CosineParamScheduler
from torch import nn

import trainkit
from trainkit.engine.hook_base import HookBase
from trainkit.engine.hooks.callback import CallbackHook
from trainkit.engine.hooks.lr_scheduler import LRScheduler
from trainkit.engine.hooks.timer import IterationTimer
from trainkit.engine.hooks.writer import PeriodicWriter
from trainkit.engine.train_loop import SimpleTrainer
from trainkit.utils.events.json_writer import JSONWriter

CEILING = 95
"""Calls that the default hooks and the engine may add to a step of PyTorch's own.

If a test says that there are more: find the call that is new in the step, and take it out. If it is
worth what it costs there, or if there are now far fewer, set this a little above what was found.
"""
CEILING_WITH_WRITES = 105
"""The same with all that comes every 20 steps, as a mean over 20."""
STEPS = 60
OURS = str(Path(trainkit.__file__).parent / "*")
SMOOTHED = ("loss", "total_loss", "grad_norm", "time", "data_time", "rank_data_time")


class Model(nn.Module):
    """A linear regression that notes in each forward pass how many calls there were."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(4, 1)
        self.calls = 0
        self.marks: list[int] = []

    def forward(self, batch: torch.Tensor) -> dict[str, torch.Tensor]:
        if self.calls:
            self.marks.append(self.calls)
        return {"loss": self.linear(batch).square().mean()}


class Quiet(HookBase):
    """A hook with nothing to do around a step."""

    def before_train(self) -> None:
        assert self.trainer.iter == 0


@pytest.fixture(autouse=True)
def _without_gc() -> Iterator[None]:
    """What is collected may call finalizers, in whichever step."""
    gc.collect()
    gc.disable()
    yield
    gc.enable()


@pytest.fixture
def trained(tmp_path: Path) -> Callable[..., Model]:
    """Trains with the default hooks and more; the model knows what its steps cost."""
    numbers = itertools.count()

    def train(*hooks: HookBase, start: int = 0, steps: int = STEPS, count: bool = True) -> Model:
        model = Model()
        # A loader that ends is begun again, which is not what is measured.
        loader = itertools.repeat(torch.ones(2, 4), steps)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.01, momentum=0.9, fused=True)
        # As a checkpoint would have brought it to a run that starts late.
        optimizer.param_groups[0]["initial_lr"] = 0.01
        trainer = SimpleTrainer(model, loader, optimizer)
        trainer.register_hooks(
            [
                IterationTimer(),
                LRScheduler(scheduler=CosineParamScheduler(1.0, 0.0)),
                *hooks,
                PeriodicWriter([JSONWriter(tmp_path / f"{next(numbers)}.json")]),
            ]
        )
        with Profile(model, count):
            trainer.train(start, start + steps)
        return model

    return train


class Profile:
    """Counts calls of Python functions for a model."""

    def __init__(self, model: Model, count: bool = True) -> None:
        self.model, self.count = model, count

    def __enter__(self) -> None:
        if self.count:
            sys.setprofile(self._note)

    def __exit__(self, *_: object) -> None:
        sys.setprofile(None)

    def _note(self, frame: FrameType, event: str, arg: object) -> None:
        self.model.calls += event == "call"


def steps_of(model: Model) -> list[int]:
    """Calls from each forward pass to the next, without the first ones, which import and compile.

    The first one of the list is that of iteration 20, which begins a period of 20.
    """
    return [after - before for before, after in itertools.pairwise(model.marks)][20:]


def plain(model: Model) -> int:
    """Calls in a step that does not write."""
    return statistics.mode(steps_of(model))


def of_torch() -> int:
    """Calls in a step of PyTorch's own."""
    model = Model()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01, momentum=0.9, fused=True)
    with Profile(model):
        for _ in range(STEPS):
            optimizer.zero_grad()
            loss = model(torch.ones(2, 4))["loss"]
            loss.backward()
            optimizer.step()
    return plain(model)


def test_the_engine_and_the_default_hooks_add_few_calls_to_a_step(
    trained: Callable[..., Model],
) -> None:
    model = trained()
    added = plain(model) - of_torch()
    assert added <= CEILING, "see CEILING"
    mean = statistics.fmean(steps_of(model)[:20]) - of_torch()
    assert mean <= CEILING_WITH_WRITES, "see CEILING_WITH_WRITES"
    # Else the ceilings have lost their meaning.
    assert added > CEILING / 2


def test_hooks_with_nothing_to_do_in_a_step_add_no_call(trained: Callable[..., Model]) -> None:
    assert steps_of(trained(*(Quiet() for _ in range(10)))) == steps_of(trained())


class History(HookBase):
    """Fills the storage with what a run would have put before it began here."""

    def before_train(self) -> None:
        storage = self.trainer.storage
        for name in (*SMOOTHED, "lr"):
            for iteration in range(max(0, storage.iter - 2000), storage.iter):
                storage.put_scalar(name, 1.0, name != "lr", iteration)


def test_a_step_after_a_million_makes_the_calls_of_one_after_a_thousand(
    trained: Callable[..., Model],
) -> None:
    late, early = (trained(History(), start=start) for start in (1_000_000, 1_000))
    assert steps_of(late) == steps_of(early)


def test_nothing_grows_with_the_number_of_steps(trained: Callable[..., Model]) -> None:
    memory: dict[int, int] = {}
    lengths: dict[str, int] = {}

    def look(trainer: Any) -> None:
        if trainer.iter % 100 == 0:
            # What waits for the garbage collector is no growth.
            gc.collect()
            ours = tracemalloc.take_snapshot().filter_traces([tracemalloc.Filter(True, OURS)])
            memory[trainer.iter] = sum(trace.size for trace in ours.traces)
            histories = trainer.storage.histories()
            lengths.update({name: len(history.values()) for name, history in histories.items()})

    tracemalloc.start()
    try:
        look_at = CallbackHook(before_step=look)
        trained(History(), look_at, start=1_000_000, steps=401, count=False)
    finally:
        tracemalloc.stop()
    # One number kept in each of 200 steps would be 1,600 bytes in the tightest array.
    assert memory[1_000_400] - memory[1_000_200] < 1000
    assert lengths == dict.fromkeys((*SMOOTHED, "lr"), 1024)


def putting(count: int) -> HookBase:
    """Puts so many metrics in each step."""
    names = [f"metric{i}" for i in range(count)]
    return CallbackHook(
        after_step=lambda trainer: trainer.storage.put_scalars(**dict.fromkeys(names, 1.0))
    )


def test_calls_grow_in_proportion_to_hooks_and_metrics(trained: Callable[..., Model]) -> None:
    def after_step(trainer: Any) -> None:
        pass

    def hooks(count: int) -> list[HookBase]:
        return [CallbackHook(after_step=after_step) for _ in range(count)]

    for make in (hooks, lambda count: [putting(4 * count)]):
        none, some, many = (steps_of(trained(*make(count))) for count in (0, 25, 50))
        assert min(some) > min(none)
        for a, b, c in zip(none, some, many, strict=True):
            assert c - a == pytest.approx(2 * (b - a), abs=4)
