"""Kills runs of a config at random moments, again and again, and compares how they end.

    python -m tests.random_kills --kills 200 --output DIR
    python -m tests.random_kills --kills 12 --output DIR --ranks 2,3 --workers 0 SOLVER.MAX_ITER 200

For each number of ranks and of loader workers it trains once unbroken. Then it trains through the
same command line with `--resume`, sends SIGKILLs from outside, and starts again, until the run has
come to its end and another one begins. After each kill, the newest valid checkpoint must be at
least as new as the last one that the log calls saved, the next start must go on from there, and no
process may be left. In the end weights, optimizer, schedule, best value and metrics without timings
must equal the unbroken run's bit for bit. The moments are spread over the phases of a run, which
are told apart by what can be seen from outside: lines of the log, and temporary files. Only Linux.

The report is DIR/kills.md, and each kill a line of DIR/kills.jsonl. `SETTINGS` shorten the runs.
"""

import argparse
import json
import random
import shutil
import signal
import statistics
import sys
import time
from collections import Counter
from collections.abc import Sequence
from itertools import chain
from pathlib import Path
from typing import Any

from tabulate import tabulate

from tests.engine.run_processes import assert_same_end
from tests.watched_run import PHASES, SETTINGS, VICTIMS, Plan, Start
from trainkit.checkpoint.folder import newest_first
from trainkit.checkpoint.format import verify

# How often each of the phases is aimed at; a run that comes to its end before is killed there.
WEIGHTS = (2, 3, 3, 2, 3, 1)


class Torture:
    """Trains unbroken, then kills runs until there were enough kills, and compares all ends.

    Args:
        plan: What is run.
        folder: Where; what ended well is removed from it.
        draw: Decides moments and victims.
    """

    def __init__(self, plan: Plan, folder: Path, draw: random.Random) -> None:
        self.plan = plan
        self.phases: Counter[str] = Counter()
        self.victims: Counter[str] = Counter()
        self.faults: list[str] = []
        self.num_runs = self.num_lost = self.num_different = 0
        self.seconds = 0.0
        self._folder = folder
        self._draw = draw
        self._times: dict[str, float] = {}

    def run(self, num_kills: int) -> None:
        began = time.monotonic()
        self._measure()
        while self.phases.total() < num_kills:
            folder = self._folder / f"run-{self.num_runs}"
            self.num_runs += 1
            if not self._complete(folder, num_kills):
                self.num_lost += 1
            elif self._ends_alike(folder):
                shutil.rmtree(folder)
            self.seconds = time.monotonic() - began

    def _measure(self) -> None:
        """Trains unbroken, and takes down how many seconds each phase takes."""
        spent: dict[str, list[float]] = {phase: [] for phase in PHASES}
        with Start(self.plan, self._folder / "unbroken") as start:
            phase, since = start.watch.phase, time.monotonic()
            while start.launcher.poll() is None:
                start.until(lambda watch: watch.phase != phase)  # noqa: B023  # called at once
                now = time.monotonic()
                spent[phase].append(now - since)
                phase, since = start.watch.phase, now
            if not start.end() or start.launcher.returncode:
                raise RuntimeError(f"the unbroken run failed: see {self._folder}/unbroken")
        self._times = {phase: statistics.median(spent[phase] or [0.0]) for phase in PHASES}
        print(self.plan.name, {k: round(t, 3) for k, t in self._times.items()}, flush=True)

    def _complete(self, folder: Path, num_kills: int) -> bool:
        """Brings one run to its end through kills; returns False if it is lost."""
        acknowledged = -1
        while True:
            with Start(self.plan, folder) as start:
                # One that can only end is spared every other time, or it never would.
                is_spared = start.watch.is_ending and self._draw.random() < 0.5
                is_due = not is_spared and self.phases.total() < num_kills
                note = self._strike(start) if is_due else {}
                if not note:
                    start.until(lambda watch: False)
                since = time.monotonic()
                if not start.end():
                    self.faults.append(f"{folder}: processes were left, {note}")
                note["seconds to leave"] = round(time.monotonic() - since, 2)
            begun, newest = start.watch.first_iter, newest_valid(folder)
            if begun is not None and begun - 1 < acknowledged:
                self.faults.append(f"{folder}: {acknowledged} was saved, but it began at {begun}")
                return False
            acknowledged = max(acknowledged, *start.watch.saved, -1)
            if newest < acknowledged:
                self.faults.append(f"{folder}: {acknowledged} was saved, but {newest} is newest")
                return False
            if "victim" not in note:
                if start.launcher.returncode:
                    self.faults.append(f"{folder}: a start failed, see output.txt")
                return start.launcher.returncode == 0
            note |= {"saved": acknowledged, "newest valid": newest}
            with (self._folder.parent / "kills.jsonl").open("a") as file:
                file.write(json.dumps({"plan": self.plan.name, "run": folder.name, **note}) + "\n")

    def _strike(self, start: Start) -> dict[str, Any]:
        """Kills at a random moment, and returns what was seen then; {} if the run left before."""
        aim = self._draw.choices(PHASES, WEIGHTS)[0]
        num_saves, share = self._draw.randrange(4), self._draw.random()
        is_there = aim == "start-up" or start.until(lambda w: w.has_come_to(aim, num_saves))
        reached = "end of the run" if start.watch.is_ending and aim != "start-up" else aim
        if not is_there or not start.passes(share * self._times[reached]):
            return {}
        phase, victim = start.watch.phase, start.kill(self._draw.choice(VICTIMS), self._draw)
        self.phases[phase] += 1
        self.victims[victim] += 1
        return {"aim": aim, "phase": phase, "victim": victim}

    def _ends_alike(self, folder: Path) -> bool:
        try:
            assert_same_end(folder, self._folder / "unbroken")
        except AssertionError as e:
            self.num_different += 1
            self.faults.append(f"{folder} ends otherwise than the unbroken run: {e}")
            return False
        return True


