"""Fingerprints: short texts that are equal when values are equal bit for bit."""

import hashlib
import random
from collections import deque
from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from torch import nn

_PLAIN = (bool, int, float, complex, str, bytes, type(None))
_MAX_SHOWN = 60


def fingerprint(value: Any) -> str:
    """Returns a short plain value as Python writes it, and a longer one as its type and a hash.

    Tensors and arrays count with dtype, shape and every bit. Containers, modules (their states),
    generators (theirs too) and batches of a class of their own (with `.to`) are looked into; of any
    other object only the type counts.

    Example:
        >>> fingerprint({"lr": (1, 0.1), "count": torch.tensor(2)})
        "{'count': int64 2, 'lr': [1, 0.1]}"
    """
    if isinstance(value, torch.Tensor) and value.ndim == 0:
        return f"{value.dtype} {value.item()!r}".removeprefix("torch.")
    if isinstance(value, (torch.Tensor, np.ndarray)):
        array = _bytes_of(value) if isinstance(value, torch.Tensor) else value
        kind = f"{value.dtype}{list(value.shape)}".removeprefix("torch.")
        content = array.tolist() if array.dtype.hasobject else np.ascontiguousarray(array).tobytes()
        return f"{kind} #{_hash(content)}"
    text = _text(value)
    return text if len(text) <= _MAX_SHOWN else f"{type(value).__name__} #{_hash(text)}"


def fingerprints(value: Any, name: str = "") -> Iterator[tuple[str, str]]:
    """Yields name and fingerprint of each value in nested dicts.

    Example:
        >>> list(fingerprints({"a": {"b": 1, "c": 2}}))
        [('a.b', '1'), ('a.c', '2')]
    """
    if isinstance(value, dict) and value:
        for key, inner in value.items():
            yield from fingerprints(inner, f"{name}.{key}" if name else str(key))
    else:
        yield name, fingerprint(value)


def _text(value: Any) -> str:
    if isinstance(value, dict):
        # In an order that does not depend on who was put in first.
        items = sorted((repr(key), fingerprint(inner)) for key, inner in value.items())
        return f"{{{', '.join(f'{key}: {inner}' for key, inner in items)}}}"
    if isinstance(value, (list, tuple, deque)):
        return f"[{', '.join(map(fingerprint, value))}]"
    if isinstance(value, (set, frozenset)):
        return f"{{{', '.join(sorted(map(fingerprint, value)))}}}"
    if isinstance(value, np.generic):
        return repr(value.item())
    state = _state(value)
    if state is not None:
        return f"{type(value).__name__}({fingerprint(state)})"
    return repr(value) if isinstance(value, _PLAIN) else type(value).__name__


def _state(value: Any) -> Any:
    if isinstance(value, nn.Module):
        return value.state_dict()
    if isinstance(value, random.Random):
        return value.getstate()
    if isinstance(value, (torch.Generator, np.random.RandomState)):
        return value.get_state()
    if isinstance(value, np.random.Generator):
        return value.bit_generator.state
    return vars(value) if hasattr(value, "to") and hasattr(value, "__dict__") else None


def _bytes_of(tensor: torch.Tensor) -> Any:
    tensor = tensor.detach().resolve_conj().resolve_neg()
    dense = tensor if tensor.layout == torch.strided else tensor.to_dense()
    return dense.cpu().contiguous().reshape(-1).view(torch.uint8).numpy()


def _hash(content: Any) -> str:
    data = content if isinstance(content, bytes) else repr(content).encode()
    return hashlib.sha256(data).hexdigest()[:16]
