import logging
import os
import random
from pathlib import Path

import numpy as np
import pytest
import torch

from trainkit.utils.env import TORCH_VERSION, seed_all_rng, setup_environment
from trainkit.utils.errors import ConfigError


def draw() -> tuple[float, float, float]:
    return random.random(), float(np.random.rand()), float(torch.rand(()))


def test_torch_version_compares_as_numbers() -> None:
    assert TORCH_VERSION >= (2, 6)
    assert torch.__version__.startswith(f"{TORCH_VERSION[0]}.{TORCH_VERSION[1]}")


@pytest.mark.parametrize("seed", [2**32 - 1, 2**32, 2**63 - 1])
def test_d45_seeds_of_more_than_32_bits_work_and_differ(seed: int) -> None:
    seed_all_rng(seed)
    first = draw()
    # Not even their lowest 32 bits would tell them apart.
    seed_all_rng(seed % 2**32)
    assert (draw() == first) is (seed < 2**32)


def test_d45_a_seed_sets_nothing_that_is_read_only_when_python_starts(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.delenv("PYTHONHASHSEED", raising=False)
    seed_all_rng(7)
    assert "PYTHONHASHSEED" not in os.environ


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


def test_an_environment_module_is_called_by_file_or_by_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("TRAINKIT_ENV_MODULE", raising=False)
    setup_environment()
    path = tmp_path / "site_setup.py"
    path.write_text(
        "import os\nvalue = 'set'\ndef setup_environment():\n    os.environ['MINE'] = value\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    for name in (str(path), "site_setup"):
        monkeypatch.setenv("MINE", "not set")
        monkeypatch.setenv("TRAINKIT_ENV_MODULE", name)
        setup_environment()
        assert os.environ["MINE"] == "set"


@pytest.mark.parametrize("name", ["no_such_module_at_all", "missing.py", "json"])
def test_an_environment_module_that_cannot_be_used_is_named(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TRAINKIT_ENV_MODULE", name)
    with pytest.raises(ConfigError, match=rf"TRAINKIT_ENV_MODULE is '{name}', where no setup_env"):
        setup_environment()
