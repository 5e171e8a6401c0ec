"""What a checkpoint may hold: tensors and plain values, which load without running code."""

from collections import Counter, OrderedDict
from collections.abc import Iterator
from typing import Any

import numpy as np
import torch

from trainkit.utils.errors import CheckpointError

# What torch's weights_only unpickler builds without being asked to, the same in 2.6 and 2.13. It
# looks at exact types, so a subclass of one of these is another type.
_VALUES = (
    *(type(None), bool, float, complex, str, bytes, bytearray),
    *(torch.Size, torch.dtype, torch.device, torch.layout),
)
_TENSORS = (torch.Tensor, torch.nn.Parameter)
_MAPPINGS = (dict, OrderedDict, Counter)
_SEQUENCES = (list, tuple, set)
_MAX_INT_BITS = 255 * 8 - 1
_MAX_SHOWN = 5


def check_storable(data: Any) -> None:
    """Refuses what `torch.load(weights_only=True)` would not load again.

    Classes made known by `torch.serialization.add_safe_globals` pass.

    Args:
        data: What is to be saved: any nesting of dicts, lists, tuples and sets.

    Raises:
        CheckpointError: Naming the path of keys, the type, and what to store instead.
    """
    known = set(torch.serialization.get_safe_globals())
    refused = [
        f"  {path or 'the data'}: {_describe(value)}"
        for path, value in _leaves(data, "", set())
        if not _is_storable(value) and type(value) not in known
    ]
    if refused:
        more = [f"  … and {len(refused) - _MAX_SHOWN} more"] if len(refused) > _MAX_SHOWN else []
        raise CheckpointError(
            "A checkpoint holds tensors and plain values only, so that loading it runs no code. "
            "Change the state_dict that returns\n" + "\n".join(refused[:_MAX_SHOWN] + more)
        )


def tensor_bytes(data: Any) -> int:
    """Returns the bytes that tensors and byte strings take in a file; shared memory counts once."""
    storages = {s._cdata: s.nbytes() for s in (t.untyped_storage() for t in strided_tensors(data))}
    values = (value for _, value in _leaves(data, "", set()))
    strings = {id(v): len(v) for v in values if type(v) in (bytes, bytearray)}
    return sum(storages.values()) + sum(strings.values())


def strided_tensors(data: Any) -> list[torch.Tensor]:
    """Returns the tensors in `data`, wherever they are, whose values lie in a storage."""
    values = (value for _, value in _leaves(data, "", set()))
    tensors = (value for value in values if type(value) in _TENSORS)
    return [t for t in tensors if t.layout == torch.strided and not t.is_meta]


def _leaves(data: Any, path: str, seen: set[int]) -> Iterator[tuple[str, Any]]:
    """Yields everything that is not a container, with its path; a container counts once."""
    if type(data) in _MAPPINGS or type(data) in _SEQUENCES:
        if id(data) in seen:
            return
        seen.add(id(data))
    if type(data) in _MAPPINGS:
        for key, value in data.items():
            if type(key) is not str:
                yield from _leaves(key, f"{path} (a key)", seen)
            yield from _leaves(value, f"{path}.{key}" if path else str(key), seen)
    elif type(data) in _SEQUENCES:
        for index, value in enumerate(data):
            yield from _leaves(value, f"{path}[{index}]", seen)
    else:
        yield path, data
    if type(data) in (OrderedDict, *_TENSORS):
        # These are pickled with their attributes: the _metadata of a model's state_dict is one.
        for key, value in vars(data).items():
            yield from _leaves(value, f"{path}.{key}", seen)


def _is_storable(value: Any) -> bool:
    if type(value) is int:
        return value.bit_length() <= _MAX_INT_BITS
    return type(value) in _VALUES or type(value) in _TENSORS


def _describe(value: Any) -> str:
    kind = f"{type(value).__module__}.{type(value).__qualname__}".removeprefix("builtins.")
    if type(value) is int:
        return f"{kind} of {value.bit_length()} bits; use str(x)"
    if isinstance(value, np.ndarray):
        return f"{kind} of shape {value.shape}; use torch.from_numpy(x)"
    if isinstance(value, (np.generic, int, float)):
        return f"{kind} {value!r}; {_advise(value)}"
    return f"{kind}; {_advise(value)}"


def _advise(value: Any) -> str:
    if isinstance(value, np.generic):
        return f"use {type(value.item()).__name__}(x)"
    if isinstance(value, torch.Tensor):
        return "use a plain tensor"
    for plain in (int, float, str, dict, list, tuple):
        if isinstance(value, plain):
            return f"use {plain.__name__}(x)"
    if isinstance(value, frozenset):
        return "use set(x)"
    return "use tensors, numbers, strings, lists and dicts"
