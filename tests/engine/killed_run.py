"""One run of a small config that kills itself at a given place, for the tests of resume."""

import hashlib
import json
import os
import re
import signal
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple
from unittest import mock

import torch
import torch._dynamo  # A process's first optimizer imports it, which takes a second.
from torch import multiprocessing as mp
from torch import nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn
from torch.utils.data import Dataset

from trainkit.config import CfgNode, get_cfg
from trainkit.data import DatasetCatalog, FashionMNIST
from trainkit.data.datasets.fashion_mnist import EMBEDDED_FOLDER
from trainkit.engine import DefaultTrainer, HookBase, launch
from trainkit.engine.hook_base import hooks_state_dict
from trainkit.evaluation import ClassificationEvaluator, DatasetEvaluator
from trainkit.utils import comm
from trainkit.utils.random import get_rng_state

Kill = tuple[str, int]
"""Where, and in which iteration, a run kills itself."""


class Setup(NamedTuple):
    """What a run is, beside its config.

    Attributes:
        is_seeded: Whether generators are seeded before each forward pass, or else saved.
        has_memory: Whether the loss depends on a buffer of each rank's own.
    """

    is_seeded: bool = True
    has_memory: bool = False


PLAIN = Setup()


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


class WeightsAverage(HookBase):
    """An average of the weights, as a user would write it."""

    def __init__(self, model: nn.Module) -> None:
        self.average = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(0.9))

    def after_step(self) -> None:
        self.average.update_parameters(unwrapped(self.trainer.model))

    def state_dict(self) -> dict[str, Any]:
        return self.average.state_dict()

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.average.load_state_dict(state)


class Recorder(HookBase):
    """Appends a line for each step to a file: samples, losses, digests of gradients and generators.

    A resumed run writes the lines of the iterations that it repeats once more.
    """

    priority = 0

    def __init__(self, model: nn.Module, accumulate: int, path: Path) -> None:
        self._accumulate = accumulate
        self._path = path
        self._forwards: list[tuple[list[int], float]] = []
        model.register_forward_hook(self._note)

    def _note(self, model: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        if model.training:
            self._forwards.append((args[0]["index"].tolist(), float(output["loss_cls"].detach())))

    def before_step(self) -> None:
        self._forwards = []

    def after_backward(self) -> None:
        trainer = self.trainer
        # Before them may come those of a rehearsal.
        samples, losses = zip(*self._forwards[-self._accumulate :], strict=True)
        record = {
            "iteration": trainer.iter,
            "samples": samples,
            "losses": losses,
            "gradients": digest([p.grad for p in trainer.model.parameters()]),
            "generators": digest(get_rng_state()),
        }
        with self._path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(record) + "\n")


def unwrapped(model: Any) -> Any:
    return getattr(model, "module", model)


def digest(state: Any) -> str:
    """Hashes nested tensors and plain values."""
    hashed = hashlib.sha256()
    leaves, structure = torch.utils._pytree.tree_flatten(state)
    for leaf in [*leaves, str(structure)]:
        is_tensor = isinstance(leaf, torch.Tensor)
        hashed.update(leaf.contiguous().numpy().tobytes() if is_tensor else repr(leaf).encode())
    return hashed.hexdigest()


class FirstSamples(Dataset[Any]):
    """The first samples of a data set, each with its index."""

    def __init__(self, dataset: Any, size: int) -> None:
        self._dataset = dataset
        self._size = size

    def __len__(self) -> int:
        return self._size

    def __getitem__(self, index: int) -> dict[str, Any]:
        return {**self._dataset[index], "index": index}


