"""Stand-ins for what an optional dependency would define, which say so when they are used."""

from collections.abc import Callable, Sequence
from typing import Any, NoReturn


def create_dummy_func(
    func: str, dependency: str | Sequence[str], message: str = ""
) -> Callable[..., NoReturn]:
    """Returns a function that raises ImportError when it is called.

    Args:
        func: Its name.
        dependency: What has to be installed, one or several.
        message: Added to the error's text.
    """
    names = dependency if isinstance(dependency, str) else ", ".join(dependency)

    def dummy(*args: Any, **kwargs: Any) -> NoReturn:
        raise ImportError(f"{func} needs {names}, which cannot be imported. {message}".strip())

    return dummy


def create_dummy_class(klass: str, dependency: str | Sequence[str], message: str = "") -> type:
    """Returns a class that raises ImportError when it, or a class made from it, is instantiated.

    The arguments are those of `create_dummy_func`.
    """
    return type(klass, (), {"__new__": create_dummy_func(klass, dependency, message)})
