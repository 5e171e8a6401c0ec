import inspect
from typing import Any

import pytest
from omegaconf import OmegaConf

from trainkit.config import CfgNode, configurable


class Net:
    """A net."""

    @configurable
    def __init__(self, size: int, name: str = "net") -> None:
        """Makes it."""
        self.args = size, name

    @classmethod
    def from_config(cls, cfg: Any, extra: int = 0) -> dict[str, Any]:
        return {"size": cfg.SIZE + extra}


class Deeper(Net):
    @classmethod
    def from_config(cls, cfg: Any, *args: Any, **kwargs: Any) -> dict[str, Any]:
        return {"size": -cfg.SIZE, **kwargs}


class Silent(Net):
    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)


def from_config(cfg: Any, factor: int = 1) -> dict[str, Any]:
    return {"size": cfg.SIZE * factor}


@configurable(from_config=from_config)
def build(size: int, name: str = "net") -> tuple[int, str]:
    """Builds it."""
    return size, name


CFGS = [CfgNode({"SIZE": 3}), OmegaConf.create({"SIZE": 3})]


@pytest.mark.parametrize("cfg", CFGS)
def test_a_class_takes_a_config_or_its_own_arguments(cfg: Any) -> None:
    make: Any = Net
    assert make(cfg).args == make(cfg=cfg).args == (3, "net")
    assert make(2, name="x").args == (2, "x")
    assert make(size=2).args == (2, "net")
    # What from_config does not take goes to __init__.
    assert make(cfg, extra=4, name="x").args == (7, "x")
    assert make(cfg, size=1).args == (1, "net")


@pytest.mark.parametrize("cfg", CFGS)
def test_a_subclass_brings_a_from_config_of_its_own(cfg: Any) -> None:
    deeper: Any = Deeper
    assert deeper(cfg, name="x").args == (-3, "x")
    silent: Any = Silent
    assert silent(cfg).args == (3, "net")


@pytest.mark.parametrize("cfg", CFGS)
def test_a_function_takes_a_config_or_its_own_arguments(cfg: Any) -> None:
    make: Any = build
    assert make(cfg) == make(cfg=cfg) == (3, "net")
    assert make(cfg, factor=2, name="x") == (6, "x")
    assert make(5) == (5, "net")
    assert make.from_config is from_config


def test_documentation_and_signature_stay() -> None:
    assert Net.__init__.__doc__ == "Makes it."
    assert build.__doc__ == "Builds it."
    assert list(inspect.signature(Net.__init__).parameters) == ["self", "size", "name"]
    assert build.__annotations__["size"] is int


def test_too_many_arguments_are_an_error() -> None:
    make: Any = Net
    with pytest.raises(TypeError, match="positional argument"):
        make(CFGS[0], 1, 2)


def decorate(*args: Any, **kwargs: Any) -> Any:
    return configurable(*args, **kwargs)


@pytest.mark.parametrize(
    ("args", "message"),
    [
        ({"init_func": from_config}, r"decorates the __init__ of a class.*from_config=…"),
        ({}, r"a function as @configurable\(from_config=…\), but was given None and None"),
        ({"from_config": 3}, r"a function as @configurable\(from_config=…\), .* and 3"),
        ({"from_config": lambda config: {}}, "first argument of from_config is called 'config'"),
        ({"init_func": Net.__init__, "from_config": from_config}, "decorates the __init__"),
    ],
)
def test_a_wrong_decoration_is_told_at_once(args: dict[str, Any], message: str) -> None:
    with pytest.raises(TypeError, match=message):
        decorate(**args)


class NoFromConfig:
    @configurable
    def __init__(self, size: int) -> None: ...


class NotAClassMethod(NoFromConfig):
    def from_config(self) -> None: ...


class OtherName(NoFromConfig):
    @classmethod
    def from_config(cls, config: Any) -> dict[str, Any]:
        return {}


class NoDict(NoFromConfig):
    @classmethod
    def from_config(cls, cfg: Any) -> Any:
        return cfg.SIZE


@pytest.mark.parametrize(
    ("cls", "message"),
    [
        (NoFromConfig, "NoFromConfig has a configurable __init__, so it needs a class method"),
        (NotAClassMethod, "needs a class method from_config"),
        (OtherName, "first argument of OtherName.from_config is called 'config'"),
        (NoDict, "from_config returned 3, but has to return a dict"),
    ],
)
def test_a_class_without_a_fitting_from_config_is_named(cls: Any, message: str) -> None:
    with pytest.raises(TypeError, match=message):
        cls(CFGS[0])
