"""One run of a small config that meets a fault: a signal, a poisoned sample, a worker's death."""

import contextlib
import ctypes
import multiprocessing
import os
import re
import signal
import socket
import sys
import threading
import time
from collections.abc import Callable, Sequence
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import multiprocessing as mp
from torch.utils.data import Dataset

from tests.engine.killed_run import small_cfg
from tests.engine.run_processes import assert_same, metrics
from trainkit.checkpoint.format import verify
from trainkit.config import CfgNode
from trainkit.data import DatasetCatalog, TrainLoader, build_train_loader
from trainkit.data.build import build_train_mapper
from trainkit.data.samplers.order import Position
from trainkit.engine import DefaultTrainer, HookBase, exit_codes, launch
from trainkit.evaluation import ClassificationEvaluator, DatasetEvaluator
from trainkit.utils import comm

BATCH = 24

SETTINGS = [
    *("SOLVER.MAX_ITER", 18, "SOLVER.IMS_PER_BATCH", BATCH, "SOLVER.WARMUP_ITERS", 5),
    *("SOLVER.CHECKPOINT_PERIOD", 6, "TEST.EVAL_PERIOD", 4, "LOG_PERIOD", 3),
    *("DATALOADER.NUM_WORKERS", 0),
]


class Fault(NamedTuple):
    """What happens to a run, and when.

    Attributes:
        place: Where in the loop, as `FaultyTrainer.meet` is told it.
        iteration: When; it happens once.
        action: What happens.
        ranks: To whom.
    """

    place: str
    iteration: int
    action: Callable[[], None]
    ranks: tuple[int, ...] = (0,)


class Sample(NamedTuple):
    """A sample of the first epoch that is not as it should be.

    Attributes:
        iteration, rank: Whose batch it is in, in a run without a fault before; it comes fourth.
        kind: "poisoned" has a NaN, "slow" never comes, "deadly" kills the process that fetches it.
    """

    iteration: int
    rank: int
    kind: str


def get(*signals: int) -> None:
    """Sends signals to this process, each more than a second after the one before."""
    for number, signum in enumerate(signals):
        time.sleep(1.1 * (number > 0))
        os.kill(os.getpid(), signum)


def get_as_group(signum: int) -> None:
    """Has another process send a signal to this one and its workers, as a scheduler does."""
    sender = os.fork()
    if sender == 0:
        os.killpg(0, signum)
        os._exit(0)
    os.waitpid(sender, 0)


def get_later(signum: int) -> None:
    """Sends a signal to this process while it waits for what comes next."""
    threading.Timer(0.2, get, (signum,)).start()


def hang(*signals: int) -> None:
    """Waits in C forever, where no Python handler runs, and gets signals meanwhile."""
    threading.Thread(target=get, args=signals, daemon=True).start()
    libc, lock = ctypes.CDLL(None), ctypes.create_string_buffer(64)
    libc.pthread_mutex_lock(lock)
    libc.pthread_mutex_lock(lock)


def dawdle(seconds: float, *signals: int) -> None:
    """Takes its time, in a call that nothing cuts short, and gets signals meanwhile."""
    threading.Thread(target=get, args=signals, daemon=True).start()
    time.sleep(seconds)


def kill() -> None:
    get(signal.SIGKILL)


def kill_workers() -> None:
    """Kills the workers of all loaders; one that has no more to do would not be missed."""
    for worker in multiprocessing.active_children():
        worker.kill()


class FaultyImages(Dataset[Any]):
    """Images as floats, some of them not as they should be."""

    def __init__(self, dataset: Any) -> None:
        self.dataset = dataset
        self.kinds: dict[int, str] = {}

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, index: int) -> dict[str, Any]:
        sample = self.dataset[index]
        image, kind = sample["image"].float(), self.kinds.get(index)
        if kind == "poisoned":
            image[:, 14, 14] = torch.nan
        elif kind == "slow":
            threading.Event().wait()
        elif kind == "deadly":
            kill()
        return {**sample, "image": image}


class FaultHook(HookBase):
    """Tells the trainer where the loop is."""

    def __init__(self, priority: int) -> None:
        self.priority = priority

    def before_train(self) -> None:
        self.trainer.meet("before_train")

    def before_step(self) -> None:
        self.trainer.meet("before_step")

    def after_step(self) -> None:
        self.trainer.meet("before writing")


class FaultyEvaluator(ClassificationEvaluator):
    def __init__(self, classes: list[str], meet: Callable[[str], None]) -> None:
        super().__init__(classes)
        self._meet = meet
        self._num_batches = 0

    def process(self, inputs: dict[str, torch.Tensor], outputs: Any) -> None:
        self._num_batches += 1
        if self._num_batches == 2:
            self._meet("evaluation")
        super().process(inputs, outputs)

    def evaluate(self) -> dict[str, Any]:
        print("Judging the outputs")
        self._meet("judging")
        return super().evaluate()


class FaultyTrainer(DefaultTrainer):
    current: "FaultyTrainer"

    def __init__(self, cfg: CfgNode, fault: Fault | None, sample: Sample | None) -> None:
        self.fault = fault
        super().__init__(cfg)
        FaultyTrainer.current = self
        if sample is not None:
            assert isinstance(self.data_loader, TrainLoader)
            place = Position(0, BATCH * sample.iteration)
            index, _, _ = self.data_loader.samples_at(place, sample.rank)[3]
            self.data_loader.dataset.dataset.kinds[index] = sample.kind

    def meet(self, place: str, iteration: int | None = None) -> None:
        """Has the fault happen if this is where and when it does; that is now, or `iteration`."""
        fault = self.fault
        if fault is None or comm.get_rank() not in fault.ranks:
            return
        now = self.iter if iteration is None else iteration
        if (place, now) == (fault.place, fault.iteration):
            self.fault = None
            fault.action()

    def build_hooks(self) -> list[HookBase | None]:
        # The default hooks have 50, the writers 90.
        return [*super().build_hooks(), FaultHook(priority=60)]

    @classmethod
    def build_train_loader(cls, cfg: CfgNode) -> TrainLoader:
        images = FaultyImages(DatasetCatalog.get("tiny_train"))
        return build_train_loader(cfg, images, mapper=build_train_mapper(cfg))

    @classmethod
    def build_evaluator(cls, cfg: CfgNode, dataset_name: str) -> DatasetEvaluator:
        return FaultyEvaluator([str(n) for n in range(10)], cls.current.meet)

    def _roll_back(self, iteration: int) -> bool:
        is_back = super()._roll_back(iteration)
        self.meet("rolled back")
        return is_back


