"""Cases of mutated files, in a process of their own; how each ends is written down.

To see one case again: python -m tests.checkpoint.mutated_runs damaged 17
"""

import json
import logging
import resource
import shutil
import sys
import tempfile
import time
import traceback
import warnings
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from random import Random
from typing import Any

import torch
from torch import nn

from tests.checkpoint.forge import unsealed
from tests.checkpoint.mutations import (
    forge,
    mutate_archive,
    mutate_bytes,
    mutate_config,
)
from trainkit.checkpoint.checkpointer import Checkpointer
from trainkit.checkpoint.folder import FINISHED, POINTER
from trainkit.checkpoint.manifest import read_manifest
from trainkit.config import get_cfg
from trainkit.config.checks import check_cfg
from trainkit.utils.errors import CheckpointError, ConfigError, UnknownNameError
from trainkit.utils.events.json_writer import JSONWriter
from trainkit.utils.events.storage import EventStorage

OLDER, NEWEST = 1, 2
MAX_SECONDS = 2.0
# Of memory that is used; and of addresses, since Python reserves what a file claims for a moment.
MAX_BYTES, MAX_ADDRESSES = 1 << 29, 1 << 33
CONFIGS = Path(__file__).parents[2] / "configs"


class Memory:
    """A part of a run's state."""

    def __init__(self, value: int) -> None:
        self.value = value

    def state_dict(self) -> dict[str, Any]:
        return {"value": self.value, "history": [0.5] * 4, "name": "x"}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.value = state["value"] + 0 * len(state["history"])


class Scene:
    """A run's folder with two checkpoints, made anew for each case.

    Attributes:
        canary: What code in a file would make.
    """

    def __init__(self, folder: Path) -> None:
        self.source = folder / "source"
        self.run = folder / "run"
        self.canary = folder / "canary"
        for value in (OLDER, NEWEST):
            checkpointer = self.checkpointer(value, self.source)
            checkpointer.save(f"model_{value:07d}", iteration=value)
        checkpointer.mark_finished(NEWEST)
        lines = [json.dumps({"iteration": i, "loss": 0.5}) + "\n" for i in range(5)]
        (self.source / "metrics.json").write_text("".join(lines))
        self.names = ["model_0000001.pth", "model_0000002.pth"]
        self.older, self.newest = ((self.source / name).read_bytes() for name in self.names)
        self.archive = unsealed(self.source / self.names[1])
        manifest = read_manifest(self.source / self.names[1])
        assert manifest is not None
        self.entries = dict(vars(manifest))

    @staticmethod
    def checkpointer(value: int, folder: Path | str) -> Checkpointer:
        model = nn.Linear(3, 2)
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.fill_(value)
        return Checkpointer(model, folder, memory=Memory(value))

    def restore(self) -> None:
        shutil.rmtree(self.run, ignore_errors=True)
        shutil.copytree(self.source, self.run)

    def resumed_value(self) -> int:
        """The one value of everything that a resume brings back."""
        checkpointer = self.checkpointer(0, self.run)
        extra = checkpointer.resume_or_load("")
        weights = torch.cat([p.detach().flatten() for p in checkpointer.model.parameters()])
        (value,) = {*weights.tolist(), checkpointer.checkpointables["memory"].value}
        assert extra["iteration"] == value
        return int(value)


def damaged(scene: Scene, draw: Random) -> str:
    """The newest checkpoint is damaged: the older one is used."""
    content = scene.newest
    while content == scene.newest:
        content = mutate_bytes(draw, content, scene.older)
        if draw.random() < 0.3:
            content = mutate_archive(draw, scene.archive, scene.older, scene.canary)
    (scene.run / scene.names[1]).write_bytes(content)
    assert scene.resumed_value() == OLDER
    return "older"


def forged(scene: Scene, draw: Random) -> str:
    """The newest has right checksums: what is in it is used or refused, but nothing runs."""
    content = forge(draw, scene.archive, scene.entries, scene.older, scene.canary)
    (scene.run / scene.names[1]).write_bytes(content)
    checkpointer = scene.checkpointer(0, scene.run)
    extra = checkpointer.resume_or_load("")
    return "older" if extra.get("iteration") == OLDER else "loaded"


def older_format(scene: Scene, draw: Random) -> str:
    """A file without checksums: it loads or is refused."""
    data = {"model": scene.checkpointer(NEWEST, "").model.state_dict(), "iteration": NEWEST}
    path = scene.run / "old.pth"
    torch.save(data, path, _use_new_zipfile_serialization=draw.random() < 0.5)
    path.write_bytes(mutate_bytes(draw, path.read_bytes(), scene.older))
    scene.checkpointer(0, "").load(str(path), checkpointables=[])
    return "loaded"


