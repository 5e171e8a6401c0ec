"""The comparisons of `benchmark.py`: trainkit with PyTorch alone, and with other libraries."""

import argparse
import contextlib
import hashlib
import importlib.util
import json
import os
import random
import shlex
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from tabulate import tabulate
from torch import nn

from trainkit.checkpoint import Checkpointer
from trainkit.checkpoint.format import verify
from trainkit.config.lazy_cfg import load_cfg
from trainkit.utils.errors import ConfigError

LOOPS_SCRIPT = Path(__file__).with_name("benchmark_loops.py")
LIBRARIES = ("lightning", "accelerate", "ignite", "mmengine", "transformers")
NUM_RESAMPLES = 2000
NUM_TENSORS = 16


class Comparison(NamedTuple):
    """What took turns.

    Attributes:
        title: What was measured.
        unit: Of the values, and how many of it make a second.
        values: Of each round, in seconds, by name.
        bases: The names that all others are compared with.
        facts: What else is known, by what it is and by name.
    """

    title: str
    unit: tuple[str, float]
    values: dict[str, list[float]]
    bases: Sequence[str]
    facts: dict[str, dict[str, float]]

    def against(self, name: str, base: str) -> tuple[float, float, float, float]:
        """Returns the median difference within rounds, its 95 % interval, and the median ratio."""
        pairs = list(zip(self.values[name], self.values[base], strict=True))
        differences = [(value - other) * self.unit[1] for value, other in pairs]
        # A bootstrap: it asks for no particular distribution, and times have long tails.
        draw, count = random.Random(0).choices, len(differences)
        medians = sorted(
            statistics.median(draw(differences, k=count)) for _ in range(NUM_RESAMPLES)
        )
        low, high = (medians[round(p * (NUM_RESAMPLES - 1))] for p in (0.025, 0.975))
        ratio = statistics.median(value / other for value, other in pairs)
        return statistics.median(differences), low, high, ratio

    def as_dict(self) -> dict[str, Any]:
        """Returns all values in seconds, and how each name compares with the bases, in the unit."""
        keys = ("median", "low", "high", "ratio")
        over = {
            name: {b: dict(zip(keys, self.against(name, b), strict=True)) for b in self.bases}
            for name in self.values
        }
        return {**self._asdict(), "over": over}

    def table(self) -> str:
        """Returns what is printed."""
        rows = []
        for name, values in self.values.items():
            scaled = [value * self.unit[1] for value in values]
            row = {"": name, "minimum": min(scaled), "median": statistics.median(scaled)}
            for base in self.bases:
                difference, low, high, ratio = self.against(name, base)
                text = f"{difference:+.2f} [{low:+.2f}, {high:+.2f}]"
                row |= {f"over {base} [95 %]": text if name != base else "", f"/ {base}": ratio}
            rows.append(row | {fact: of[name] for fact, of in self.facts.items()})
        return tabulate(rows, "keys", floatfmt=".2f")


def start(name: str, args: argparse.Namespace, folder: str) -> subprocess.Popen[str]:
    """Starts a loop of `benchmark_loops.py`, which writes into a folder of its own."""
    work = Path(folder, name)
    work.mkdir(exist_ok=True)
    config = str(Path(args.config_file).resolve()) if args.config_file else ""
    size = [str(args.iterations), str(args.warmup)]
    with (work / "stderr").open("w") as errors:
        return subprocess.Popen(
            [sys.executable, str(LOOPS_SCRIPT), name, *size, config, *args.opts],
            cwd=work,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=errors,
            text=True,
        )


def hear(name: str, process: subprocess.Popen[str], folder: str) -> dict[str, float]:
    """Returns what a loop says next.

    Raises:
        ConfigError: If it failed.
    """
    assert process.stdout is not None
    if line := process.stdout.readline():
        return dict(json.loads(line))
    text = Path(folder, name, "stderr").read_text("utf-8", "replace")
    raise ConfigError(f"The loop {name!r} failed:\n{text[-2000:]}")


