import logging
import random

import numpy as np
import pytest
import torch

from trainkit.utils.env import TORCH_VERSION, seed_all_rng


def draw() -> tuple[float, float, float]:
    return random.random(), float(np.random.rand()), float(torch.rand(()))


def test_torch_version_compares_as_numbers() -> None:
    assert TORCH_VERSION >= (2, 6)
    assert torch.__version__.startswith(f"{TORCH_VERSION[0]}.{TORCH_VERSION[1]}")


def test_a_given_seed_is_returned_and_decides_the_draws() -> None:
    assert seed_all_rng(2**63 - 1) == 2**63 - 1
    first = draw()
    seed_all_rng(2**63 - 1)
    assert draw() == first


def test_a_drawn_seed_is_logged_and_repeats_the_run(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO):
        seed = seed_all_rng()
    first = draw()
    assert f"Using a generated random seed {seed}" in caplog.text
    assert 0 <= seed < 2**63
    seed_all_rng(seed)
    assert draw() == first


def test_two_drawn_seeds_differ() -> None:
    assert seed_all_rng() != seed_all_rng()


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_the_seed_decides_what_cuda_draws() -> None:
    seed_all_rng(1)
    first = torch.rand(4, device="cuda")
    seed_all_rng(1)
    assert torch.equal(torch.rand(4, device="cuda"), first)
