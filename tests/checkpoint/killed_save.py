"""Saves that kill themselves at a given call of the operating system, for the tests of kills."""

import io
import os
import resource
import signal
from pathlib import Path
from typing import Any

import torch
from torch import nn

from trainkit.checkpoint.checkpointer import Checkpointer
from trainkit.data import TrainingSampler, TrainLoader
from trainkit.engine import SimpleTrainer, hooks
from trainkit.utils.period import is_due

NUM_WEIGHTS = 700_000
MAX_ITER, PERIOD = 7, 3


class State(nn.Module):
    """A model of several chunks of a file, all of whose weights have one value."""

    def __init__(self, value: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.full((NUM_WEIGHTS,), float(value)))


class Killer:
    """Kills before the call of a given number; of a write, the first half is then done."""

    def __init__(self, at: int) -> None:
        self.num_left = at

    def count(self) -> bool:
        self.num_left -= 1
        return self.num_left < 0

    def kill(self) -> None:
        os.kill(os.getpid(), signal.SIGKILL)

    def watch(self, name: str) -> None:
        function: Any = getattr(os, name)

        def watched(*args: Any, **kwargs: Any) -> Any:
            if self.count():
                self.kill()
            return function(*args, **kwargs)

        setattr(os, name, watched)

    def arm(self) -> None:
        self.watch_writes()
        for call in ("fsync", "replace"):
            self.watch(call)

    def watch_writes(self) -> None:
        open_file: Any = Path.open
        killer = self

        class WatchedFile(io.FileIO):
            def write(self, data: Any) -> int:
                if killer.count():
                    super().write(memoryview(data)[: len(data) // 2])
                    killer.kill()
                return super().write(data)

        def watched(path: Path, mode: str = "r", *args: Any, **kwargs: Any) -> Any:
            if "r" in mode:
                return open_file(path, mode, *args, **kwargs)
            file = io.BufferedWriter(WatchedFile(path, mode.replace("b", "")))
            return file if "b" in mode else io.TextIOWrapper(file, encoding="utf-8")

        setattr(Path, "open", watched)  # noqa: B010  # this process lives for one save only


def save(folder: Path, name: str, value: int, kill_at: int) -> None:
    """Saves a state, to be killed at call number `kill_at`, from 0."""
    torch.set_num_threads(1)
    checkpointer = Checkpointer(State(value), folder)
    Killer(kill_at).arm()
    checkpointer.save(name, iteration=value)


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(3, 8), nn.Dropout(0.5), nn.Linear(8, 1))

    def forward(self, points: torch.Tensor) -> dict[str, torch.Tensor]:
        return {"loss": self.layers(points).square().mean()}


def train(folder: Path, kill_at: int, is_async: bool = False) -> None:
    """Trains from the newest checkpoint; its saves make calls numbered from 0 all together.

    Asynchronous ones have names of their own, and only the newest is kept.
    """
    torch.set_num_threads(1)
    torch.manual_seed(0)
    model = Net()
    points = [*torch.randn(20, 3, generator=torch.Generator().manual_seed(1))]
    loader = TrainLoader(points, TrainingSampler(len(points), seed=0), batch_size=4, seed=0)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    trainer = SimpleTrainer(model, loader, optimizer, seed=0)
    checkpointer = Checkpointer(model, folder, trainer=trainer)

    # One name is used again and again.
    def save_latest(trainer: Any) -> None:
        if is_due(trainer.iter, PERIOD):
            checkpointer.save("latest", iteration=trainer.iter)

    def save_final(trainer: Any) -> None:
        checkpointer.save("model_final", iteration=trainer.iter - 1)

    periodic = hooks.PeriodicCheckpointer(checkpointer, PERIOD, max_to_keep=1, is_async=True)
    synchronous = hooks.CallbackHook(after_step=save_latest, after_train=save_final)
    trainer.register_hooks([periodic if is_async else synchronous])
    extra = checkpointer.resume_or_load("")
    Killer(kill_at).arm()
    trainer.train(extra.get("iteration", -1) + 1, MAX_ITER)


def save_within(folder: Path, name: str, value: int, max_bytes: int) -> None:
    """Saves a state, to be killed when a file passes a length, in the middle of a write."""
    torch.set_num_threads(1)
    checkpointer = Checkpointer(State(value), folder)
    signal.signal(signal.SIGXFSZ, signal.SIG_DFL)
    # Without a core file.
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    resource.setrlimit(resource.RLIMIT_FSIZE, (max_bytes, max_bytes))
    checkpointer.save(name, iteration=value)
