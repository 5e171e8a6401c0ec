"""What a bug report and the head of a log need to know about the machine.

`python -m trainkit.utils.collect_env` prints it.
"""

import importlib.metadata
import os
import platform
import sys

import torch
from tabulate import tabulate

import trainkit

_LIBRARIES = ("numpy", "fvcore", "iopath")


def collect_env_info() -> str:
    """Returns a table of versions, devices and CPUs, one fact per line; takes milliseconds."""
    facts = [
        ("platform", platform.platform()),
        ("Python", sys.version.split()[0]),
        ("trainkit", trainkit.__version__),
        ("torch", f"{torch.__version__} from {os.path.dirname(torch.__file__)}"),
        *((name, _version(name)) for name in _LIBRARIES),
        ("CUDA of torch", torch.version.cuda or "none"),
        *_cuda_devices(),
        ("MPS", "available" if torch.backends.mps.is_available() else "not available"),
        ("CPUs", f"{os.cpu_count()}, of which this process may use {_usable_cpus()}"),
        ("torch threads", str(torch.get_num_threads())),
        ("OMP_NUM_THREADS", os.environ.get("OMP_NUM_THREADS", "not set")),
    ]
    return tabulate(facts, disable_numparse=True)


def _version(name: str) -> str:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return "not installed"


def _usable_cpus() -> int:
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def _cuda_devices() -> list[tuple[str, str]]:
    names = [torch.cuda.get_device_name(index) for index in range(torch.cuda.device_count())]
    return [(f"GPU {index}", name) for index, name in enumerate(names)] or [("GPUs", "none")]


if __name__ == "__main__":
    print(collect_env_info())
