"""Functions and objects that plain pickle cannot bring to another process."""

import importlib
import pickle
from typing import Any

from trainkit.utils.errors import ConfigError


class PicklableWrapper:
    """Holds an object, such as a lambda, and pickles it by cloudpickle where pickle cannot.

    It is called like the object and has its attributes. What arrives is unpickled by plain pickle,
    which runs code: as always, only for what comes from a process of your own.
    """

    def __init__(self, obj: Any) -> None:
        # A wrapper of a wrapper is one.
        self._obj: Any = obj._obj if isinstance(obj, PicklableWrapper) else obj

    def __reduce__(self) -> tuple[Any, ...]:
        try:
            pickled = pickle.dumps(self._obj)
        except (pickle.PicklingError, AttributeError, TypeError) as e:
            try:
                pickled = importlib.import_module("cloudpickle").dumps(self._obj)
            except ImportError:
                raise ConfigError(
                    f"{self._obj!r} cannot be pickled ({e}), and cloudpickle, which could, is not "
                    "installed. Run pip install 'trainkit[pickle]', or use what a module defines "
                    "at its top level."
                ) from None
        return _unpickle, (pickled,)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Calls the object."""
        return self._obj(*args, **kwargs)

    def __getattr__(self, name: str) -> Any:
        # While it is copied or unpickled, there is no object yet.
        if name == "_obj":
            raise AttributeError(name)
        return getattr(self._obj, name)


def _unpickle(pickled: bytes) -> PicklableWrapper:
    return PicklableWrapper(pickle.loads(pickled))
