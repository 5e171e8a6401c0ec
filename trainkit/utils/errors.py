"""The errors that a user can mend from their text alone.

A tool prints these without a traceback and exits with 1; everything else is a defect, of ours or in
the user's own code, and keeps its traceback. Messages name the value, its place and the mend.
"""

import difflib
from collections.abc import Iterable


class ConfigError(ValueError):
    """A setting, argument or input that cannot work."""


class UnknownNameError(KeyError):
    """A name that nothing is known by.

    Example:
        >>> str(UnknownNameError("optimizer", "SDG", ["SGD", "Adam"]))
        "Unknown optimizer 'SDG'. Did you mean 'SGD'? Known: Adam, SGD."
    """

    def __init__(self, kind: str, name: str, known: Iterable[str]) -> None:
        names = sorted(known)
        nearest = nearest_name(name, names)
        hint = f" Did you mean {nearest!r}?" if nearest else ""
        self.message = f"Unknown {kind} {name!r}.{hint} Known: {', '.join(names) or 'none'}."
        # All arguments stay in `args`, so that the error survives pickling between processes.
        super().__init__(kind, name, names)

    def __str__(self) -> str:
        return self.message


class CheckpointError(RuntimeError):
    """A checkpoint that cannot be written, read, or used for this model."""


class CheckpointWriteError(CheckpointError):
    """A checkpoint that the storage refused: the state is sound, and a later save may succeed."""


USER_ERRORS = (ConfigError, UnknownNameError, CheckpointError)


def add_note(error: BaseException, note: str) -> None:
    """Adds a line to what a traceback shows of an error: `error.add_note`, on Python 3.10 too.

    Example:
        >>> error = ConfigError("no")
        >>> add_note(error, "on rank 1")
        >>> error.__notes__
        ['on rank 1']
    """
    vars(error).setdefault("__notes__", []).append(note)


def nearest_name(name: str, known: Iterable[str]) -> str | None:
    """Returns the known name that looks most like `name`, or None when none comes close."""
    by_lower = {candidate.lower(): candidate for candidate in known}
    matches = difflib.get_close_matches(name.lower(), by_lower, n=1, cutoff=0.6)
    return by_lower[matches[0]] if matches else None
