import contextlib
import random
from pathlib import Path

import numpy as np
import pytest
import torch

from trainkit.utils.random import (
    get_rng_state,
    hash64,
    isolated_rng,
    seed_accelerator,
    seed_generators,
    set_rng_state,
)


def draw() -> tuple[float, float, float]:
    return random.random(), float(np.random.rand()), float(torch.rand(()))


def test_hash64_of_one_key_is_splitmix64() -> None:
    # The published generator's first outputs for seed 0: the orders of all runs hang on them.
    assert hash64(0) == 0xE220A8397B1DCDAF
    assert hash64(0x9E3779B97F4A7C15) == 0x6E789E6AA1B965F4


def test_hash64_tells_keys_and_their_order_and_number_apart() -> None:
    keys = [(), (0,), (0, 0), (1, 0), (0, 1), (1,), (-1,), (2**63,)]
    assert len({hash64(*key) for key in keys}) == len(keys)


def test_hash64_flips_half_of_the_bits_when_one_bit_of_a_key_flips() -> None:
    flips = [(hash64(7, 1 << bit) ^ hash64(7, 0)).bit_count() for bit in range(64)]
    assert 28 < sum(flips) / len(flips) < 36
    assert min(flips) > 12


def test_seed_generators_decides_what_all_three_draw() -> None:
    seed_generators(hash64(1))
    first = draw()
    seed_generators(hash64(1))
    assert draw() == first
    seed_generators(hash64(2))
    assert all(a != b for a, b in zip(draw(), first, strict=True))


def test_seed_accelerator_leaves_the_cpu_alone() -> None:
    seed_generators(3)
    expected = draw()
    seed_generators(3)
    seed_accelerator(99, torch.device("cpu"))
    assert draw() == expected


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_seed_accelerator_decides_what_cuda_draws() -> None:
    device = torch.device("cuda", 0)
    torch.rand(1, device=device)
    seed_accelerator(5, device)
    first = torch.rand(4, device=device)
    state = get_rng_state(device)
    second = torch.rand(4, device=device)
    seed_accelerator(5, device)
    assert torch.equal(torch.rand(4, device=device), first)
    torch.rand(3, device=device)
    set_rng_state(state, device)
    assert torch.equal(torch.rand(4, device=device), second)


def test_restored_state_continues_all_three_generators_after_a_safe_load(
    tmp_path: Path,
) -> None:
    seed_generators(4)
    random.gauss(0, 1)
    np.random.randn()  # Leaves a cached second normal number, which the state must hold.
    torch.save(get_rng_state(), tmp_path / "state.pth")
    expected = (draw(), random.gauss(0, 1), np.random.randn())
    draw()
    set_rng_state(torch.load(tmp_path / "state.pth", weights_only=True))
    assert (draw(), random.gauss(0, 1), np.random.randn()) == expected


def test_state_is_a_copy_that_later_draws_do_not_change() -> None:
    seed_generators(5)
    state = get_rng_state()
    expected = [draw() for _ in range(400)]
    set_rng_state(state)
    assert [draw() for _ in range(400)] == expected


def test_isolated_rng_hides_what_was_drawn_inside() -> None:
    seed_generators(6)
    expected = draw()
    seed_generators(6)
    with isolated_rng():
        seed_generators(1)
        draw()
    assert draw() == expected


def test_isolated_rng_restores_after_an_error() -> None:
    seed_generators(7)
    expected = draw()
    seed_generators(7)
    with contextlib.suppress(ZeroDivisionError), isolated_rng():
        draw()
        raise ZeroDivisionError
    assert draw() == expected
