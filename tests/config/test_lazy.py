import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from omegaconf import DictConfig, OmegaConf
from torch import nn

from trainkit.config import LazyCall as L
from trainkit.config import LazyConfig, instantiate
from trainkit.config.lazy_files import lazy_dict
from trainkit.utils.errors import ConfigError


@dataclass
class Shape:
    size: int


FILE = """
from trainkit.config import LazyCall as L
from torch import nn

width = 4
train = dict(seed=3, names=["a", "b"], path=None)
_hidden = dict(a=1)
model = L(nn.Linear)(in_features=width, out_features="${train.seed}")
"""


@pytest.fixture
def path(tmp_path: Path) -> Path:
    path = tmp_path / "config.py"
    path.write_text(FILE, encoding="utf-8")
    return path


def test_a_call_is_noted_by_name_and_can_be_changed() -> None:
    cfg = L(nn.Linear)(in_features=2, out_features=3)
    cfg.out_features = 4
    assert cfg == {"in_features": 2, "out_features": 4, "_target_": nn.Linear}
    assert instantiate(cfg).out_features == 4


@pytest.mark.parametrize("target", [3, None, ["torch.nn.Linear"]])
def test_a_target_that_cannot_be_called_is_refused(target: Any) -> None:
    with pytest.raises(TypeError, match="LazyCall takes something to call or its dotted name, not"):
        L(target)


def test_arguments_by_position_are_refused() -> None:
    with pytest.raises(TypeError, match=r"was given \(2, 3\) by position, .*Write name=value"):
        L(nn.Linear)(2, 3)


def test_a_file_loads_as_its_sections(path: Path) -> None:
    cfg = LazyConfig.load(path)
    assert list(cfg) == ["train", "model"]
    assert instantiate(cfg.model).out_features == 3


def test_names_of_a_file_are_loaded_by_key(path: Path) -> None:
    assert LazyConfig.load(path, "width") == 4
    train, hidden = LazyConfig.load(path, ("train", "_hidden"))
    assert train.seed == 3
    assert isinstance(hidden, DictConfig)
    with pytest.raises(ConfigError, match=r"config\.py has no 'modle'\. Did you mean model\?"):
        LazyConfig.load(path, "modle")


def test_a_path_may_be_relative_to_the_file_that_loads(path: Path) -> None:
    calling = path.with_name("calling.py")
    calling.write_text(
        "from trainkit.config import LazyConfig\n"
        "train = LazyConfig.load_rel('config.py', 'train')\n"
    )
    assert LazyConfig.load(calling).train.seed == 3


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("missing.py", r"Cannot read the config file '.*missing\.py'.*Check the path"),
        ("missing.yaml", r"Cannot read the config file '.*missing\.yaml'"),
        ("config.json", "neither a .py nor a .yaml file"),
    ],
)
def test_a_file_that_is_not_there_or_no_config_is_named(
    tmp_path: Path, name: str, message: str
) -> None:
    with pytest.raises(ConfigError, match=message):
        LazyConfig.load(tmp_path / name)


def test_d38_yaml_that_would_run_code_is_refused(tmp_path: Path) -> None:
    mark = tmp_path / "mark"
    path = tmp_path / "config.yaml"
    path.write_text(f"train: !!python/object/apply:os.mkdir ['{mark}']\n")
    with pytest.raises(ConfigError, match="tags that build Python objects are refused"):
        LazyConfig.load(path)
    assert not mark.exists()


def test_what_is_saved_loads_and_makes_the_same_objects(tmp_path: Path) -> None:
    cfg = lazy_dict(
        {
            "train": {"seed": 3, "lr": 1e-05, "best": None, "text": "3", "path": tmp_path},
            "model": L(nn.Linear)(in_features=2, out_features="${train.seed}"),
            "call": L(dict)(norm=nn.LayerNorm, shape=OmegaConf.structured(Shape(3)), pair=(1, 2)),
        }
    )
    LazyConfig.save(cfg, tmp_path / "config.yaml")
    assert [path.name for path in tmp_path.iterdir()] == ["config.yaml"]
    loaded = LazyConfig.load(tmp_path / "config.yaml")
    assert loaded.train == {**cfg.train, "path": str(tmp_path)}
    assert loaded.model._target_ == "torch.nn.Linear"
    assert instantiate(loaded.model).out_features == 3
    made = instantiate(loaded.call)
    assert made == {"norm": nn.LayerNorm, "shape": Shape(3), "pair": [1, 2]}
    # Whoever saves once more gets the same file.
    LazyConfig.save(loaded, tmp_path / "again.yaml")
    texts = [(tmp_path / name).read_text() for name in ("config.yaml", "again.yaml")]
    assert texts[0] == texts[1]


@pytest.mark.parametrize(
    ("value", "message"),
    [
        (lambda name: 1.0, r"parts\[1\]\.f is <function .*<lambda>.*Define it at the top level"),
        (nn.Identity(), r"parts\[1\]\.f is Identity\(\), which no YAML file can say"),
        (torch.float16, r"parts\[1\]\.f is torch\.float16"),
    ],
)
def test_d38_what_yaml_cannot_say_is_refused_and_never_pickled(
    tmp_path: Path, value: Any, message: str
) -> None:
    cfg = lazy_dict({"parts": [1, {"f": value}]})
    with pytest.raises(ConfigError, match=message):
        LazyConfig.save(cfg, tmp_path / "config.yaml")
    assert list(tmp_path.iterdir()) == []


def test_overrides_are_applied_in_place_and_the_config_returned(path: Path) -> None:
    cfg = LazyConfig.load(path)
    assert LazyConfig.apply_overrides(cfg, ["train.seed=5", "+train.x=1"]) is cfg
    assert cfg.train == {"seed": 5, "names": ["a", "b"], "path": None, "x": 1}


def test_to_py_reads_as_python(path: Path) -> None:
    cfg = LazyConfig.load(path)
    cfg.odd = {"a b": 1}
    cfg.call = L(L(dict)(a=1))(first="x" * 40, second="y" * 40, more=[nn.Linear])
    assert (
        LazyConfig.to_py(cfg)
        == f"""\
cfg.train = dict(seed=3, names=['a', 'b'], path=None)
cfg.model = torch.nn.Linear(in_features=4, out_features='${{train.seed}}')
cfg.odd = {{'a b': 1}}
cfg.call = builtins.dict(a=1)(
    first='{"x" * 40}',
    second='{"y" * 40}',
    more=[torch.nn.Linear],
)
"""
    )
    assert LazyConfig.to_py(cfg, prefix="").startswith("train = dict(")


def test_importing_the_config_package_does_not_import_omegaconf() -> None:
    code = "import sys, trainkit.config; print({'omegaconf', 'hydra'} & set(sys.modules))"
    assert subprocess.check_output([sys.executable, "-c", code], text=True) == "set()\n"


@pytest.mark.parametrize(
    "use",
    [
        lambda path: L(dict)(a=1),
        lambda path: LazyConfig.load(path),
        lambda path: LazyConfig.save({}, path),  # type: ignore[arg-type]  # it ends before
    ],
)
def test_a_missing_omegaconf_is_named_with_the_mend(
    path: Path, use: Callable[[Path], Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "omegaconf", None)
    with pytest.raises(ConfigError, match=r"pip install 'trainkit\[lazy\]'"):
        use(path)
