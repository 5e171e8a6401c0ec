"""One run of a small config that kills itself at a given place, for the tests of resume."""

import os
import signal
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch.utils.data import Subset

from trainkit.config import CfgNode, get_cfg
from trainkit.data import DatasetCatalog, FashionMNIST
from trainkit.data.datasets.fashion_mnist import EMBEDDED_FOLDER
from trainkit.engine import DefaultTrainer, HookBase
from trainkit.evaluation import ClassificationEvaluator, DatasetEvaluator

Kill = tuple[str, int]
"""Where, and in which iteration, a run kills itself."""


def kill() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


class KillHook(HookBase):
    """Kills in the loop itself: at a step's start, after backward, after a save, before writing."""

    def __init__(self, place: str, iteration: int, priority: int) -> None:
        self.place = place
        self.iteration = iteration
        self.priority = priority

    def _kill_at(self, place: str) -> None:
        if (place, self.trainer.iter) == (self.place, self.iteration):
            kill()

    def before_step(self) -> None:
        self._kill_at("step")

    def after_backward(self) -> None:
        self._kill_at("backward")

    def after_step(self) -> None:
        self._kill_at("between save and evaluation" if self.priority == 50 else "before writing")


class KillingEvaluator(ClassificationEvaluator):
    """Kills at the second batch of an evaluation in a given iteration."""

    def __init__(self, classes: list[str], trainer: "KilledTrainer") -> None:
        super().__init__(classes)
        self._trainer = trainer
        self._num_batches = 0

    def process(self, inputs: dict[str, torch.Tensor], outputs: Any) -> None:
        self._num_batches += 1
        if self._num_batches == 2 and self._trainer.kill == ("evaluation", self._trainer.iter):
            kill()
        super().process(inputs, outputs)


class KilledTrainer(DefaultTrainer):
    current: "KilledTrainer"

    def __init__(self, cfg: CfgNode, kill: Kill | None) -> None:
        self.kill = kill
        super().__init__(cfg)
        KilledTrainer.current = self

    def build_hooks(self) -> list[HookBase | None]:
        hooks = super().build_hooks()
        if self.kill is not None:
            # The first lands right behind the checkpointer, the second before the writers.
            hooks.insert(3, KillHook(*self.kill, priority=50))
            hooks.append(KillHook(*self.kill, priority=60))
        return hooks

    @classmethod
    def build_evaluator(cls, cfg: CfgNode, dataset_name: str) -> DatasetEvaluator:
        return KillingEvaluator([str(n) for n in range(10)], cls.current)


def kill_in_call(name: str, place: str, trainer: KilledTrainer, *, after: bool = False) -> None:
    """Makes `os.<name>` kill, before or after its work, when the trainer saves a checkpoint."""
    function: Callable[..., Any] = getattr(os, name)

    def killing(*args: Any) -> Any:
        is_due = trainer.kill == (place, trainer.iter)
        if is_due and not after:
            kill()
        result = function(*args)
        if is_due:
            kill()
        return result

    setattr(os, name, killing)


def small_cfg(output_dir: Path, opts: list[Any]) -> CfgNode:
    for name, split, size in (("tiny_train", "train", 500), ("tiny_test", "test", 120)):
        if name not in DatasetCatalog:
            dataset = FashionMNIST(EMBEDDED_FOLDER, split)
            DatasetCatalog.register(name, partial(Subset, dataset, range(size)))
    cfg = get_cfg()
    settings: list[Any] = ["DATASETS.TRAIN", ("tiny_train",), "DATASETS.TEST", ("tiny_test",)]
    settings += ["MODEL.BACKBONE.WIDTHS", (4, 8), "MODEL.BACKBONE.BLOCKS", (0, 1)]
    settings += ["MODEL.DEVICE", "cpu", "MODEL.DROPOUT", 0.3, "INPUT.ERASE_PROB", 0.5]
    settings += ["SOLVER.MAX_ITER", 120, "SOLVER.IMS_PER_BATCH", 24, "SOLVER.WARMUP_ITERS", 20]
    settings += ["SOLVER.CHECKPOINT_PERIOD", 15, "TEST.EVAL_PERIOD", 20, "LOG_PERIOD", 10]
    settings += ["TEST.IMS_PER_BATCH", 40, "TEST.BEST_METRIC", "classification/top1", "SEED", 3]
    cfg.merge_from_list([*settings, "OUTPUT_DIR", str(output_dir), *opts])
    cfg.freeze()
    return cfg


def run(output_dir: Path, opts: list[Any], kill: Kill | None, resume: bool) -> None:
    """Trains, from the newest checkpoint if `resume`, until the end or the kill."""
    torch.set_num_threads(1)
    cfg = small_cfg(output_dir, opts)
    trainer = KilledTrainer(cfg, kill)
    trainer.resume_or_load(resume)
    if kill is not None:
        kill_in_call("fsync", "inside a save", trainer)
        kill_in_call("replace", "before publishing", trainer)
        kill_in_call("replace", "after publishing", trainer, after=True)
    trainer.train()
