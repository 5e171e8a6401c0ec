"""Batches: tensors nested in dicts, lists, tuples, named tuples, or anything with `.to`."""

from typing import Any

import torch


def move_to(batch: Any, device: torch.device) -> Any:
    """Returns `batch` with every tensor on `device`; what is already there is not copied.

    Args:
        batch: Any nesting of dicts, lists, tuples, named tuples, tensors and objects with `.to`;
            other leaves (strings, numbers) stay as they are.
        device: Where to. Copies from pinned memory do not block the host.
    """
    if isinstance(batch, torch.Tensor):
        return batch if batch.device == device else batch.to(device, non_blocking=True)
    if isinstance(batch, dict):
        return {key: move_to(value, device) for key, value in batch.items()}
    if isinstance(batch, tuple) and hasattr(batch, "_fields"):
        return type(batch)(*(move_to(value, device) for value in batch))
    if isinstance(batch, (list, tuple)):
        return type(batch)(move_to(value, device) for value in batch)
    if hasattr(batch, "to"):
        return batch.to(device)
    return batch


def batch_size(batch: Any) -> int | None:
    """Returns the number of samples in a batch, or None where that cannot be told.

    A list of nothing but per-sample dicts, lists or tuples has its length; otherwise the first
    tensor's first dimension counts.

    Example:
        >>> batch_size({"image": torch.zeros(8, 1, 28, 28), "label": torch.zeros(8)})
        8
    """
    if isinstance(batch, torch.Tensor):
        return batch.shape[0] if batch.ndim > 0 else None
    is_list = isinstance(batch, list) and len(batch) > 0
    if is_list and all(isinstance(sample, (dict, list, tuple)) for sample in batch):
        return len(batch)
    children = batch.values() if isinstance(batch, dict) else batch
    if isinstance(children, (str, bytes)) or not hasattr(children, "__iter__"):
        return None
    sizes = (batch_size(child) for child in children)
    return next((size for size in sizes if size is not None), None)