class Memory(nn.Module):
    """Weights the loss of a model by the labels that this rank has seen."""

    mean: torch.Tensor

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model
        self.register_buffer("mean", torch.zeros(()))

    def forward(self, batch: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        output: dict[str, torch.Tensor] = self.model(batch)
        if self.training:
            # Not in place, as many models do it.
            self.mean = 0.9 * self.mean + 0.1 * batch["label"].float().mean()
            output["loss_cls"] = output["loss_cls"] * (1 + self.mean)
        return output


class KilledTrainer(DefaultTrainer):
    current: "KilledTrainer"
    setup: Setup

    def __init__(self, cfg: CfgNode, kill: Kill | None) -> None:
        self.kill = kill
        super().__init__(cfg)
        if not self.setup.is_seeded:
            self.seed = None
            # Every rank its own, which a resume has to bring back.
            torch.manual_seed(comm.get_rank())
        KilledTrainer.current = self

    def build_hooks(self) -> list[HookBase | None]:
        hooks = super().build_hooks()
        model = unwrapped(self.model)
        record = Path(self.cfg.OUTPUT_DIR, f"record.{comm.get_rank()}.jsonl")
        hooks.append(WeightsAverage(model))
        hooks.append(Recorder(model, self.accumulate, record))
        if self.kill is not None:
            # The first lands right behind the checkpointer, the second before the writers.
            hooks.insert(3, KillHook(*self.kill, priority=50))
            hooks.append(KillHook(*self.kill, priority=60))
        return hooks

    @classmethod
    def build_model(cls, cfg: CfgNode) -> nn.Module:
        model = super().build_model(cfg)
        return Memory(model) if cls.setup.has_memory else model

    @classmethod
    def build_evaluator(cls, cfg: CfgNode, dataset_name: str) -> DatasetEvaluator:
        return KillingEvaluator([str(n) for n in range(10)], cls.current)


def kill_in_calls(trainer: KilledTrainer) -> None:
    """Makes `os.fsync` and `os.replace` kill where the trainer saves, rank 0 that is."""
    fsync, replace = os.fsync, os.replace

    def is_at(place: str, path: str = "") -> bool:
        # A save in the background is of an earlier iteration, which its name tells.
        numbered = re.search(r"model_(\d{7})\.pth", path)
        return trainer.kill == (place, int(numbered[1]) if numbered else trainer.iter)

    def killing_fsync(descriptor: int) -> None:
        path = os.readlink(f"/proc/self/fd/{descriptor}")
        if path.endswith(".pth.tmp") and is_at("inside a save", path):
            # As if half of it were written.
            os.ftruncate(descriptor, os.fstat(descriptor).st_size // 2)
            kill()
        fsync(descriptor)

    def killing_replace(source: Any, path: Any) -> None:
        name = Path(path).name
        place = {"model_best.pth": "before the best", "finished.json": "before the end is noted"}
        is_checkpoint = name.startswith("model_")
        if is_at(place.get(name, "before publishing" if is_checkpoint else ""), name):
            kill()
        replace(source, path)
        if is_checkpoint and is_at("after publishing", name):
            kill()

    mock.patch.multiple(os, fsync=killing_fsync, replace=killing_replace).start()


def small_cfg(output_dir: Path, opts: list[Any]) -> CfgNode:
    for name, split, size in (("tiny_train", "train", 500), ("tiny_test", "test", 120)):
        if name not in DatasetCatalog:
            dataset = FashionMNIST(EMBEDDED_FOLDER, split)
            DatasetCatalog.register(name, partial(FirstSamples, dataset, size))
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


def run(
    output_dir: Path, opts: list[Any], kill: Kill | None, resume: bool, setup: Setup = PLAIN
) -> None:
    """Trains, from the newest checkpoint if `resume`, until the end or the kill."""
    torch.set_num_threads(1)
    # Loader workers start as usual, not as this process did.
    mp.set_start_method("fork", force=True)
    KilledTrainer.setup = setup
    trainer = KilledTrainer(small_cfg(output_dir, opts), kill)
    trainer.resume_or_load(resume)
    if kill is not None:
        kill_in_calls(trainer)
    trainer.train()
    state = {"model": unwrapped(trainer.model).state_dict(), "generators": get_rng_state()}
    if comm.is_main_process():
        state["hooks"] = hooks_state_dict(trainer._hooks)
        # It holds timings.
        del state["hooks"]["PeriodicWriter"]
    torch.save(state, output_dir / f"end.{comm.get_rank()}.pth")


def run_rank(rank: int, world_size: int, port: int, args: tuple[Any, ...]) -> None:
    """Runs as one of the processes that torchrun would start."""
    numbers = {"RANK": rank, "LOCAL_RANK": rank}
    numbers |= dict.fromkeys(("WORLD_SIZE", "LOCAL_WORLD_SIZE"), world_size)
    os.environ |= {name: str(number) for name, number in numbers.items()}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    launch(run, args=args)
