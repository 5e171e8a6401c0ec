"""Processes that hold a run's folder, for the tests of the lock."""

import os
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch.utils.data import DataLoader

from trainkit.checkpoint.lock import check_not_held, hold_run_folder
from trainkit.utils import comm
from trainkit.utils.errors import ConfigError


def hold(folder: Path, connection: Connection, num_workers: int) -> None:
    """Holds the folder until it is told to leave it, with workers that were forked meanwhile."""
    torch.set_num_threads(1)
    try:
        with hold_run_folder(folder):
            context = "fork" if num_workers else None
            loader: Any = iter(
                DataLoader(range(100), num_workers=num_workers, multiprocessing_context=context)  # type: ignore[arg-type]  # a sequence
            )
            next(loader)
            connection.send([worker.pid for worker in getattr(loader, "_workers", [])])
            connection.recv()
    except ConfigError as e:
        connection.send(str(e))


def rank_errors(rank: int, folder: Path, port: int) -> None:
    """Writes down what one of two ranks is told about a folder."""
    torch.set_num_threads(1)
    os.environ["GLOO_SOCKET_IFNAME"] = "lo"
    address = f"tcp://127.0.0.1:{port}"
    dist.init_process_group("gloo", init_method=address, rank=rank, world_size=2)
    texts = []
    for run in ("held", "free"):
        for function in (check_not_held, lambda path: hold_run_folder(path).__enter__()):
            try:
                function(folder / run)
                texts.append("")
            except ConfigError as e:
                texts.append(str(e))
            comm.synchronize()
    (folder / f"{rank}.txt").write_text("\n".join(texts))
    dist.destroy_process_group()
