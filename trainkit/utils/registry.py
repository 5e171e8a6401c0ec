"""Registries and dotted names: where a string in a config finds a class."""

import importlib
import sys
from typing import Any

from fvcore.common.registry import Registry as _Registry

from trainkit.utils.errors import ConfigError, UnknownNameError, nearest_name


class Registry(_Registry):
    """fvcore's registry, with an error that lists the known names and the nearest one.

    Example:
        >>> HEADS = Registry("head")
        >>> @HEADS.register()
        ... class LinearHead: ...
        >>> HEADS.get("LinearHead").__name__
        'LinearHead'
    """

    def get(self, name: str) -> Any:
        """Returns what is registered as `name`.

        Raises:
            UnknownNameError: If nothing is.
        """
        if name not in self:
            raise UnknownNameError(self._name, name, (key for key, _ in self))
        return super().get(name)


def locate(name: str) -> Any:
    """Returns what a dotted name such as "torch.optim.SGD" leads to, importing what it has to.

    Raises:
        ConfigError: If it leads to nothing, with the nearest name.
    """
    found: Any = None
    parts = name.split(".")
    for index, part in enumerate(parts):
        path = ".".join(parts[: index + 1])
        if index and hasattr(found, part):
            found = getattr(found, part)
            continue
        try:
            found = importlib.import_module(path)
        except (ModuleNotFoundError, ValueError) as e:
            # A package that the module itself misses is not a wrong name.
            if getattr(e, "name", path) not in (path, ".".join(parts[:index])):
                raise
            known = dir(found) if index else {module.partition(".")[0] for module in sys.modules}
            nearest = nearest_name(part, known)
            hint = "Check the spelling, and that its package is installed."
            if nearest:
                hint = f"Did you mean {'.'.join([*parts[:index], nearest])!r}?"
            raise ConfigError(f"There is no {path!r}, as in {name!r}. {hint}") from None
    return found


def _convert_target_to_string(t: Any) -> str:
    """Returns the shortest dotted name that leads to a class or function.

    Raises:
        ConfigError: If no name does.
    """
    qualname = getattr(t, "__qualname__", "")
    parts = (getattr(t, "__module__", None) or "").split(".") if qualname else []
    for end in range(1, len(parts) + 1):
        name = ".".join([*parts[:end], qualname])
        try:
            if locate(name) == t:
                return name
        except ConfigError:
            continue
    raise ConfigError(f"No dotted name leads to {t!r}. Define it at the top level of a module.")
