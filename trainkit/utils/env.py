"""Facts about the environment, and the seed of a whole process."""

import logging
import os

import torch

from trainkit.utils.random import seed_generators

TORCH_VERSION = tuple(int(part) for part in torch.__version__.split("+")[0].split(".")[:2])
"""(major, minor) of the torch that runs."""


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
