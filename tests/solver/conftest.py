"""The default config, with a run short enough to step through."""

from typing import Any

import pytest

from trainkit.config.config import CfgNode
from trainkit.config.defaults import get_cfg

SETTINGS: list[Any] = [
    *("MAX_ITER", 100, "STEPS", (50, 80), "WARMUP_ITERS", 10, "WARMUP_FACTOR", 0.01),
    *("BASE_LR", 0.1, "WEIGHT_DECAY", 0.01, "WEIGHT_DECAY_NORM", 0.0),
]


@pytest.fixture
def cfg() -> CfgNode:
    cfg = get_cfg()
    cfg.SOLVER.merge_from_list(SETTINGS)
    return cfg
