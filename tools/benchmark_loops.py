"""One training loop in a process of its own, which `benchmark.py` starts and gives turns.

    python tools/benchmark_loops.py NAME ITERATIONS WARMUP CONFIG_FILE [KEY VALUE ...]

It writes a line of JSON once its first step is done. For each line that it reads, it then makes
WARMUP steps, times ITERATIONS, and writes another line; it ends when there is none left to read.
Without a config file (""), the model is of about a thousand parameters, on one thread of the CPU.
"""

import importlib
import itertools
import json
import os
import resource
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, TextIO

import torch
from torch import nn

# Of a schedule; none of the loops gets there.
MAX_ITER = 10**9
LOG_PERIOD = 20
RATE, MOMENTUM = 0.01, 0.9

Batch = tuple[torch.Tensor, torch.Tensor]


class Clock:
    """Called in each forward pass in training; waits there for its turn, and times blocks of steps.

    Args:
        iterations: To time in each turn.
        warmup: Iterations at the beginning of each turn, which do not count.
        channel: Where what was measured goes.
    """

    def __init__(self, iterations: int, warmup: int, channel: TextIO) -> None:
        self.import_seconds = 0.0
        self._iterations, self._warmup, self._channel = iterations, warmup, channel
        self._turns = self._take_turns()
        self._calls_left = next(self._turns)

    def __call__(self) -> None:
        """Counts a forward pass."""
        self._calls_left -= 1
        if self._calls_left == 0:
            self._calls_left = next(self._turns)

    def _take_turns(self) -> Iterator[int]:
        """Yields how many forward passes away the next event is."""
        yield 2
        self._tell(import_seconds=self.import_seconds)
        while sys.stdin.readline():
            yield self._warmup
            begin, cpu_begin = _now(), time.process_time()
            yield self._iterations
            seconds, cpu_seconds = _now() - begin, time.process_time() - cpu_begin
            self._tell(
                seconds=seconds / self._iterations, cpu_seconds=cpu_seconds / self._iterations
            )
        sys.exit()

    def _tell(self, **measured: float) -> None:
        print(json.dumps({**measured, "peak_mb": peak_mb()}), file=self._channel, flush=True)


def _now() -> float:
    if torch.accelerator.is_available():
        torch.accelerator.synchronize()
    return time.perf_counter()


def peak_mb() -> float:
    """Returns the most memory (RSS) that this process has held so far."""
    status = Path("/proc/self/status")
    if status.exists():
        # getrusage would also count the process that started this one.
        lines = status.read_text("ascii").splitlines()
        return next(int(line.split()[1]) for line in lines if line.startswith("VmHWM")) / 1024
    # macOS counts bytes.
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20


class Net(nn.Module):
    """Of 1,140 parameters; returns a dict of one loss."""

    def __init__(self, clock: Clock) -> None:
        super().__init__()
        self.layers = nn.Sequential(
            *(nn.Linear(16, 32), nn.ReLU(), nn.Linear(32, 16), nn.ReLU(), nn.Linear(16, 4))
        )
        self.clock = clock

    def forward(self, batch: Batch) -> dict[str, torch.Tensor]:
        """Takes inputs of shape (8, 16) and classes of shape (8,)."""
        self.clock()
        inputs, classes = batch
        return {"loss_cls": nn.functional.cross_entropy(self.layers(inputs), classes)}


class EndlessBatches(torch.utils.data.IterableDataset[Batch]):
    """The same 64 batches, over and over."""

    def __iter__(self) -> Iterator[Batch]:
        generator = torch.Generator().manual_seed(0)
        batches = [
            (torch.randn(8, 16, generator=generator), torch.randint(4, (8,), generator=generator))
            for _ in range(64)
        ]
        return itertools.cycle(batches)


def sgd(net: nn.Module, **settings: Any) -> torch.optim.Optimizer:
    """Returns the optimizer of all loops."""
    return torch.optim.SGD(net.parameters(), RATE, MOMENTUM, **settings)


def cosine(optimizer: torch.optim.Optimizer) -> torch.optim.lr_scheduler.LRScheduler:
    """Returns the schedule of all loops but trainkit's, which has its own of the same shape."""
    return torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, MAX_ITER)


def raw(clock: Clock, **settings: Any) -> None:
    """PyTorch alone, with an optimizer as PyTorch makes it by default or with these settings."""
    net = Net(clock)
    optimizer = sgd(net, **settings)
    scheduler = cosine(optimizer)
    for batch in EndlessBatches():
        optimizer.zero_grad()
        loss = net(batch)["loss_cls"]
        loss.backward()
        optimizer.step()
        scheduler.step()


def raw_fused(clock: Clock) -> None:
    """The same with the optimizer's settings that trainkit has by default."""
    raw(clock, fused=True)


