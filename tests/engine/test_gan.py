"""Two models and two optimizers in one trainer: a generative adversarial net."""

import copy
import time
import weakref
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F  # noqa: N812  # As torch's own documentation calls it.
from fvcore.common.param_scheduler import LinearParamScheduler
from torch import nn
from torch.utils.data import DataLoader

from trainkit.checkpoint.checkpointer import Checkpointer
from trainkit.engine.hooks.callback import CallbackHook
from trainkit.engine.hooks.checkpoint import PeriodicCheckpointer
from trainkit.engine.hooks.lr_scheduler import LRScheduler
from trainkit.engine.train_loop import SimpleTrainer


class GanTrainer(SimpleTrainer):
    """Goodfellow et al., "Generative Adversarial Nets" (arXiv:1406.2661), alg. 1 with k = 1."""

    def __init__(self, data_loader: DataLoader[Any]) -> None:
        self.generator = nn.Sequential(nn.Linear(2, 8), nn.ReLU(), nn.Linear(8, 2))
        self.discriminator = nn.Sequential(nn.Linear(2, 8), nn.ReLU(), nn.Dropout(0.1))
        self.discriminator.append(nn.Linear(8, 1))
        models = nn.ModuleDict({"generator": self.generator, "discriminator": self.discriminator})
        optimizer = torch.optim.Adam(self.generator.parameters(), lr=0.01, betas=(0.5, 0.9))
        super().__init__(models, data_loader, optimizer)
        self.discriminator_optimizer = torch.optim.Adam(self.discriminator.parameters(), lr=0.02)

    def run_step(self) -> None:
        start = time.perf_counter()
        (batch,) = self.draw_batches()
        data_time = time.perf_counter() - start
        real = self.move_batch(batch)
        fake = self.generator(torch.randn_like(real))
        loss_real = F.softplus(-self.discriminator(real)).mean()
        loss_fake = F.softplus(self.discriminator(fake.detach())).mean()
        self._update(self.discriminator_optimizer, loss_real + loss_fake)
        loss_generator = F.softplus(-self.discriminator(fake)).mean()
        self._update(self.optimizer, loss_generator)
        losses = {"loss_real": loss_real, "loss_fake": loss_fake, "loss_generator": loss_generator}
        self._write_metrics(losses, data_time)

    def _update(self, optimizer: torch.optim.Optimizer, loss: torch.Tensor) -> None:
        optimizer.zero_grad()
        loss.backward()
        self.after_backward()
        optimizer.step()


def fail_at_13(trainer: SimpleTrainer) -> None:
    if trainer.iter == 13:
        raise RuntimeError("a broken run")


def start(folder: Path, is_broken: bool = False) -> GanTrainer:
    """A GAN on points around (1, 1), which goes on where a run in the folder was cut."""
    torch.manual_seed(0)
    points = torch.randn(50, 2) * 0.1 + 1.0
    dataset: Any = points
    trainer = GanTrainer(DataLoader(dataset, batch_size=8, shuffle=True))
    # The trainer saves its own optimizer; the second one is saved like anything else with a state.
    checkpointer = Checkpointer(
        trainer.model,
        folder,
        trainer=weakref.proxy(trainer),
        discriminator_optimizer=trainer.discriminator_optimizer,
    )
    falling = LinearParamScheduler(1.0, 0.1)
    trainer.register_hooks(
        [
            LRScheduler(scheduler=falling),
            LRScheduler(trainer.discriminator_optimizer, falling),
            PeriodicCheckpointer(checkpointer, period=5),
            CallbackHook(after_step=fail_at_13) if is_broken else None,
        ]
    )
    if checkpointer.has_checkpoint():
        checkpointer.resume_or_load("")
        trainer.start_iter = trainer.iter + 1
    return trainer


def test_a_gan_is_resumed_bit_by_bit(tmp_path: Path) -> None:
    unbroken = start(tmp_path / "unbroken")
    before = copy.deepcopy(unbroken.model.state_dict())
    unbroken.train(0, 20)
    broken = start(tmp_path / "broken", is_broken=True)
    with pytest.raises(RuntimeError, match="a broken run"):
        broken.train(0, 20)
    torch.rand(3)
    resumed = start(tmp_path / "broken")
    assert resumed.start_iter == 10
    resumed.train(resumed.start_iter, 20)
    ended, expected = (
        torch.load(tmp_path / name / "model_final.pth", weights_only=True)
        for name in ("broken", "unbroken")
    )
    assert all((expected["model"][name] != value).any() for name, value in before.items())
    assert expected.keys() >= {"model", "trainer", "discriminator_optimizer"}
    for key in ("model", "discriminator_optimizer"):
        torch.testing.assert_close(ended[key], expected[key], rtol=0, atol=0)
    for key in ("optimizer", "rng", "hooks"):
        torch.testing.assert_close(ended["trainer"][key], expected["trainer"][key], rtol=0, atol=0)
    for name in ("loss_real", "loss_fake", "loss_generator", "lr"):
        values = {i: v for v, i in unbroken.storage.history(name).values()}
        assert {i: v for v, i in resumed.storage.history(name).values()} == values, name
