"""What a model may be wrapped in, and how long what is iterated is."""

from typing import Any, cast

from torch import nn
from torch.nn.parallel import DataParallel, DistributedDataParallel


def unwrap(model: nn.Module) -> nn.Module:
    """Returns the module inside DistributedDataParallel, DataParallel and torch.compile."""
    while True:
        if isinstance(model, (DistributedDataParallel, DataParallel)):
            model = model.module
        elif isinstance(getattr(model, "_orig_mod", None), nn.Module):
            # What torch.compile returns; it shares its parameters with the module within.
            model = cast(nn.Module, model._orig_mod)
        else:
            return model


def known_length(iterable: Any) -> int | None:
    """Returns how many items there are, or None where that cannot be told.

    A DataLoader always has `__len__`, which fails if its data set has none.
    """
    try:
        return len(iterable)
    except TypeError:
        return None
