"""Lengths in epochs, as `SOLVER.MAX_EPOCHS` states them, turned into iterations."""

from typing import Any

from trainkit.config.config import CfgNode
from trainkit.utils.errors import ConfigError

_ITERATIONS = {
    "SOLVER.MAX_EPOCHS": "MAX_ITER",
    "SOLVER.WARMUP_EPOCHS": "WARMUP_ITERS",
    "SOLVER.STEP_EPOCHS": "STEPS",
    "SOLVER.CHECKPOINT_EPOCHS": "CHECKPOINT_PERIOD",
    "TEST.EVAL_EPOCHS": "EVAL_PERIOD",
}
"""The key in iterations, of the same section, that each key in epochs decides where it is set."""


def uses_epochs(cfg: CfgNode) -> bool:
    """Whether any length is stated in epochs."""
    return any(_value(cfg, key) for key in _ITERATIONS)


def epochs_to_iterations(cfg: CfgNode, iters_per_epoch: float) -> CfgNode:
    """Returns a config whose keys in iterations follow those in epochs, each rounded, at least 1.

    Args:
        cfg: The whole config; it stays as it is.
        iters_per_epoch: Samples of the training set per `SOLVER.IMS_PER_BATCH`.

    Raises:
        ConfigError: If an epoch has no sample.

    Example:
        >>> from trainkit.config import get_cfg
        >>> cfg = get_cfg()
        >>> cfg.merge_from_list(["SOLVER.MAX_EPOCHS", 2.5, "SOLVER.STEP_EPOCHS", (1, 2)])
        >>> cfg = epochs_to_iterations(cfg, iters_per_epoch=31.25)
        >>> cfg.SOLVER.MAX_ITER, cfg.SOLVER.STEPS
        (78, (31, 62))
    """
    if not iters_per_epoch > 0:
        used = ", ".join(key for key in _ITERATIONS if _value(cfg, key))
        raise ConfigError(
            f"Lengths are stated in epochs ({used}), but an epoch has {iters_per_epoch} "
            "iterations. State them in iterations."
        )
    resolved = cfg.clone()
    resolved.defrost()
    for key, name in _ITERATIONS.items():
        if epochs := _value(cfg, key):
            section = resolved[key.partition(".")[0]]
            if isinstance(epochs, (list, tuple)):
                section[name] = tuple(_iterations(e, iters_per_epoch) for e in epochs)
            else:
                section[name] = _iterations(epochs, iters_per_epoch)
    if cfg.is_frozen():
        resolved.freeze()
    return resolved


def _iterations(epochs: float, iters_per_epoch: float) -> int:
    return max(1, round(epochs * iters_per_epoch))


def _value(cfg: CfgNode, key: str) -> Any:
    section, name = key.split(".")
    return cfg[section][name]
