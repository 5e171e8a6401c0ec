"""What a bug report and the head of a log need to know about the machine.

`python -m trainkit.utils.collect_env` prints it, and tries every device out.
"""

import argparse
import importlib.metadata
import os
import platform
import sys

import torch
import torch.distributed as dist
from tabulate import tabulate

import trainkit

_LIBRARIES = ("numpy", "fvcore", "iopath")
_BACKENDS = ("gloo", "nccl", "xccl", "mpi", "ucc")


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
        ("distributed", ", ".join(_backends()) or "not available"),
        ("CPUs", f"{os.cpu_count()}, of which this process may use {_usable_cpus()}"),
        ("torch threads", str(torch.get_num_threads())),
        ("OMP_NUM_THREADS", os.environ.get("OMP_NUM_THREADS", "not set")),
    ]
    return tabulate(facts, disable_numparse=True)


def check_devices() -> list[tuple[str, str]]:
    """Multiplies small matrices on the CPU and every accelerator, of whatever kind.

    Returns:
        The name of each device, and "works" or what went wrong.
    """
    names = ["cpu"]
    if (accelerator := torch.accelerator.current_accelerator()) is not None:
        names += [f"{accelerator.type}:{i}" for i in range(torch.accelerator.device_count())]
    return [(name, _check(name)) for name in names]


def _check(device: str) -> str:
    try:
        ones = torch.ones(64, 64, device=device)
        total = (ones @ ones).sum().item()
    except RuntimeError as e:
        return f"fails: {e}"
    return "works" if total == 64**3 else f"computes wrong: {total} instead of {64**3}"


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


def _backends() -> list[str]:
    return [b for b in _BACKENDS if dist.is_available() and dist.is_backend_available(b)]


def main(argv: list[str] | None = None) -> int:
    """Prints all of it; returns 1 if a device does not work, else 0."""
    argparse.ArgumentParser(
        prog="python -m trainkit.utils.collect_env",
        description="Prints versions, devices and torch's build for a bug report, and multiplies "
        "small matrices on every device. Exits with 1 if one fails.",
    ).parse_args(argv)
    checks = check_devices()
    print(collect_env_info(), torch.__config__.show(), tabulate(checks), sep="\n\n")
    return int(any(result != "works" for _, result in checks))


if __name__ == "__main__":
    sys.exit(main())
