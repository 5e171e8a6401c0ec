"""Starts runs that kill themselves, on one rank or several, and compares how runs end."""

import json
import signal
import socket
import time
from multiprocessing.connection import wait
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import torch
from torch import multiprocessing as mp

from tests.engine.killed_run import PLAIN, Kill, Setup, run, run_rank

TIMINGS = {"time", "data_time", "rank_data_time", "eta_seconds"}

HOOKS = ("LRScheduler", "BestCheckpointer", "EMA", "PreciseBN", "EarlyStopping")
"""Those whose states are the same before and after what was pending."""

LEAVE_SECONDS = 20
"""How long the ranks that live on may take to notice that one has died."""

Record = dict[str, Any]


def start(output_dir: Path, opts: list[Any], kill: Kill | None, resume: bool) -> int:
    """Runs in a new process, which has imported everything, and returns its exit code."""
    return start_ranks(1, output_dir, opts, kill, resume)[0]


def start_ranks(
    world_size: int,
    output_dir: Path,
    opts: list[Any],
    kill: Kill | None,
    resume: bool,
    victims: tuple[int, ...] = (0,),
    setup: Setup = PLAIN,
) -> list[int]:
    """Runs in new processes, as torchrun starts them, and returns their exit codes.

    Args:
        world_size: Ranks.
        output_dir, opts, resume, setup: As in `run`.
        kill: Where the victims kill themselves. As soon as one has died, the other victims are
            killed wherever they are.
        victims: Ranks.
    """
    context = mp.get_context("forkserver")
    context.set_forkserver_preload(["tests.engine.killed_run"])
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    processes: list[BaseProcess] = []
    for rank in range(world_size):
        args = (output_dir, opts, kill if rank in victims else None, resume, setup)
        if world_size == 1:
            processes.append(context.Process(target=run, args=args))
        else:
            processes.append(context.Process(target=run_rank, args=(rank, world_size, port, args)))
        processes[-1].start()
    try:
        wait([process.sentinel for process in processes], 120)
        if any(process.exitcode == -signal.SIGKILL for process in processes):
            for rank in victims:
                processes[rank].kill()
        deadline = time.monotonic() + LEAVE_SECONDS
        for process in processes:
            process.join(max(0.0, deadline - time.monotonic()))
        codes = [process.exitcode for process in processes]
    finally:
        for process in processes:
            process.kill()
            process.join()
    assert None not in codes, f"a rank hangs: {codes}"
    return codes  # type: ignore[return-value]  # None is not among them


def metrics(output_dir: Path) -> list[str]:
    """Returns the lines of metrics.json without the values of timings."""
    lines = []
    for line in (output_dir / "metrics.json").read_text().splitlines():
        record = {k: None if k in TIMINGS else v for k, v in json.loads(line).items()}
        lines.append(json.dumps(record, sort_keys=True))
    return lines


def records(output_dir: Path, rank: int) -> list[Record]:
    """Returns what a rank has recorded of each step, those included that were done again."""
    lines = (output_dir / f"record.{rank}.jsonl").read_text().splitlines()
    return [json.loads(line) for line in lines]


def steps(output_dir: Path, rank: int) -> list[Record]:
    """Returns what a rank has recorded of each iteration, in order, the last time that it ran."""
    by_iteration = {record["iteration"]: record for record in records(output_dir, rank)}
    return [by_iteration[iteration] for iteration in sorted(by_iteration)]


def assert_same_end(output_dir: Path, expected_dir: Path) -> None:
    ended, expected = (
        torch.load(folder / "model_final.pth", weights_only=True)
        for folder in (output_dir, expected_dir)
    )
    assert_same(ended["model"], expected["model"])
    for state in (ended["trainer"], expected["trainer"]):
        # A resumed run saves its end anew, with nothing pending. The storage holds timings.
        del state["pending"], state["storage"]
        state["hooks"] = {k: v for k, v in state["hooks"].items() if k in HOOKS}
    assert_same(ended["trainer"], expected["trainer"])
    best = [folder / "model_best.pth" for folder in (output_dir, expected_dir)]
    assert best[0].exists() == best[1].exists()
    if best[0].exists():
        assert_same(*(torch.load(path, weights_only=True)["model"] for path in best))
    assert metrics(output_dir) == metrics(expected_dir)


def assert_same_run(output_dir: Path, expected_dir: Path, world_size: int = 1) -> None:
    """Compares the ends of two runs, and each step of all ranks, those done again included."""
    for rank in range(world_size):
        expected = records(expected_dir, rank)
        assert [record["iteration"] for record in expected] == list(range(len(expected)))
        found = records(output_dir, rank)
        assert {record["iteration"] for record in found} == set(range(len(expected)))
        for record in found:
            assert record == expected[record["iteration"]], f"rank {rank}"
        name = f"end.{rank}.pth"
        end, unbroken = (
            torch.load(folder / name, weights_only=True) for folder in (output_dir, expected_dir)
        )
        assert_same(end, unbroken, f"rank {rank}")
    assert_same_end(output_dir, expected_dir)


def assert_same(found: Any, expected: Any, path: str = "") -> None:
    """Compares nested states bit for bit."""
    assert type(found) is type(expected), path
    if isinstance(found, dict):
        assert found.keys() == expected.keys(), path
        for key in found:
            assert_same(found[key], expected[key], f"{path}.{key}")
    elif isinstance(found, (list, tuple)):
        assert len(found) == len(expected), path
        for i, (a, b) in enumerate(zip(found, expected, strict=True)):
            assert_same(a, b, f"{path}[{i}]")
    elif isinstance(found, torch.Tensor):
        assert found.dtype == expected.dtype, path
        assert torch.equal(found, expected), path
    else:
        assert found == expected, path
