"""Runs Python config files, whose relative imports lead to other config files."""

import builtins
import os
import traceback
from types import ModuleType
from typing import TYPE_CHECKING, Any

from trainkit.utils.errors import ConfigError, add_note, nearest_name
from trainkit.utils.file_io import PathManager

if TYPE_CHECKING:
    from omegaconf import DictConfig


def omegaconf() -> Any:
    """Returns the module omegaconf; raises a ConfigError if it is not installed."""
    try:
        import omegaconf
    except ImportError:
        raise ConfigError(
            "A LazyConfig needs omegaconf, which is missing: pip install 'trainkit[lazy]'."
        ) from None
    return omegaconf


def lazy_dict(content: Any) -> "DictConfig":
    """Returns an omegaconf node with a copy of a mapping, whose values may be any objects."""
    node: DictConfig = omegaconf().DictConfig(content, flags={"allow_objects": True})
    return node


def run_config_file(path: str, importers: tuple[str, ...] = ()) -> dict[str, Any]:
    """Runs a Python config file and returns its names; dicts at its top have become DictConfigs.

    The file gets builtins of its own, in which a relative import runs the config file that it leads
    to, each time anew and without `__init__.py`. So nothing in this process is patched, and no
    config file stays in `sys.modules`.

    Args:
        path: Path or address of the file. It is code: run only what you trust.
        importers: The files whose imports lead here.

    Raises:
        ConfigError: If the file cannot be read or raises; it names file, line and importers.
    """
    path = path if "://" in path else os.path.abspath(path)
    if path in importers:
        raise ConfigError(f"Config files import each other: {' -> '.join([*importers, path])}.")
    text = _read(path)

    def import_(
        name: str, globals_: Any = None, locals_: Any = None, fromlist: Any = (), level: int = 0
    ) -> Any:
        if level == 0:
            return builtins.__import__(name, globals_, locals_, fromlist)
        return _import_relative((*importers, path), name, fromlist, level)

    own_builtins = {**vars(builtins), "__import__": import_}
    names: dict[str, Any] = {"__name__": path, "__file__": path, "__builtins__": own_builtins}
    try:
        exec(compile(text, path, "exec", dont_inherit=True), names)
    except Exception as e:
        frames = traceback.walk_tb(e.__traceback__)
        lines = [line for frame, line in frames if frame.f_code.co_filename == path]
        place = f"{path}, line {lines[-1] if lines else getattr(e, 'lineno', None)}"
        if not isinstance(e, ConfigError):
            raise ConfigError(f"{place}: {type(e).__name__}: {e}") from e
        add_note(e, f"That was found in {place}.")
        raise
    return {k: lazy_dict(v) if type(v) is dict else v for k, v in names.items() if k[:2] != "__"}


def _read(path: str) -> bytes:
    try:
        with PathManager.open(path, "rb") as file:
            return bytes(file.read())
    except OSError as e:
        folder, name = os.path.split(path)
        nearest = nearest_name(name, os.listdir(folder) if os.path.isdir(folder) else ())
        hint = f"Did you mean {nearest!r}?" if nearest else "Check the path."
        error = f"Cannot read the config file {path!r}: {e.strerror or e}. {hint}"
        raise ConfigError(error) from None


def _import_relative(
    importers: tuple[str, ...], name: str, fromlist: tuple[str, ...], level: int
) -> ModuleType:
    """Returns what `from {level dots}{name} import {fromlist}` takes its names from."""
    folder = importers[-1]
    for _ in range(level):
        inner, folder = folder, os.path.dirname(folder)
        if folder == inner or ("://" in inner and "://" not in folder):
            raise ConfigError(
                f"'from {'.' * level}{name} import …' leads out of the file system. Use fewer dots."
            )
    path = "/".join([folder, *filter(None, name.split("."))])
    module = ModuleType(name)
    if name and (os.path.isfile(f"{path}.py") or not os.path.isdir(path)):
        vars(module).update(run_config_file(f"{path}.py", importers))
    else:
        for each in fromlist:
            child = ModuleType(each)
            vars(child).update(run_config_file(f"{path}/{each}.py", importers))
            setattr(module, each, child)
    return module
