"""Randomness as a function of what is being computed.

A sample's augmentation, a step's dropout and an epoch's order each draw from generators seeded by
a hash of what they are (seed, position; seed, rank, iteration; seed, epoch), so nothing that ran
before can disturb them, and a resumed run draws what the unbroken one drew.
"""

import contextlib
import random
from collections.abc import Iterator
from typing import Any

import numpy as np
import torch

_MASK64 = (1 << 64) - 1
# No other hash of a run's seed begins with this tag, or with one just above it.
_STEP_TAG = 0x57E9_0000


def hash64(*keys: int) -> int:
    """Hashes integers into one 64-bit integer; the order of the keys matters.

    Each key is absorbed by the finalizer of splitmix64 (Steele, Lea and Flood, "Fast Splittable
    Pseudorandom Number Generators", OOPSLA 2014, fig. 17).

    Args:
        keys: Integers of any size; their low 64 bits count.

    Returns:
        An integer in [0, 2**64).

    Example:
        >>> hash64(1, 2) == hash64(2, 1)
        False
    """
    state = 0
    for key in keys:
        state = (state + (key & _MASK64) + 0x9E3779B97F4A7C15) & _MASK64
        state = ((state ^ (state >> 30)) * 0xBF58476D1CE4E5B9) & _MASK64
        state = ((state ^ (state >> 27)) * 0x94D049BB133111EB) & _MASK64
        state ^= state >> 31
    return state


def seed_generators(seed: int) -> None:
    """Seeds the global generators of Python, NumPy and torch's CPU from a hash.

    Args:
        seed: A well-mixed integer such as `hash64` gives. torch's CPU generator is seeded directly:
            `torch.manual_seed` visits every device and costs a hundred times more.
    """
    random.seed(seed)
    # NumPy and torch run one algorithm: from one seed they would draw one and the same stream.
    np.random.seed(hash64(seed) & 0xFFFFFFFF)
    torch.default_generator.manual_seed(seed)


def seed_accelerator(seed: int, device: torch.device) -> None:
    """Seeds the generator of one CUDA or MPS device; does nothing for other devices.

    The seed is set on the host and reaches the device with the next kernel: no synchronization.
    """
    if device.type == "cuda":
        index = torch.cuda.current_device() if device.index is None else device.index
        torch.cuda.default_generators[index].manual_seed(seed)
    elif device.type == "mps":
        torch.mps.manual_seed(seed & 0xFFFFFFFF)


def seed_step(
    seed: int, rank: int, iteration: int, micro_batch: int, device: torch.device, tag: int = 0
) -> None:
    """Seeds all generators that a step draws from, by what the step is.

    Args:
        seed: The run's seed.
        rank: Rank of the process.
        iteration: The iteration, 0-based.
        micro_batch: Number of the micro-batch within the step.
        device: Where the model runs.
        tag: Tells apart what else the same step draws for; 0 is the forward pass.
    """
    step_seed = hash64(seed, _STEP_TAG + tag, rank, iteration, micro_batch)
    seed_generators(step_seed)
    seed_accelerator(step_seed, device)


def get_rng_state(device: torch.device | None = None) -> dict[str, Any]:
    """Returns the state of the global generators as tensors and plain values.

    Args:
        device: Also take the state of this CUDA device; others have none worth saving.
    """
    version, words, gauss = random.getstate()
    numpy_state = np.random.get_state(legacy=False)
    assert isinstance(numpy_state, dict)
    state = {
        "python": [version, torch.tensor(words, dtype=torch.int64), gauss],
        "numpy": {
            "key": torch.from_numpy(numpy_state["state"]["key"].astype(np.int64)),
            "pos": int(numpy_state["state"]["pos"]),
            "has_gauss": int(numpy_state["has_gauss"]),
            "gauss": float(numpy_state["gauss"]),
        },
        "torch": torch.get_rng_state(),
    }
    if device is not None and device.type == "cuda":
        state["cuda"] = torch.cuda.get_rng_state(device)
    return state


def set_rng_state(state: dict[str, Any], device: torch.device | None = None) -> None:
    """Restores what `get_rng_state` returned; a CUDA state is used only with a CUDA device."""
    version, words, gauss = state["python"]
    random.setstate((version, tuple(words.tolist()), gauss))
    numpy_state = state["numpy"]
    np.random.set_state(
        {
            "bit_generator": "MT19937",
            "state": {
                "key": numpy_state["key"].numpy().astype(np.uint32),
                "pos": numpy_state["pos"],
            },
            "has_gauss": numpy_state["has_gauss"],
            "gauss": numpy_state["gauss"],
        }
    )
    torch.set_rng_state(state["torch"])
    if "cuda" in state and device is not None and device.type == "cuda":
        torch.cuda.set_rng_state(state["cuda"], device)


@contextlib.contextmanager
def isolated_rng() -> Iterator[None]:
    """Puts the global generators of Python, NumPy and torch's CPU back as they were found."""
    python_state = random.getstate()
    numpy_state = np.random.get_state()
    torch_state = torch.get_rng_state()
    try:
        yield
    finally:
        random.setstate(python_state)
        np.random.set_state(numpy_state)
        torch.set_rng_state(torch_state)
