"""`@configurable`: what takes arguments can take a config as well."""

import functools
import inspect
import sys
from collections.abc import Callable
from typing import Any

from fvcore.common.config import CfgNode


def configurable(
    init_func: Any = None, *, from_config: Callable[..., Any] | None = None
) -> Callable[..., Any]:
    """Lets a class's `__init__`, or a function, be called with a config.

    Called with a CfgNode or DictConfig as its first argument or as `cfg=`, it takes its arguments
    from the dict that `from_config(cfg, …)` returns, and from those arguments by name that
    `from_config` does not take. All other calls stay as they are.

    Args:
        init_func: The `__init__` of a class that has a class method `from_config`.
        from_config: For a function: what turns a config into its arguments.

    Raises:
        TypeError: If it decorates anything else, or the first argument of `from_config` is not
            called cfg.

    Example:
        >>> @configurable(from_config=lambda cfg: {"size": cfg.SIZE})
        ... def build(size, name="net"):
        ...     return name, size
        >>> build(2), build(CfgNode({"SIZE": 3}), name="other")
        (('net', 2), ('other', 3))
    """
    if init_func is None and callable(from_config):
        _check_signature(from_config, "from_config")
        return functools.partial(_wrap, from_config=from_config)
    if from_config is not None or getattr(init_func, "__name__", "") != "__init__":
        raise TypeError(
            f"@configurable decorates the __init__ of a class, and a function as "
            f"@configurable(from_config=…), but was given {init_func!r} and {from_config!r}."
        )

    @functools.wraps(init_func)
    def wrapped(self: Any, *args: Any, **kwargs: Any) -> None:
        if _has_config(args, kwargs):
            args, kwargs = (), _explicit(_from_config_of(type(self)), args, kwargs)
        init_func(self, *args, **kwargs)

    return wrapped


def _wrap(function: Callable[..., Any], from_config: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(function)
    def wrapped(*args: Any, **kwargs: Any) -> Any:
        if _has_config(args, kwargs):
            args, kwargs = (), _explicit(from_config, args, kwargs)
        return function(*args, **kwargs)

    vars(wrapped)["from_config"] = from_config
    return wrapped


def _from_config_of(cls: type) -> Callable[..., Any]:
    found = getattr(cls, "from_config", None)
    if not inspect.ismethod(found):
        raise TypeError(
            f"{cls.__qualname__} has a configurable __init__, so it needs a class method "
            f"from_config(cls, cfg), but its from_config is {found!r}."
        )
    _check_signature(found, f"{cls.__qualname__}.from_config")
    return found


def _check_signature(from_config: Callable[..., Any], name: str) -> None:
    first = next(iter(inspect.signature(from_config).parameters), None)
    if first != "cfg":
        raise TypeError(f"The first argument of {name} is called {first!r}, but has to be 'cfg'.")


def _has_config(args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
    # Whoever has a DictConfig has imported omegaconf.
    module = sys.modules.get("omegaconf")
    types = (CfgNode, module.DictConfig) if module else CfgNode
    return isinstance(args[0] if args else kwargs.get("cfg"), types)


def _explicit(
    from_config: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]
) -> dict[str, Any]:
    """Returns the arguments that a call with a config stands for."""
    parameters = inspect.signature(from_config).parameters
    takes_all = any(p.kind is p.VAR_KEYWORD for p in parameters.values())
    taken = {k: v for k, v in kwargs.items() if takes_all or k in parameters}
    found = from_config(*args, **taken)
    if not isinstance(found, dict):
        raise TypeError(f"from_config returned {found!r}, but has to return a dict of arguments.")
    return {**found, **{k: v for k, v in kwargs.items() if k not in taken}}
