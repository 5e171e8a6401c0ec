"""Registries: where a string in a config finds a class."""

from typing import Any

from fvcore.common.registry import Registry as _Registry

from trainkit.utils.errors import UnknownNameError


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
