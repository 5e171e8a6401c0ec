from typing import Any

import pytest

from trainkit.config.auto_scale import auto_scale_workers
from trainkit.config.config import CfgNode
from trainkit.config.defaults import get_cfg
from trainkit.utils.errors import ConfigError

SCALED = {
    "IMS_PER_BATCH": (16, 32, 4),
    "BASE_LR": (0.2, 0.4, 0.05),
    "BASE_LR_END": (0.02, 0.04, 0.005),
    "MAX_ITER": (1001, 500, 4004),
    "WARMUP_ITERS": (10, 5, 40),
    "STEPS": ((101, 303), (50, 152), (404, 1212)),
    "CHECKPOINT_PERIOD": (1, 1, 4),
}
"""With the 8 processes of the reference, with 16, and with 2; halves go to the even number."""


@pytest.fixture
def cfg() -> CfgNode:
    cfg = get_cfg()
    cfg.SOLVER.REFERENCE_WORLD_SIZE = 8
    cfg.SOLVER.update({key: values[0] for key, values in SCALED.items()})
    cfg.TEST.EVAL_PERIOD = 100
    return cfg


def leaves(node: CfgNode, prefix: str = "") -> dict[str, Any]:
    found: dict[str, Any] = {}
    for key, value in node.items():
        found |= (
            leaves(value, f"{prefix}{key}.")
            if isinstance(value, CfgNode)
            else {prefix + key: value}
        )
    return found


@pytest.mark.parametrize(("num_workers", "column", "period"), [(16, 1, 50), (2, 2, 400)])
def test_batches_and_rates_grow_with_the_workers_and_lengths_shrink(
    cfg: CfgNode, num_workers: int, column: int, period: int
) -> None:
    before = cfg.clone()
    scaled = auto_scale_workers(cfg, num_workers)
    assert cfg == before
    changed = {key: value for key, value in leaves(scaled).items() if leaves(cfg)[key] != value}
    expected = {f"SOLVER.{key}": values[column] for key, values in SCALED.items()}
    expected |= {"SOLVER.REFERENCE_WORLD_SIZE": num_workers, "TEST.EVAL_PERIOD": period}
    expected = {key: value for key, value in expected.items() if leaves(cfg)[key] != value}
    assert changed == {
        key: pytest.approx(value) if isinstance(value, float) else value
        for key, value in expected.items()
    }
    # Scaled once more to the same number, nothing changes.
    assert auto_scale_workers(scaled, num_workers) is scaled


def test_a_period_of_zero_stays_never(cfg: CfgNode) -> None:
    cfg.SOLVER.CHECKPOINT_PERIOD = cfg.SOLVER.WARMUP_ITERS = cfg.TEST.EVAL_PERIOD = 0
    for num_workers in (2, 16):
        scaled = auto_scale_workers(cfg, num_workers)
        assert scaled.SOLVER.CHECKPOINT_PERIOD == scaled.SOLVER.WARMUP_ITERS == 0
        assert scaled.TEST.EVAL_PERIOD == 0


@pytest.mark.parametrize("frozen", [False, True])
def test_a_frozen_config_gives_a_frozen_one(cfg: CfgNode, frozen: bool) -> None:
    if frozen:
        cfg.freeze()
    assert (
        auto_scale_workers(cfg, 2).is_frozen() == auto_scale_workers(cfg, 8).is_frozen() == frozen
    )
    assert cfg.is_frozen() == frozen


def test_without_a_reference_nothing_is_scaled(cfg: CfgNode) -> None:
    cfg.SOLVER.REFERENCE_WORLD_SIZE = 0
    assert auto_scale_workers(cfg, 2) is cfg


def test_a_batch_that_the_reference_cannot_share_is_refused(cfg: CfgNode) -> None:
    cfg.SOLVER.IMS_PER_BATCH = 20
    message = r"IMS_PER_BATCH is 20, which is no multiple of SOLVER\.REFERENCE_WORLD_SIZE, 8"
    with pytest.raises(ConfigError, match=message):
        auto_scale_workers(cfg, 4)


def test_a_python_config_is_not_scaled_by_half() -> None:
    cfg = get_cfg()
    cfg.SOLVER.REFERENCE_WORLD_SIZE = 2
    cfg.LAZY = CfgNode()
    with pytest.raises(ConfigError, match="cannot scale the loader and the optimizer"):
        auto_scale_workers(cfg, 1)
