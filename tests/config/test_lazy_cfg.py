from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml
from torch import nn

from trainkit.config import LazyCall as L
from trainkit.config import get_cfg
from trainkit.config.lazy_cfg import build_part, cfg_from_lazy, load_cfg, settings_of
from trainkit.config.lazy_files import lazy_dict
from trainkit.utils.errors import ConfigError

CONFIGS = Path(__file__).parents[2] / "configs"
FILE = """
from torch import nn
from trainkit.config import LazyCall as L

train = dict(max_iter=30, seed=4, checkpointer=dict(period=7), ddp=dict(static_graph=True))
SOLVER = dict(IMS_PER_BATCH=12)
LOG_PERIOD = 6
NUM_CLASSES = 10
optimizer = L("torch.optim.SGD")(params=L(dict)(x=1), lr=0.1)
dataloader = dict(train=L(dict)(batch_size=3, seed="${train.seed}"))
"""


@pytest.fixture
def path(tmp_path: Path) -> str:
    path = tmp_path / "config.py"
    path.write_text(FILE, encoding="utf-8")
    return str(path)


def test_d51_a_py_config_becomes_the_keys_and_parts_of_a_run(path: str) -> None:
    cfg = load_cfg(path)
    assert (cfg.SOLVER.MAX_ITER, cfg.SEED, cfg.SOLVER.CHECKPOINT_PERIOD) == (30, 4, 7)
    assert cfg.DDP.STATIC_GRAPH is True
    assert (cfg.SOLVER.IMS_PER_BATCH, cfg.LOG_PERIOD) == (12, 6)
    assert cfg.LAZY.dataloader.train.seed == 4
    # What is written down is plain and whole.
    assert yaml.safe_load(cfg.dump())["LAZY"]["optimizer"]["_target_"] == "torch.optim.SGD"
    # Nobody evaluates a model on data that its config does not name.
    assert cfg.DATASETS.TEST == ()


def test_d51_one_command_line_takes_both_kinds_of_settings(path: str) -> None:
    opts = [
        "train.max_iter=40",
        "LOG_PERIOD=8",
        "OUTPUT_DIR",
        "a=b",
        "dataloader.train.batch_size=5",
        "SEED",
        9,
    ]
    cfg = load_cfg(path, opts)
    assert (cfg.SOLVER.MAX_ITER, cfg.OUTPUT_DIR, cfg.SEED) == (40, "a=b", 9)
    assert (cfg.LAZY.dataloader.train.batch_size, cfg.LOG_PERIOD) == (5, 8)


def test_a_yaml_config_and_none_are_read_as_ever() -> None:
    assert load_cfg("") == get_cfg()
    cfg = load_cfg(str(CONFIGS / "fashion_mnist.yaml"), ["SOLVER.MAX_ITER", "12"])
    assert (cfg.SOLVER.BASE_LR, cfg.SOLVER.MAX_ITER) == (0.3, 12)


def test_the_dumped_config_of_such_a_run_is_not_taken_for_a_whole_one(
    path: str, tmp_path: Path
) -> None:
    (tmp_path / "config.yaml").write_text(load_cfg(path).dump())
    with pytest.raises(
        ConfigError,
        match=r"is of a run that a .py config describes.*Give that .py",
    ):
        load_cfg(str(tmp_path / "config.yaml"))


def test_a_part_is_built_from_its_call_and_more_arguments(path: str) -> None:
    cfg = load_cfg(path)
    cfg.freeze()
    assert build_part(cfg, "dataloader.train", dict, seed=5) == {"batch_size": 3, "seed": 5}
    model = nn.Linear(1, 1)
    cfg.defrost()
    cfg.LAZY.optimizer._target_ = "builtins.dict"
    del cfg.LAZY.optimizer.params["_target_"]
    made: dict[str, Any] = build_part(cfg, "optimizer", dict, params={"model": model})
    assert made == {"params": {"x": 1, "model": model}, "lr": 0.1}
    assert made["params"]["model"] is model


@pytest.mark.parametrize("name", ["model", "dataloader.test"])
def test_a_part_that_no_call_makes_is_left_to_the_keys(path: str, name: str) -> None:
    assert build_part(load_cfg(path), name, lambda: "default") == "default"
    assert build_part(get_cfg(), name, lambda: "default") == "default"


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ({"train": {"max_itr": 3}}, r"train\.max_itr sets nothing.*mean train\.max_iter\?"),
        ({"train": {"max_iter": "x"}}, r"train\.max_iter: SOLVER\.MAX_ITER is 'x', of type str"),
        ({"SOLVR": {}}, r"The \.py config: SOLVR is not a config key\. Did you mean SOLVER"),
        ({"SOLVER": {"STEP": (1,)}}, r"SOLVER\.STEP is not a config key\. Did you mean"),
        ({"optimzer": {}}, "has a 'optimzer'. Did you mean 'optimizer'"),
        ({"model": L(lambda: 1)()}, r"model\._target_ is <function .*no YAML file can say"),
    ],
)
def test_what_a_run_cannot_take_is_named(content: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        cfg_from_lazy(lazy_dict(content))


def test_the_flat_script_may_have_settings_of_its_own() -> None:
    assert settings_of(lazy_dict({"train": {"max_iter": 3, "mine": 1}})).SOLVER.MAX_ITER == 3


@pytest.mark.parametrize("read", [load_cfg, lambda path: load_cfg(path, ["train.max_itr=3"])])
def test_a_wrong_file_or_override_is_named(read: Callable[[str], Any], path: str) -> None:
    with pytest.raises(ConfigError, match=r"missing\.py|train\.max_iter"):
        read(path if read is not load_cfg else "missing.py")
