"""`launch`: one function on several processes of this machine, on torchrun's, or on srun's."""

import atexit
import datetime
import gc
import importlib
import itertools
import multiprocessing
import os
import re
import socket
import sys
import threading
import time
import traceback
from collections.abc import Callable, Mapping, Sequence
from multiprocessing import parent_process
from multiprocessing.connection import Connection
from signal import SIGTERM
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.distributed_c10d import PrefixStore
from torch.distributed.elastic.multiprocessing.errors import get_error_handler
from torch.distributed.rendezvous import rendezvous

from trainkit.engine.failures import note_place
from trainkit.engine.preemption import PreemptedExit
from trainkit.engine.processes import Processes, report_error, report_result
from trainkit.utils import comm
from trainkit.utils.errors import ConfigError
from trainkit.utils.stop_signals import is_asked_to_stop

__all__ = ["DEFAULT_TIMEOUT", "launch"]

DEFAULT_TIMEOUT = datetime.timedelta(minutes=30)
"""How long a process waits for the others in a collective."""

_group_numbers = itertools.count()
# Far more than gloo's threads take to drop what they have sent.
_GLOO_SECONDS = 0.2


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

    Under torchrun, and in a task of an `srun` with several that asks for one process here, it joins
    their group, and the numbers given here do not count. Otherwise this starts
    `num_gpus_per_machine` processes, over NCCL where there is CUDA, and over gloo on the CPU.

    Args:
        main_func: What every process runs; it must be importable, to reach a new process.
        num_gpus_per_machine: Processes on this machine, with or without a GPU each.
        num_machines: Machines, on each of which `launch` is called. torchrun does this better.
        machine_rank: The number of this machine, in [0, num_machines).
        dist_url: Where the processes meet, as tcp://host:port; None or "auto" picks a free port.
        args: Arguments of `main_func`.
        timeout: How long a process waits for the others.

    Returns:
        What `main_func` returned, here or in this machine's first process, if that has a pickle.

    Raises:
        ConfigError: If the numbers do not go together.
        Exception: What the first process raised that failed, or RankDiedError if that was killed;
            the others have been ended.
        KeyboardInterrupt, SystemExit: After a signal, once all processes have saved and left.
    """
    if num_gpus_per_machine == num_machines == 1:
        os.environ.update(_sruns_numbers(os.environ))
    if "RANK" in os.environ and "WORLD_SIZE" in os.environ:
        return _run_as_torchruns_rank(main_func, args, timeout)
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
    worker_args = (num_gpus_per_machine, world_size, dist_url, timeout, main_func, args)
    first_rank = machine_rank * num_gpus_per_machine
    return Processes(first_rank).run(_worker, num_gpus_per_machine, worker_args)


def _sruns_numbers(env: Mapping[str, str]) -> dict[str, str]:
    """Returns torchrun's variables for one of several tasks of srun; {} elsewhere.

    A batch script that srun did not start has no number of tasks of a step.
    """
    if "RANK" in env or int(env.get("SLURM_STEP_NUM_TASKS", "1")) < 2:
        return {}
    # As in "2(x3),1": two on each of three nodes, one on the fourth.
    counts = re.findall(r"(\d+)(?:\(x(\d+)\))?", env["SLURM_STEP_TASKS_PER_NODE"])
    sizes = [size for size, times in counts for _ in range(int(times or 1))]
    # Of "gpu[03-05,9],cpu1" the first is gpu03.
    first_node = re.match(r"([^\[,]+)(?:\[(\w+))?", env["SLURM_STEP_NODELIST"])
    assert first_node, "srun names its nodes"
    job, step = int(env["SLURM_JOB_ID"]), int(env["SLURM_STEP_ID"])
    return {
        "RANK": env["SLURM_PROCID"],
        "WORLD_SIZE": env["SLURM_STEP_NUM_TASKS"],
        "LOCAL_RANK": env["SLURM_LOCALID"],
        "LOCAL_WORLD_SIZE": sizes[int(env["SLURM_NODEID"])],
        "MASTER_ADDR": env.get("MASTER_ADDR", first_node[1] + (first_node[2] or "")),
        # Jobs, and steps of a job, that share a node must not meet each other.
        "MASTER_PORT": env.get("MASTER_PORT", str(20000 + (7 * job + step) % 20000)),
    }


def _worker(
    channel: Connection,
    rank: int,
    local_rank: int,
    num_local: int,
    world_size: int,
    dist_url: str,
    timeout: datetime.timedelta,
    main_func: Callable[..., Any],
    args: Sequence[Any],
) -> None:
    """Runs in each new process."""
    threading.Thread(target=_leave_with_launcher, daemon=True).start()
    # Loader workers start as they do elsewhere: spawned ones would import torch anew, each.
    multiprocessing.set_start_method(None, force=True)
    os.environ["LOCAL_RANK"] = str(local_rank)
    os.environ["LOCAL_WORLD_SIZE"] = str(num_local)
    exit_code = 0
    try:
        _join_group(dist_url, world_size, rank, timeout)
        result = main_func(*args)
        dist.destroy_process_group()
        if local_rank == 0:
            report_result(channel, result)
    except BaseException as e:
        # Before the group is left, which the others then fail for want of.
        exit_code = report_error(channel, e)
    # The interpreter is not torn down: a thread of gloo's that asks for it then aborts the process.
    atexit._run_exitfuncs()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(exit_code)


def _leave_with_launcher() -> None:
    """Asks this process to save and leave once its launcher is gone, even by SIGKILL."""
    launcher = parent_process()
    assert launcher is not None
    launcher.join()
    # One more signal would have it leave at once, unsaved.
    if not is_asked_to_stop():
        os.kill(os.getpid(), SIGTERM)


def _run_as_torchruns_rank(
    main_func: Callable[..., Any], args: Sequence[Any], timeout: datetime.timedelta
) -> Any:
    try:
        _join_group("env://", -1, -1, timeout)
        return main_func(*args)
    except Exception as e:
        note_place(e)
        get_error_handler().record_exception(e)
        if comm.get_world_size() > 1:
            # torchrun takes the error of the earliest second for the cause of the others'.
            time.sleep(1 - time.time() % 1)
        raise
    except (SystemExit, KeyboardInterrupt) as e:
        if isinstance(e, PreemptedExit):
            comm.synchronize()  # Once one has left, torchrun ends those that still requeue the job.
        traceback.clear_frames(e.__traceback__)  # A model in there would keep the group alive.
        raise
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()
            # A thread of gloo's that still drops its last message needs the interpreter, which the
            # end of the group below would not give back before that thread has ended.
            time.sleep(_GLOO_SECONDS)
        # Gloo's threads end with the group's last reference; one that asks for the interpreter
        # while it is being torn down aborts the process, and with it a run that succeeded.
        gc.collect()


def _join_group(dist_url: str, world_size: int, rank: int, timeout: datetime.timedelta) -> None:
    """Joins the process group; -1 where `dist_url` tells."""
    # DistributedDataParallel imports it anyhow, and the import holds on to a group that exists.
    importlib.import_module("torch._dynamo")
    has_cuda = torch.cuda.is_available()
    if has_cuda:
        torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", "0")) % torch.cuda.device_count())
    try:
        store, rank, world_size = next(rendezvous(dist_url, rank, world_size, timeout=timeout))
        store.set_timeout(timeout)
        dist.init_process_group(
            # Small things between ranks are CPU tensors: they go over gloo and wait for no GPU.
            backend="cpu:gloo,cuda:nccl" if has_cuda else "gloo",
            # torchrun's store still has the addresses of a group that this process was in before.
            store=PrefixStore(f"group {next(_group_numbers)}", store),
            world_size=world_size,
            rank=rank,
            timeout=timeout,
        )
    except (RuntimeError, ValueError) as e:
        raise ConfigError(
            f"Process {rank} could not meet the others at {dist_url}: {e} Check that the address "
            "is free and reachable, and that every process was started."
        ) from e
    comm.synchronize()


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
