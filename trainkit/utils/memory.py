"""What to do when an accelerator runs out of memory."""

import functools
import logging
from collections.abc import Callable
from typing import ParamSpec, TypeVar

import torch

from trainkit.utils.nested import move_to

P = ParamSpec("P")
T = TypeVar("T")
logger = logging.getLogger(__name__)


def retry_if_cuda_oom(func: Callable[P, T]) -> Callable[P, T]:
    """Makes a function survive that an accelerator, CUDA or another, runs out of memory.

    It is called again after the allocator's cache has been emptied, and if that does not help, with
    the tensors among its arguments, nested ones included, on the CPU; its result is then there too.
    As it may run three times, it should change nothing outside.
    """

    @functools.wraps(func)
    def retrying(*args: P.args, **kwargs: P.kwargs) -> T:
        for is_retry in (False, True):
            # Outside of `except`, where the failed call's tensors still live.
            if is_retry and torch.accelerator.is_available():
                torch.get_device_module().empty_cache()
            try:
                return func(*args, **kwargs)
            except RuntimeError as e:
                if not _is_out_of_memory(e):
                    raise
        name = getattr(func, "__qualname__", repr(func))
        logger.warning("%s ran out of the accelerator's memory twice and goes to the CPU.", name)
        args, kwargs = move_to((args, kwargs), torch.device("cpu"))
        return func(*args, **kwargs)

    return retrying


def _is_out_of_memory(error: RuntimeError) -> bool:
    # MPS raises a plain RuntimeError.
    return isinstance(error, torch.OutOfMemoryError) or "out of memory" in str(error)
