"""Measures how fast a config trains (with and without hooks), evaluates, or loads its data.

What is printed is the median over blocks of iterations, after a warmup. The tasks loop, startup and
checkpoint compare trainkit with PyTorch alone, in rounds in which each takes its turn: a step, the
time until the first one, saving and loading. loop and startup take a model of about a thousand
parameters, or a config if one is given: what the engine costs that run. Nothing is written to
OUTPUT_DIR.
"""

import argparse
import importlib
import itertools
import shlex
import statistics
import sys
import tempfile
import time
from collections.abc import Iterator
from typing import Any

import torch
from tabulate import tabulate
from torch.utils.data import default_collate

from trainkit.config import CfgNode
from trainkit.config.lazy_cfg import load_cfg
from trainkit.data.benchmark import DataLoaderBenchmark
from trainkit.engine import DefaultTrainer, HookBase, default_setup, exit_codes, launch
from trainkit.engine.run_config import precision_of
from trainkit.evaluation.evaluator import inference_context
from trainkit.utils import comm
from trainkit.utils.device import autocast, resolve_device
from trainkit.utils.errors import ConfigError
from trainkit.utils.nested import batch_size, move_to

NUM_BLOCKS = 10
COSTS = ("loop", "startup", "checkpoint")
"""Tasks that compare, in `benchmark_costs.py`."""

Rate = tuple[str, float, float]
"""What was measured, seconds of an iteration, and its samples on all ranks together."""


