"""Two ranks, of which rank 0's storage refuses one save, for the tests of what follows."""

import errno
import json
import os
import weakref
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import nn

from trainkit.checkpoint.checkpointer import Checkpointer
from trainkit.engine.hooks.callback import CallbackHook
from trainkit.engine.hooks.checkpoint import PeriodicCheckpointer
from trainkit.engine.setup import create_ddp_model
from trainkit.engine.train_loop import SimpleTrainer
from trainkit.utils import comm
from trainkit.utils.errors import CheckpointWriteError


class Square(nn.Linear):
    """The mean square of a linear map."""

    def forward(self, batch: torch.Tensor) -> Any:
        return {"loss": super().forward(batch).square().mean()}


def refuse_in(trainer: SimpleTrainer, iteration: int) -> None:
    """Makes publishing fail with EIO on rank 0 in one iteration."""
    replace: Any = os.replace

    def replacing(*args: Any) -> None:
        if trainer.iter == iteration and comm.is_main_process():
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        replace(*args)

    setattr(os, "replace", replacing)  # noqa: B010  # this process lives for one test only


def train(folder: Path, on_error: str) -> dict[str, Any]:
    """Trains five iterations, of which the third one's save is refused; returns what happened."""
    torch.manual_seed(0)
    model = create_ddp_model(Square(2, 1))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    trainer = SimpleTrainer(model, [torch.ones(3, 2)], optimizer, seed=1)
    checkpointer = Checkpointer(model, folder, trainer=weakref.proxy(trainer))
    iterations: list[int] = []
    trainer.register_hooks(
        [
            PeriodicCheckpointer(checkpointer, 1, on_error=on_error),
            CallbackHook(after_step=lambda t: iterations.append(t.iter)),
        ]
    )
    refuse_in(trainer, 2)
    try:
        trainer.train(0, 5)
    except CheckpointWriteError as e:
        return {"error": str(e), "iterations": iterations}
    return {"error": "", "iterations": iterations}


def run(rank: int, folder: Path, port: int) -> None:
    torch.set_num_threads(1)
    os.environ["GLOO_SOCKET_IFNAME"] = "lo"
    address = f"tcp://127.0.0.1:{port}"
    dist.init_process_group("gloo", init_method=address, rank=rank, world_size=2)
    report = {on_error: train(folder / on_error, on_error) for on_error in ("warn", "raise")}
    (folder / f"{rank}.json").write_text(json.dumps(report))
    dist.destroy_process_group()
