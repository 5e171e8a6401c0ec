"""`CfgNode`: a tree of settings with fixed keys and types, from files and KEY VALUE pairs."""

import math
import os
from collections.abc import Sequence
from typing import IO, Any

import yaml
from fvcore.common.config import BASE_KEY
from fvcore.common.config import CfgNode as _CfgNode

from trainkit.utils.errors import ConfigError, nearest_name
from trainkit.utils.file_io import PathManager

# Of one file, what aliases repeat included; and of files below one file.
_MAX_CHARS, _MAX_DEPTH, _MAX_BASES = 1 << 18, 50, 50
_TOO_LARGE = (
    f"it has more than {_MAX_CHARS:,} characters, counted as often as aliases repeat them, or more "
    f"than {_MAX_DEPTH} levels"
)
_PLAIN_TYPES = (tuple, list, str, int, float, bool, type(None))
# The names of the sections that lead to a key, and its own.
_Keys = tuple[str, ...]


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
            ConfigError: If a file is missing, empty, not valid YAML, or not a mapping, or one on
                the web has no SHA-256, as in `https://host/x.yaml#sha256=…`, or another.
        """
        return _merged(_read_with_bases(cls, filename))[0]

    def clone(self) -> "CfgNode":
        """Returns a deep copy, as frozen as this node is."""
        copied: CfgNode = super().clone()
        return copied

    def merge_from_file(self, cfg_filename: str, allow_unsafe: bool = False) -> None:
        """Overwrites values with those of a YAML file; `allow_unsafe` has no effect.

        Raises:
            ConfigError: If the file cannot be read, or a key or a value's type does not fit.
        """
        merged, places = _merged(_read_with_bases(type(self), os.fspath(cfg_filename)))
        _merge(self, merged, (), places.__getitem__)

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


global_cfg = CfgNode()
"""For code that nobody can hand a config; empty until `set_global_cfg`."""


def set_global_cfg(cfg: CfgNode) -> None:
    """Makes `global_cfg` hold what `cfg` holds."""
    global_cfg.clear()
    global_cfg.update(cfg)


def _merge(node: _CfgNode, loaded: dict[str, Any], path: _Keys, place: Any) -> None:
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


def _unknown_key(node: _CfgNode, path: _Keys, place: str) -> ConfigError:
    nearest = nearest_name(path[-1], node)
    section = ".".join(path[:-1])
    name = f"{section}.{nearest}" if section else nearest
    hint = f"Did you mean {name}?" if nearest else f"Known here: {', '.join(sorted(node))}."
    return ConfigError(f"{place}: {'.'.join(path)} is not a config key. {hint}")


def _coerce(value: Any, current: Any, path: _Keys, place: Any) -> Any:
    """Returns `value` in the type of `current`: strings are read as literals, ints as floats."""
    # A string stays as it was written where a string is due: an OUTPUT_DIR may be called 123.
    if isinstance(value, str) and not isinstance(current, str):
        value = _decode(value)
    wanted = type(current)
    if type(value) is wanted or (current is None and isinstance(value, _PLAIN_TYPES)):
        return value
    # `inf` is no literal, but what people write for it.
    if wanted is float and (value == "inf" or (type(value) is int and abs(value) < 2**1000)):
        return float(value)
    if wanted in (tuple, list) and isinstance(value, (tuple, list)):
        return wanted(value)
    must = "a plain value" if current is None else f"of type {wanted.__name__}, like {current!r}"
    raise ConfigError(
        f"{place(path)}: {'.'.join(path)} is {value!r}, of type {type(value).__name__}, but must "
        f"be {must}."
    )


def _decode(text: str) -> Any:
    """Returns the value that a string spells in Python's literals, or else the string."""
    try:
        value = _CfgNode._decode_cfg_value(text)
        # An integer of thousands of digits could not be shown in an error.
        repr(value)
    except (MemoryError, RecursionError, ValueError):
        return text
    return value


