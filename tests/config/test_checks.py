import math
from pathlib import Path

import pytest
from fvcore.common.config import CfgNode as FvcoreCfgNode

from trainkit.config.checks import _RULES, _values, check_cfg
from trainkit.config.defaults import get_cfg
from trainkit.utils.errors import ConfigError

CONFIGS = sorted((Path(__file__).parents[2] / "configs").rglob("*.yaml"))


def test_the_defaults_are_possible_and_every_checked_key_exists() -> None:
    check_cfg(get_cfg())
    assert all(_values(get_cfg(), key) for key in _RULES)


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.name)
def test_the_configs_are_possible(path: Path) -> None:
    cfg = get_cfg()
    cfg.merge_from_file(str(path))
    check_cfg(cfg)


INTEGER_0 = "an integer in [0, 2**31)"
INTEGER_1 = "an integer in [1, 2**31)"
FINITE = "a finite number of at least 0"


@pytest.mark.parametrize(
    ("key", "wrong", "words"),
    [
        ("OUTPUT_DIR", ["", "a\0b", "\ud800"], "a path"),
        ("SEED", [2**63], "an integer below 2**63"),
        ("FLOAT32_PRECISION", ["low"], "one of '', 'highest', 'high', 'medium'"),
        ("LOG_PERIOD", [-1], INTEGER_0),
        ("GATHER_METRIC_PERIOD", [0, -1], INTEGER_1),
        ("LIMIT_BATCHES", [-1], INTEGER_0),
        ("MODEL.NUM_CLASSES", [0, -1, 2**31], INTEGER_1),
        (
            "MODEL.PIXEL_MEAN",
            [["x"], [None], [math.nan], [math.inf]],
            "a list whose entries are each a finite number",
        ),
        ("MODEL.PIXEL_STD", [["x"]], "a list whose entries are each a finite number"),
        ("DATASETS.TRAIN", [(1,), ({},)], "a list whose entries are each a name"),
        ("DATASETS.TEST", [(None,)], "a list whose entries are each a name"),
        ("DATASETS.VAL", [(1,)], "a list whose entries are each a name"),
        ("MODEL.DROPOUT", [-0.1, 1.0, math.nan], "in [0, 1)"),
        ("MODEL.LABEL_SMOOTHING", [-0.1, 1.0, math.nan], "in [0, 1)"),
        ("MODEL.EMA.DECAY", [-0.1, 1.0, math.nan], "in [0, 1)"),
        ("MODEL.BACKBONE.WIDTHS", [(16, 0)], f"a list whose entries are each {INTEGER_1}"),
        ("MODEL.BACKBONE.BLOCKS", [(1, -1)], f"a list whose entries are each {INTEGER_0}"),
        ("INPUT.CROP_PADDING", [-1], INTEGER_0),
        ("INPUT.FLIP_PROB", [-0.1, 1.1, math.nan], "in [0, 1]"),
        ("INPUT.ERASE_PROB", [-0.1, 1.1, math.nan], "in [0, 1]"),
        ("DATALOADER.NUM_WORKERS", [-1], INTEGER_0),
        ("DATALOADER.RANDOM_SUBSET_RATIO", [0.0, 1.1, math.nan], "in (0, 1]"),
        ("DATALOADER.REPEAT_THRESHOLD", [-0.1, 1.1, math.nan], "in [0, 1]"),
        ("SOLVER.BASE_LR", [-0.1, math.nan, math.inf], FINITE),
        ("SOLVER.MOMENTUM", [-0.1, 1.0, math.nan], "in [0, 1)"),
        ("SOLVER.BETAS", [(0.9, 1.0), (math.nan, 0.9), (0.9,)], "two numbers in [0, 1)"),
        ("SOLVER.WEIGHT_DECAY", [-0.1, math.nan, math.inf], FINITE),
        ("SOLVER.WEIGHT_DECAY_NORM", [-0.1, math.nan], f"{FINITE} or None"),
        ("SOLVER.WEIGHT_DECAY_BIAS", [-0.1, math.nan], f"{FINITE} or None"),
        ("SOLVER.BIAS_LR_FACTOR", [-0.1, math.nan], f"{FINITE} or None"),
        ("SOLVER.REFERENCE_WORLD_SIZE", [-1], INTEGER_0),
        ("SOLVER.LAYER_DECAY", [0.0, -0.1, 1.1, math.nan], "in (0, 1]"),
        ("SOLVER.POLY_LR_POWER", [-0.1, math.nan], FINITE),
        ("SOLVER.PLATEAU.FACTOR", [1.0, -0.1, math.nan], "in [0, 1)"),
        ("SOLVER.PLATEAU.PATIENCE", [-1], INTEGER_0),
        ("SOLVER.PLATEAU.MODE", ["", "most"], "one of 'min', 'max'"),
        ("SOLVER.GAMMA", [-0.1, math.nan], FINITE),
        ("SOLVER.WARMUP_FACTOR", [-0.1, math.nan], FINITE),
        ("SOLVER.WARMUP_ITERS", [-1], INTEGER_0),
        ("SOLVER.CHECKPOINT_PERIOD", [-1], INTEGER_0),
        ("CHECKPOINT.MAX_TO_KEEP", [-1], INTEGER_0),
        ("CHECKPOINT.ON_ERROR", ["ignore", ""], "one of 'raise', 'warn'"),
        ("TEST.EVAL_PERIOD", [-1], INTEGER_0),
        ("TEST.IMS_PER_BATCH", [0, -1], INTEGER_1),
        ("TEST.PRECISE_BN.NUM_ITER", [0, -1], INTEGER_1),
        ("TEST.EARLY_STOPPING.METRIC", [1, None], "a name"),
        ("TEST.EARLY_STOPPING.PATIENCE", [0], INTEGER_1),
        ("TEST.EARLY_STOPPING.MODE", ["", "most"], "one of 'max', 'min'"),
        ("TEST.EARLY_STOPPING.MIN_DELTA", [-0.1, math.nan], FINITE),
        ("TEST.EARLY_STOPPING.THRESHOLD", [math.nan, math.inf], "a finite number or None"),
    ],
)
def test_an_impossible_value_is_named_with_its_range_and_default(
    key: str, wrong: list[object], words: str
) -> None:
    default = _values(get_cfg(), key)[0]
    for value in wrong:
        cfg = get_cfg()
        section, _, name = key.rpartition(".")
        node = _values(cfg, section)[0] if section else cfg
        node[name] = value
        with pytest.raises(ConfigError) as raised:
            check_cfg(cfg)
        assert str(raised.value) == (
            f"{key} is {value!r}, but must be {words}. Its default is {default!r}."
        )


