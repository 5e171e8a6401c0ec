"""`StepTrace`: writes down what the steps of a run compute, to be compared with another run's."""

import json
import os
import weakref
from collections import Counter
from collections.abc import Iterable, Iterator
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import nn

from trainkit.data.build import TrainLoader
from trainkit.engine.hook_base import hooks_by_key
from trainkit.engine.hooks.callback import CallbackHook
from trainkit.engine.hooks.writer import PeriodicWriter
from trainkit.engine.train_loop import SimpleTrainer
from trainkit.testing.fingerprint import fingerprint, fingerprints
from trainkit.utils import comm
from trainkit.utils.nested import batch_size
from trainkit.utils.random import get_rng_state
from trainkit.utils.wrappers import unwrap

Value = tuple[str, str, str]
"""A component ("layer backbone.stem"), an item of it ("its output"), and the item's fingerprint."""


class Record(NamedTuple):
    """What one rank wrote at one moment of a run.

    Attributes:
        rank: Of the process.
        segment: Its number in a run that is killed and resumed, from 0 on.
        iteration, phase, part: The moment; part is the number of the micro-batch.
        values: Fingerprints by component and item, in causal order.
    """

    rank: int
    segment: int
    iteration: int
    phase: str
    part: int
    values: dict[tuple[str, str], str]


class _First(CallbackHook):
    priority = 0


class _Last(CallbackHook):
    priority = 100


class StepTrace:
    """Writes fingerprints of all that a trainer's steps consist of, one JSON line for each moment.

    The phases of an iteration are "forward" (samples, generators, each layer's input and output,
    losses), once for each micro-batch, "gradients", "gradient norm", and "end", the state behind
    all hooks. A process begins with "checkpoint", the state after the iteration before its first;
    whoever saves a checkpoint writes the same by `write_state`. "after training" is the last. A
    line reaches the operating system at once, so that a kill loses none.

    Args:
        trainer: Gets hooks, hooks in its model, and a `grad_clipper` around its own.
        path: The file, one for each process and rank; appended to.
    """

    def __init__(self, trainer: SimpleTrainer, path: str | os.PathLike[str]) -> None:
        self._path = Path(path)
        self._trainer = weakref.ref(trainer)
        self._is_in_step = False
        # Where the step's data begins; the values of its forward passes; the modules that run.
        self._position: Any = None
        self._passes: list[list[Value]] = []
        self._running: list[str] = []
        self._calls: Counter[str] = Counter()
        for name, module in unwrap(trainer.model).named_modules():
            module.register_forward_pre_hook(partial(self._enter, name), with_kwargs=True)
            module.register_forward_hook(partial(self._leave, name))
        trainer.grad_clipper = partial(self._clip, trainer.grad_clipper)
        first = _First(before_step=self._begin_step, after_backward=self._write_gradients)
        last = _Last(
            before_train=lambda t: self.write_state("checkpoint", t.start_iter - 1),
            after_step=lambda t: self.write_state("end", t.iter),
            after_train=lambda t: self.write_state("after training", t.iter),
        )
        trainer.register_hooks([first, last])

    def __deepcopy__(self, memo: dict[int, Any]) -> "StepTrace":
        # A copy of the model brings its hooks along.
        return self

    def write_state(self, phase: str, iteration: int) -> None:
        """Writes what the next step depends on."""
        trainer = self._trainer()
        assert trainer is not None
        self._write(iteration, phase, [*_state_of_training(trainer), *_state_of_hooks(trainer)])

    def _write(self, iteration: int, phase: str, values: Iterable[Value], part: int = 0) -> None:
        with self._path.open("a", encoding="utf-8") as file:
            file.write(json.dumps([iteration, phase, part, list(values)]) + "\n")

    def _begin_step(self, trainer: SimpleTrainer) -> None:
        self._is_in_step, self._passes = True, []
        self._position = getattr(trainer.data_loader, "position", None)

    def _write_gradients(self, trainer: SimpleTrainer) -> None:
        self._is_in_step = False
        half = len(self._passes) // 2
        is_resumed = trainer.iter == trainer.start_iter > 0 and comm.get_world_size() > 1
        if is_resumed and self._passes[:half] == self._passes[half:]:
            # The first half is the rehearsal with which DistributedDataParallel goes on.
            del self._passes[:half]
        for part, values in enumerate(self._passes):
            self._write(trainer.iter, "forward", values, part)
        gradients = [(n, p.grad) for n, p in unwrap(trainer.model).named_parameters()]
        # Backward comes to the last layers first.
        values = [("gradient", name, fingerprint(grad)) for name, grad in reversed(gradients)]
        self._write(trainer.iter, "gradients", values)

    def _clip(self, clip: Any, parameters: Any) -> Any:
        norm = clip(parameters)
        trainer = self._trainer()
        assert trainer is not None
        self._write(trainer.iter, "gradient norm", [("gradient norm", "it", fingerprint(norm))])
        return norm

    def _enter(self, name: str, module: nn.Module, args: Any, kwargs: Any) -> None:
        trainer = self._trainer()
        if not self._is_in_step or trainer is None or (name and not self._running):
            return
        if name == "":
            self._running, self._calls = [], Counter()
            batch = args[0] if len(args) == 1 and not kwargs else [*args, kwargs]
            number = len(self._passes)
            self._passes.append([*_samples(trainer, batch, self._position, number)])
            for kind, state in get_rng_state(trainer.device).items():
                self._passes[-1].append(("generators", kind, fingerprint(state)))
        else:
            self._add(self._running[-1], f"its input to {name}", [args, kwargs])
            is_cuda = trainer.device.type == "cuda"
            draws = torch.cuda.get_rng_state(trainer.device) if is_cuda else torch.get_rng_state()
            self._add(self._running[-1], f"its draws before {name}", draws)
        self._running.append(name)

    def _leave(self, name: str, module: nn.Module, args: Any, output: Any) -> None:
        if not self._running:
            return
        self._running.pop()
        if name:
            self._add(name, "its output", output)
        else:
            self._passes[-1] += [("loss", loss, value) for loss, value in fingerprints(output)]

    def _add(self, layer: str, item: str, value: Any) -> None:
        self._calls[f"{layer} {item}"] += 1
        count = self._calls[f"{layer} {item}"]
        item = item if count == 1 else f"{item} (call {count})"
        self._passes[-1].append((f"layer {layer or '(the model)'}", item, fingerprint(value)))


