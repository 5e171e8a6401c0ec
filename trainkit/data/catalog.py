"""Data sets by name: how to make each, and what is known about it."""

from collections import UserDict
from collections.abc import Callable
from typing import Any

from trainkit.utils.errors import ConfigError, UnknownNameError, nearest_name

_Names = list[str]


class _DatasetCatalog(UserDict[str, Callable[[], Any]]):
    """From a name to the function that makes the data set.

    The function takes no arguments and returns anything with `__len__` and `__getitem__`, such as a
    torch `Dataset` or a list of dicts, equal each time. It runs when the data set is asked for.

    Example:
        >>> catalog = _DatasetCatalog()
        >>> catalog.register("digits", lambda: [{"label": 3}, {"label": 1}])
        >>> len(catalog.get("digits"))
        2
    """

    def register(self, name: str, func: Callable[[], Any]) -> None:
        """Makes a data set known.

        Raises:
            ConfigError: If the name is taken, or `func` cannot be called.
        """
        if not callable(func):
            raise ConfigError(
                f"Data set {name!r} was registered with a {type(func).__name__}. Register a "
                "function without arguments that returns the data set."
            )
        if name in self:
            raise ConfigError(
                f"Data set {name!r} is already registered. Choose another name, or call "
                f"DatasetCatalog.remove({name!r}) first."
            )
        self[name] = func

    def get(self, name: str) -> Any:  # type: ignore[override]  # It makes what it returns.
        """Makes the data set registered as `name`; an unknown one is an UnknownNameError."""
        return self[name]()

    def remove(self, name: str) -> None:
        """Forgets a data set; an unknown one is an UnknownNameError, here and in `pop`."""
        self.pop(name)

    def __missing__(self, name: str) -> Any:
        raise UnknownNameError("data set", name, self)

    def __repr__(self) -> str:
        return f"DatasetCatalog({', '.join(self)})"

    def list(self) -> _Names:
        """Returns the registered names, in the order of registration."""
        return list(self)


class Metadata:
    """What is known about one data set, as attributes that are written once.

    Setting an attribute again to an equal value is allowed.

    Example:
        >>> Metadata("digits").set(classes=["zero", "one"]).classes
        ['zero', 'one']
    """

    name: str

    def __init__(self, name: str) -> None:
        self.name = name

    def __getattr__(self, key: str) -> Any:
        # Python asks here only after it found no such attribute.
        known = self.as_dict()
        nearest = nearest_name(key, known)
        hint = f" Did you mean {nearest!r}?" if nearest else ""
        raise AttributeError(
            f"The metadata of data set {known.get('name', '')!r} has no {key!r}.{hint} "
            f"Known: {', '.join(sorted(known))}."
        )

    def __setattr__(self, key: str, value: Any) -> None:
        known = self.as_dict()
        if key in known and known[key] != value:
            raise ConfigError(
                f"The metadata of data set {known['name']!r} already has {key!r} = {known[key]!r}, "
                f"which cannot become {value!r}. Register the changed data set under another name."
            )
        super().__setattr__(key, value)

    def set(self, **attributes: Any) -> "Metadata":
        """Sets several attributes and returns this object.

        Raises:
            ConfigError: If one has another value already.
        """
        for key, value in attributes.items():
            setattr(self, key, value)
        return self

    def get(self, key: str, default: Any = None) -> Any:
        """Returns an attribute, or `default` where there is none."""
        return self.as_dict().get(key, default)

    def as_dict(self) -> dict[str, Any]:
        """Returns all attributes, `name` among them."""
        return dict(self.__dict__)

    def __repr__(self) -> str:
        return f"Metadata({self.as_dict()})"


class _MetadataCatalog(UserDict[str, Metadata]):
    """From the name of a data set to its `Metadata`, which is made when first asked for."""

    def get(self, name: str) -> Metadata:  # type: ignore[override]  # It makes what is missing.
        """Returns the metadata of a data set, the same object each time."""
        return self.setdefault(name, Metadata(name))

    def remove(self, name: str) -> None:
        """Forgets the metadata of a data set; without any it is an UnknownNameError."""
        self.pop(name)

    def __missing__(self, name: str) -> Any:
        raise UnknownNameError("metadata of data set", name, self)

    def __repr__(self) -> str:
        return f"MetadataCatalog({', '.join(self)})"

    def list(self) -> _Names:
        """Returns the names that have metadata."""
        return list(self)


DatasetCatalog = _DatasetCatalog()
"""The data sets that a config can name."""

MetadataCatalog = _MetadataCatalog()
"""What is known about them."""