def _read_with_bases(
    node_type: type[CfgNode], filename: str, num_before: int = 0
) -> list[tuple[str, dict[str, Any]]]:
    """Reads a file and those below it, each once: names and contents, the ones that win last."""
    loaded = _read_mapping(node_type, filename)
    bases = loaded.pop(BASE_KEY, [])
    files: list[tuple[str, dict[str, Any]]] = []
    for base in bases if isinstance(bases, list) else [bases]:
        if not isinstance(base, str):
            raise ConfigError(f"{filename}: {BASE_KEY} is {bases!r}, but must be a path or a list.")
        if num_before + len(files) >= _MAX_BASES:
            raise ConfigError(
                f"{filename}: its {BASE_KEY} leads back to itself, or to over {_MAX_BASES} files."
            )
        path = os.path.expanduser(base)
        path = path if "://" in path else os.path.join(os.path.dirname(filename), path)
        files += _read_with_bases(node_type, path, num_before + len(files) + 1)
    return [*files, (filename, loaded)]


def _read_mapping(node_type: type[CfgNode], filename: str) -> dict[str, Any]:
    """Reads one YAML file without its bases."""
    try:
        with node_type._open_cfg(filename) as file:
            text = file.read(_MAX_CHARS + 1)
        if len(text) > _MAX_CHARS:
            raise yaml.YAMLError(_TOO_LARGE)
        loaded = yaml.load(text, _Loader)
        # An integer of thousands of digits could not be shown in an error.
        repr(loaded)
    except ConfigError:
        raise
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
    except Exception as e:
        # PyYAML lets through what its parts raise: a ValueError for a 13th month, or bytes that are
        # not UTF-8, a KeyError for `!!bool x`, a RecursionError for many brackets.
        raise ConfigError(f"{filename} is not valid YAML: {e}") from None
    if not isinstance(loaded, dict):
        found = "empty" if loaded is None else f"a {type(loaded).__name__}"
        raise ConfigError(
            f"The config file {filename!r} is {found}; it must hold sections and keys such as "
            "'SOLVER: {MAX_ITER: 100}'."
        )
    return loaded


def _merged(files: list[tuple[str, dict[str, Any]]]) -> tuple[dict[str, Any], dict[_Keys, str]]:
    """Returns what the files say together, and which of them says it."""
    merged: dict[str, Any] = {}
    places: dict[_Keys, str] = {}
    for filename, loaded in files:
        _overlay(merged, loaded, (), filename, places)
    return merged, places


def _overlay(
    base: dict[str, Any],
    loaded: dict[str, Any],
    path: _Keys,
    filename: str,
    places: dict[_Keys, str],
) -> None:
    for key, value in loaded.items():
        here = (*path, str(key))
        places[here] = filename
        if not isinstance(value, dict):
            base[key] = value
        elif isinstance(section := base.setdefault(key, {}), dict):
            _overlay(section, value, here, filename, places)
        else:
            raise ConfigError(
                f"{filename}: {'.'.join(here)} is a section here and a value below {BASE_KEY}; "
                "both must be sections."
            )


class _Loader(yaml.SafeLoader):
    """PyYAML's safe loader, for files that no alias makes larger than a config can be."""

    def get_single_node(self) -> Any:
        node = super().get_single_node()
        num_chars, depth = _measure(node, {}) if node else (0, 0)
        if num_chars > _MAX_CHARS or depth > _MAX_DEPTH:
            raise yaml.YAMLError(_TOO_LARGE)
        return node


def _measure(node: Any, known: dict[Any, tuple[float, int]]) -> tuple[float, int]:
    """Returns the characters and levels that a node stands for; infinity if it holds itself."""
    if node not in known:
        known[node] = math.inf, 0
        children = [] if isinstance(node, yaml.ScalarNode) else node.value
        if isinstance(node, yaml.MappingNode):
            children = [child for pair in node.value for child in pair]
        sizes = [_measure(child, known) for child in children] or [(len(node.value), 0)]
        known[node] = 1 + sum(size for size, _ in sizes), 1 + max(depth for _, depth in sizes)
    return known[node]
