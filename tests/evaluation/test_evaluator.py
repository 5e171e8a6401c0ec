import contextlib
import gc
import itertools
import logging
import os
import signal
import weakref
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from trainkit.evaluation.evaluator import (
    DatasetEvaluator,
    DatasetEvaluators,
    inference_context,
    inference_on_dataset,
)
from trainkit.utils import comm
from trainkit.utils.errors import ConfigError, UnknownNameError
from trainkit.utils.stop_signals import Interruption, StopRequested, stop_signals


class SumEvaluator(DatasetEvaluator):
    """Adds up the outputs, and remembers what it was given."""

    def __init__(self, name: str = "sum") -> None:
        self.name = name
        self.inputs: list[Any] = [None]
        self.total = -1.0

    def reset(self) -> None:
        self.inputs, self.total = [], 0.0

    def process(self, inputs: Any, outputs: Any) -> None:
        self.inputs.append(inputs)
        self.total += outputs.sum().item()

    def evaluate(self) -> dict[str, Any]:
        return {self.name: {"total": self.total}}


class Doubler(nn.Module):
    """Doubles its input with a weight, and notes the modes it ran in."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.tensor(2.0))
        self.frozen = nn.BatchNorm1d(1).eval()
        self.modes: list[tuple[bool, bool]] = []

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.modes.append((self.training, torch.is_grad_enabled()))
        return self.weight * x


def batches(count: int) -> list[torch.Tensor]:
    return [torch.full((2,), float(i)) for i in range(count)]


def test_the_model_runs_over_all_batches_in_evaluation_mode() -> None:
    model = Doubler()
    results = inference_on_dataset(model, batches(4), SumEvaluator())
    assert results == {"sum": {"total": 24.0}}
    assert model.modes == [(False, False)] * 4
    assert model.training
    assert torch.is_grad_enabled()


def test_d46_a_loader_without_a_length_will_do() -> None:
    assert inference_on_dataset(Doubler(), iter(batches(3)), SumEvaluator()) == {
        "sum": {"total": 12.0}
    }


def test_d46_limit_batches_takes_no_more_from_the_loader() -> None:
    endless = itertools.repeat(torch.ones(1))
    results = inference_on_dataset(Doubler(), endless, SumEvaluator(), limit_batches=3)
    assert results == {"sum": {"total": 6.0}}
    rest = iter(batches(5))
    inference_on_dataset(Doubler(), rest, SumEvaluator(), limit_batches=2)
    assert next(rest)[0].item() == 2.0


def test_d46_the_caller_may_autocast() -> None:
    class Keeping(SumEvaluator):
        def process(self, inputs: Any, outputs: Any) -> None:
            self.dtype = outputs.dtype

    evaluator = Keeping()
    with torch.autocast("cpu", torch.bfloat16):
        inference_on_dataset(nn.Linear(2, 1), batches(1), evaluator)
    assert evaluator.dtype == torch.bfloat16


def test_d46_nothing_waits_for_the_device(fake_cuda: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    class OnDevice(Doubler):
        def forward(self, x: Any) -> torch.Tensor:
            return fake_cuda(super().forward(x).detach()) + 1  # type: ignore[no-any-return]  # a tensor

    class Keeping(SumEvaluator):
        def process(self, inputs: Any, outputs: Any) -> None:
            self.inputs.append(outputs)

    def synchronize(*args: Any) -> None:
        raise AssertionError("waits for the device")

    monkeypatch.setattr(torch.cuda, "synchronize", synchronize)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    evaluator = Keeping()
    inference_on_dataset(OnDevice(), batches(3), evaluator)
    assert (len(evaluator.inputs), fake_cuda.num_transfers) == (3, 0)


def test_callbacks_are_called_in_their_places() -> None:
    told: list[str] = []

    class Telling(Doubler):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            told.append(f"model {self.training}")
            return super().forward(x)

    class Evaluator(SumEvaluator):
        def process(self, inputs: Any, outputs: Any) -> None:
            told.append("process")

        def evaluate(self) -> dict[str, Any]:
            told.append("evaluate")
            return {}

    names = ("on_start", "before_inference", "after_inference", "on_end")
    callbacks = {name: partial(told.append, name) for name in names}
    inference_on_dataset(Telling(), batches(2), Evaluator(), callbacks)
    batch = ["before_inference", "model False", "after_inference", "process"]
    assert told == ["on_start", *batch, *batch, "on_end", "evaluate"]
    told.clear()
    inference_on_dataset(Doubler(), batches(2), None, callbacks={"on_end": callbacks["on_end"]})
    assert told == ["on_end"]


def test_an_unknown_callback_is_refused_before_anything_runs() -> None:
    model = Doubler()
    with pytest.raises(UnknownNameError, match=r"callback 'on_stop'\. Did you mean 'on_start'"):
        inference_on_dataset(model, batches(1), None, {"on_stop": list})
    assert model.modes == []


def test_without_an_evaluator_the_model_runs_and_nothing_comes_back() -> None:
    model = Doubler()
    assert inference_on_dataset(model, batches(2), None) == {}
    assert len(model.modes) == 2


def test_an_evaluator_with_nothing_to_say_gives_an_empty_dict() -> None:
    class Silent(SumEvaluator):
        def evaluate(self) -> Any:
            return None

    assert inference_on_dataset(Doubler(), batches(1), Silent()) == {}
    merged = inference_on_dataset(Doubler(), batches(1), [Silent(), SumEvaluator("b")])
    assert merged == {"b": {"total": 0.0}}


def test_several_evaluators_are_merged() -> None:
    evaluators = [SumEvaluator("a"), SumEvaluator("b")]
    results = inference_on_dataset(Doubler(), batches(2), evaluators)
    assert results == {"a": {"total": 4.0}, "b": {"total": 4.0}}


def test_two_results_of_one_name_are_refused() -> None:
    evaluators = DatasetEvaluators([SumEvaluator(), SumEvaluator()])
    with pytest.raises(ConfigError, match="Two evaluators both have results named sum"):
        evaluators.evaluate()


def test_an_evaluator_without_its_methods_says_so() -> None:
    with pytest.raises(NotImplementedError, match=r"DatasetEvaluator does not define process\(\)"):
        inference_on_dataset(Doubler(), batches(1), DatasetEvaluator())
    with pytest.raises(NotImplementedError, match=r"DatasetEvaluator does not define evaluate\(\)"):
        inference_on_dataset(Doubler(), [], DatasetEvaluator())


def test_batches_go_to_the_device_of_the_model() -> None:
    class OnMeta(Doubler):
        def forward(self, x: Any) -> torch.Tensor:
            assert x["image"].device.type == "meta"
            return torch.zeros(1)

    evaluator = SumEvaluator()
    inference_on_dataset(OnMeta().to("meta"), [{"image": torch.ones(1), "id": 7}], evaluator)
    assert evaluator.inputs[0]["image"].device.type == "meta"
    assert evaluator.inputs[0]["id"] == 7


def test_move_batch_decides_what_model_and_evaluator_see() -> None:
    evaluator = SumEvaluator()
    inference_on_dataset(Doubler(), [1.0, 2.0], evaluator, move_batch=torch.tensor)
    assert [x.item() for x in evaluator.inputs] == [1.0, 2.0]
    assert evaluator.total == 6.0


def test_d36_each_module_gets_its_own_mode_back_even_after_an_error() -> None:
    model = Doubler()
    with inference_context(model):
        assert not model.training
    assert (model.training, model.frozen.training) == (True, False)
    with pytest.raises(ZeroDivisionError), inference_context(model):
        raise ZeroDivisionError
    assert (model.training, model.frozen.training) == (True, False)


def test_a_failing_batch_leaves_the_model_as_it_was() -> None:
    class Failing(SumEvaluator):
        def process(self, inputs: Any, outputs: Any) -> None:
            raise RuntimeError("cannot judge this")

    model = Doubler()
    with pytest.raises(RuntimeError, match=r"^cannot judge this$"):
        inference_on_dataset(model, batches(2), Failing())
    assert model.training
    assert len(model.modes) == 1


class Signalled(SumEvaluator):
    """Gets a signal while it takes in a batch of a given number."""

    def __init__(self, at: int) -> None:
        super().__init__()
        self.at = at

    def process(self, inputs: Any, outputs: Any) -> None:
        super().process(inputs, outputs)
        if len(self.inputs) == self.at:
            os.kill(os.getpid(), signal.SIGTERM)

    def evaluate(self) -> dict[str, Any]:
        raise AssertionError("of a part of the data")


@pytest.mark.parametrize("at", [1, 3, 4])
def test_a_signal_is_noticed_after_the_batch_in_which_it_came(at: int) -> None:
    model, evaluator = Doubler(), Signalled(at)
    with stop_signals(lambda *args, **kwargs: None), pytest.raises(StopRequested) as stop:
        inference_on_dataset(model, iter(batches(4)), evaluator)
    assert stop.value.interruption == Interruption("SIGTERM", 143)
    assert len(evaluator.inputs) == at
    assert model.training


class OtherRank:
    """A second rank that has its own number of batches, and a signal from one meeting on."""

    def __init__(self, num_batches: int, stops_at: int | None = None) -> None:
        self.num_batches = num_batches
        self.stops_at = stops_at
        self.num_meetings = -1

    def gather(self, own: torch.Tensor) -> torch.Tensor:
        self.num_meetings += 1
        if self.num_meetings == 0:
            return torch.stack([own, torch.tensor(self.num_batches)])
        stops = self.stops_at is not None and self.num_meetings >= self.stops_at
        return torch.stack([own, torch.tensor(143 if stops else 0)])


@pytest.mark.parametrize(
    ("own", "others", "meetings"),
    [(0, 0, 1), (19, 19, 1), (20, 20, 2), (45, 45, 3), (45, 39, 2), (45, 40, 3), (39, 45, 2)],
)
def test_ranks_meet_now_and_then_while_all_have_batches_and_once_at_the_end(
    own: int, others: int, meetings: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    rank = OtherRank(others)
    monkeypatch.setattr(comm, "get_world_size", lambda: 2)
    monkeypatch.setattr(comm, "all_gather_tensor", rank.gather)
    inference_on_dataset(Doubler(), batches(own), SumEvaluator())
    assert rank.num_meetings == meetings


def test_ranks_without_a_known_length_meet_at_the_end_only(monkeypatch: pytest.MonkeyPatch) -> None:
    rank = OtherRank(100)
    monkeypatch.setattr(comm, "get_world_size", lambda: 2)
    monkeypatch.setattr(comm, "all_gather_tensor", rank.gather)
    inference_on_dataset(Doubler(), iter(batches(100)), SumEvaluator())
    assert rank.num_meetings == 1


@pytest.mark.parametrize(("stops_at", "num_judged"), [(1, 20), (2, 40), (3, 45)])
def test_a_signal_to_another_rank_is_noticed_when_ranks_meet(
    stops_at: int, num_judged: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(comm, "get_world_size", lambda: 2)
    monkeypatch.setattr(comm, "all_gather_tensor", OtherRank(45, stops_at).gather)
    evaluator = Signalled(at=-1)
    with pytest.raises(StopRequested) as stop:
        inference_on_dataset(Doubler(), batches(45), evaluator)
    assert stop.value.interruption.exit_code == 143
    assert len(evaluator.inputs) == num_judged


def test_a_failed_evaluation_keeps_nothing_alive() -> None:
    class Failing(SumEvaluator):
        def process(self, inputs: Any, outputs: Any) -> None:
            raise RuntimeError("cannot judge this")

    def run() -> weakref.ref[nn.Module]:
        model = Doubler()
        with contextlib.suppress(RuntimeError):
            inference_on_dataset(model, batches(2), Failing())
        return weakref.ref(model)

    gc.collect()
    gc.disable()
    try:
        assert run()() is None
    finally:
        gc.enable()


@pytest.fixture
def one_process_group(tmp_path: Path) -> Iterator[None]:
    store = f"file://{tmp_path}/store"
    dist.init_process_group("gloo", init_method=store, rank=0, world_size=1)
    yield
    dist.destroy_process_group()


@pytest.mark.usefixtures("one_process_group")
def test_a_ddp_model_runs_without_its_wrapper(monkeypatch: pytest.MonkeyPatch) -> None:
    wrapped = DistributedDataParallel(Doubler())

    def forward(*args: Any) -> None:
        raise AssertionError("DDP's forward may wait for ranks that have no batch left")

    monkeypatch.setattr(wrapped, "forward", forward)
    assert inference_on_dataset(wrapped, batches(2), SumEvaluator()) == {"sum": {"total": 4.0}}
    assert wrapped.training


@pytest.mark.parametrize(
    ("limit", "sized", "expected"),
    [
        (None, True, "Inference done 3/4. 2.0000 s/batch. ETA=0:00:02"),
        (None, False, "Inference done 3/?. 2.0000 s/batch."),
        (100, True, "Inference done 3/4. 2.0000 s/batch. ETA=0:00:02"),
        (3602, False, "Inference done 3/3602. 2.0000 s/batch. ETA=1:59:58"),
    ],
)
def test_progress_is_logged_every_five_seconds(
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    limit: int | None,
    sized: bool,
    expected: str,
) -> None:
    clock = itertools.count(step=2.0)  # Each batch takes two seconds.
    fake_time = SimpleNamespace(perf_counter=lambda: next(clock))
    monkeypatch.setattr("trainkit.evaluation.evaluator.time", fake_time)
    loader = batches(4) if sized else iter(batches(4))
    with caplog.at_level(logging.INFO):
        inference_on_dataset(Doubler(), loader, None, limit_batches=limit)
    total = {None: "4" if sized else "an unknown number of", 100: "4", 3602: "3602"}[limit]
    assert caplog.messages == [
        f"Start inference on {total} batches",
        expected,
        "Inference on 4 batches took 10.0 s",
    ]


class Counting(torch.utils.data.IterableDataset[Any]):
    def __iter__(self) -> Any:
        yield from (torch.full((2,), float(number)) for number in range(3))


def test_d46_a_loader_of_an_iterable_data_set_is_evaluated() -> None:
    evaluator = SumEvaluator()
    loader = torch.utils.data.DataLoader(Counting(), batch_size=None)
    assert inference_on_dataset(Doubler(), loader, evaluator) == {"sum": {"total": 12.0}}
