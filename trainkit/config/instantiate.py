"""Makes the calls that a config notes."""

import dataclasses
from collections.abc import Mapping
from typing import Any

from trainkit.config.lazy_files import lazy_dict, omegaconf
from trainkit.utils.errors import USER_ERRORS, ConfigError
from trainkit.utils.registry import _convert_target_to_string, locate


def instantiate(cfg: Any) -> Any:
    """Makes a call that a `LazyCall` notes, after those among its arguments.

    Args:
        cfg: A mapping with `_target_`, a class or function or its dotted name, and arguments.

    Returns:
        What the target returns. Of a list or ListConfig, one of the same type; of a node that has a
        dataclass as its schema, an object of that; all else comes back as it is.

    Raises:
        ConfigError: If a target does not exist, or refuses its arguments; it names target and key.
        RuntimeError: If a target fails otherwise; in both cases, its error is the cause.
    """
    module = omegaconf()
    is_node = isinstance(cfg, (module.DictConfig, module.ListConfig))
    try:
        return build(cfg, cfg._get_full_key(None) if is_node else "")
    except module.errors.OmegaConfBaseException as e:
        raise ConfigError(str(e)) from e


def build(cfg: Any, path: str) -> Any:
    """Does what `instantiate` does, for a config that lies at `path`."""
    module = omegaconf()
    if isinstance(cfg, (list, module.ListConfig)):
        items = [build(item, f"{path}[{index}]") for index, item in enumerate(cfg)]
        if isinstance(cfg, list):
            return items
        return module.ListConfig(items, flags={"allow_objects": True})
    if not isinstance(cfg, Mapping):
        return cfg
    is_node = isinstance(cfg, module.DictConfig)
    if is_node and dataclasses.is_dataclass(module.OmegaConf.get_type(cfg)):
        return module.OmegaConf.to_object(cfg)
    parts = {key: build(part, f"{path}.{key}".lstrip(".")) for key, part in cfg.items()}
    if "_target_" in parts:
        return _call(parts.pop("_target_"), parts, path)
    if all(part is cfg[key] for key, part in parts.items()):
        return cfg
    return lazy_dict(parts) if is_node else parts


def _call(target: Any, arguments: dict[str, Any], path: str) -> Any:
    place = path or "The config"
    try:
        function = locate(target) if isinstance(target, str) else target
    except ConfigError as e:
        raise ConfigError(f"{place}: {e}") from None
    if not callable(function):
        raise ConfigError(f"{place}: _target_ is {target!r}, which cannot be called.")
    try:
        return function(**arguments)
    except Exception as e:
        name = getattr(function, "__qualname__", repr(function))
        is_mistake = isinstance(e, (*USER_ERRORS, TypeError, ValueError))
        raise (ConfigError if is_mistake else RuntimeError)(
            f"{place}: {name}({', '.join(arguments)}) failed: {type(e).__name__}: {e}"
        ) from e


def dump_dataclass(obj: Any) -> dict[str, Any]:
    """Returns a dict from which `instantiate` makes a dataclass object again, and those inside.

    Raises:
        TypeError: If it is no such object.
    """
    if not dataclasses.is_dataclass(obj) or isinstance(obj, type):
        raise TypeError(f"{obj!r} is not an object of a dataclass.")
    values = {f.name: _dumped(getattr(obj, f.name)) for f in dataclasses.fields(obj) if f.init}
    return {"_target_": _convert_target_to_string(type(obj)), **values}


def _dumped(value: Any) -> Any:
    if isinstance(value, (list, tuple)):
        return [_dumped(part) for part in value]
    is_object = dataclasses.is_dataclass(value) and not isinstance(value, type)
    return dump_dataclass(value) if is_object else value
