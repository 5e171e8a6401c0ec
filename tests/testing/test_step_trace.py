"""What a trace holds, and that tracing changes nothing."""

import copy
import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from trainkit.data import TrainingSampler, TrainLoader
from trainkit.engine import CallbackHook, HookBase, SimpleTrainer
from trainkit.engine.hooks import PeriodicWriter
from trainkit.testing.divergence import differences
from trainkit.testing.fingerprint import fingerprint
from trainkit.testing.step_trace import Record, StepTrace, _sample, read_trace
from trainkit.utils.events import JSONWriter


class Samples(torch.utils.data.Dataset[Any]):
    def __len__(self) -> int:
        return 10

    def __getitem__(self, index: int) -> dict[str, Any]:
        return {
            "x": torch.full((4,), float(index)) + 0.1 * torch.rand(4),
            "name": f"sample {index}",
        }


class Net(nn.Module):
    """Runs its layer twice, and something between the two."""

    def __init__(self, between: Callable[[torch.Tensor], torch.Tensor] = torch.relu) -> None:
        super().__init__()
        self.inner = nn.Sequential(nn.Dropout(0.5), nn.Linear(4, 4))
        self.norm = nn.BatchNorm1d(4)
        self.between = between
        nn.init.eye_(self.inner.get_parameter("1.weight"))
        nn.init.zeros_(self.inner.get_parameter("1.bias"))

    def forward(self, batch: dict[str, Any]) -> dict[str, torch.Tensor]:
        x = self.inner(self.between(self.inner(batch["x"])))
        return {"loss": self.norm(x).abs().mean() + x.mean()}


Make = Callable[..., SimpleTrainer]


def make(net: nn.Module | None = None, accumulate: int = 1, **kwargs: Any) -> SimpleTrainer:
    loader = TrainLoader(
        Samples(), TrainingSampler(10, seed=0), 4, accumulate=accumulate, seed=0, **kwargs
    )
    net = net or Net()
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1, momentum=0.9)
    return SimpleTrainer(net, loader, optimizer, seed=0, accumulate=accumulate)


@pytest.fixture
def traced(tmp_path: Path) -> Callable[..., list[Record]]:
    """Trains for three iterations and returns the trace."""

    def train(trainer: SimpleTrainer, *hooks: HookBase) -> list[Record]:
        path = tmp_path / f"{len(list(tmp_path.iterdir()))}.jsonl"
        trainer.register_hooks(hooks)
        StepTrace(trainer, path)
        trainer.train(0, 3)
        return read_trace(path, rank=0, segment=0)

    return train


Traced = Callable[..., list[Record]]


def components(records: list[Record], phase: str, iteration: int = 1) -> list[tuple[str, str]]:
    return [
        name for r in records if (r.phase, r.iteration) == (phase, iteration) for name in r.values
    ]


def test_the_moments_of_a_run_come_in_order(traced: Traced) -> None:
    records = traced(make())
    phases = [(record.iteration, record.phase) for record in records]
    step = ["forward", "gradients", "gradient norm", "end"]
    steps = [(iteration, phase) for iteration in range(3) for phase in step]
    assert phases == [(-1, "checkpoint"), *steps, (3, "after training")]


def test_a_forward_pass_is_written_from_its_samples_to_its_losses(traced: Traced) -> None:
    names = components(traced(make()), "forward")
    detail = "; index 6, epoch 0, offset 4"
    assert names[0] == ("data loader", "sample 0")
    samples = [item for component, item in names if component == "data set Samples"]
    assert [item for item in samples if item.startswith("sample 0")] == [
        f"sample 0; x{detail}",
        f"sample 0; name{detail}",
    ]
    assert names[names.index(("generators", "python")) :] == [
        *(("generators", kind) for kind in ("python", "numpy", "torch")),
        ("layer (the model)", "its input to inner"),
        ("layer (the model)", "its draws before inner"),
        ("layer inner", "its input to inner.0"),
        ("layer inner", "its draws before inner.0"),
        ("layer inner.0", "its output"),
        ("layer inner", "its input to inner.1"),
        ("layer inner", "its draws before inner.1"),
        ("layer inner.1", "its output"),
        ("layer inner", "its output"),
        ("layer (the model)", "its input to inner (call 2)"),
        ("layer (the model)", "its draws before inner (call 2)"),
        ("layer inner", "its input to inner.0 (call 2)"),
        ("layer inner", "its draws before inner.0 (call 2)"),
        ("layer inner.0", "its output (call 2)"),
        ("layer inner", "its input to inner.1 (call 2)"),
        ("layer inner", "its draws before inner.1 (call 2)"),
        ("layer inner.1", "its output (call 2)"),
        ("layer inner", "its output (call 2)"),
        ("layer (the model)", "its input to norm"),
        ("layer (the model)", "its draws before norm"),
        ("layer norm", "its output"),
        ("loss", "loss"),
    ]