def loop_names(args: argparse.Namespace) -> list[str]:
    """Returns the loops to be compared, and says which libraries are missing.

    Raises:
        ConfigError: If the config has an error, or asks for what the loop by hand does not do.
    """
    if args.config_file or args.opts:
        solver = load_cfg(args.config_file, args.opts).SOLVER
        if solver.ACCUMULATE > 1 or solver.PLATEAU.METRIC:
            raise ConfigError(
                f"SOLVER.ACCUMULATE is {solver.ACCUMULATE} and SOLVER.PLATEAU.METRIC "
                f"{solver.PLATEAU.METRIC!r}, which the loop to compare with does not know. Compare "
                "with SOLVER.ACCUMULATE 1 and another schedule (SOLVER.LR_SCHEDULER_NAME)."
            )
        return ["raw", "raw-again", "trainkit"]
    names = ["raw", "raw-again", "raw-fused", "raw-duties", "trainkit"]
    for library in LIBRARIES:
        if importlib.util.find_spec(library):
            names.append(library)
        else:
            print(f"{library} is not installed: left out.")
    return names


def compare_loops(args: argparse.Namespace) -> Iterator[Comparison]:
    """Compares steps of loops, each in a process that waits while it is another one's turn."""
    names = loop_names(args)
    values: dict[str, list[float]] = {name: [] for name in names}
    cpu_values: dict[str, list[float]] = {name: [] for name in names}
    imports, memory = dict[str, float](), dict[str, float]()
    with tempfile.TemporaryDirectory() as folder, contextlib.ExitStack() as stack:
        processes = {}
        for name in names:
            processes[name] = stack.enter_context(start(name, args, folder))
            imports[name] = hear(name, processes[name], folder)["import_seconds"]
        for number in range(args.rounds):
            # Whoever comes first in a round, or after the same neighbor, may have an advantage.
            for name in random.Random(number).sample(names, len(names)):
                print(file=processes[name].stdin, flush=True)
                told = hear(name, processes[name], folder)
                values[name].append(told["seconds"])
                cpu_values[name].append(told["cpu_seconds"])
                memory[name] = told["peak_mb"]
    bases = [name for name in ("raw", "raw-fused") if name in names]
    facts = {"imports after torch, s": imports, "peak MB": memory}
    yield Comparison("a step", ("µs", 1e6), values, bases, facts)
    # What other work on the machine disturbs less; processes that load data are not in it.
    yield Comparison("a step, in CPU time", ("µs", 1e6), cpu_values, bases, {})


def compare_startups(args: argparse.Namespace) -> Iterator[Comparison]:
    """Compares how long processes take until their first step is done."""
    torch_alone = "import torch"
    names = [torch_alone, *(name for name in loop_names(args) if not name.startswith("raw-"))]
    imports: dict[str, list[float]] = {name: [] for name in names[2:]}
    steps: dict[str, list[float]] = {name: [] for name in names}
    with tempfile.TemporaryDirectory() as folder:
        for number in range(args.rounds):
            for name in random.Random(number).sample(names, len(names)):
                begin = time.perf_counter()
                if name == torch_alone:
                    code = "import os, torch; os._exit(0)"
                    subprocess.run([sys.executable, "-c", code], check=True)
                    steps[name].append(time.perf_counter() - begin)
                    continue
                with start(name, args, folder) as process:
                    told = hear(name, process, folder)
                    steps[name].append(time.perf_counter() - begin)
                if name in imports:
                    imports[name].append(told["import_seconds"])
    yield Comparison("imports after torch", ("s", 1), imports, [], {})
    yield Comparison("start to first step", ("s", 1), steps, [torch_alone, "raw"], {})


