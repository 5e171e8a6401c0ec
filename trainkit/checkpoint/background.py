"""Saving while training goes on: a copy of the state, and one thread that writes it."""

import contextlib
import copy
import threading
import time
from collections import defaultdict
from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import nn

from trainkit.checkpoint.storable import check_storable, strided_tensors
from trainkit.utils import comm

Surviving = Callable[[], AbstractContextManager[None]]
_Storages = dict[tuple[int, bool], list[torch.UntypedStorage]]


class StateCopier:
    """Copies states into memory of the host, which it keeps for the next copy.

    A copy is saved as the bytes that the state itself would be, but for the names of accelerators:
    tensors share memory in it, and objects are one, as they are there.
    """

    def __init__(self) -> None:
        self._kept: _Storages = {}
        self._events: list[torch.cuda.Event] = []

    @torch.no_grad()
    def copy(self, data: Any) -> Any:
        """Returns a copy that no later change of the state enters; it replaces the one before.

        Args:
            data: Tensors and plain values, nested in dicts, lists, tuples and sets. Those on CUDA
                may still be on their way: see `wait`.
        """
        free, self._kept = self._kept, defaultdict(list)
        tensors = [tensor for tensor in strided_tensors(data) if not tensor.is_quantized]
        storages: dict[int, torch.UntypedStorage] = {}
        memo: dict[int, Any] = {}
        for tensor in tensors:
            source = tensor.untyped_storage()
            key = source._cdata
            is_new = key not in storages
            kept = storages[key] = self._keep(source, free) if is_new else storages[key]
            place = tensor.storage_offset(), tensor.size(), tensor.stride()
            values = torch.empty(0, dtype=tensor.dtype, device="cpu").set_(kept, *place)
            copied = memo[id(tensor)] = _like(tensor, values)
            if is_new:
                is_all = tensor.is_contiguous() and tensor.nbytes == source.nbytes()
                # If it is all of it, then as numbers, which is faster.
                copied.copy_(tensor, source.is_cuda) if is_all else kept.copy_(
                    source, source.is_cuda
                )
        for tensor in filter(vars, tensors):
            vars(memo[id(tensor)]).update(copy.deepcopy(vars(tensor), memo))
        devices = {tensor.device for tensor in tensors if tensor.is_cuda}
        self._events = [torch.cuda.current_stream(device).record_event() for device in devices]
        return copy.deepcopy(data, memo)

    def wait(self) -> None:
        """Waits until the last copy is whole; any thread may."""
        for event in self._events:
            event.synchronize()

    def _keep(self, source: torch.UntypedStorage, free: _Storages) -> torch.UntypedStorage:
        """Returns memory for a storage, that of the copy before if it had one of this size."""
        num_bytes, is_cuda = key = source.nbytes(), source.is_cuda
        if free.get(key):
            kept = free[key].pop()
        else:
            # Pinned, so that a copy from CUDA keeps nobody waiting.
            bytes_ = torch.empty(num_bytes, dtype=torch.uint8, device="cpu", pin_memory=is_cuda)
            kept = bytes_.untyped_storage()
        self._kept[key].append(kept)
        return kept


class BackgroundSaver:
    """Has at most one save in flight, whose outcome all ranks learn when they next ask for it.

    Rank 0 copies and writes. Every rank calls the methods, unless they say otherwise.

    Attributes:
        seconds: How long the last save took its thread; 0 on other ranks.
    """

    def __init__(self) -> None:
        self.seconds = 0.0
        self._copier = StateCopier()
        # Not the thread's join: once Ctrl-C has cut it short, Python takes the thread for ended.
        self._is_over = threading.Event()
        self._is_over.set()
        self._error: BaseException | None = None
        self._surviving: Surviving | None = None

    def start(
        self, write: Callable[[Any], None], data: Any, surviving: Surviving = contextlib.nullcontext
    ) -> None:
        """Returns once the state is copied, while a thread of rank 0 goes on; none is in flight.

        Args:
            write: Writes a copy; it must not communicate.
            data: The state.
            surviving: Makes the context in which all ranks learn what `write` raised.
        """
        assert self._surviving is None, "one save at a time: wait() comes first"
        comm.on_main(lambda: self._start(write, data))
        self._surviving = surviving

    def wait(self, *, alone: bool = False) -> None:
        """Waits for the save in flight, if there is one.

        Args:
            alone: Whether the other ranks may not come here, as after an error of this one; each
                then waits for what it writes itself.

        Raises:
            Exception: What the save raised, on every rank, unless `surviving` keeps it.
        """
        surviving = self._surviving
        if surviving is None:
            return
        with surviving():
            try:
                self._join() if alone else comm.on_main(self._join)
            except Exception:
                self._surviving = None
                raise
        # Not after a KeyboardInterrupt: the save is still in flight then.
        self._surviving = None

    def poll(self) -> None:
        """Like `wait`, if the save in flight is over; else it goes on."""
        if self._surviving is not None and comm.on_main(self._is_over.is_set):
            self.wait()

    def _start(self, write: Callable[[Any], None], data: Any) -> None:
        try:
            args = write, self._copier.copy(data)
        except Exception:
            # Which names what it is, and where; all that can be copied is checked by `write`.
            check_storable(data)
            raise
        # No daemon: an interpreter that ends waits for it, for torch's code does not survive it.
        self._is_over.clear()
        threading.Thread(target=self._run, args=args).start()

    def _run(self, write: Callable[[Any], None], copied: Any) -> None:
        start = time.monotonic()
        try:
            self._copier.wait()
            write(copied)
        except BaseException as e:
            self._error = e
        self.seconds = time.monotonic() - start
        self._is_over.set()

    def _join(self) -> None:
        self._is_over.wait()
        # Taken off self: an error that stays there would hold the frames that hold self.
        error, self._error = self._error, None
        try:
            if error is not None:
                raise error
        finally:
            del error


def _like(tensor: torch.Tensor, values: torch.Tensor) -> torch.Tensor:
    """Returns numbers in memory as the kind of tensor that another one is."""
    values = values.conj() if tensor.is_conj() else values
    values = torch._neg_view(values) if tensor.is_neg() else values
    if type(tensor) is nn.Parameter:
        return nn.Parameter(values, tensor.requires_grad)
    return values.requires_grad_(tensor.requires_grad)
