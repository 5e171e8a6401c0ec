"""Devices and precisions, by the names that a config gives them."""

import contextlib

import torch

from trainkit.utils import comm
from trainkit.utils.errors import ConfigError

PRECISIONS = {"fp32": None, "bf16": torch.bfloat16, "fp16": torch.float16}
"""Autocast dtype of each `SOLVER.PRECISION`; None runs without autocast."""


def resolve_device(name: str) -> torch.device:
    """Turns `MODEL.DEVICE` into the device of this process.

    Args:
        name: "auto" (CUDA, then MPS, then CPU), or what `torch.device` takes, such as "cpu",
            "cuda", "cuda:1" or "mps". "cuda" without a number takes this process's local rank.

    Raises:
        ConfigError: If torch does not know the device, or this machine does not have it.
    """
    if name == "auto":
        name = next((n for n in ("cuda", "mps") if _device_count(n) > 0), "cpu")
    try:
        device = torch.device(name)
    except RuntimeError:
        raise ConfigError(
            f"MODEL.DEVICE is {name!r}, which is not a device. Use auto, cpu, cuda, cuda:1 or mps."
        ) from None
    if device.type == "cuda" and ":" not in name:
        device = torch.device("cuda", comm.get_local_rank())
    count = _device_count(device.type)
    if (device.index or 0) >= count:
        raise ConfigError(
            f"MODEL.DEVICE is {name!r} but torch {torch.__version__} sees {count} {device.type} "
            f"device(s) here. Set MODEL.DEVICE to auto or cpu, or start fewer processes."
        )
    return device


def _device_count(device_type: str) -> int:
    if device_type == "cuda":
        return torch.cuda.device_count()
    if device_type == "mps":
        return int(torch.backends.mps.is_available())
    return 1


def autocast(precision: str, device: torch.device) -> contextlib.AbstractContextManager[object]:
    """Returns the context in which a model of this precision runs forward.

    Raises:
        ConfigError: If the precision is unknown.
    """
    if precision not in PRECISIONS:
        raise ConfigError(
            f"The precision (SOLVER.PRECISION) is {precision!r}; known: {', '.join(PRECISIONS)}."
        )
    dtype = PRECISIONS[precision]
    if dtype is None:
        return contextlib.nullcontext()
    return torch.autocast(device.type, dtype)