def compare_checkpoints(args: argparse.Namespace) -> Iterator[Comparison]:
    """Compares saving and loading with PyTorch's, and with the least that a safe file needs."""
    size = args.megabytes * 2**20 // 4 // NUM_TENSORS
    model = nn.ParameterList(torch.rand(size) for _ in range(NUM_TENSORS))
    # Here and not in a folder for temporary files, which may be in memory.
    with tempfile.TemporaryDirectory(dir=".") as folder:
        plain, bare = Path(folder, "plain.pth"), Path(folder, "bare")
        checkpointer = Checkpointer(model, folder)
        torch.save(model.state_dict(), plain)
        data = plain.read_bytes()

        def write() -> None:
            # With fsync and SHA-256: the least that a file takes which is durable and can be told
            # from a damaged one.
            with bare.open("wb") as file:
                file.write(data)
                os.fsync(file.fileno())
            hashlib.sha256(data).digest()

        def load() -> None:
            # With SHA-256.
            with plain.open("rb") as file:
                hashlib.file_digest(file, "sha256")
            model.load_state_dict(torch.load(plain))

        saves = {
            "torch.save": lambda: torch.save(model.state_dict(), plain),
            "bare write": write,
            "Checkpointer.save": lambda: checkpointer.save("model"),
        }
        loads = {
            "torch.load": load,
            "Checkpointer.load": lambda: checkpointer.load(f"{folder}/model.pth"),
            "verify alone": lambda: verify(f"{folder}/model.pth"),
        }
        for title, calls, bases in (
            ("saving", saves, ["torch.save", "bare write"]),
            ("loading", loads, ["torch.load"]),
        ):
            values = in_turns(calls, args.rounds)
            yield Comparison(f"{title} {args.megabytes} MB", ("ms", 1e3), values, bases, {})


def in_turns(calls: dict[str, Callable[[], Any]], rounds: int) -> dict[str, list[float]]:
    """Times each call once in each round, in an order that is drawn."""
    values: dict[str, list[float]] = {name: [] for name in calls}
    # The first round is a warmup.
    for number in range(-1, rounds):
        for name in random.Random(number).sample(list(calls), len(calls)):
            # What others wrote must not be waited for by whoever syncs next.
            os.sync()
            begin = time.perf_counter()
            calls[name]()
            if number >= 0:
                values[name].append(time.perf_counter() - begin)
    return values


COMPARE = {
    "loop": compare_loops,
    "startup": compare_startups,
    "checkpoint": compare_checkpoints,
}


def compare(args: argparse.Namespace) -> None:
    """Compares what `args.task` says, and prints, writes and draws it."""
    comparisons = list(COMPARE[args.task](args))
    for found in comparisons:
        print(f"\n{found.title}, {found.unit[0]}, {args.rounds} rounds")
        print(found.table())
    print(f"\ntorch {torch.__version__}\nCommand: python {shlex.join(sys.argv)}")
    if args.json:
        facts = {"command": sys.argv, "torch": torch.__version__, "cpus": os.cpu_count()}
        results = [found.as_dict() for found in comparisons]
        text = json.dumps({**facts, "comparisons": results}, indent=1)
        Path(args.json).write_text(text, "utf-8")
    if args.plot:
        plot(comparisons, args.plot)


def plot(comparisons: list[Comparison], path: str) -> None:
    """Draws the values of all rounds, as boxes from quartile to quartile.

    Raises:
        ConfigError: If matplotlib is not installed.
    """
    try:
        import matplotlib.pyplot as plt
    except ImportError:
        raise ConfigError("--plot needs matplotlib: pip install 'trainkit[plot]'.") from None
    figure, panels = plt.subplots(
        1, len(comparisons), figsize=(7 * len(comparisons), 4), squeeze=False, layout="constrained"
    )
    for axes, found in zip(panels[0], comparisons, strict=True):
        name, scale = found.unit
        data = [[value * scale for value in values] for values in found.values.values()]
        axes.boxplot(data, orientation="horizontal", tick_labels=list(found.values), sym="")
        axes.invert_yaxis()
        axes.set(xlabel=f"{found.title}, {name}", xlim=(0, None))
        axes.grid(axis="x")
    figure.savefig(path, dpi=120)
    plt.close(figure)