def read_trace(path: Path, rank: int, segment: int) -> list[Record]:
    """Returns what a process wrote."""
    records = []
    for line in path.read_text(encoding="utf-8").splitlines():
        iteration, phase, part, values = json.loads(line)
        by_item = {(component, item): value for component, item, value in values}
        records.append(Record(rank, segment, iteration, phase, part, by_item))
    return records


def _samples(trainer: SimpleTrainer, batch: Any, position: Any, number: int) -> Iterator[Value]:
    """Yields the batch of one pass, sample by sample where they can be told apart."""
    loader = trainer.data_loader
    size = batch_size(batch) or 0
    details = [""] * size
    if isinstance(loader, TrainLoader):
        keys = loader.samples_at(position, comm.get_rank())[number % loader.accumulate * size :]
        for j, (index, epoch, offset) in enumerate(keys[:size]):
            details[j] = f"; index {index}, epoch {epoch}, offset {offset}"
            yield "data loader", f"sample {j}", details[j]
    dataset: Any = getattr(loader, "dataset", None)
    while hasattr(dataset, "dataset"):
        dataset = dataset.dataset
    component = f"data set {type(dataset).__name__}"
    for j, detail in enumerate(details):
        for name, value in fingerprints(_sample(batch, j, size)):
            yield component, f"sample {j}; {name}{detail}", value
    yield component, "the batch; as a whole", fingerprint(batch)


def _sample(batch: Any, j: int, size: int) -> Any:
    """Returns entry `j` of everything in a batch that has one for each sample."""
    if isinstance(batch, dict):
        return {key: _sample(inner, j, size) for key, inner in batch.items()}
    if isinstance(batch, (torch.Tensor, np.ndarray)):
        return batch[j] if batch.ndim and len(batch) == size else None
    if isinstance(batch, (list, tuple)):
        parts = [_sample(inner, j, size) for inner in batch]
        is_of_fields = any(isinstance(part, torch.Tensor) for part in parts)
        return batch[j] if len(batch) == size and not is_of_fields else parts
    return None


def _state_of_training(trainer: SimpleTrainer) -> Iterator[Value]:
    model, optimizer = unwrap(trainer.model), trainer.optimizer
    for name, parameter in model.named_parameters():
        yield "parameter", name, fingerprint(parameter)
    for name, buffer in model.named_buffers():
        yield "buffer", name, fingerprint(buffer)
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    for number, group in enumerate(optimizer.param_groups):
        for key in sorted(group.keys() - {"params"}):
            yield "optimizer", f"{key} of group {number}", fingerprint(group[key])
        for j, parameter in enumerate(group["params"]):
            owner = names.get(id(parameter), f"parameter {j} of group {number}")
            state = optimizer.state.get(parameter)
            for name, value in fingerprints(state) if state else ():
                yield "optimizer", f"{name} of {owner}", value
    if isinstance(trainer.data_loader, TrainLoader):
        for name, value in fingerprints(trainer.data_loader.state_dict()):
            yield "data loader", name, value


def _state_of_hooks(trainer: SimpleTrainer) -> Iterator[Value]:
    """Yields what hooks say to be their states, and the attributes of those of the user's own."""
    for key, hook in hooks_by_key(trainer._hooks).items():
        # Where metrics.json stands depends on how many digits the timings in it have.
        state = {} if isinstance(hook, PeriodicWriter) else hook.state_dict()
        for name, value in fingerprints(state) if state else ():
            yield f"state of hook {key}", name, value
        if type(hook).__module__.partition(".")[0] != "trainkit":
            for name, value in fingerprints(vars(hook)):
                yield f"hook {key}", name, value
