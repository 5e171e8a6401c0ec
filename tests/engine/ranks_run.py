"""A small run on several processes, one of which fails or gets a signal at a given place."""

import json
import os
import signal
import subprocess
import time
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import nn

from trainkit.checkpoint.checkpointer import Checkpointer
from trainkit.data.build import TrainLoader
from trainkit.data.samplers.distributed_sampler import TrainingSampler
from trainkit.engine.exit_codes import exit_codes
from trainkit.engine.hook_base import HookBase
from trainkit.engine.hooks.checkpoint import PeriodicCheckpointer
from trainkit.engine.hooks.evaluation import EvalHook
from trainkit.engine.launch import launch
from trainkit.engine.setup import create_ddp_model
from trainkit.engine.train_loop import SimpleTrainer
from trainkit.evaluation.evaluator import inference_on_dataset
from trainkit.utils import comm
from trainkit.utils.stop_signals import SIGNALS

PERIOD = 4
"""Iterations between two agreements, two checkpoints, and two evaluations."""


class Fault(NamedTuple):
    """What happens on one rank, and where.

    Attributes:
        place: "building", "data", "forward", "evaluation", or a method of the hook.
        iteration: When.
        signum: The signal that is sent there; 0 raises an error instead.
        receiver: Who gets it: this "rank", the "launcher", the "group" of all, or the "launcher"
            "twice".
        rank: Which rank.
        num_workers: Processes that load data for each rank.
        others_hang: Whether the other ranks stop there, and run no Python, as in a collective.
    """

    place: str
    iteration: int
    signum: int = 0
    receiver: str = "rank"
    rank: int = 1
    num_workers: int = 0
    others_hang: bool = False


class Striker:
    """Makes the fault happen, when the run comes to its place."""

    def __init__(self, fault: Fault, folder: Path) -> None:
        self.fault = fault
        self.folder = folder
        self.iteration = -1
        # Loader workers are in no group.
        self.rank, self.world_size = comm.get_rank(), comm.get_world_size()

    def __call__(self, place: str, iteration: int) -> None:
        fault = self.fault
        if (place, iteration) != (fault.place, fault.iteration):
            return
        if self.rank != fault.rank:
            if fault.others_hang:
                signal.pthread_sigmask(signal.SIG_BLOCK, SIGNALS)
                time.sleep(60)
            return
        (self.folder / "struck").write_text(str(time.time()))
        if not fault.signum:
            raise ValueError(f"of rank {fault.rank}")
        if fault.receiver == "rank":
            os.kill(os.getpid(), fault.signum)
        elif fault.receiver == "group":
            # Not sent by this process, which would be how it ends its loader's workers.
            subprocess.run(["kill", f"-{fault.signum}", "--", f"-{os.getpgrp()}"], check=False)
        else:
            os.kill(os.getppid(), fault.signum)
        if fault.receiver == "launcher twice":
            time.sleep(1.1)  # A second one so soon would be a copy of the first.
            os.kill(os.getppid(), fault.signum)
            time.sleep(60)


class StrikingHook(HookBase):
    """Strikes in its methods, and tells the model which iteration it is."""

    def __init__(self, strike: Striker) -> None:
        self.strike = strike

    def before_train(self) -> None:
        self.strike("before_train", self.trainer.iter)

    def before_step(self) -> None:
        self.strike.iteration = self.trainer.iter
        self.strike("before_step", self.trainer.iter)

    def after_step(self) -> None:
        self.strike("after_step", self.trainer.iter)

    def state_dict(self) -> dict[str, Any]:
        self.strike("state_dict", self.trainer.iter)
        return {}


class StrikingData:
    """Its samples are read in order, one by each rank in each iteration."""

    def __init__(self, strike: Striker) -> None:
        self.strike = strike

    def __len__(self) -> int:
        return 1000

    def __getitem__(self, index: int) -> torch.Tensor:
        iteration, rank = divmod(index, self.strike.world_size)
        if rank == self.strike.rank:
            self.strike("data", iteration)
        return torch.full((2,), float(index))


class StrikingNet(nn.Module):
    def __init__(self, strike: Striker) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.linear = nn.Linear(2, 1)
        self.strike = strike

    def forward(self, batch: torch.Tensor) -> Any:
        self.strike("forward" if self.training else "evaluation", self.strike.iteration)
        return {"loss": self.linear(batch).tanh().mean()}


def train(folder: Path, fault: Fault) -> None:
    """Runs on each rank; writes its process before, and the iteration it came to after."""
    torch.set_num_threads(1)
    rank = comm.get_rank()
    (folder / f"pid-{rank}").write_text(str(os.getpid()))
    strike = Striker(fault, folder)
    strike("building", -1)
    model = create_ddp_model(StrikingNet(strike))
    data = StrikingData(strike)
    loader = TrainLoader(
        data,
        TrainingSampler(len(data), shuffle=False),
        comm.get_world_size(),
        seed=0,
        num_workers=fault.num_workers,
    )
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    trainer = SimpleTrainer(model, loader, optimizer, gather_metric_period=PERIOD)
    checkpointer = Checkpointer(model, str(folder), trainer=trainer)
    trainer.register_hooks(
        [
            StrikingHook(strike),
            PeriodicCheckpointer(checkpointer, PERIOD),
            EvalHook(PERIOD, lambda: inference_on_dataset(model, [torch.zeros(1, 2)] * 3, None)),
        ]
    )
    try:
        trainer.train(0, 1000)
    finally:
        (folder / f"iter-{rank}").write_text(json.dumps(trainer.iter))


def launch_train(folder: Path, fault: Fault, num_processes: int) -> None:
    """Runs in a process of its own, with a group of its own, as a script would."""
    os.setsid()
    with exit_codes():
        launch(train, num_processes, args=(folder, fault))


def train_as_rank(folder: Path, fault: Fault, rank: int, world_size: int, port: int) -> None:
    """Runs in a process of its own, which somebody else started as one rank of several."""
    numbers = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": world_size, "MASTER_PORT": port}
    os.environ |= {name: str(n) for name, n in numbers.items()} | {"MASTER_ADDR": "127.0.0.1"}
    with exit_codes():
        launch(train, args=(folder, fault))
