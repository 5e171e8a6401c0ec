"""The config of a run."""

from typing import Any

import pytest
from torch.utils.data import DataLoader

from trainkit.config.config import CfgNode
from trainkit.config.defaults import get_cfg
from trainkit.data.build import TrainLoader
from trainkit.data.samplers.distributed_sampler import TrainingSampler
from trainkit.engine.run_config import in_iterations, precision_of, with_seed
from trainkit.utils.errors import ConfigError


@pytest.fixture
def cfg() -> CfgNode:
    cfg = get_cfg()
    cfg.merge_from_list(["SOLVER.MAX_EPOCHS", 3, "SOLVER.ACCUMULATE", 2])
    cfg.freeze()
    return cfg


def test_a_seed_is_put_into_a_copy(cfg: CfgNode) -> None:
    seeded = with_seed(cfg, 5)
    assert (seeded.SEED, cfg.SEED, seeded.is_frozen()) == (5, -1, True)


def test_detectron2s_switch_means_fp16() -> None:
    cfg = get_cfg()
    assert precision_of(cfg) == "fp32"
    cfg.SOLVER.AMP.ENABLED = True
    assert precision_of(cfg) == "fp16"
    cfg.SOLVER.PRECISION = "bf16"
    with pytest.raises(ConfigError, match=r"AMP.ENABLED is True.*PRECISION is 'bf16'"):
        precision_of(cfg)


def test_an_epoch_of_our_loader_is_its_samplers(cfg: CfgNode) -> None:
    samples = list(range(50))
    loader = TrainLoader(samples, TrainingSampler(50), 20, accumulate=2, seed=0)
    assert in_iterations(cfg, loader).SOLVER.MAX_ITER == 8  # 3 epochs of 2.5


def test_an_epoch_of_another_loader_is_its_length(cfg: CfgNode) -> None:
    samples: Any = list(range(50))
    loader: Any = DataLoader(samples, batch_size=5)
    # Each step takes two of its batches.
    assert in_iterations(cfg, loader).SOLVER.MAX_ITER == 15


def test_a_loader_without_length_cannot_state_epochs(cfg: CfgNode) -> None:
    with pytest.raises(ConfigError, match=r"\(generator\) has no length.*in iterations"):
        in_iterations(cfg, (i for i in range(3)))
    assert in_iterations(get_cfg(), iter([])) == get_cfg()