def test_a_state_holds_all_that_the_next_step_depends_on(traced: Traced) -> None:
    names = components(traced(make()), "end")
    assert [item for component, item in names if component == "parameter"] == [
        *("inner.1.weight", "inner.1.bias", "norm.weight", "norm.bias")
    ]
    assert ("buffer", "norm.running_mean") in names
    assert ("optimizer", "lr of group 0") in names
    assert ("optimizer", "momentum_buffer of inner.1.weight") in names
    assert ("data loader", "offset") in names


@pytest.mark.parametrize("accumulate", [1, 2])
def test_equal_runs_have_equal_traces(traced: Traced, accumulate: int) -> None:
    first = traced(make(accumulate=accumulate))
    assert [r.part for r in first if r.phase == "forward"] == [*range(accumulate)] * 3
    offsets = re.findall(r"sample 0; x; index \d+, epoch \d, offset (\d)", str(first))
    assert list(map(int, offsets)) == [n % 10 for n in range(0, 12, 4 // accumulate)]
    assert differences(first, traced(make(accumulate=accumulate))) == []


def test_tracing_does_not_change_a_run(traced: Traced) -> None:
    plain, watched = make(), make()
    plain.train(0, 3)
    traced(watched)
    for name, value in plain.model.state_dict().items():
        assert torch.equal(value, watched.model.state_dict()[name]), name


def test_a_resumed_run_is_traced_like_an_unbroken_one(tmp_path: Path) -> None:
    saved: dict[str, Any] = {}
    traces: list[StepTrace] = []

    def save(trainer: SimpleTrainer) -> None:
        if trainer.iter == 1:
            traces[0].write_state("checkpoint", 1)
            state = {"trainer": trainer.state_dict(), "model": trainer.model.state_dict()}
            saved.update(copy.deepcopy(state))

    unbroken = make()
    unbroken.register_hooks([CallbackHook(after_step=save)])
    traces.append(StepTrace(unbroken, tmp_path / "unbroken"))
    unbroken.train(0, 4)
    resumed = make()
    resumed.register_hooks([CallbackHook(after_step=save)])
    StepTrace(resumed, tmp_path / "resumed")
    resumed.model.load_state_dict(saved["model"])
    resumed.load_state_dict(saved["trainer"])
    resumed.train(2, 4)
    records = read_trace(tmp_path / "unbroken", 0, 0)
    later = read_trace(tmp_path / "resumed", 0, 1)
    assert [(r.iteration, r.phase) for r in later[:3]] == [
        *((1, "checkpoint"), (1, "end"), (2, "forward"))
    ]
    cut = [(r.iteration, r.phase) for r in records].index((1, "checkpoint"))
    assert differences(records, [*records[: cut + 1], *later]) == []


def first_difference(traced: Traced, *between: Callable[[torch.Tensor], torch.Tensor]) -> Any:
    first, second = (traced(make(Net(function))) for function in between)
    return differences(first, second)[0]


def test_code_between_layers_is_told_from_the_layers(traced: Traced) -> None:
    found = first_difference(traced, torch.relu, torch.sigmoid)
    assert (found.component, found.item) == ("layer (the model)", "its input to inner (call 2)")


def test_who_draws_other_numbers_is_told_from_who_then_gets_others(traced: Traced) -> None:
    def draw(x: torch.Tensor) -> torch.Tensor:
        torch.rand(1)
        return x.relu()

    found = first_difference(traced, torch.relu, draw)
    assert found.item == "its draws before inner (call 2)"


def test_evaluation_between_steps_leaves_no_trace(traced: Traced) -> None:
    def evaluate(trainer: SimpleTrainer) -> None:
        trainer.model.eval()({"x": torch.ones(4, 4)})
        trainer.model.train()

    hook = CallbackHook(before_train=evaluate, after_step=evaluate)
    assert differences(traced(make()), traced(make(), hook)) == []


def test_layers_that_run_outside_of_the_model_leave_no_trace(traced: Traced) -> None:
    hook = CallbackHook(before_step=lambda trainer: trainer.model.inner(torch.ones(1, 4)))
    assert differences(traced(make()), traced(make(), hook)) == []


class Counter(HookBase):
    priority = 99

    def __init__(self) -> None:
        self.count = 0
        self.nested = {"seen": torch.zeros(2)}

    def after_step(self) -> None:
        self.count += 1

    def state_dict(self) -> dict[str, Any]:
        return {"half": self.count / 2}


def test_hooks_are_traced_by_state_and_attributes(traced: Traced) -> None:
    records = traced(make(), Counter(), Counter())
    values = next(r for r in records if (r.phase, r.iteration) == ("end", 1)).values
    assert values["state of hook Counter#2", "half"] == "1.0"
    assert values["hook Counter", "count"] == "2"
    assert values["hook Counter", "nested.seen"].startswith("float32[2] #")


def test_the_library_is_trusted_with_its_own_attributes_and_writers(
    traced: Traced, tmp_path: Path
) -> None:
    writer = PeriodicWriter([JSONWriter(tmp_path / "metrics.json")])
    records = traced(make(), writer, CallbackHook())
    assert writer.state_dict()
    assert not any("hook" in component for record in records for component, _ in record.values)


def test_a_model_is_copied_with_its_trace(tmp_path: Path) -> None:
    trainer = make()
    StepTrace(trainer, tmp_path / "trace")
    copied = copy.deepcopy(trainer.model)
    copied({"x": torch.ones(4, 4)})
    assert not (tmp_path / "trace").exists()


def test_each_line_is_in_the_file_at_once(tmp_path: Path) -> None:
    trainer = make()
    lines: list[int] = []
    path = tmp_path / "trace"

    def look(trainer: SimpleTrainer) -> None:
        lines.append(len([json.loads(line) for line in path.read_text().splitlines()]))

    trainer.register_hooks([CallbackHook(after_step=look)])
    StepTrace(trainer, path)
    trainer.train(0, 2)
    assert lines == [4, 8]


class Positive(nn.Module):
    """Takes batches of any form."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(()))

    def forward(self, batch: Any) -> torch.Tensor:
        return self.weight * 2


def test_a_sample_is_cut_out_of_every_field() -> None:
    x, y = torch.rand(2, 3), torch.rand(2)
    found = _sample([x, {"y": y, "name": ["a", "b"], "scale": 1.0}], 1, size=2)
    assert fingerprint(found) == fingerprint([x[1], {"y": y[1], "name": "b", "scale": None}])
    found = _sample([x, y], 1, size=2)
    assert fingerprint(found) == fingerprint([x[1], y[1]])
    samples = [{"x": x}, {"x": y}]
    assert _sample(samples, 1, size=2) is samples[1]


@pytest.mark.parametrize(
    ("batch", "samples"),
    [
        (torch.rand(2, 3), ["sample 0; ", "sample 1; "]),
        ([torch.rand(2, 3), torch.rand(2)], ["sample 0; ", "sample 1; "]),
        ([{"x": torch.rand(3)}, {"x": torch.rand(2)}], ["sample 0; x", "sample 1; x"]),
        ({"x": {"y": torch.rand(2)}, "n": ["a", "b"]}, ["sample 0; x.y", "sample 0; n"]),
        (torch.rand(()), []),
        ("no tensors", []),
    ],
)
def test_samples_are_told_apart_in_batches_of_many_forms(
    traced: Traced, batch: Any, samples: list[str]
) -> None:
    net = Positive()
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
    records = traced(SimpleTrainer(net, [batch], optimizer, seed=0))
    items = [item for c, item in components(records, "forward") if c.startswith("data set")]
    assert set(samples) <= set(items)
    assert items[-1] == "the batch; as a whole"
    assert bool(samples) == any(item.startswith("sample") for item in items)