def meet_in_saves(trainer: FaultyTrainer) -> None:
    """Has the fault happen when a checkpoint is written and not yet published."""
    fsync = os.fsync

    def faulty_fsync(descriptor: int) -> None:
        path = os.readlink(f"/proc/self/fd/{descriptor}")
        if path.endswith(".pth.tmp"):
            # A save in the background is of an earlier iteration, which its name tells.
            numbered = re.search(r"model_(\d{7})\.pth", path)
            trainer.meet("save", int(numbered[1]) if numbered else None)
        fsync(descriptor)

    os.fsync = faulty_fsync  # type: ignore[assignment]  # it is given descriptors only


def train(
    output_dir: Path, opts: list[Any], fault: Fault | None, sample: Sample | None, resume: bool
) -> None:
    """Trains, and at the end writes this rank's model."""
    cfg = small_cfg(output_dir, [*SETTINGS, *opts])
    trainer = FaultyTrainer(cfg, fault, sample)
    trainer.resume_or_load(resume)
    meet_in_saves(trainer)
    trainer.train()
    model = getattr(trainer.model, "module", trainer.model)
    torch.save(model.state_dict(), output_dir / f"end.{comm.get_rank()}.pth")


def run(environment: dict[str, str], output_dir: Path, args: tuple[Any, ...]) -> None:
    """Is the script of a process, in a group of its own; what it prints goes to a file."""
    os.setsid()
    os.environ |= environment
    output_dir.mkdir(exist_ok=True)
    printed = os.open(
        output_dir / f"printed.{os.environ.get('RANK', '0')}", os.O_CREAT | os.O_WRONLY | os.O_TRUNC
    )
    for stream in (1, 2):
        os.dup2(printed, stream)
    sys.stdout.reconfigure(line_buffering=True)  # type: ignore[union-attr]  # a TextIOWrapper
    torch.set_num_threads(1)
    # Loader workers start as usual, not as this process did.
    mp.set_start_method("fork", force=True)
    with exit_codes():
        launch(train, args=(output_dir, *args))


def start(
    output_dir: Path,
    opts: Sequence[Any] = (),
    fault: Fault | None = None,
    *,
    sample: Sample | None = None,
    resume: bool = False,
    world_size: int = 1,
    environment: dict[str, str] | None = None,
) -> list[int]:
    """Runs in new processes, as torchrun starts them, and returns their exit codes.

    Args:
        output_dir, opts, fault, sample, resume: What they train.
        world_size: Ranks.
        environment: Variables of all of them.
    """
    context = mp.get_context("forkserver")
    context.set_forkserver_preload(["tests.engine.faulty_run"])
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    processes: list[BaseProcess] = []
    for rank in range(world_size):
        variables = dict(environment or {})
        if world_size > 1:
            variables |= {"RANK": str(rank), "LOCAL_RANK": str(rank)}
            variables |= dict.fromkeys(("WORLD_SIZE", "LOCAL_WORLD_SIZE"), str(world_size))
            variables |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
        args = (variables, output_dir, (list(opts), fault, sample, resume))
        processes.append(context.Process(target=run, args=args))
        processes[-1].start()
    try:
        deadline = time.monotonic() + 60
        for process in processes:
            process.join(max(0.0, deadline - time.monotonic()))
        codes = [process.exitcode for process in processes]
    finally:
        for process in processes:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid or 0, signal.SIGKILL)
            process.kill()
            process.join()
    assert None not in codes, f"a rank hangs: {codes}"
    return codes  # type: ignore[return-value]  # None is not among them


def printed(output_dir: Path, rank: int = 0) -> str:
    """Returns what a rank has printed last."""
    return (output_dir / f"printed.{rank}").read_text()


def saved(output_dir: Path) -> list[int]:
    """Returns the iterations of all checkpoints, which must be sound, finite and whole."""
    assert not list(output_dir.glob("*.tmp"))
    iterations = []
    for path in output_dir.glob("model_*.pth"):
        assert verify(path).state == "verified", path
        checkpoint = torch.load(path, weights_only=True)
        assert all(value.isfinite().all() for value in checkpoint["model"].values()), path
        iterations.append(checkpoint["iteration"])
    return sorted(iterations)


def assert_same_end(output_dir: Path, expected_dir: Path) -> None:
    """Compares weights, buffers, optimizer, hooks, data and metrics of two runs that ended."""
    ended, expected = (
        torch.load(folder / "model_final.pth", weights_only=True)
        for folder in (output_dir, expected_dir)
    )
    assert_same(ended["model"], expected["model"])
    for state in (ended["trainer"], expected["trainer"]):
        # They hold timings; what the writer made of them is compared below. And a run that was left
        # in its last iteration saves once more at its end, when no hook is pending any more.
        del state["storage"], state["hooks"]["PeriodicWriter"], state["pending"]
    assert_same(ended["trainer"], expected["trainer"])
    assert metrics(output_dir) == metrics(expected_dir)