def newest_valid(folder: Path) -> int:
    """Returns the iteration of the checkpoint that a resume takes, or -1 if there is none."""
    for path in newest_first(folder):
        manifest = verify(path).manifest
        if manifest is not None:
            return -1 if manifest.iteration is None else manifest.iteration
    return -1


def report(seed: int, tortures: Sequence[Torture]) -> str:
    """Returns in Markdown how runs were started, what was killed when, and how the runs ended."""
    plan = tortures[0].plan
    settings = chain.from_iterable((SETTINGS | plan.opts).items())
    command = " ".join(["tools/train_net.py --config-file", plan.config_file, *settings])
    header = ["ranks", "workers", "runs", "kills", *PHASES, "lost", "bit-equal", "seconds"]
    rows: list[list[Any]] = []
    for t in tortures:
        phases = [t.phases[phase] for phase in PHASES]
        equal = f"{t.num_runs - t.num_lost - t.num_different} of {t.num_runs}"
        row = [t.plan.world_size, t.plan.num_workers, t.num_runs, t.phases.total(), *phases]
        rows.append([*row, t.num_lost, equal, round(t.seconds)])
    totals = [sum(row[column] for row in rows) for column in range(2, len(header) - 2)]
    num_equal = sum(t.num_runs - t.num_lost - t.num_different for t in tortures)
    rows.append(["all", "", *totals, f"{num_equal} of {totals[0]}", sum(row[-1] for row in rows)])
    victims = sum((t.victims for t in tortures), Counter[str]())
    faults = [fault for t in tortures for fault in t.faults]
    return "\n".join(
        [
            f"`{command}`, three ranks with SOLVER.IMS_PER_BATCH 66; seed {seed}.",
            "",
            tabulate(rows, header, tablefmt="github"),
            "",
            "Killed were " + ", ".join(f"{who}: {n}" for who, n in victims.most_common()) + ".",
            f"Faults: {len(faults)}.",
            *(f"- {fault}" for fault in faults),
            "",
        ]
    )


def _integers(text: str) -> list[int]:
    return [int(number) for number in text.split(",")]


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--kills", type=int, default=200)
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--config-file", default="configs/fashion_mnist.yaml")
    parser.add_argument("--ranks", type=_integers, default=[1, 2, 3])
    parser.add_argument("--workers", type=_integers, default=[0, 2])
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("opts", nargs=argparse.REMAINDER, metavar="KEY VALUE")
    args = parser.parse_args(arguments)
    opts = dict(zip(args.opts[::2], args.opts[1::2], strict=True))
    plans = [
        Plan(world_size, num_workers, args.config_file, opts)
        for world_size in args.ranks
        for num_workers in args.workers
    ]
    tortures: list[Torture] = []
    for number, plan in enumerate(plans):
        folder = args.output / f"ranks{plan.world_size}-workers{plan.num_workers}"
        tortures.append(Torture(plan, folder, random.Random(f"{args.seed} {plan.name}")))
        # Shared out evenly, also where the number of plans does not divide that of kills.
        done = number * args.kills // len(plans)
        tortures[-1].run((number + 1) * args.kills // len(plans) - done)
        text = report(args.seed, tortures)
        (args.output / "kills.md").write_text(text, "utf-8")
        print(text, flush=True)
    return int(any(t.faults for t in tortures))


if __name__ == "__main__":
    # What was started is ended with it.
    signal.signal(signal.SIGTERM, lambda *args: sys.exit(143))
    sys.exit(main())
