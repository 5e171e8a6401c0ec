"""A model at work on other data, in training mode, which training does not feel."""

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
from torch import nn

from trainkit.engine.losses import TensorCopies
from trainkit.utils.events.storage import EventStorage
from trainkit.utils.random import get_rng_state, set_rng_state


class _AsItIs(nn.Module):
    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        # In a tuple it is no submodule, which `eval` would reach.
        self._model = (model,)

    def forward(self, batch: Any) -> Any:
        return self._model[0](batch)


@contextlib.contextmanager
def undisturbed(model: nn.Module) -> Iterator[nn.Module]:
    """Lets a model run without gradients, and leaves no trace of that in training.

    Afterwards, also after an error, its buffers, such as running statistics, and the generators are
    as before, and the metrics that it put are gone.

    Args:
        model: Without a wrapper, which may communicate.

    Yields:
        A module that runs the model; its `eval` and `train` leave the model's modes alone.
    """
    device = next(model.parameters()).device
    buffers = TensorCopies(lambda: dict(model.named_buffers()))
    rng_state = get_rng_state(device)
    try:
        with EventStorage(), torch.no_grad():
            yield _AsItIs(model)
    finally:
        buffers.restore()
        set_rng_state(rng_state, device)
