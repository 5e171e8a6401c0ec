"""Configs as Python files: `LazyCall` notes a call, `LazyConfig` loads, changes and saves them.

This needs omegaconf and hydra-core: pip install 'trainkit[lazy]'.
"""

import dataclasses
import inspect
import os
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import yaml

from trainkit.config.config import CfgNode
from trainkit.config.defaults import get_cfg
from trainkit.config.instantiate import dump_dataclass
from trainkit.config.lazy_files import lazy_dict, omegaconf, run_config_file
from trainkit.config.overrides import apply_override
from trainkit.utils.errors import ConfigError, nearest_name
from trainkit.utils.file_io import PathManager
from trainkit.utils.registry import _convert_target_to_string

if TYPE_CHECKING:
    from omegaconf import DictConfig

_LINE_LENGTH = 88


class LazyCall:
    """Notes a call instead of making it; `instantiate` makes it.

    Args:
        target: What is to be called: a class or function, its dotted name, or a noted call that
            returns it.

    Raises:
        TypeError: If the target is none of these, or arguments are not given by name.

    Example:
        >>> note = LazyCall(dict)(a=1)
        >>> note.a += 1
        >>> note
        {'_target_': 'builtins.dict', 'a': 2}
    """

    def __init__(self, target: Callable[..., Any] | str | Mapping[str, Any]) -> None:
        if not (callable(target) or isinstance(target, (str, Mapping))):
            raise TypeError(f"LazyCall takes something to call or its dotted name, not {target!r}.")
        self._target = target

    def __call__(self, *args: Any, **kwargs: Any) -> "DictConfig":
        """Returns the call with these arguments, which can be read and changed by their names."""
        if args:
            raise TypeError(
                f"LazyCall({self._target!r}) was given {args!r} by position, but takes arguments "
                "by name only, so that a config can change them. Write name=value."
            )
        target: Any = self._target
        # omegaconf takes these for the type of a node.
        is_schema = isinstance(target, type) and issubclass(target, (dict, list, tuple))
        if is_schema or dataclasses.is_dataclass(target):
            target = _convert_target_to_string(target)
        return lazy_dict({"_target_": target, **kwargs})


class LazyConfig:
    """Loads, changes and saves configs that are Python files.

    A `.py` config is code, which runs when you name it: load only what you trust. YAML is read
    safely, and nothing is pickled.
    """

    @staticmethod
    def load(filename: str | os.PathLike[str], keys: str | Sequence[str] | None = None) -> Any:
        """Loads a `.py` config, or a `.yaml` that `save` wrote.

        In a `.py` file, relative imports lead to other config files; see `run_config_file`. YAML is
        read safely, but `instantiate` makes the calls that a config names, which can be any.

        Args:
            filename: Path or address.
            keys: A name, or several, whose values to return, as a tuple if it is several.

        Returns:
            A DictConfig of the names at the top of the file that do not start with "_"; in a `.py`
            file only sections and keys of a `CfgNode` such as SEED, as other values there just help
            to write it. Or the values of `keys`.

        Raises:
            ConfigError: If the file cannot be read or run, or does not have a name.
        """
        filename = os.fspath(filename)
        extension = os.path.splitext(filename.partition("#")[0])[1]
        if extension not in (".py", ".yaml", ".yml"):
            raise ConfigError(f"The config file {filename!r} is neither a .py nor a .yaml file.")
        if extension == ".py":
            names = run_config_file(filename)
            is_section, cfg = omegaconf().OmegaConf.is_config, get_cfg()
            shown = {k: v for k, v in names.items() if is_section(v) or k in cfg}
        else:
            names = shown = dict(lazy_dict(CfgNode.load_yaml_with_base(filename)))
        if keys is None:
            return lazy_dict({k: v for k, v in shown.items() if not str(k).startswith("_")})
        for key in (wanted := [keys] if isinstance(keys, str) else list(keys)):
            if key not in names:
                hint = nearest_name(key, names) or ", ".join(names)
                raise ConfigError(f"{filename} has no {key!r}. Did you mean {hint}?")
        return names[keys] if isinstance(keys, str) else tuple(names[key] for key in wanted)

    @staticmethod
    def load_rel(filename: str, keys: str | Sequence[str] | None = None) -> Any:
        """Like `load`, with a path relative to the folder of the file that calls this."""
        caller = inspect.stack(context=0)[1].filename
        return LazyConfig.load(os.path.join(os.path.dirname(caller), filename), keys)

    @staticmethod
    def apply_overrides(cfg: "DictConfig", overrides: Sequence[str]) -> "DictConfig":
        """Changes a config in place by hydra's grammar, and returns it.

        `key=value` changes what is there, `+key=value` adds or takes any value, `~key` removes.
        Dots lead through sections and lists; quotes make a value text.

        Raises:
            ConfigError: If an override cannot be read, its key does not exist, or its value is of
                another kind than the one before; it names the nearest key.
        """
        for override in overrides:
            if override.startswith("--"):
                raise ConfigError(f"{override} stands among the overrides. Options go before them.")
            apply_override(cfg, override)
        return cfg

    @staticmethod
    def save(cfg: "DictConfig", filename: str | os.PathLike[str]) -> None:
        """Saves a config as YAML, from which `load` and `instantiate` get the same objects.

        Classes and functions are written as dotted names.

        Raises:
            ConfigError: If a value is neither plain nor has such a name; it names the key.
        """
        text = yaml.safe_dump(to_plain(cfg), sort_keys=False, allow_unicode=True)
        with PathManager.open(os.fspath(filename), "w") as file:
            file.write(text)

    @staticmethod
    def to_py(cfg: "DictConfig", prefix: str = "cfg.") -> str:
        """Returns a config as Python assignments to `prefix` and each key, to be read by people."""
        plain = omegaconf().OmegaConf.to_container(cfg)
        lines = (f"{prefix}{key} = {_python(value)}" for key, value in plain.items())
        return "\n".join(lines) + "\n"


