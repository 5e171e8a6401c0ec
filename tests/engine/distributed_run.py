"""One run of a net without batch statistics, on any number of processes, which records samples."""

import json
from itertools import chain
from pathlib import Path
from typing import Any

import torch
from torch import nn

from tests.engine.killed_run import small_cfg
from trainkit.config import CfgNode
from trainkit.data import FashionMNIST, TrainLoader, build_train_loader
from trainkit.data.datasets.fashion_mnist import EMBEDDED_FOLDER
from trainkit.engine import DefaultTrainer
from trainkit.utils import comm


class Net(nn.Module):
    """Batch norm would see half of the batch on each of two processes, and learn something else."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(784, 32), nn.ReLU(), nn.Linear(32, 10))

    def forward(self, batch: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        logits = self.layers(batch["image"].flatten(1).float() / 255)
        if self.training:
            return {"loss_cls": nn.functional.cross_entropy(logits, batch["label"])}
        return {"logits": logits}


class IndexedImages(FashionMNIST):
    """The first 200 images, each with its index."""

    def __len__(self) -> int:
        return 200

    def __getitem__(self, index: int) -> dict[str, Any]:
        return {**super().__getitem__(index), "index": index}


class RecordingTrainer(DefaultTrainer):
    def __init__(self, cfg: CfgNode) -> None:
        self.seen: list[list[int]] = []
        super().__init__(cfg)

    @classmethod
    def build_model(cls, cfg: CfgNode) -> nn.Module:
        return Net()

    @classmethod
    def build_train_loader(cls, cfg: CfgNode) -> TrainLoader:
        return build_train_loader(cfg, IndexedImages(EMBEDDED_FOLDER, "train"))

    def move_batch(self, batch: Any) -> Any:
        self.seen.append(batch["index"].tolist())
        return super().move_batch(batch)


def run(output_dir: Path, opts: list[Any]) -> None:
    """Trains, and writes each iteration's samples, in the order of ranks, to samples.json."""
    torch.set_num_threads(1)
    settings = ["SOLVER.MAX_ITER", 40, "DATALOADER.NUM_WORKERS", 0, "SOLVER.BASE_LR", 0.1]
    trainer = RecordingTrainer(small_cfg(output_dir, [*settings, *opts]))
    trainer.train()
    by_rank = comm.all_gather(trainer.seen)
    if comm.is_main_process():
        samples = [list(chain(*parts)) for parts in zip(*by_rank, strict=True)]
        (output_dir / "samples.json").write_text(json.dumps(samples))
