"""Shows that a killed run of your own config goes on bit for bit, or names what does not.

    python tools/verify_resume.py --config-file configs/fashion_mnist.yaml --iterations 20

Runs the first iterations of a config twice, once unbroken and once killed by SIGKILL after some of
them and resumed each time. Compares samples, randomness, each layer's output, losses, gradients,
parameters, optimizer and hooks in every step, then metrics.json and checkpoints. If they differ,
another unbroken run tells chance from what was not restored. Exits with 0 if nothing differs.

The schedule stays that of SOLVER.MAX_ITER. To have evaluation and logging inside so few iterations,
lower TEST.EVAL_PERIOD and LOG_PERIOD; LIMIT_BATCHES shortens evaluation.
"""

import argparse
import contextlib
import importlib
import json
import os
import pkgutil
import random
import signal
import sys
import tempfile
from collections import Counter
from collections.abc import Sequence
from multiprocessing import resource_tracker
from pathlib import Path
from typing import Any, NamedTuple

from tabulate import tabulate
from torch import multiprocessing as mp

from trainkit.checkpoint.format import load_checkpoint
from trainkit.checkpoint.manifest import read_manifest
from trainkit.config import CfgNode
from trainkit.config.lazy_cfg import load_cfg
from trainkit.engine import (
    CallbackHook,
    DefaultTrainer,
    PeriodicCheckpointer,
    default_argument_parser,
    default_setup,
    exit_codes,
    launch,
)
from trainkit.testing import Record, StepTrace, diagnose, fingerprints, read_trace
from trainkit.utils import comm
from trainkit.utils.errors import USER_ERRORS, ConfigError

TIMINGS = {"iteration", "time", "data_time", "rank_data_time", "eta_seconds"}
"""What metrics.json holds besides results."""


class Job(NamedTuple):
    """One process's share of a run.

    Attributes:
        args: Of the command line.
        folder: Of the run.
        segment: Number of the process in the run; all but 0 resume.
        places: The iterations after which checkpoints are saved, in every run alike.
        kill_at: The one of them after which this process is killed, if it is.
    """

    args: argparse.Namespace
    folder: Path
    segment: int
    places: Sequence[int]
    kill_at: int | None

    def trace(self, rank: int) -> Path:
        """Returns where a rank writes its trace."""
        return self.folder / f"trace.{self.segment}.rank{rank}.jsonl"


class SaveAndKill(CallbackHook):
    """Saves where the run's own checkpointer would, and then kills all ranks."""

    is_collective = True


def iterations(text: str) -> list[int]:
    """Parses 1,7,13."""
    return sorted({int(part) for part in text.split(",")})


