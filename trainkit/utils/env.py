"""Facts about the environment, and the seed of a whole process."""

import importlib
import logging
import os
import runpy

import torch

from trainkit.utils.errors import ConfigError
from trainkit.utils.random import seed_generators

TORCH_VERSION = tuple(int(part) for part in torch.__version__.split("+")[0].split(".")[:2])
"""(major, minor) of the torch that runs."""


# What has prepared this process.
_set_up_by: set[str] = set()


def seed_all_rng(seed: int | None = None) -> int:
    """Seeds the generators of Python, NumPy, torch's CPU, and the current CUDA device.

    Args:
        seed: An integer in [0, 2**63); None draws one from the operating system.

    Returns:
        The seed used.
    """
    if seed is None:
        seed = int.from_bytes(os.urandom(8), "big") >> 1
        logging.getLogger(__name__).info("Using a generated random seed %d", seed)
    seed_generators(seed)
    torch.cuda.manual_seed(seed)  # Waits for CUDA's first use; does nothing where there is none.
    return seed


def setup_environment() -> None:
    """Calls the `setup_environment()` of the module that $TRAINKIT_ENV_MODULE names, once.

    There a site prepares each process before it reads a config: registers path handlers and data
    sets, sets libraries up. The variable is a module's dotted name, or the path of a Python file;
    nothing happens if it is not set.

    Raises:
        ConfigError: If there is no such module or file, or no such function in it.
    """
    name = os.environ.get("TRAINKIT_ENV_MODULE", "")
    if not name or name in _set_up_by:
        return
    fault = "it defines none"
    try:
        is_file = name.endswith(".py")
        names = runpy.run_path(name) if is_file else vars(importlib.import_module(name))
    except (ImportError, OSError) as e:
        names, fault = {}, repr(e)
    if "setup_environment" not in names:
        raise ConfigError(
            f"TRAINKIT_ENV_MODULE is {name!r}, where no setup_environment() is found: {fault}. "
            "Name a module or a .py file that defines that function, or unset the variable."
        )
    _set_up_by.add(name)
    names["setup_environment"]()
