"""A run of tools/train_net.py as it is seen, and killed, from outside; only Linux."""

import contextlib
import os
import random
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from itertools import chain
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).parents[1]
SETTINGS = {"SOLVER.MAX_ITER": "300", "SOLVER.CHECKPOINT_PERIOD": "15", "TEST.EVAL_PERIOD": "30"}
"""They shorten the runs."""

# What three ranks can share, instead of 64.
IMS_PER_BATCH = {3: {"SOLVER.IMS_PER_BATCH": "66"}}

PHASES = (
    *("start-up", "steps", "save", "between save and evaluation", "evaluation"),
    "end of the run",
)
"""The last one begins when the final checkpoint is saved."""

GROUP, RANK, LAUNCHER, PARENT = VICTIMS = (
    *("the process group", "one rank", "the launcher", "a parent of loader workers"),
)
LEAVE_SECONDS = 30.0
RUN_SECONDS = 1800.0
_POLL_SECONDS = 0.001
_LINES = {
    "begun": re.compile(r"Starting training from iteration (\d+)"),
    "saved": re.compile(r"Saved checkpoint to \S*/model_(\w+)\.pth"),
    "evaluating": re.compile(r"Start inference on"),
    "evaluated": re.compile(r"Results on"),
    "best": re.compile(r"after iteration (\d+), the best so far"),
}


class Plan(NamedTuple):
    """One combination: how its runs are started."""

    world_size: int
    num_workers: int
    config_file: str
    opts: dict[str, str]

    @property
    def name(self) -> str:
        return f"{self.world_size} ranks, {self.num_workers} workers"

    @property
    def settings(self) -> dict[str, str]:
        workers = {"DATALOADER.NUM_WORKERS": str(self.num_workers)}
        return SETTINGS | workers | IMS_PER_BATCH.get(self.world_size, {}) | self.opts

    def command(self, folder: Path) -> list[str]:
        return [
            *(sys.executable, "tools/train_net.py", "--config-file", self.config_file),
            *("--num-gpus", str(self.world_size), "--resume"),
            *chain.from_iterable(self.settings.items()),
            *("OUTPUT_DIR", str(folder.absolute())),
        ]


class Watch:
    """What can be seen of one start of a run from outside."""

    def __init__(self, plan: Plan, folder: Path) -> None:
        self._eval_period = int(plan.settings["TEST.EVAL_PERIOD"])
        self._folder = folder
        self._log = folder / "log.txt"
        self._offset = self._log.stat().st_size if self._log.exists() else 0
        self._since_ns = time.time_ns()
        self._rest = b""
        self._best_iter = -1
        self._last = ""
        self.first_iter: int | None = None
        self.saved: list[int] = []
        self.is_ending = (folder / "model_final.pth").exists()
        self._final_iter = int(plan.settings["SOLVER.MAX_ITER"]) - 1

    def look(self) -> None:
        """Reads what is new in the log."""
        if not os.path.exists(self._log) or os.path.getsize(self._log) == self._offset:
            return
        with open(self._log, "rb") as file:
            file.seek(self._offset)
            new = file.read()
        self._offset += len(new)
        *lines, self._rest = (self._rest + new).split(b"\n")
        for line in lines:
            self._take(line.decode("utf-8", "replace"))

    def _take(self, line: str) -> None:
        for event, pattern in _LINES.items():
            match = pattern.search(line)
            if match is None:
                continue
            if event == "begun":
                self.first_iter = int(match[1])
            elif event == "best":
                self._best_iter = int(match[1])
            elif event == "saved":
                named = {"final": self._final_iter, "best": self._best_iter, "start": -1}
                iteration = named[match[1]] if match[1] in named else int(match[1])
                self.saved.append(iteration)
                self.is_ending |= match[1] == "final"
                is_evaluated_next = (iteration + 1) % self._eval_period == 0
                event = "before evaluation" if match[1].isdigit() and is_evaluated_next else event
            self._last = event

    def has_come_to(self, phase: str, num_saves: int) -> bool:
        """Whether a phase is there, after some saves, or the run has come to its end before."""
        if self.first_iter is None:
            return False
        is_far_enough = len(self.saved) >= num_saves and self.phase == phase
        return self.is_ending or (is_far_enough and phase != "end of the run")

    @property
    def is_saving(self) -> bool:
        """Whether there is a temporary file that an earlier kill did not leave."""
        for name in os.listdir(self._folder):
            with contextlib.suppress(FileNotFoundError):
                path = self._folder / name
                if name.endswith(".pth.tmp") and path.stat().st_mtime_ns > self._since_ns:
                    return True
        return False

    @property
    def phase(self) -> str:
        """One of `PHASES`."""
        if self.first_iter is None:
            return "start-up"
        if self.is_saving:
            return "save"
        if self.is_ending:
            return "end of the run"
        if self._last == "before evaluation":
            return "between save and evaluation"
        return "evaluation" if self._last == "evaluating" else "steps"


