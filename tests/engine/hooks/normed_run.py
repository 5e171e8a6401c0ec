"""Short runs of a net with batch norm and dropout, broken off and resumed, or not."""

import weakref
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.utils.data import DataLoader

from trainkit.checkpoint.checkpointer import Checkpointer
from trainkit.engine.hook_base import HookBase
from trainkit.engine.hooks.callback import CallbackHook
from trainkit.engine.hooks.checkpoint import PeriodicCheckpointer
from trainkit.engine.train_loop import SimpleTrainer

Sample = dict[str, torch.Tensor]
MakeHooks = Callable[[SimpleTrainer], Sequence[HookBase]]


class NormedNet(nn.Module):
    """The layers before the first dropout are the same function in each training step."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(4, 6)
        self.norm = nn.BatchNorm1d(6)
        self.dropout = nn.Dropout(0.5)
        self.last = nn.Linear(6, 1)

    def forward(self, batch: Sample) -> Any:
        prediction = self.last(self.dropout(self.norm(self.linear(batch["x"])).relu()))
        if not self.training:
            return prediction
        error = (prediction - batch["y"]).abs()
        return {"loss_mse": error.square().mean(), "error": error.detach().mean()}


def samples(count: int, seed: int) -> list[Sample]:
    generator = torch.Generator().manual_seed(seed)
    return [
        {"x": torch.randn(4, generator=generator) + 3, "y": torch.randn(1, generator=generator)}
        for _ in range(count)
    ]


def loader(count: int = 10, seed: int = 1, batch_size: int = 4, shuffle: bool = False) -> Any:
    return DataLoader(samples(count, seed), batch_size=batch_size, shuffle=shuffle)  # type: ignore[arg-type]  # a list


def make_trainer(make_hooks: MakeHooks = lambda trainer: []) -> SimpleTrainer:
    """Makes a trainer without a seed, so that whatever draws random numbers shows."""
    torch.manual_seed(3)
    model = NormedNet()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
    trainer = SimpleTrainer(model, loader(shuffle=True), optimizer)
    trainer.register_hooks(make_hooks(trainer))
    return trainer


def training(trainer: SimpleTrainer) -> dict[str, Any]:
    """All that training has come to, without the hooks."""
    state = trainer.state_dict()
    losses = trainer.storage.history("total_loss").values()
    kept = {name: state[name] for name in ("iteration", "optimizer", "rng", "data")}
    return {**kept, "losses": losses, "model": trainer.model.state_dict()}


def resumed(make_hooks: MakeHooks, folder: Path, at: int, max_iter: int) -> SimpleTrainer:
    """Breaks a run off in an iteration, and goes on with all of it made anew."""
    first = make_trainer(make_hooks)
    stop = CallbackHook(before_step=lambda t: t.request_stop("test") if t.iter == at else None)
    checkpointer = Checkpointer(first.model, folder, trainer=weakref.proxy(first))
    first.register_hooks([PeriodicCheckpointer(checkpointer, 0), stop])
    first.train(0, max_iter)
    second = make_trainer(make_hooks)
    torch.manual_seed(99)
    checkpointer = Checkpointer(second.model, folder, trainer=weakref.proxy(second))
    second.register_hooks([PeriodicCheckpointer(checkpointer, 0)])
    checkpointer.resume_or_load("")
    assert second.iter == at
    second.train(second.iter + 1, max_iter)
    return second