class Clock(HookBase):
    """Times blocks of iterations; the device is waited for only where a block ends."""

    priority = 100

    def __init__(self, warmup: int, iterations: int) -> None:
        self.block = max(1, iterations // NUM_BLOCKS)
        self._done = -warmup
        self._times: list[float] = []

    def after_step(self) -> None:
        """Counts an iteration."""
        self._done += 1
        if self._done >= 0 and self._done % self.block == 0:
            if torch.accelerator.is_available():
                torch.accelerator.synchronize()
            self._times.append(time.perf_counter())

    @property
    def seconds(self) -> float:
        """The median time of one iteration."""
        pairs = itertools.pairwise(self._times)
        return statistics.median(end - begin for begin, end in pairs) / self.block


class Trainer(DefaultTrainer):
    """The trainer to be measured; evaluation at the end is left out."""

    @classmethod
    def test(cls, *args: Any, **kwargs: Any) -> dict[str, Any]:
        """Returns no results."""
        return {}


class TrainerWithoutHooks(Trainer):
    """The same with nothing around its steps."""

    def build_hooks(self) -> list[HookBase | None]:
        """Returns no hooks."""
        return []


def measure_train(cfg: CfgNode, args: argparse.Namespace) -> Iterator[Rate]:
    """Measures the training loop."""
    cfg.SOLVER.MAX_ITER = max(cfg.SOLVER.MAX_ITER, args.warmup + args.iterations)
    for name, kind in (("train, no hooks", TrainerWithoutHooks), ("train", Trainer)):
        trainer, clock = kind(cfg), Clock(args.warmup, args.iterations)
        trainer.register_hooks([clock])
        trainer.train(0, args.warmup + args.iterations)
        # Before the next one is built beside it.
        del trainer
        yield name, clock.seconds, cfg.SOLVER.IMS_PER_BATCH


def measure_eval(cfg: CfgNode, args: argparse.Namespace) -> Iterator[Rate]:
    """Measures loading and forward passes on the first test data set."""
    if not cfg.DATASETS.TEST:
        raise ConfigError("DATASETS.TEST is empty. Name a data set to evaluate on.")
    device = resolve_device(cfg.MODEL.DEVICE)
    model = Trainer.build_model(cfg).to(device)
    loader = Trainer.build_test_loader(cfg, cfg.DATASETS.TEST[0])
    with inference_context(model), torch.no_grad(), autocast(precision_of(cfg), device):
        yield timed("eval", loader, args, lambda batch: model(move_to(batch, device)))


def measure_data(cfg: CfgNode, args: argparse.Namespace) -> Iterator[Rate]:
    """Measures the training data: the samples alone, their way into batches, and the loader."""
    loader: Any = Trainer.build_train_loader(cfg)
    stages = DataLoaderBenchmark(
        loader.dataset,
        total_batch_size=cfg.SOLVER.IMS_PER_BATCH,
        num_workers=cfg.DATALOADER.NUM_WORKERS,
        accumulate=cfg.SOLVER.ACCUMULATE,
        collate_fn=getattr(loader, "collate_fn", default_collate),
    )
    per_rank = cfg.SOLVER.IMS_PER_BATCH / comm.get_world_size()
    samples = int(args.iterations * per_rank)
    for name, rate in (
        ("samples, in this process", stages.benchmark_dataset(samples)),
        ("collation and transport", stages.benchmark_ipc(args.iterations, args.warmup)),
    ):
        rates = comm.all_gather(rate)
        yield name, per_rank / statistics.median(rates), cfg.SOLVER.IMS_PER_BATCH
    yield timed("loader", loader, args, lambda batch: None)


def timed(name: str, loader: Any, args: argparse.Namespace, use: Any) -> Rate:
    """Measures a loop over batches, which begins the loader anew when it ends."""
    clock, sizes = Clock(args.warmup, args.iterations), []
    batches = itertools.chain.from_iterable(itertools.repeat(loader))
    for batch in itertools.islice(batches, args.warmup + args.iterations):
        use(batch)
        clock.after_step()
        sizes.append(batch_size(batch) or 1)
    return name, clock.seconds, sum(comm.all_gather(statistics.fmean(sizes)))


def check_args(args: argparse.Namespace) -> None:
    """Checks what argparse does not.

    Raises:
        ConfigError: If a number is too small, or an option is not one of this task.
    """
    for name in ("warmup", "iterations", "rounds", "megabytes"):
        if getattr(args, name) < 1:
            raise ConfigError(f"--{name} {getattr(args, name)}: it is at least 1.")
    if args.task in COSTS and args.num_gpus != 1:
        raise ConfigError(f"--num-gpus {args.num_gpus}: --task {args.task} takes one process.")
    if args.task not in COSTS and (args.json or args.plot):
        raise ConfigError(f"--json and --plot: they are for --task {', '.join(COSTS)}.")


def main(args: argparse.Namespace) -> None:
    """Measures on every process, and prints on rank 0."""
    cfg = load_cfg(args.config_file, args.opts)
    with tempfile.TemporaryDirectory() as folder:
        cfg.OUTPUT_DIR = comm.broadcast(folder)
        default_setup(cfg, args)
        measure = {"train": measure_train, "eval": measure_eval, "data": measure_data}[args.task]
        rates = list(measure(cfg, args))
        comm.synchronize()
    if comm.is_main_process():
        rows = [(name, 1e3 * s, 1 / s, size / s) for name, s, size in rates]
        headers = ("", "ms/iteration", "iterations/s", "samples/s")
        print(f"\n{tabulate(rows, headers, floatfmt=('', '.4f', '.2f', '.1f'))}\n")
        print(f"Medians of {args.iterations} iterations after {args.warmup} of warmup, ", end="")
        print(f"{comm.get_world_size()} process(es), torch {torch.__version__}, ", end="")
        print(f"device {resolve_device(cfg.MODEL.DEVICE)}\nCommand: python {shlex.join(sys.argv)}")


def parse_args() -> argparse.Namespace:
    """Parses the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__,
        epilog=f"Example:\n\n    {sys.argv[0]} --task train --config-file "
        "configs/fashion_mnist.yaml MODEL.DEVICE cpu",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--task", choices=("train", "eval", "data", *COSTS), required=True)
    parser.add_argument("--config-file", default="", metavar="FILE", help="a .yaml or .py config")
    parser.add_argument("--num-gpus", type=int, default=1, help="processes on this machine")
    parser.add_argument("--iterations", type=int, default=100, help="to time (default: 100)")
    parser.add_argument("--warmup", type=int, default=20, help="iterations before (default: 20)")
    parser.add_argument("--rounds", type=int, default=5, help="of comparisons (default: 5)")
    parser.add_argument("--megabytes", type=int, default=200, help="to save (default: 200)")
    parser.add_argument("--json", metavar="FILE", help="writes what was compared, round by round")
    parser.add_argument("--plot", metavar="FILE", help="draws it; needs matplotlib")
    parser.add_argument("--debug", action="store_true", help="show tracebacks of all errors")
    parser.add_argument(
        "opts",
        nargs=argparse.REMAINDER,
        metavar="KEY VALUE",
        help="settings that override the config, as in SOLVER.IMS_PER_BATCH 128",
    )
    parser.set_defaults(eval_only=False, resume=False)
    return parser.parse_args()


if __name__ == "__main__":
    args = parse_args()
    with exit_codes(debug=args.debug):
        check_args(args)
        if args.task in COSTS:
            # Beside this file; it runs loops in processes of its own, without `launch`.
            importlib.import_module("benchmark_costs").compare(args)
        else:
            launch(main, args.num_gpus, args=(args,))