class Start:
    """One start of a run: its processes, in a session of their own, and what is seen of them."""

    def __init__(self, plan: Plan, folder: Path) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self._plan = plan
        self.watch = Watch(plan, folder)
        with (folder / "output.txt").open("ab") as output:
            self.launcher = subprocess.Popen(
                plan.command(folder),
                cwd=ROOT,
                env={**os.environ, "OMP_NUM_THREADS": "1"},
                stdout=output,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )

    def __enter__(self) -> "Start":
        return self

    def __exit__(self, *error: object) -> None:
        self.end(0.0)

    def until(self, is_there: Callable[[Watch], bool]) -> bool:
        """Waits for something to be seen; returns False if the run leaves before."""
        deadline = time.monotonic() + RUN_SECONDS
        while True:
            has_left = self.launcher.poll() is not None
            self.watch.look()
            if is_there(self.watch):
                return True
            if has_left:
                return False
            if time.monotonic() > deadline:
                raise RuntimeError(f"a run of {self._plan.name} hangs: {self.watch.phase}")
            time.sleep(_POLL_SECONDS)

    def passes(self, seconds: float) -> bool:
        """Waits; returns False if the run leaves before."""
        deadline = time.monotonic() + seconds
        self.until(lambda watch: time.monotonic() > deadline)
        return self.launcher.poll() is None

    def members(self) -> dict[int, int]:
        """Returns the processes that are left, each with its parent."""
        found = {}
        for path in Path("/proc").glob("[0-9]*/stat"):
            with contextlib.suppress(OSError):
                # The command, in parentheses, may hold anything.
                state, parent, _, session = path.read_text().rpartition(")")[2].split()[:4]
                if int(session) == self.launcher.pid and state not in "ZX":
                    found[int(path.parent.name)] = int(parent)
        return found

    def ranks(self) -> list[int]:
        """Returns the processes that train, in the order of ranks, as far as they are there."""
        if self._plan.world_size == 1:
            return [self.launcher.pid]
        found = []
        for pid, parent in sorted(self.members().items()):
            with contextlib.suppress(OSError):
                command = Path(f"/proc/{pid}/cmdline").read_bytes()
                if parent == self.launcher.pid and b"multiprocessing.spawn" in command:
                    found.append(pid)
        return found

    def kill(self, victim: str, draw: random.Random) -> str:
        """Sends a SIGKILL to a victim, and returns who it was."""
        ranks = self.ranks()
        if victim == PARENT:
            parents = set(self.members().values())
            ranks = [pid for pid in ranks if pid in parents]
        if victim == GROUP or (victim != LAUNCHER and not ranks):
            os.killpg(self.launcher.pid, signal.SIGKILL)
            return GROUP
        pid = self.launcher.pid if victim == LAUNCHER else draw.choice(ranks)
        os.kill(pid, signal.SIGKILL)
        return victim

    def end(self, seconds: float = LEAVE_SECONDS) -> bool:
        """Waits until all processes have left; returns False if some had to be killed."""
        deadline = time.monotonic() + seconds
        while self.members() and time.monotonic() < deadline:
            self.launcher.poll()
            time.sleep(0.02)
        left = self.members()
        for pid in left:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        self.launcher.wait()
        self.watch.look()
        return not left
