"""Small trainers: a loop without a model, a linear regression on 10 samples, a tiny config."""

import weakref
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader

from trainkit.config.config import CfgNode
from trainkit.config.defaults import get_cfg
from trainkit.data.catalog import DatasetCatalog, MetadataCatalog
from trainkit.engine.hook_base import HookBase
from trainkit.engine.train_loop import SimpleTrainer, TrainerBase

Sample = dict[str, torch.Tensor]
MakeCfg = Callable[..., CfgNode]


class Loop(TrainerBase):
    """Takes down its steps, and fails in one."""

    def __init__(self, fail_at: int | None = None) -> None:
        super().__init__()
        self.fail_at = fail_at
        self.steps: list[int] = []

    def run_step(self) -> None:
        if self.iter == self.fail_at:
            raise RuntimeError(f"step {self.iter}")
        self.steps.append(self.iter)


class Recorder(HookBase):
    """Writes down its calls as "name.method iter", and fails in some of them."""

    def __init__(self, log: list[str], name: str = "a", fail: tuple[str, ...] = ()) -> None:
        self.log = log
        self.name = name
        self.fail = fail

    def _record(self, method: str) -> None:
        call = f"{self.name}.{method} {self.trainer.iter}"
        self.log.append(call)
        if call in self.fail or f"{self.name}.{method}" in self.fail:
            raise ValueError(call)

    def before_train(self) -> None:
        self._record("before_train")

    def after_train(self) -> None:
        self._record("after_train")

    def before_step(self) -> None:
        self._record("before_step")

    def after_backward(self) -> None:
        self._record("after_backward")

    def after_step(self) -> None:
        self._record("after_step")


class Regression(nn.Module):
    """Mean squared error of a linear map of dropped-out inputs."""

    def __init__(self, dropout: float = 0.0) -> None:
        super().__init__()
        self.dropout = nn.Dropout(dropout)
        self.linear = nn.Linear(4, 1)

    def forward(self, batch: Sample) -> Any:
        prediction = self.linear(self.dropout(batch["x"]))
        if not self.training:
            return prediction
        return {"loss_mse": (prediction - batch["y"]).square().mean()}


@pytest.fixture
def loop() -> type[Loop]:
    return Loop


@pytest.fixture
def recorder() -> type[Recorder]:
    return Recorder


@pytest.fixture
def samples() -> list[Sample]:
    generator = torch.Generator().manual_seed(1)
    return [
        {"x": torch.randn(4, generator=generator), "y": torch.randn(1, generator=generator)}
        for _ in range(10)
    ]


@pytest.fixture
def regression() -> Callable[..., Regression]:
    def make(dropout: float = 0.0) -> Regression:
        with torch.random.fork_rng():
            torch.manual_seed(7)
            return Regression(dropout)

    return make


@pytest.fixture
def simple(
    samples: list[Sample], regression: Callable[..., Regression]
) -> Callable[..., SimpleTrainer]:
    """Makes a SimpleTrainer; the model has the same weights each time."""

    def make(
        model: nn.Module | None = None,
        data_loader: Any = None,
        lr: float = 0.1,
        **kwargs: Any,
    ) -> SimpleTrainer:
        model = regression() if model is None else model
        if data_loader is None:
            data_loader = DataLoader(samples, batch_size=2)  # type: ignore[arg-type]  # a list
        optimizer = torch.optim.SGD(model.parameters(), lr=lr, momentum=0.9)
        return SimpleTrainer(model, data_loader, optimizer, **kwargs)

    return make


@pytest.fixture
def make_cfg(tmp_path: Path) -> Iterator[MakeCfg]:
    """A tiny net on 12 images of 8 x 8 pixels, for 4 iterations."""
    generator = torch.Generator().manual_seed(2)
    images = torch.randint(256, (12, 1, 8, 8), dtype=torch.uint8, generator=generator)
    data = [{"image": image, "label": i % 3} for i, image in enumerate(images)]
    for name in ("tiny_train", "tiny_test", "tiny_other"):
        DatasetCatalog.register(name, lambda: data)
        MetadataCatalog.get(name).set(classes=["a", "b", "c"])

    def make(*opts: Any) -> CfgNode:
        cfg = get_cfg()
        cfg.merge_from_list(
            [
                *("DATASETS.TRAIN", ("tiny_train",), "DATASETS.TEST", ("tiny_test",)),
                *("MODEL.BACKBONE.WIDTHS", (4,), "MODEL.BACKBONE.BLOCKS", (0,)),
                *("MODEL.NUM_CLASSES", 3, "MODEL.DEVICE", "cpu", "MODEL.DROPOUT", 0.2),
                *("SOLVER.MAX_ITER", 4, "SOLVER.IMS_PER_BATCH", 4, "SOLVER.WARMUP_ITERS", 1),
                *("SOLVER.CHECKPOINT_PERIOD", 2, "DATALOADER.NUM_WORKERS", 0, "SEED", 5),
                *("OUTPUT_DIR", str(tmp_path), "TEST.IMS_PER_BATCH", 5, *opts),
            ]
        )
        cfg.freeze()
        return cfg

    yield make
    for name in ("tiny_train", "tiny_test", "tiny_other"):
        DatasetCatalog.remove(name)
        MetadataCatalog.remove(name)


@pytest.fixture(scope="session")
def _first_optimizer() -> None:
    """A process's first optimizer imports torch's compiler, which pins its caller's frame."""
    parameter = nn.Parameter(torch.zeros(1))
    optimizer = torch.optim.SGD([parameter], lr=0.1)
    parameter.grad = torch.zeros(1)
    optimizer.step()


@pytest.fixture
def no_gc(_first_optimizer: None) -> Iterator[Callable[..., list[weakref.ref[Any]]]]:
    """Switches the garbage collector off and gives a function that makes weak references."""
    import gc

    gc.collect()
    gc.disable()
    try:
        yield lambda *objects: [weakref.ref(o) for o in objects]
    finally:
        gc.enable()