def parse_args(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """Reads the command line."""
    parser = default_argument_parser(epilog=__doc__)
    places = parser.add_mutually_exclusive_group()
    places.add_argument(
        "--at", type=iterations, metavar="I,J,…", help="iterations to be killed after"
    )
    places.add_argument("--kills", type=int, default=3, help="number of random ones, 3 by default")
    parser.add_argument("--kill-seed", type=int, default=0, help="seed of the random ones")
    parser.add_argument("--iterations", type=int, default=30, help="how many to run, at most")
    parser.add_argument(
        "--import",
        dest="modules",
        action="append",
        default=[],
        metavar="MODULE",
        help="imported first in every process, to register your models and data sets",
    )
    parser.add_argument(
        "--trainer",
        default="trainkit.engine:DefaultTrainer",
        metavar="MODULE:CLASS",
        help="your own DefaultTrainer",
    )
    parser.add_argument("--keep", metavar="DIR", help="a new folder for the runs, which is kept")
    return parser.parse_args(argv)


def build_cfg(args: argparse.Namespace, output_dir: Path) -> CfgNode:
    """Returns the user's config for a run into a folder, with a seed in any case."""
    cfg = load_cfg(args.config_file, args.opts)
    cfg.OUTPUT_DIR = str(output_dir)
    cfg.SEED = max(cfg.SEED, 0)
    # Those of a whole run.
    cfg.TEST.EXPECTED_RESULTS = []
    cfg.freeze()
    return cfg


def find_trainer(args: argparse.Namespace) -> type[DefaultTrainer]:
    """Imports the user's modules and returns the trainer's class.

    Raises:
        ConfigError: If a module or the class cannot be found.
    """
    name = ""
    try:
        for name in args.modules:
            importlib.import_module(name)
        found = pkgutil.resolve_name(name := args.trainer)
    except (ImportError, AttributeError, ValueError) as e:
        raise ConfigError(f"Cannot find {name!r} (--import, --trainer): {e}") from e
    if not (isinstance(found, type) and issubclass(found, DefaultTrainer)):
        raise ConfigError(
            f"--trainer is {name!r}, which is no DefaultTrainer. Give MODULE:CLASS, as in "
            "train_net:Trainer."
        )
    return found


def choose_places(args: argparse.Namespace, num_iterations: int) -> list[int]:
    """Returns the iterations after which the run is killed, in order.

    Raises:
        ConfigError: If there are none, or some are not among the iterations that are run.
    """
    run = f"{num_iterations} iterations are run (--iterations, SOLVER.MAX_ITER, LIMIT_BATCHES)"
    if args.at is not None:
        if args.at[0] < 0 or args.at[-1] >= num_iterations:
            listed = ",".join(map(str, args.at))
            raise ConfigError(f"--at is {listed}, but only {run}. Name some of these, from 0 on.")
        return list(args.at)
    if not 0 < args.kills < num_iterations:
        raise ConfigError(f"--kills is {args.kills}, but {run}: give 1 to {num_iterations - 1}.")
    # Not after the last one, behind which little can differ.
    return sorted(random.Random(args.kill_seed).sample(range(num_iterations - 1), args.kills))


def train(job: Job) -> None:
    """Trains on every rank, from the newest checkpoint to the kill or the end."""
    trainer_class = find_trainer(job.args)
    cfg = build_cfg(job.args, job.folder)
    job.args.resume = job.segment > 0
    default_setup(cfg, job.args)
    trainer = trainer_class(cfg)
    trainer.max_iter = min(trainer.max_iter, job.args.iterations)
    trace = StepTrace(trainer, job.trace(comm.get_rank()))

    def save_and_kill(trainer: DefaultTrainer) -> None:
        if trainer.iter in job.places:
            trace.write_state("checkpoint", trainer.iter)
            trainer.checkpointer.save(f"model_{trainer.iter:07d}", iteration=trainer.iter)
        if trainer.iter == job.kill_at:
            comm.synchronize()
            os.killpg(os.getpgrp(), signal.SIGKILL)

    hook = SaveAndKill(after_step=save_and_kill)
    trainer.register_hooks([hook])
    own = next((h for h in trainer._hooks if isinstance(h, PeriodicCheckpointer)), None)
    if own is not None:
        # The hooks behind it have yet to run in a step that a checkpoint cuts.
        hook.priority = own.priority
        trainer._hooks.remove(hook)
        trainer._hooks.insert(trainer._hooks.index(own) + 1, hook)
    trainer.resume_or_load(resume=job.args.resume)
    trainer.train()


def run_process(job: Job, errors: Any) -> None:
    """Runs the ranks of a process, as a group that can be killed at once; the output is kept."""
    os.setsid()
    # Workers of data loaders start as they do without this tool.
    mp.set_start_method(None, force=True)
    with (job.folder / "output.txt").open("ab") as output:
        os.dup2(output.fileno(), 1)
        os.dup2(output.fileno(), 2)
    try:
        launch(train, job.args.num_gpus, dist_url=job.args.dist_url, args=(job,))
    except USER_ERRORS as e:
        errors.put(e)
        raise


def start(job: Job) -> None:
    """Starts a process and waits for its end, which must be the one that is wanted.

    Raises:
        ConfigError: If it is another one, or as raised in the process.
    """
    _start_resource_tracker()
    context = mp.get_context("forkserver")
    # The first optimizer of a process imports torch's compiler, 1 s.
    context.set_forkserver_preload(["trainkit.testing", "torch._dynamo"])
    errors = context.SimpleQueue()
    process = context.Process(target=run_process, args=(job, errors))
    process.start()
    assert process.pid is not None
    try:
        process.join()
    finally:
        process.kill()
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
    if not errors.empty():
        raise errors.get()
    if process.exitcode == (0 if job.kill_at is None else -signal.SIGKILL):
        return
    if process.exitcode == 0:
        raise ConfigError(
            f"The run ended before it could be killed after iteration {job.kill_at}. Name earlier "
            "iterations by --at."
        )
    output = job.folder / "output.txt"
    lines = output.read_text(errors="replace").splitlines() if output.exists() else []
    told = "\n".join(lines[-20:])
    raise ConfigError(f"A process ended with exit code {process.exitcode}, saying last:\n{told}")


def _start_resource_tracker() -> None:
    """Has it not warn of what killed processes leave, which it is there to remove."""
    before = os.environ.get("PYTHONWARNINGS", "")
    os.environ["PYTHONWARNINGS"] = "ignore"
    resource_tracker.ensure_running()
    os.environ["PYTHONWARNINGS"] = before


def run(args: argparse.Namespace, folder: Path, places: Sequence[int], kills: bool) -> list[Record]:
    """Runs all processes of a run, and returns what they wrote and left behind."""
    folder.mkdir(parents=True)
    print(f"Running {folder.name} …", flush=True)
    ends = [*places, None] if kills else [None]
    jobs = [Job(args, folder, segment, places, end) for segment, end in enumerate(ends)]
    for job in jobs:
        start(job)
    records = []
    for rank in range(args.num_gpus):
        for job in jobs:
            records += read_trace(job.trace(rank), rank, job.segment)
    return records + read_outputs(folder)


def read_outputs(folder: Path) -> list[Record]:
    """Returns metrics.json, without timings, and the checkpoints, as records."""
    records = []
    metrics = folder / "metrics.json"
    for line in metrics.read_text().splitlines() if metrics.exists() else []:
        row = json.loads(line)
        values = {("metrics.json", k): repr(v) for k, v in row.items() if k not in TIMINGS}
        if values:
            records.append(Record(0, 0, row["iteration"], "metrics.json", 0, values))
    for path in sorted(path for path in folder.glob("*.pth") if read_manifest(path)):
        state = load_checkpoint(path)
        trainer = state.get("trainer", {})
        parts = {"model": state["model"], "optimizer": trainer.get("optimizer", {})}
        values = {(f"file {path.name}", name): value for name, value in fingerprints(parts)}
        records.append(Record(0, 0, state["iteration"], path.name, 0, values))
    return records


def verify(args: argparse.Namespace, folder: Path) -> bool:
    """Runs, compares and prints; returns whether all is bit-exact."""
    cfg = build_cfg(args, folder)
    find_trainer(args)
    count = min(args.iterations, cfg.SOLVER.MAX_ITER, cfg.LIMIT_BATCHES or args.iterations)
    places = choose_places(args, count)
    print(f"{count} iterations with SEED {cfg.SEED}, killed after {', '.join(map(str, places))}")
    unbroken = run(args, folder / "unbroken", places, kills=False)
    killed = run(args, folder / "killed", places, kills=True)
    is_exact, lines = diagnose(
        unbroken, killed, lambda: run(args, folder / "unbroken again", places, kills=False)
    )
    compared = Counter(name[0].split()[0] for record in killed for name in record.values)
    print(tabulate(compared.items(), headers=["compared", "values"], intfmt=","))
    verdict = "Bit-exact" if is_exact else "NOT bit-exact"
    size = f"{count} iterations, {args.num_gpus} rank(s), {compared.total():,} values"
    print(f"{verdict}: {len(places)} kill(s), {size}.", *lines, sep="\n")
    return is_exact


def main(argv: Sequence[str] | None = None) -> int:
    """Verifies, and returns the exit code."""
    args = parse_args(argv)
    with exit_codes(debug=args.debug), tempfile.TemporaryDirectory(prefix="verify_resume") as new:
        if args.resume or args.eval_only or args.num_machines > 1 or "RANK" in os.environ:
            raise ConfigError(
                "--resume, --eval-only, --num-machines and torchrun have no place here: this tool "
                "starts and resumes runs of its own, on this machine."
            )
        folder = Path(args.keep or new).resolve()
        if folder.exists() and any(folder.iterdir()):
            raise ConfigError(f"--keep is {args.keep!r}, which is not empty. Name a new folder.")
        return 0 if verify(args, folder) else 1


if __name__ == "__main__":
    # The user's modules are found where the command is given.
    sys.path.insert(0, os.getcwd())
    # As Ctrl-C does, it ends what was started here too.
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    sys.exit(main())
