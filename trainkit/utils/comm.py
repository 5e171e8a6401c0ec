"""Ranks: how many processes there are, which one this is, and how they agree.

Every function works without a process group too and then sees one process. `trainkit.engine.launch`
sets the group up with gloo for CPU tensors, and NCCL beside it where there is CUDA, so nothing here
touches a device.
"""

import os
import weakref
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any, TypeVar, cast

import torch
import torch.distributed as dist

from trainkit.utils.errors import USER_ERRORS, CheckpointError, ConfigError

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

T = TypeVar("T")
_local_groups: "weakref.WeakKeyDictionary[Any, ProcessGroup]" = weakref.WeakKeyDictionary()


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


def create_local_process_group(num_workers_per_machine: int) -> None:
    """Makes a group of each machine's processes; every process calls it, with the same number.

    Raises:
        ConfigError: If there is no process group, or the number of processes is not a multiple of
            `num_workers_per_machine`.
    """
    world_size = get_world_size()
    if not _is_initialized():
        raise ConfigError("There is no process group yet. Start the processes by `launch` first.")
    if num_workers_per_machine < 1 or world_size % num_workers_per_machine:
        raise ConfigError(
            f"{world_size} processes cannot be {num_workers_per_machine} on each machine. Start "
            "equally many on all machines."
        )
    # Every process takes part in making every group.
    for first in range(0, world_size, num_workers_per_machine):
        ranks = list(range(first, first + num_workers_per_machine))
        group = dist.new_group(ranks)
        if get_rank() in ranks:
            # A group goes with its world: a new world makes one of its own.
            _local_groups[dist.group.WORLD] = group


def get_local_process_group() -> "ProcessGroup":
    """Returns the group of this machine's processes, for `torch.distributed`'s functions.

    Every process calls it the first time, when it makes the group unless that was made before.
    """
    if dist.group.WORLD not in _local_groups:
        create_local_process_group(get_local_size())
    return _local_groups[dist.group.WORLD]


def all_gather(data: Any, group: "ProcessGroup | None" = None) -> list[Any]:
    """Collects one picklable object from every process, in rank order, on every process.

    Args:
        data: What this process gives.
        group: Collects from its processes only; one that is not among them gets an empty list.
    """
    size = len(_ranks_of(group))
    if size <= 1:
        return [data] * size
    gathered: list[Any] = [None] * size
    dist.all_gather_object(gathered, data, group=group)
    return gathered


def gather(data: Any, dst: int = 0, group: "ProcessGroup | None" = None) -> list[Any]:
    """Like `all_gather`, but only one process receives the list; the others receive an empty one.

    Args:
        data: What this process gives.
        dst: Who receives: its rank among all processes, also if there is a group.
        group: Collects from its processes only.

    Raises:
        ConfigError: On the group's processes, if `dst` is not one of them.
    """
    ranks = _ranks_of(group)
    if not ranks:
        return []
    if dst not in ranks:
        raise ConfigError(
            f"Rank {dst} cannot receive what the ranks {ranks} give. Name one of them."
        )
    if len(ranks) == 1:
        return [data]
    gathered: list[Any] | None = [None] * len(ranks) if get_rank() == dst else None
    dist.gather_object(data, gathered, dst=dst, group=group)
    return gathered or []


def _ranks_of(group: "ProcessGroup | None") -> list[int]:
    """Returns the ranks of a group's processes, none in a process that is not one of them."""
    if group is None:
        return list(range(get_world_size()))
    return dist.get_process_group_ranks(group) if dist.get_world_size(group) > 0 else []


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


def reduce_dict(
    input_dict: Mapping[str, torch.Tensor], average: bool = True
) -> dict[str, torch.Tensor]:
    """Sums or averages tensors over all processes, each of which gets the same result.

    Args:
        input_dict: Tensors of one shape, dtype and device under the same names on every process.
        average: Whether to average.

    Returns:
        The results, without a graph.

    Raises:
        ConfigError: On every rank, if their names differ.
    """
    names = sorted(input_dict)
    names_of_ranks = all_gather(names)
    if any(names != others for others in names_of_ranks):
        raise ConfigError(
            f"reduce_dict got different names on different ranks: {names_of_ranks}. Give the same "
            "names on all ranks, as with a value of 0 where there is none."
        )
    if get_world_size() == 1 or not names:
        return {name: input_dict[name].detach() for name in names}
    values = torch.stack([input_dict[name].detach() for name in names])
    dist.all_reduce(values)
    return dict(zip(names, values / get_world_size() if average else values, strict=True))


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
