"""`launch`: one function on several processes of this machine, or on torchrun's."""

import atexit
import datetime
import logging
import os
import signal
import socket
import sys
import traceback
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import multiprocessing as mp
from torch.multiprocessing.spawn import ProcessException, start_processes

from trainkit.engine.exit_codes import MESSAGE_ERRORS
from trainkit.utils import comm
from trainkit.utils.errors import ConfigError, add_note

__all__ = ["DEFAULT_TIMEOUT", "launch"]

logger = logging.getLogger(__name__)

DEFAULT_TIMEOUT = datetime.timedelta(minutes=30)
"""How long a process waits for the others in a collective."""


def launch(
    main_func: Callable[..., Any],
    num_gpus_per_machine: int = 1,
    num_machines: int = 1,
    machine_rank: int = 0,
    dist_url: str | None = None,
    args: Sequence[Any] = (),
    timeout: datetime.timedelta = DEFAULT_TIMEOUT,
) -> Any:
    """Calls `main_func(*args)` in one process, in several of this machine, or in torchrun's.

    Under torchrun, whose environment is recognised, the process joins torchrun's group and the
    numbers given here do not count. Otherwise this starts `num_gpus_per_machine` processes that
    train together over NCCL where there is CUDA, and over gloo on the CPU.

    Args:
        main_func: What every process runs; it must be importable, to reach a new process.
        num_gpus_per_machine: Processes on this machine, with or without a GPU each.
        num_machines: Machines, on each of which `launch` is called. torchrun does this better.
        machine_rank: The number of this machine, in [0, num_machines).
        dist_url: Where the processes meet, as tcp://host:port; None or "auto" picks a free port.
        args: Arguments of `main_func`.
        timeout: How long a process waits for the others.

    Returns:
        What `main_func` returned in a process that was not newly started, else None.

    Raises:
        ConfigError: If the numbers do not go together, or what a new process raised as such.
        KeyboardInterrupt: After Ctrl-C, once all processes have saved and left.
    """
    if "RANK" in os.environ and "WORLD_SIZE" in os.environ:
        return _run_in_group(main_func, args, "env://", None, None, timeout)
    world_size = num_gpus_per_machine * num_machines
    if num_gpus_per_machine < 1 or not 0 <= machine_rank < num_machines:
        raise ConfigError(
            f"Cannot launch {num_gpus_per_machine} processes on machine {machine_rank} of "
            f"{num_machines}. --num-gpus must be at least 1, and --machine-rank at least 0 and "
            "below --num-machines."
        )
    if world_size == 1:
        return main_func(*args)
    dist_url = _meeting_point(dist_url, num_machines)
    _start_processes(
        num_gpus_per_machine,
        (main_func, args, dist_url, world_size, machine_rank, num_gpus_per_machine, timeout),
    )
    return None


def _start_processes(count: int, worker_args: tuple[Any, ...]) -> None:
    """Starts the processes and waits for them; the first error that a user can mend is raised."""
    errors: Any = mp.get_context("spawn").SimpleQueue()
    context = start_processes(
        _worker, (errors, *worker_args), nprocs=count, join=False, start_method="spawn"
    )
    assert context is not None
    interrupted = False
    while True:
        try:
            if context.join():
                break
        except KeyboardInterrupt:
            if interrupted:
                raise
            interrupted = True
            # They finish their step and save. A terminal's Ctrl-C reaches them without this too.
            for process in context.processes:
                if process.is_alive() and process.pid is not None:
                    os.kill(process.pid, signal.SIGINT)
        except ProcessException:
            # Whichever process failed first: the others then fail for want of it.
            if errors.empty():
                raise
            raise errors.get() from None
    if interrupted:
        raise KeyboardInterrupt


def _worker(
    local_rank: int,
    errors: Any,
    main_func: Callable[..., Any],
    args: Sequence[Any],
    dist_url: str,
    world_size: int,
    machine_rank: int,
    num_local: int,
    timeout: datetime.timedelta,
) -> None:
    os.environ["LOCAL_RANK"] = str(local_rank)
    os.environ["LOCAL_WORLD_SIZE"] = str(num_local)
    rank = machine_rank * num_local + local_rank
    exit_code = 0
    try:
        _run_in_group(main_func, args, dist_url, world_size, rank, timeout)
    except MESSAGE_ERRORS as e:
        add_note(e, f"On rank {rank}:\n{traceback.format_exc()}")
        errors.put(e)
        exit_code = 1
    except KeyboardInterrupt:
        # The launching process got it too, and raises it once all have left.
        logger.info("Rank %d leaves.", rank)
    # Once DistributedDataParallel was used, gloo's threads outlive their group; one that asks for
    # the interpreter while it is being torn down aborts the process. So it is not torn down.
    atexit._run_exitfuncs()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(exit_code)


def _run_in_group(
    main_func: Callable[..., Any],
    args: Sequence[Any],
    dist_url: str,
    world_size: int | None,
    rank: int | None,
    timeout: datetime.timedelta,
) -> Any:
    """Joins the process group, runs, and leaves the group."""
    has_cuda = torch.cuda.is_available()
    if has_cuda:
        torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", "0")) % torch.cuda.device_count())
    try:
        dist.init_process_group(
            # Small things between ranks are CPU tensors: they go over gloo and wait for no GPU.
            backend="cpu:gloo,cuda:nccl" if has_cuda else "gloo",
            init_method=dist_url,
            world_size=-1 if world_size is None else world_size,
            rank=-1 if rank is None else rank,
            timeout=timeout,
        )
    except (RuntimeError, ValueError) as e:
        raise ConfigError(
            f"Process {rank} could not meet the others at {dist_url}: {e} Check that the address "
            "is free and reachable, and that every process was started."
        ) from e
    try:
        comm.synchronize()
        return main_func(*args)
    finally:
        dist.destroy_process_group()


def _meeting_point(dist_url: str | None, num_machines: int) -> str:
    if dist_url not in (None, "auto"):
        return str(dist_url)
    if num_machines > 1:
        raise ConfigError(
            "Several machines need an address to meet at: pass --dist-url tcp://HOST:PORT, or "
            "start each with torchrun."
        )
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return f"tcp://127.0.0.1:{s.getsockname()[1]}"
