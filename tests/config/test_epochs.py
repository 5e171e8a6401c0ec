"""Lengths in epochs."""

import pytest

from trainkit.config.defaults import get_cfg
from trainkit.config.epochs import epochs_to_iterations, uses_epochs
from trainkit.utils.errors import ConfigError


def test_keys_in_epochs_decide_those_in_iterations() -> None:
    cfg = get_cfg()
    lengths = ["SOLVER.MAX_EPOCHS", 10, "SOLVER.WARMUP_EPOCHS", 0.5, "TEST.EVAL_EPOCHS", 2]
    cfg.merge_from_list([*lengths, "SOLVER.STEP_EPOCHS", (5, 7.5), "SOLVER.CHECKPOINT_EPOCHS", 1])
    cfg.freeze()
    found = epochs_to_iterations(cfg, 100)
    solver = found.SOLVER
    assert (solver.MAX_ITER, solver.WARMUP_ITERS, solver.STEPS) == (1000, 50, (500, 750))
    assert (solver.CHECKPOINT_PERIOD, found.TEST.EVAL_PERIOD) == (100, 200)
    assert found.is_frozen()
    assert cfg.SOLVER.MAX_ITER == get_cfg().SOLVER.MAX_ITER


def test_what_is_not_stated_in_epochs_stays() -> None:
    cfg = get_cfg()
    assert not uses_epochs(cfg)
    cfg.SOLVER.MAX_EPOCHS = 0.001
    assert uses_epochs(cfg)
    found = epochs_to_iterations(cfg, 10)
    # A run has at least one iteration.
    assert found.SOLVER.MAX_ITER == 1
    assert found.SOLVER.STEPS == cfg.SOLVER.STEPS


def test_epochs_without_samples_are_an_error() -> None:
    cfg = get_cfg()
    cfg.SOLVER.MAX_EPOCHS = 2.0
    with pytest.raises(ConfigError, match=r"in epochs \(SOLVER.MAX_EPOCHS\), but an epoch has 0"):
        epochs_to_iterations(cfg, 0)
