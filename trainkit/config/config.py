"""`CfgNode`: a tree of settings with fixed keys and types, from files and KEY VALUE pairs."""

import os
from collections.abc import Sequence
from typing import IO, Any

import yaml
from fvcore.common.config import BASE_KEY
from fvcore.common.config import CfgNode as _CfgNode

from trainkit.utils.errors import ConfigError, nearest_name
from trainkit.utils.file_io import PathManager


class CfgNode(_CfgNode):
    """fvcore's config node (yacs with `_BASE_` files); its errors name file, key, value and mend.

    YAML is always read safely: a file cannot run code. An integer is taken where a float is due.
    """

    def __init__(
        self,
        init_dict: dict[str, Any] | None = None,
        key_list: list[str] | None = None,
        new_allowed: bool = False,
    ) -> None:
        super().__init__(init_dict, key_list, new_allowed)

    @classmethod
    def _open_cfg(cls, filename: str) -> IO[str]:
        file: IO[str] = PathManager.open(filename, "r")
        return file

    @classmethod
    def load_yaml_with_base(cls, filename: str, allow_unsafe: bool = False) -> dict[str, Any]:
        """Reads a YAML file and the `_BASE_` files below it into one dict.

        Args:
            filename: Path or address of the file.
            allow_unsafe: Kept for detectron2's callers and without effect: tags that would build
                Python objects are refused.

        Raises:
            ConfigError: If a file is missing, empty, not valid YAML, or not a mapping.
        """
        _read_mapping(cls, filename)
        try:
            loaded: dict[str, Any] = super().load_yaml_with_base(filename)
        except AssertionError as e:
            raise ConfigError(
                f"{filename}: {e} A section of a file and of its {BASE_KEY} must both be sections."
            ) from None
        except RecursionError:
            raise ConfigError(f"{filename}: its {BASE_KEY} leads back to itself.") from None
        return loaded

    def clone(self) -> "CfgNode":
        """Returns a deep copy, as frozen as this node is."""
        copied: CfgNode = super().clone()
        return copied

    def merge_from_file(self, cfg_filename: str, allow_unsafe: bool = False) -> None:
        """Overwrites values with those of a YAML file; `allow_unsafe` has no effect.

        Raises:
            ConfigError: If the file cannot be read, or a key or a value's type does not fit.
        """
        loaded = self.load_yaml_with_base(os.fspath(cfg_filename))

        def place(path: tuple[str, ...]) -> str:
            return _defining_file(type(self), cfg_filename, path) or cfg_filename

        _merge(self, loaded, (), place)

    def merge_from_list(self, cfg_list: Sequence[Any]) -> None:
        """Overwrites values with `[key, value, key, value, …]`, as a command line gives them.

        Raises:
            ConfigError: If the list's length is odd, an option such as --resume stands in it, or a
                key or a value's type does not fit.
        """
        option = next((x for x in cfg_list if isinstance(x, str) and x.startswith("--")), None)
        if option is not None:
            raise ConfigError(
                f"{option} stands among the settings, which are pairs of KEY VALUE. Options such "
                f"as {option} go before the settings."
            )
        if len(cfg_list) % 2:
            raise ConfigError(
                f"Settings come in pairs of KEY VALUE, but {len(cfg_list)} words were given, the "
                f"last one {cfg_list[-1]!r}. Put a space between them, as in SOLVER.MAX_ITER 100."
            )
        for key, value in zip(cfg_list[0::2], cfg_list[1::2], strict=True):
            nested: Any = value
            for part in reversed(str(key).split(".")):
                nested = {part: nested}
            _merge(self, nested, (), lambda path: "command line")

    def merge_from_other_cfg(self, cfg_other: _CfgNode) -> None:
        """Overwrites values with those of another node, whose keys must be known here.

        Raises:
            ConfigError: If a key or a value's type does not fit.
        """
        _merge(self, cfg_other.clone(), (), lambda path: "merged config")

    def __getattr__(self, name: str) -> Any:
        if name in self:
            return self[name]
        nearest = nearest_name(name, self)
        raise AttributeError(
            f"This config node has no key {name!r}."
            + (f" Did you mean {nearest!r}?" if nearest else f" It has: {', '.join(self)}.")
        )


