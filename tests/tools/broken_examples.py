"""Hooks, layers, a data set and optimizers, each of which forgets something in a resume."""

import os
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from trainkit.config import CfgNode
from trainkit.data import DatasetCatalog
from trainkit.engine import DefaultTrainer, HookBase

SIZE = 100

# Imported in every process of a run; on two cores, they must not fight with threads of their own.
torch.set_num_threads(1)


class Images(torch.utils.data.Dataset[Any]):
    """A few images; sound."""

    def __len__(self) -> int:
        return SIZE

    def __getitem__(self, index: int) -> dict[str, Any]:
        generator = torch.Generator().manual_seed(index)
        image = torch.randint(256, (1, 28, 28), generator=generator, dtype=torch.uint8)
        return {"image": image, "label": index % 10}


class PrivateNoise(Images):
    """Draws from a generator of its own."""

    def __init__(self) -> None:
        self._random = np.random.RandomState(0)

    def __getitem__(self, index: int) -> dict[str, Any]:
        sample = super().__getitem__(index)
        noise = self._random.randint(0, 9, size=sample["image"].shape)
        return {**sample, "image": (sample["image"] + noise).clamp(max=255).to(torch.uint8)}


for name, dataset in (("images", Images), ("private_noise", PrivateNoise)):
    if name not in DatasetCatalog:
        DatasetCatalog.register(name, dataset)


class GradientScaler(HookBase):
    """Scales gradients by how often it was called, which it does not save."""

    def __init__(self) -> None:
        self.count = 0
        self._started = time.perf_counter()

    def after_backward(self) -> None:
        self.count += 1
        for parameter in self.trainer.model.parameters():
            parameter.grad.mul_(1 / self.count)


class HalfSaved(GradientScaler):
    """Saves one of two things."""

    def __init__(self) -> None:
        super().__init__()
        self.total = 0.0

    def after_backward(self) -> None:
        super().after_backward()
        self.total += self.count

    def after_step(self) -> None:
        self.trainer.storage.put_scalar("total", self.total, smoothing_hint=False)

    def state_dict(self) -> dict[str, Any]:
        return {"count": self.count}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.count = state["count"]


class Saved(HalfSaved):
    """Saves both, and is given back one."""

    def state_dict(self) -> dict[str, Any]:
        return {"count": self.count, "total": self.total}


class Idle(HookBase):
    """Remembers something that nothing depends on, and the time, which differs in every run."""

    def __init__(self) -> None:
        self.calls = 0
        self.last_time = 0.0

    def after_step(self) -> None:
        self.calls += 1
        self.last_time = time.perf_counter()
        self.trainer.storage.put_scalar("clock", self.last_time, smoothing_hint=False)


class DivideByZero(HookBase):
    """Fails in a step."""

    def after_step(self) -> None:
        if self.trainer.iter == 2:
            raise ZeroDivisionError


class EarlyStop(HookBase):
    """Ends the run."""

    def after_step(self) -> None:
        if self.trainer.iter == 2:
            self.trainer.request_stop("enough", finished=True)


class Announcement(HookBase):
    """Says which process trains, and goes on for long."""

    def before_step(self) -> None:
        Path(self.trainer.cfg.OUTPUT_DIR, "pid").write_text(str(os.getpid()))


class Noise(nn.Module):
    """Adds noise from a generator of its own."""

    def __init__(self, is_seeded: bool) -> None:
        super().__init__()
        self._generator = torch.Generator()
        if is_seeded:
            self._generator.manual_seed(0)
        else:
            self._generator.seed()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + 0.01 * torch.randn(x.shape, generator=self._generator)


class ForgetfulSGD(torch.optim.SGD):
    """Does not save its momentum."""

    def state_dict(self) -> dict[str, Any]:
        return {**super().state_dict(), "state": {}}


class DriftingSGD(torch.optim.SGD):
    """Counts its steps outside of its state, and shrinks them."""

    _count = 0

    def step(self, closure: Any = None) -> Any:
        self._count += 1
        result = super().step(closure)
        with torch.no_grad():
            for group in self.param_groups:
                torch._foreach_mul_(group["params"], 1 - 1e-3 / self._count)
        return result


class Hooked(DefaultTrainer):
    """Has one more hook."""

    hook: type[HookBase] = HookBase

    def build_hooks(self) -> list[HookBase | None]:
        return [*super().build_hooks(), self.hook()]


class WithGradientScaler(Hooked):
    hook = GradientScaler


class WithHalfSaved(Hooked):
    hook = HalfSaved


class WithSaved(Hooked):
    hook = Saved


class WithIdle(Hooked):
    hook = Idle


class Failing(Hooked):
    hook = DivideByZero


class Stopping(Hooked):
    hook = EarlyStop


class Endless(Hooked):
    hook = Announcement


class WithNoise(DefaultTrainer):
    """Has a noisy layer behind the stem."""

    is_seeded = False

    @classmethod
    def build_model(cls, cfg: CfgNode) -> nn.Module:
        model = super().build_model(cfg)
        model.get_submodule("backbone.stem").add_module("noise", Noise(cls.is_seeded))
        return model


class WithSeededNoise(WithNoise):
    is_seeded = True


class WithForgetfulSGD(DefaultTrainer):
    @classmethod
    def build_optimizer(cls, cfg: CfgNode, model: nn.Module) -> torch.optim.Optimizer:
        return ForgetfulSGD(model.parameters(), lr=0.1, momentum=0.9)


class WithDriftingSGD(DefaultTrainer):
    @classmethod
    def build_optimizer(cls, cfg: CfgNode, model: nn.Module) -> torch.optim.Optimizer:
        return DriftingSGD(model.parameters(), lr=0.1, momentum=0.9)
