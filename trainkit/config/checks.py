"""Which values of the config are possible at all, so that a run refuses the others at its start.

What one builder can judge alone, or only together with other settings or the machine, is checked
there: MAX_ITER, the sharing of batches, the schedules, clipping, devices, and all names.
"""

import os
from collections.abc import Callable
from typing import Any, NamedTuple

from fvcore.common.config import CfgNode

from trainkit.config.defaults import get_cfg
from trainkit.utils.errors import ConfigError


class _Rule(NamedTuple):
    words: str
    accepts: Callable[[Any], bool]


def _integer(least: int) -> _Rule:
    return _Rule(
        f"an integer in [{least}, 2**31)", lambda x: isinstance(x, int) and least <= x < 2**31
    )


def _one_of(*choices: str) -> _Rule:
    return _Rule(f"one of {', '.join(map(repr, choices))}", lambda x: x in choices)


def _each(rule: _Rule) -> _Rule:
    return _Rule(
        f"a list whose entries are each {rule.words}",
        lambda x: isinstance(x, (list, tuple)) and all(map(rule.accepts, x)),
    )


def _or_none(rule: _Rule) -> _Rule:
    return _Rule(f"{rule.words} or None", lambda x: x is None or rule.accepts(x))


def _is_path(x: Any) -> bool:
    try:
        return x != "" and b"\0" not in os.fsencode(x)
    except (TypeError, UnicodeEncodeError):
        return False


# Comparisons are written so that NaN, with which each of them is false, is refused.
_FINITE = _Rule(
    "a finite number of at least 0", lambda x: isinstance(x, (int, float)) and 0 <= x < float("inf")
)
_BELOW_1 = _Rule("in [0, 1)", lambda x: isinstance(x, (int, float)) and 0 <= x < 1)
_NUMBER = _Rule("a finite number", lambda x: isinstance(x, (int, float)) and abs(x) < float("inf"))
_NAME = _Rule("a name", lambda x: isinstance(x, str))
_DECAY = _Rule("in (0, 1]", lambda x: isinstance(x, (int, float)) and 0 < x <= 1)
_PROBABILITY = _Rule("in [0, 1]", lambda x: isinstance(x, (int, float)) and 0 <= x <= 1)

_RULES = {
    "OUTPUT_DIR": _Rule("a path", _is_path),
    "SEED": _Rule("an integer below 2**63", lambda x: isinstance(x, int) and x < 2**63),
    "FLOAT32_PRECISION": _one_of("", "highest", "high", "medium"),
    "LOG_PERIOD": _integer(0),
    "TRACKERS": _each(_one_of("wandb", "mlflow")),
    "GATHER_METRIC_PERIOD": _integer(1),
    "LIMIT_BATCHES": _integer(0),
    "MODEL.NUM_CLASSES": _integer(1),
    "MODEL.PIXEL_MEAN": _each(_NUMBER),
    "MODEL.PIXEL_STD": _each(_NUMBER),
    "MODEL.DROPOUT": _BELOW_1,
    "MODEL.LABEL_SMOOTHING": _BELOW_1,
    "MODEL.EMA.DECAY": _BELOW_1,
    "MODEL.BACKBONE.WIDTHS": _each(_integer(1)),
    "MODEL.BACKBONE.BLOCKS": _each(_integer(0)),
    "INPUT.CROP_PADDING": _integer(0),
    "INPUT.FLIP_PROB": _PROBABILITY,
    "INPUT.ERASE_PROB": _PROBABILITY,
    "DATASETS.TRAIN": _each(_NAME),
    "DATASETS.TEST": _each(_NAME),
    "DATASETS.VAL": _each(_NAME),
    "DATALOADER.NUM_WORKERS": _integer(0),
    "DATALOADER.RANDOM_SUBSET_RATIO": _Rule(
        "in (0, 1]", lambda x: isinstance(x, (int, float)) and 0 < x <= 1
    ),
    "DATALOADER.REPEAT_THRESHOLD": _PROBABILITY,
    "SOLVER.MAX_EPOCHS": _FINITE,
    "SOLVER.WARMUP_EPOCHS": _FINITE,
    "SOLVER.STEP_EPOCHS": _each(_FINITE),
    "SOLVER.CHECKPOINT_EPOCHS": _FINITE,
    "SOLVER.MAX_SECONDS": _FINITE,
    "SOLVER.REFERENCE_WORLD_SIZE": _integer(0),
    "SOLVER.BASE_LR": _FINITE,
    "SOLVER.MOMENTUM": _BELOW_1,
    "SOLVER.BETAS": _Rule(
        "two numbers in [0, 1)", lambda x: _each(_BELOW_1).accepts(x) and len(x) == 2
    ),
    "SOLVER.WEIGHT_DECAY": _FINITE,
    "SOLVER.WEIGHT_DECAY_NORM": _or_none(_FINITE),
    "SOLVER.WEIGHT_DECAY_BIAS": _or_none(_FINITE),
    "SOLVER.BIAS_LR_FACTOR": _or_none(_FINITE),
    "SOLVER.LAYER_DECAY": _DECAY,
    "SOLVER.POLY_LR_POWER": _FINITE,
    "SOLVER.PLATEAU.FACTOR": _BELOW_1,
    "SOLVER.PLATEAU.PATIENCE": _integer(0),
    "SOLVER.PLATEAU.METRIC": _NAME,
    "SOLVER.PLATEAU.MODE": _one_of("min", "max"),
    "SOLVER.GAMMA": _FINITE,
    "SOLVER.WARMUP_FACTOR": _FINITE,
    "SOLVER.WARMUP_ITERS": _integer(0),
    "SOLVER.CHECKPOINT_PERIOD": _integer(0),
    "SOLVER.NON_FINITE": _one_of("raise", "skip", "rollback"),
    "CHECKPOINT.MAX_TO_KEEP": _integer(0),
    "CHECKPOINT.ON_ERROR": _one_of("raise", "warn"),
    "TEST.EVAL_PERIOD": _integer(0),
    "TEST.EVAL_EPOCHS": _FINITE,
    "TEST.BEST_MODE": _one_of("max", "min"),
    "TEST.IMS_PER_BATCH": _integer(1),
    "TEST.PRECISE_BN.NUM_ITER": _integer(1),
    "TEST.EARLY_STOPPING.METRIC": _NAME,
    "TEST.EARLY_STOPPING.PATIENCE": _integer(1),
    "TEST.EARLY_STOPPING.MODE": _one_of("max", "min"),
    "TEST.EARLY_STOPPING.MIN_DELTA": _FINITE,
    "TEST.EARLY_STOPPING.THRESHOLD": _or_none(_NUMBER),
}


def check_cfg(cfg: CfgNode) -> None:
    """Refuses values that no run can work with.

    Args:
        cfg: A whole config; keys that it does not have are not missed.

    Raises:
        ConfigError: Naming every such value, what it must be, and the key's default.
    """
    default = get_cfg()
    problems = []
    for key, rule in _RULES.items():
        found = _values(cfg, key)
        if found and not rule.accepts(found[0]):
            problems.append(
                f"{key} is {found[0]!r}, but must be {rule.words}. "
                f"Its default is {_values(default, key)[0]!r}."
            )
    if problems:
        raise ConfigError("\n".join(problems))


def _values(cfg: CfgNode, key: str) -> list[Any]:
    """Returns the value at a dotted key in a list, which is empty where there is no such key."""
    node: Any = cfg
    for part in key.split("."):
        if not isinstance(node, CfgNode) or part not in node:
            return []
        node = node[part]
    return [node]