def _merge(node: _CfgNode, loaded: dict[str, Any], path: tuple[str, ...], place: Any) -> None:
    """Merges `loaded` into `node`; `place(path)` names where the value at a path came from."""
    for key, value in loaded.items():
        here = (*path, str(key))
        if key not in node:
            if not node.is_new_allowed():
                raise _unknown_key(node, here, place(here))
            setattr(node, here[-1], CfgNode(value) if isinstance(value, dict) else value)
        elif isinstance(node[key], _CfgNode):
            if not isinstance(value, dict):
                raise ConfigError(
                    f"{place(here)}: {'.'.join(here)} is a section with the keys "
                    f"{', '.join(node[key])}, but was given the value {value!r}."
                )
            _merge(node[key], value, here, place)
        else:
            setattr(node, key, _coerce(value, node[key], here, place))


def _unknown_key(node: _CfgNode, path: tuple[str, ...], place: str) -> ConfigError:
    nearest = nearest_name(path[-1], node)
    section = ".".join(path[:-1])
    name = f"{section}.{nearest}" if section else nearest
    hint = f"Did you mean {name}?" if nearest else f"Known here: {', '.join(sorted(node))}."
    return ConfigError(f"{place}: {'.'.join(path)} is not a config key. {hint}")


def _coerce(value: Any, current: Any, path: tuple[str, ...], place: Any) -> Any:
    """Returns `value` in the type of `current`: strings are read as literals, ints as floats."""
    # A string stays as it was written where a string is due: an OUTPUT_DIR may be called 123.
    if not isinstance(current, str):
        value = _CfgNode._decode_cfg_value(value)
    wanted = type(current)
    if current is None or type(value) is wanted:
        return value
    # `inf` is no literal, but what people write for it.
    if wanted is float and (type(value) is int or value == "inf"):
        return float(value)
    if wanted in (tuple, list) and isinstance(value, (tuple, list)):
        return wanted(value)
    raise ConfigError(
        f"{place(path)}: {'.'.join(path)} is {value!r}, of type {type(value).__name__}, but must "
        f"be of type {wanted.__name__}, like {current!r}."
    )


def _read_mapping(node_type: type[CfgNode], filename: str) -> dict[str, Any]:
    """Reads one YAML file without its bases."""
    try:
        with node_type._open_cfg(filename) as file:
            loaded = yaml.safe_load(file)
    except OSError as e:
        raise ConfigError(
            f"Cannot read the config file {filename!r}: {e.strerror or e}. Check the path after "
            f"--config-file or {BASE_KEY} (relative to {os.getcwd()!r}, or to the file naming it)."
        ) from None
    except yaml.constructor.ConstructorError as e:
        raise ConfigError(
            f"{filename}: {e.problem}{e.problem_mark}. YAML tags that build Python objects are "
            "refused, since they can run code. Write a plain value."
        ) from None
    except (yaml.YAMLError, ValueError) as e:  # ValueError: not UTF-8, or a 13th month.
        raise ConfigError(f"{filename} is not valid YAML: {e}") from None
    if not isinstance(loaded, dict):
        found = "empty" if loaded is None else f"a {type(loaded).__name__}"
        raise ConfigError(
            f"The config file {filename!r} is {found}; it must hold sections and keys such as "
            "'SOLVER: {MAX_ITER: 100}'."
        )
    if not all(isinstance(base, str) for base in _bases(loaded)):
        raise ConfigError(
            f"{filename}: {BASE_KEY} is {loaded[BASE_KEY]!r}, but must be a path or a list."
        )
    return loaded


def _bases(loaded: dict[str, Any]) -> list[Any]:
    bases = loaded.get(BASE_KEY, [])
    return bases if isinstance(bases, list) else [bases]


def _defining_file(node_type: type[CfgNode], filename: str, path: tuple[str, ...]) -> str | None:
    """Names the file that sets the key at `path`: `filename`, or the base whose value counts."""
    loaded = _read_mapping(node_type, filename)
    value: Any = loaded
    for key in path:
        if not isinstance(value, dict) or key not in value:
            break
        value = value[key]
    else:
        return filename
    for base in reversed(_bases(loaded)):
        base_file = os.path.expanduser(base)
        if "://" not in base_file:
            base_file = os.path.join(os.path.dirname(filename), base_file)
        found = _defining_file(node_type, base_file, path)
        if found:
            return found
    return None
