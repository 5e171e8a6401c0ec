"""Ranks: how many processes there are, which one this is, and how they agree.

Every function works without a process group too and then sees one process. `trainkit.engine.launch`
sets the group up with gloo for CPU tensors, and NCCL beside it where there is CUDA, so nothing here
touches a device.
"""

import os
from collections.abc import Callable
from typing import Any, TypeVar, cast

import torch
import torch.distributed as dist

from trainkit.utils.errors import USER_ERRORS, CheckpointError, ConfigError

T = TypeVar("T")


def _is_initialized() -> bool:
    return dist.is_available() and dist.is_initialized()


def get_world_size() -> int:
    """Returns the number of processes that train together."""
    return dist.get_world_size() if _is_initialized() else 1


def get_rank() -> int:
    """Returns the number of this process among all, in [0, world size)."""
    return dist.get_rank() if _is_initialized() else 0


def get_local_rank() -> int:
    """Returns the number of this process on its machine, as torchrun and `launch` set it."""
    return int(os.environ.get("LOCAL_RANK", "0")) if _is_initialized() else 0


def get_local_size() -> int:
    """Returns the number of processes on this machine."""
    return int(os.environ.get("LOCAL_WORLD_SIZE", "1")) if _is_initialized() else 1


def is_main_process() -> bool:
    """Whether this is rank 0, the one that prints and writes files."""
    return get_rank() == 0


def synchronize() -> None:
    """Waits until every process has come here."""
    if get_world_size() > 1:
        dist.barrier()


def all_gather(data: Any) -> list[Any]:
    """Collects one picklable object from every process, in rank order, on every process."""
    if get_world_size() == 1:
        return [data]
    gathered: list[Any] = [None] * get_world_size()
    dist.all_gather_object(gathered, data)
    return gathered


def gather(data: Any, dst: int = 0) -> list[Any]:
    """Like `all_gather`, but only rank `dst` receives the list; the others receive an empty one."""
    if get_world_size() == 1:
        return [data]
    gathered: list[Any] | None = [None] * get_world_size() if get_rank() == dst else None
    dist.gather_object(data, gathered, dst=dst)
    return gathered or []


def all_gather_tensor(tensor: torch.Tensor) -> torch.Tensor:
    """Stacks the CPU tensors of all processes, which have one shape and dtype, in rank order.

    Returns:
        A tensor of shape (world size, *tensor.shape). Unlike a reduction in the network, a sum over
        it has one order, so its last bits do not depend on message sizes.
    """
    if get_world_size() == 1:
        return tensor.unsqueeze(0)
    gathered = [torch.empty_like(tensor) for _ in range(get_world_size())]
    dist.all_gather(gathered, tensor.contiguous())
    return torch.stack(gathered)


def broadcast(data: T) -> T:
    """Returns rank 0's picklable object on every process."""
    if get_world_size() == 1:
        return data
    box = [data]
    dist.broadcast_object_list(box, src=0)
    return box[0]


def shared_random_seed() -> int:
    """Returns a seed in [0, 2**63) that is random, and the same on every process."""
    return broadcast(int.from_bytes(os.urandom(8), "big") >> 1)


def on_main(function: Callable[[], T]) -> T:
    """Runs `function` on rank 0 only and gives its result to every process.

    Raises:
        Exception: What `function` raised, on every rank: an error that the user can mend as it was,
            any other as a RuntimeError on the other ranks.
    """
    if get_world_size() == 1:
        return function()
    result: Any = None
    error: Exception | None = None
    if is_main_process():
        try:
            result = function()
        except Exception as e:
            error = e
    picklable = error if error is None or isinstance(error, USER_ERRORS) else repr(error)
    result, reported = broadcast((result, picklable))
    try:
        if error is not None:
            raise error
        if isinstance(reported, str):
            raise RuntimeError(f"rank 0 failed: {reported}")
        if reported is not None:
            raise reported
    finally:
        # An exception kept in a local of a frame that it passed through is a reference cycle.
        del error, picklable, reported
    return cast(T, result)


def together(function: Callable[[], T]) -> T:
    """Runs a function on every rank and returns each rank's own result.

    Raises:
        Exception: If any rank failed, on every rank, as `raise_together` says.
    """
    result: T | None = None
    error: Exception | None = None
    try:
        result = function()
    except Exception as e:
        error = e
    try:
        raise_together(error)
    finally:
        # An exception kept in a local of a frame that it passed through is a reference cycle.
        del error
    return cast(T, result)


def raise_together(error: Exception | None) -> None:
    """Raises on every rank as soon as one rank has an error.

    Args:
        error: This rank's own error, or None.

    Raises:
        Exception: This rank's error if it has one.
        CheckpointError: Else, if the lowest failing rank has one, or one of a kind of it; the text
            names that rank.
        ConfigError: Else, if that rank has another error that the user can mend.
        RuntimeError: Else.
    """
    own: Any = error if error is None or isinstance(error, USER_ERRORS) else repr(error)
    reported = [(rank, e) for rank, e in enumerate(all_gather(own)) if e is not None]
    try:
        if error is not None:
            raise error
        if reported:
            rank, other = reported[0]
            raise _kind_of(other)(f"rank {rank} failed: {other}")
    finally:
        del error, own, reported


def _kind_of(reported: object) -> type[Exception]:
    if isinstance(reported, CheckpointError):
        return type(reported)
    return ConfigError if isinstance(reported, USER_ERRORS) else RuntimeError