def raw_duties(clock: Clock) -> None:
    """The same with what a default trainer has to do besides: record, average, write, time."""
    net = Net(clock)
    optimizer = sgd(net, fused=True)
    scheduler = cosine(optimizer)
    losses: list[float] = []
    times: list[float] = []
    with Path("metrics.json").open("w", encoding="utf-8") as file:
        for iteration, batch in enumerate(EndlessBatches()):
            begin = time.perf_counter()
            optimizer.zero_grad()
            loss = net(batch)["loss_cls"]
            loss.backward()
            optimizer.step()
            losses.append(loss.item())
            rate = scheduler.get_last_lr()[0]
            scheduler.step()
            times.append(time.perf_counter() - begin)
            if (iteration + 1) % LOG_PERIOD == 0:
                means = {"loss": sum(losses) / LOG_PERIOD, "time": sum(times) / LOG_PERIOD}
                print(json.dumps({"iteration": iteration, "lr": rate, **means}), file=file)
                file.flush()
                losses.clear()
                times.clear()


def library(clock: Clock, name: str) -> Any:
    """Imports what a loop needs, on its clock."""
    begin = time.perf_counter()
    module = importlib.import_module(name)
    clock.import_seconds += time.perf_counter() - begin
    return module


def trainkit(clock: Clock) -> None:
    """A SimpleTrainer with the default hooks and a JSONWriter."""
    engine = library(clock, "trainkit.engine")
    schedules = library(clock, "fvcore.common.param_scheduler")
    events = library(clock, "trainkit.utils.events")
    net = Net(clock)
    trainer = engine.SimpleTrainer(net, EndlessBatches(), sgd(net, fused=True))
    trainer.register_hooks(
        [
            engine.IterationTimer(),
            engine.LRScheduler(scheduler=schedules.CosineParamScheduler(1.0, 0.0)),
            engine.PeriodicWriter([events.JSONWriter("metrics.json")], LOG_PERIOD),
        ]
    )
    trainer.train(0, MAX_ITER)


def lightning(clock: Clock) -> None:
    """Lightning's Trainer with its default callbacks and a CSVLogger, without bars and saving."""
    pl = library(clock, "lightning.pytorch")
    loggers = library(clock, "lightning.pytorch.loggers")
    module = pl.LightningModule

    class Module(module):  # type: ignore[misc, valid-type]  # Of type Any.
        def __init__(self) -> None:
            super().__init__()
            self.net = Net(clock)

        def training_step(self, batch: Batch, _: int) -> torch.Tensor:
            loss: torch.Tensor = self.net(batch)["loss_cls"]
            self.log("loss_cls", loss)
            return loss

        def configure_optimizers(self) -> Any:
            optimizer = sgd(self.net)
            return [optimizer], [{"scheduler": cosine(optimizer), "interval": "step"}]

    trainer = pl.Trainer(
        accelerator="cpu",
        max_steps=MAX_ITER,
        log_every_n_steps=LOG_PERIOD,
        logger=loggers.CSVLogger("."),
        enable_checkpointing=False,
        enable_progress_bar=False,
    )
    trainer.fit(Module(), torch.utils.data.DataLoader(EndlessBatches(), batch_size=None))


def accelerate(clock: Clock) -> None:
    """A loop of one's own with what Accelerate prepares; nothing is recorded or written."""
    accelerator = library(clock, "accelerate").Accelerator(cpu=True)
    net: Any = Net(clock)
    optimizer: Any = sgd(net)
    net, optimizer, scheduler = accelerator.prepare(net, optimizer, cosine(optimizer))
    for batch in EndlessBatches():
        optimizer.zero_grad()
        loss = net(batch)["loss_cls"]
        accelerator.backward(loss)
        optimizer.step()
        scheduler.step()


def ignite(clock: Clock) -> None:
    """An Engine with a running average of the loss, which is written every 20 steps."""
    engine = library(clock, "ignite.engine")
    average = library(clock, "ignite.metrics").RunningAverage
    net = Net(clock)
    optimizer = sgd(net)
    scheduler = cosine(optimizer)

    def step(_: Any, batch: Batch) -> float:
        optimizer.zero_grad()
        loss: torch.Tensor = net(batch)["loss_cls"]
        loss.backward()
        optimizer.step()
        scheduler.step()
        return loss.item()

    trainer = engine.Engine(step)
    average(output_transform=lambda loss: loss).attach(trainer, "loss_cls")
    with Path("metrics.json").open("w", encoding="utf-8") as file:
        every = engine.Events.ITERATION_COMPLETED(every=LOG_PERIOD)
        trainer.add_event_handler(
            every, lambda e: print(json.dumps(e.state.metrics), file=file, flush=True)
        )
        trainer.run(EndlessBatches(), max_epochs=1, epoch_length=MAX_ITER)