def beside(scene: Scene, draw: Random) -> str:
    """Pointer, mark of the end and metrics are damaged: the newest checkpoint is used."""
    for name in draw.sample([POINTER, FINISHED, "metrics.json"], draw.randrange(1, 4)):
        path = scene.run / name
        content = mutate_bytes(draw, path.read_bytes(), scene.older)
        if draw.random() < 0.3:
            names = (b"../../x", b"/etc/passwd", b"model_0000009.pth", b"model_0000001.pth")
            iterations = (b'{"iteration": %s}' % n for n in (b"9" * 5000, b"[" * 30_000, b"2.0"))
            content = draw.choice((*names, *iterations, b"", b"\xff\xfe", b"x" * 100_000))
        path.write_bytes(content)
    assert scene.resumed_value() == NEWEST
    finished = scene.checkpointer(0, scene.run).finished_iteration()
    assert finished is None or isinstance(finished, int)
    writer = JSONWriter(scene.run / "metrics.json")
    with EventStorage(3) as storage:
        storage.put_scalar("loss", 1.0, cur_iter=3)
        writer.write()
    writer.close()
    lines = (scene.run / "metrics.json").read_text().splitlines()
    records = [json.loads(line) for line in lines]
    assert all(record["iteration"] < 3 for record in records[:-1])
    assert records[-1] == {"iteration": 3, "loss": 1.0}
    return "newest" if finished is None else "newest, finished"


def config(scene: Scene, draw: Random) -> str:
    """A mutated config is merged, or refused."""
    files = [(CONFIGS / name).read_text() for name in ("Base.yaml", "fashion_mnist.yaml")]
    files.append(get_cfg().dump())
    text = draw.choice([*files, files[-1]])
    text = text.replace("_BASE_: Base.yaml", f"_BASE_: {CONFIGS / 'Base.yaml'}")
    path = scene.run / "config.yaml"
    path.write_bytes(mutate_config(draw, text, draw.choice(files), scene.canary))
    cfg = get_cfg()
    cfg.merge_from_file(str(path))
    check_cfg(cfg)
    again = get_cfg()
    (scene.run / "dumped.yaml").write_text(cfg.dump())
    again.merge_from_file(str(scene.run / "dumped.yaml"))
    return "merged"


CASES: dict[str, tuple[Callable[[Scene, Random], str], int]] = {
    "damaged": (damaged, 700),
    "forged": (forged, 500),
    "older_format": (older_format, 200),
    "beside": (beside, 200),
    "config": (config, 400),
}


def run_case(scene: Scene, name: str, seed: int) -> str:
    """Returns how a case ended; raises what no user should see."""
    scene.restore()
    start = time.process_time()
    error = ""
    try:
        outcome = CASES[name][0](scene, Random(f"{name} {seed}"))
    except (CheckpointError, ConfigError, UnknownNameError) as e:
        outcome, error = type(e).__name__, str(e)
    assert not error or name not in ("damaged", "beside"), f"no valid file was used: {error}"
    assert "MemoryError" not in error, error
    assert "allocate" not in error, error
    assert not scene.canary.exists(), "code in a file was run"
    seconds = time.process_time() - start
    assert seconds < MAX_SECONDS, f"took {seconds:.1f} s"
    return outcome


def used_bytes() -> int:
    """The most memory that this process has had so far."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def limit_addresses() -> None:
    size = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (size + MAX_ADDRESSES, size + MAX_ADDRESSES))


def run_cases(folder: Path, name: str, seeds: range, report: Path) -> None:
    """Runs cases and writes a line for each; where the process dies, the last names the seed."""
    torch.set_num_threads(1)
    logging.disable(logging.CRITICAL)
    warnings.simplefilter("ignore")
    scene = Scene(folder)
    assert scene_is_sound(scene)
    limit_addresses()
    before = used_bytes()
    with report.open("w") as file:
        for seed in seeds:
            print(f"{name} {seed}:", end=" ", file=file, flush=True)
            try:
                outcome = run_case(scene, name, seed)
                assert used_bytes() - before < MAX_BYTES, "takes too much memory"
            except Exception:
                outcome = "FAILED " + " | ".join(traceback.format_exc(limit=-3).splitlines())
                shutil.rmtree(scene.canary, ignore_errors=True)
            print(outcome, file=file, flush=True)


def scene_is_sound(scene: Scene) -> bool:
    """Whether a resume takes the newest checkpoint as long as nobody has touched anything."""
    scene.restore()
    return scene.resumed_value() == NEWEST


def outcomes(report: Path) -> Counter[str]:
    return Counter(line.partition(": ")[2] for line in report.read_text().splitlines())


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as kept:
        logging.basicConfig()
        print(run_case(Scene(Path(kept)), sys.argv[1], int(sys.argv[2])))
