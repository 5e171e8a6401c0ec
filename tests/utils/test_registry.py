import pytest

from trainkit.utils.errors import UnknownNameError
from trainkit.utils.registry import Registry


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
