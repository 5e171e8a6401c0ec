"""One save that kills itself at a given call of the operating system, for the tests of kills."""

import io
import os
import resource
import signal
from pathlib import Path
from typing import Any

import torch
from torch import nn

from trainkit.checkpoint.checkpointer import Checkpointer

NUM_WEIGHTS = 700_000


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
    killer = Killer(kill_at)
    killer.watch_writes()
    for call in ("fsync", "replace"):
        killer.watch(call)
    checkpointer.save(name, iteration=value)


def save_within(folder: Path, name: str, value: int, max_bytes: int) -> None:
    """Saves a state, to be killed when a file passes a length, in the middle of a write."""
    torch.set_num_threads(1)
    checkpointer = Checkpointer(State(value), folder)
    signal.signal(signal.SIGXFSZ, signal.SIG_DFL)
    # Without a core file.
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    resource.setrlimit(resource.RLIMIT_FSIZE, (max_bytes, max_bytes))
    checkpointer.save(name, iteration=value)