def to_plain(cfg: "DictConfig", resolve: bool = False) -> Any:
    """Returns a config as plain values, as `LazyConfig.save` writes it; raises as that does.

    Args:
        cfg: The config.
        resolve: Whether "${…}" becomes the value that it stands for.
    """
    module = omegaconf()
    mode = module.SCMode.INSTANTIATE
    content = module.OmegaConf.to_container(cfg, resolve=resolve, structured_config_mode=mode)
    return _plain(content, "")


def _plain(value: Any, path: str) -> Any:
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        value = dump_dataclass(value)
    if isinstance(value, Mapping):
        return {key: _plain(part, f"{path}.{key}".lstrip(".")) for key, part in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(part, f"{path}[{index}]") for index, part in enumerate(value)]
    if value is None or type(value) in (str, int, float, bool):
        return value
    if isinstance(value, os.PathLike):
        return os.fspath(value)
    try:
        name = _convert_target_to_string(value)
    except ConfigError as e:
        raise ConfigError(
            f"{path} is {value!r}, which no YAML file can say. {e} For an object, write the "
            "LazyCall that makes it."
        ) from None
    if path.endswith("_target_"):
        return name
    return {"_target_": "trainkit.utils.registry.locate", "name": name}


def _python(value: Any, indent: int = 0) -> str:
    if isinstance(value, Mapping):
        parts = {k: _python(v, indent + 4) for k, v in value.items() if k != "_target_"}
        opening, closing = "dict(", ")"
        items = [f"{key}={text}" for key, text in parts.items()]
        if "_target_" in value:
            target = value["_target_"]
            opening = f"{target if isinstance(target, str) else _python(target, indent)}("
        elif not all(isinstance(key, str) and key.isidentifier() for key in parts):
            opening, closing = "{", "}"
            items = [f"{key!r}: {text}" for key, text in parts.items()]
    elif isinstance(value, list):
        opening, closing = "[", "]"
        items = [_python(part, indent + 4) for part in value]
    else:
        try:
            return _convert_target_to_string(value)
        except ConfigError:
            return repr(value)
    line = f"{opening}{', '.join(items)}{closing}"
    if indent + len(line) <= _LINE_LENGTH and "\n" not in line:
        return line
    margin = "\n" + " " * indent
    return margin.join([opening, *(f"    {item}," for item in items), closing])
