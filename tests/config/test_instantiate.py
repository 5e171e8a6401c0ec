import sys
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from omegaconf import DictConfig, ListConfig, OmegaConf
from torch import nn

from trainkit.config import LazyCall as L
from trainkit.config import instantiate
from trainkit.config.instantiate import dump_dataclass
from trainkit.config.lazy_files import lazy_dict
from trainkit.utils.errors import CheckpointError, ConfigError


def note(**kwargs: Any) -> dict[str, Any]:
    return kwargs


def fail(error: Exception) -> None:
    raise error


@dataclass
class Shape:
    size: int
    name: str = "s"


@dataclass
class Shapes:
    first: Shape
    more: list[Any] = field(default_factory=list)


def test_calls_are_made_from_the_inside_out() -> None:
    cfg = L(note)(layer=L(nn.Linear)(in_features=2, out_features=3), name="x")
    made = instantiate(cfg)
    assert isinstance(made["layer"], nn.Linear)
    assert made["name"] == "x"
    # The notes stay notes.
    assert cfg.layer.in_features == 2


@pytest.mark.parametrize("target", [nn.Linear, "torch.nn.Linear"])
def test_a_target_is_a_class_or_its_name(target: Any) -> None:
    assert instantiate(L(target)(in_features=2, out_features=3)).out_features == 3


def test_a_target_may_be_made_by_a_call_itself() -> None:
    assert instantiate(L(L(lambda: note)())(a=1)) == {"a": 1}


def test_lists_and_list_configs_stay_what_they_are() -> None:
    made = instantiate([1, L(note)(a=1)])
    assert made == [1, {"a": 1}]
    assert type(made) is list
    made = instantiate(L(note)(items=[1, L(torch.device)(type="cpu")]))["items"]
    assert isinstance(made, ListConfig)
    assert made[1] == torch.device("cpu")


def test_calls_inside_plain_sections_are_made() -> None:
    made = instantiate(L(note)(parts={"a": {"b": L(torch.device)(type="cpu")}}))["parts"]
    assert isinstance(made, DictConfig)
    assert made.a.b == torch.device("cpu")


@pytest.mark.parametrize("value", [3, "x", None, {"a": 1}, nn.Identity(), (1, 2)])
def test_what_is_no_call_comes_back_as_it_is(value: Any) -> None:
    assert instantiate(value) is value


def test_a_section_without_calls_comes_back_as_it_is() -> None:
    cfg = lazy_dict({"a": {"b": 1}})
    assert instantiate(cfg.a) is cfg.a


def test_interpolations_are_resolved() -> None:
    cfg = lazy_dict({"train": {"seed": 5}, "loader": L(note)(seed="${train.seed}")})
    assert instantiate(cfg.loader) == {"seed": 5}
    cfg.loader.seed = "${train.sed}"
    with pytest.raises(ConfigError, match=r"train\.sed"):
        instantiate(cfg.loader)


def test_a_node_with_a_dataclass_as_its_schema_becomes_an_object() -> None:
    made = instantiate(L(note)(shape=OmegaConf.structured(Shape(size=3))))
    assert made["shape"] == Shape(3)


def test_a_dataclass_is_a_target_like_any_other() -> None:
    cfg = L(Shape)(size=3)
    cfg.name = "t"
    assert instantiate(cfg) == Shape(3, "t")


def test_objects_of_dataclasses_are_made_again_from_their_dicts() -> None:
    shapes = Shapes(Shape(1), [Shape(2), 3])
    assert instantiate(dump_dataclass(shapes)) == shapes
    with pytest.raises(TypeError, match="is not an object of a dataclass"):
        dump_dataclass(Shapes)


@pytest.mark.parametrize(
    ("params", "message"),
    [
        (
            L("torch.optim.SDG")(),
            r"optimizer\.params: There is no 'torch\.optim\.SDG'.*optim\.SGD'",
        ),
        (L("torch.optm.SGD")(), r"optimizer\.params: .*Did you mean 'torch\.optim'\?"),
        (L("no_such_package.x")(), r"optimizer\.params: .*its package is installed"),
        (L("torch.__version__")(), r"optimizer\.params: _target_ is .* cannot be called"),
        (L(nn.Linear)(in_feature=2), r"optimizer\.params: Linear\(in_feature\) failed: TypeError"),
        (L(fail)(error=CheckpointError("no")), r"fail\(error\) failed: CheckpointError: no"),
    ],
)
def test_what_cannot_be_built_is_named_with_its_key(params: Any, message: str) -> None:
    cfg = lazy_dict({"optimizer": L(note)(params=params)})
    with pytest.raises(ConfigError, match=message):
        instantiate(cfg.optimizer)


def test_the_error_of_a_target_is_the_cause() -> None:
    error = KeyError("x")
    with pytest.raises(RuntimeError, match=r"items\[0\]: fail\(error\) failed: KeyError") as raised:
        instantiate(L(note)(items=[L(fail)(error=error)]))
    assert raised.value.__cause__ is error


def test_a_missing_omegaconf_is_named_with_the_mend(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "omegaconf", None)
    with pytest.raises(ConfigError, match=r"pip install 'trainkit\[lazy\]'"):
        instantiate({"_target_": note})
