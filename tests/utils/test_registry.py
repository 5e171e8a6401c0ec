import json
import logging.handlers
from pathlib import Path

import pytest
import torch

from trainkit.utils.errors import ConfigError, UnknownNameError
from trainkit.utils.registry import Registry, _convert_target_to_string, locate


class LinearHead:
    pass


def test_what_is_registered_is_found_by_its_name() -> None:
    registry = Registry("HEAD")
    registry.register(LinearHead)
    assert registry.get("LinearHead") is LinearHead
    assert "LinearHead" in registry


def test_unknown_name_is_answered_with_the_nearest_one() -> None:
    registry = Registry("HEAD")
    registry.register(LinearHead)
    with pytest.raises(UnknownNameError, match=r"Unknown HEAD 'LinearHaed'.*mean 'LinearHead'\?"):
        registry.get("LinearHaed")


def test_a_name_is_taken_only_once() -> None:
    registry = Registry("HEAD")
    registry.register(LinearHead)
    with pytest.raises(AssertionError, match="'LinearHead' was already registered in 'HEAD'"):
        registry.register(LinearHead)


@pytest.mark.parametrize(
    ("name", "found"),
    [
        ("torch.optim.SGD", torch.optim.SGD),
        ("torch.nn.functional", torch.nn.functional),
        ("logging.handlers", logging.handlers),
        ("json", json),
    ],
)
def test_a_dotted_name_leads_to_what_it_names(name: str, found: object) -> None:
    assert locate(name) is found


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("torch.optim.SDG", r"no 'torch\.optim\.SDG'.*Did you mean 'torch\.optim\.SGD'\?"),
        ("torch.optm.SGD", r"no 'torch\.optm', as in 'torch\.optm\.SGD'.*'torch\.optim'\?"),
        ("trch.optim.SGD", r"no 'trch'.*Did you mean 'torch'\?"),
        ("torch.optim.SGD.no_such_thing", "Check the spelling"),
        ("no_such_package.x", "Check the spelling, and that its package is installed"),
        ("torch..SGD", "There is no 'torch.'"),
        ("", "There is no ''"),
    ],
)
def test_a_name_that_leads_nowhere_is_told_with_the_nearest_one(name: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        locate(name)


def test_a_package_that_a_module_misses_is_no_wrong_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "module_with_need.py").write_text("import no_such_package\n")
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(ModuleNotFoundError, match="no_such_package"):
        locate("module_with_need.x")


@pytest.mark.parametrize(
    ("target", "name"),
    [
        (torch.optim.SGD, "torch.optim.SGD"),
        (torch.nn.Linear, "torch.nn.Linear"),
        (torch.nn.functional.cross_entropy, "torch.nn.functional.cross_entropy"),
        (dict, "builtins.dict"),
        (Path.cwd, "pathlib.Path.cwd"),
    ],
)
def test_a_target_has_its_shortest_public_name(target: object, name: str) -> None:
    assert _convert_target_to_string(target) == name


@pytest.mark.parametrize("target", [lambda: 1, torch.nn.Identity(), 3])
def test_what_no_name_leads_to_is_refused(target: object) -> None:
    with pytest.raises(ConfigError, match=r"No dotted name leads to .*top level of a module"):
        _convert_target_to_string(target)