def mmengine(clock: Clock) -> None:
    """MMEngine's Runner with its default hooks, logging every 20 steps."""
    runner = library(clock, "mmengine.runner")
    base = library(clock, "mmengine.model").BaseModel

    class Model(base):  # type: ignore[misc, valid-type]  # Of type Any.
        def __init__(self) -> None:
            super().__init__()
            self.net = Net(clock)

        def forward(self, inputs: torch.Tensor, classes: torch.Tensor, mode: str) -> Any:
            return self.net((inputs, classes))

    class Batches(EndlessBatches):
        def __len__(self) -> int:
            return MAX_ITER

    runner.Runner(
        model=Model(),
        work_dir=".",
        train_dataloader=torch.utils.data.DataLoader(Batches(), batch_size=None),
        train_cfg={"type": "IterBasedTrainLoop", "max_iters": MAX_ITER},
        optim_wrapper={"optimizer": {"type": "SGD", "lr": RATE, "momentum": MOMENTUM}},
        param_scheduler={"type": "CosineAnnealingLR", "T_max": MAX_ITER, "by_epoch": False},
        default_hooks={
            "logger": {"type": "LoggerHook", "interval": LOG_PERIOD},
            "checkpoint": {"type": "CheckpointHook", "interval": MAX_ITER, "by_epoch": False},
            # It seeds the samplers of data sets that have an end.
            "sampler_seed": None,
        },
        default_scope="mmengine",
    ).train()


def transformers(clock: Clock) -> None:
    """transformers.Trainer with logs every 20 steps, without saving and bars."""
    base = library(clock, "transformers.trainer").Trainer
    arguments = library(clock, "transformers.training_args").TrainingArguments

    class Trainer(base):  # type: ignore[misc, valid-type]  # Of type Any.
        def compute_loss(self, model: Any, inputs: Batch, *_: Any, **__: Any) -> torch.Tensor:
            loss: torch.Tensor = model(inputs)["loss_cls"]
            return loss

        def get_train_dataloader(self) -> Any:
            return torch.utils.data.DataLoader(EndlessBatches(), batch_size=None)

    net = Net(clock)
    optimizer = sgd(net)
    settings = arguments(
        output_dir=".",
        max_steps=MAX_ITER,
        logging_steps=LOG_PERIOD,
        use_cpu=True,
        save_strategy="no",
        report_to=[],
        disable_tqdm=True,
    )
    Trainer(net, settings, optimizers=(optimizer, cosine(optimizer))).train()


LOOPS: dict[str, Callable[[Clock], None]] = {
    "raw": raw,
    "raw-again": raw,
    "raw-fused": raw_fused,
    "raw-duties": raw_duties,
    "trainkit": trainkit,
    "lightning": lightning,
    "accelerate": accelerate,
    "ignite": ignite,
    "mmengine": mmengine,
    "transformers": transformers,
}


def train_config(clock: Clock, name: str, file: str, opts: list[str]) -> None:
    """What a config describes, by its trainer, or by hand with that trainer's parts."""
    engine = library(clock, "trainkit.engine")
    cfg = importlib.import_module("trainkit.config.lazy_cfg").load_cfg(file, opts)
    cfg.OUTPUT_DIR, cfg.SOLVER.MAX_ITER = ".", MAX_ITER
    # These would be a part of some turns only, or end the run.
    cfg.TEST.EVAL_PERIOD = cfg.SOLVER.CHECKPOINT_PERIOD = 0
    cfg.SOLVER.MAX_EPOCHS = cfg.SOLVER.CHECKPOINT_EPOCHS = cfg.TEST.EVAL_EPOCHS = 0
    cfg.LIMIT_BATCHES = cfg.SOLVER.MAX_SECONDS = 0
    trainer = engine.DefaultTrainer(cfg)
    trainer.model.register_forward_pre_hook(lambda model, _: clock() if model.training else None)
    if name == "trainkit":
        trainer.train()
    else:
        train_by_hand(trainer)


def train_by_hand(trainer: Any) -> None:
    """The loop that one would write for a trainer's model, data, optimizer and schedule."""
    autocast = importlib.import_module("trainkit.utils.device").autocast
    move_to = importlib.import_module("trainkit.utils.nested").move_to
    model, optimizer, scheduler = trainer.model, trainer.optimizer, trainer.scheduler
    scaler, clips = trainer.grad_scaler, trainer.cfg.SOLVER.CLIP_GRADIENTS.ENABLED
    if not hasattr(scheduler, "step"):
        multiplier = importlib.import_module("trainkit.solver").LRMultiplier
        scheduler = multiplier(optimizer, scheduler, MAX_ITER)
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    for batch in itertools.chain.from_iterable(itertools.repeat(trainer.data_loader)):
        optimizer.zero_grad()
        with autocast(trainer.precision, trainer.device):
            output = model(move_to(batch, trainer.device))
            losses = output.values() if isinstance(output, dict) else [output]
            loss = sum(value for value in losses if value.requires_grad)
        scaler.scale(loss).backward()
        if clips:
            scaler.unscale_(optimizer)
            trainer.grad_clipper(parameters)
        scaler.step(optimizer)
        scaler.update()
        scheduler.step()


def main() -> None:
    """Runs the loop that the command line names."""
    name, iterations, warmup, config_file, *opts = sys.argv[1:]
    # What libraries print must not come between the lines of JSON.
    channel = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    clock = Clock(int(iterations), int(warmup), channel)
    if config_file or opts:
        train_config(clock, name, config_file, opts)
    else:
        torch.set_num_threads(1)
        LOOPS[name](clock)


if __name__ == "__main__":
    main()