def test_values_at_the_edge_are_possible() -> None:
    cfg = get_cfg()
    cfg.SEED = 2**63 - 1
    cfg.MODEL.merge_from_list(["DROPOUT", 0, "NUM_CLASSES", 1])
    cfg.INPUT.merge_from_list(["FLIP_PROB", 1, "ERASE_PROB", 0, "CROP_PADDING", 1000])
    cfg.SOLVER.merge_from_list(["BETAS", (0, 0.99), "BASE_LR", 0, "WARMUP_FACTOR", 2])
    cfg.SOLVER.merge_from_list(["BIAS_LR_FACTOR", 0, "WEIGHT_DECAY_BIAS", None])
    cfg.DATALOADER.NUM_WORKERS = 0
    check_cfg(cfg)


def test_all_impossible_values_stand_in_one_error() -> None:
    cfg = get_cfg()
    cfg.TEST.IMS_PER_BATCH = 0
    cfg.MODEL.DROPOUT = math.nan
    with pytest.raises(ConfigError) as raised:
        check_cfg(cfg)
    assert str(raised.value).splitlines() == [
        "MODEL.DROPOUT is nan, but must be in [0, 1). Its default is 0.0.",
        "TEST.IMS_PER_BATCH is 0, but must be an integer in [1, 2**31). Its default is 500.",
    ]


def test_a_value_of_another_type_is_refused() -> None:
    cfg = get_cfg()
    cfg.MODEL.BACKBONE.BLOCKS = 3
    cfg.DATALOADER.NUM_WORKERS = 1.5
    cfg.SOLVER.BASE_LR = "0.1"
    cfg.SOLVER.BETAS = 0.9
    with pytest.raises(ConfigError) as raised:
        check_cfg(cfg)
    starts = [line.split(",")[0] for line in str(raised.value).splitlines()]
    assert starts == [
        "MODEL.BACKBONE.BLOCKS is 3",
        "DATALOADER.NUM_WORKERS is 1.5",
        "SOLVER.BASE_LR is '0.1'",
        "SOLVER.BETAS is 0.9",
    ]


def test_keys_that_a_config_does_not_have_are_not_missed() -> None:
    check_cfg(FvcoreCfgNode({"MODEL": {"DROPOUT": 0.5}, "SOLVER": "none", "SEED": -1}))
    with pytest.raises(ConfigError, match=r"^MODEL\.DROPOUT is 2, but must be in"):
        check_cfg(FvcoreCfgNode({"MODEL": {"DROPOUT": 2}}))
