"""`EMA`: a moving average of the weights, to be evaluated in their place."""

import contextlib
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import torch
from torch import nn
from torch.optim.swa_utils import get_ema_multi_avg_fn

from trainkit.engine.hook_base import HookBase
from trainkit.engine.losses import TensorCopies
from trainkit.utils.errors import CheckpointError, ConfigError
from trainkit.utils.wrappers import unwrap


class EMA(HookBase):
    """Averages the weights of all steps, later ones with more weight; training does not feel it.

    In update t, from 0 on, the average becomes `d * average + (1 - d) * weights`, where d is
    `min(decay, (1 + t) / (10 + t))`, as in TensorFlow's `ExponentialMovingAverage(num_updates=t)`:
    the first weights are soon forgotten. Saved buffers of floating point, such as running
    statistics, are averaged too, to fit the weights; others stay the model's. Register it before
    the checkpointer and evaluation. Checkpoints hold rank 0's averages; only buffers may differ.

    Args:
        model: The trainer's model.
        decay: The largest d, in [0, 1).

    Raises:
        ConfigError: If `decay` is outside [0, 1).
    """

    # Ranks that judge together judge one model.
    is_collective = True

    def __init__(self, model: nn.Module, decay: float = 0.999) -> None:
        if not 0 <= decay < 1:
            raise ConfigError(f"decay of EMA (MODEL.EMA.DECAY) is {decay}; it must be in [0, 1).")
        self._model = unwrap(model)
        self._decay = decay
        self._num_updates = 0
        self._averages: dict[str, torch.Tensor] = {}
        # Where each tensor is found: a model may put another buffer in the place of one.
        self._places: dict[str, tuple[dict[str, Any], str]] = {}

    def before_train(self) -> None:
        """Begins with the weights as they are, unless this run goes on with averages."""
        if self.trainer.iter == 0 or not self._averages:
            self._num_updates, self._places = 0, _find_places(self._model)
            self._averages = {name: t.detach().clone() for name, t in self._tensors().items()}

    def after_step(self) -> None:
        """Averages the weights after the update."""
        decay = min(self._decay, (1 + self._num_updates) / (10 + self._num_updates))
        average = get_ema_multi_avg_fn(decay)
        average(list(self._averages.values()), list(self._tensors().values()), 0)
        self._num_updates += 1

    @contextlib.contextmanager
    def applied(self) -> Iterator[None]:
        """Puts the averages into the model's tensors, and back what was there when the block ends.

        Until there are averages, the model stays as it is.
        """
        with torch.no_grad():
            copies, own = TensorCopies(self._tensors), self._tensors()
        try:
            with torch.no_grad():
                for name, average in self._averages.items():
                    own[name].copy_(average)
            yield
        finally:
            copies.restore()

    def averages_of(self, tensors: Iterable[torch.Tensor]) -> list[torch.Tensor]:
        """Returns the averages of some of the model's tensors."""
        names = {id(tensor): name for name, tensor in self._tensors().items()}
        return [self._averages[names[id(tensor)]] for tensor in tensors]

    def state_dict(self) -> dict[str, Any]:
        """Returns the averages, by the names of the model's tensors."""
        state = {"num_updates": self._num_updates, "averages": self._averages}
        return state if self._averages else {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Goes on with the averages.

        Raises:
            CheckpointError: If they are of another model.
        """
        self._places = _find_places(self._model)
        loaded, own = state["averages"], self._tensors()
        shapes = ({(name, tuple(t.shape)) for name, t in side.items()} for side in (loaded, own))
        if differences := set.symmetric_difference(*shapes):
            raise CheckpointError(
                "The averaged weights (EMA) in the checkpoint are of another model. They differ in "
                f"{', '.join(sorted({name for name, _ in differences}))}. Load them into that "
                "model, or train without EMA (MODEL.EMA.ENABLED False)."
            )
        self._num_updates = state["num_updates"]
        with torch.no_grad():
            self._averages = {n: torch.empty_like(t).copy_(loaded[n]) for n, t in own.items()}

    def _tensors(self) -> dict[str, torch.Tensor]:
        return {name: tensors[key] for name, (tensors, key) in self._places.items()}


def averaged_weights(
    model: nn.Module, checkpoint: Mapping[str, Any]
) -> contextlib.AbstractContextManager[None]:
    """Returns the context in which a model has the averages of a checkpoint, if that holds any.

    Args:
        model: The model.
        checkpoint: What `Checkpointer.load` and `resume_or_load` return.

    Raises:
        CheckpointError: If the averages are of another model.
    """
    ema = EMA(model)
    states = checkpoint.get("trainer", {}).get("hooks", {}).values()
    # By what it holds: the hook may be of a subclass.
    for state in (s for s in states if isinstance(s, dict) and "averages" in s):
        ema.load_state_dict(state)
    return ema.applied()


def _find_places(model: nn.Module) -> dict[str, tuple[dict[str, Any], str]]:
    places = {}
    for path, module in model.named_modules():
        for tensors in (module._parameters, module._buffers):
            for key, tensor in tensors.items():
                is_kept = key not in module._non_persistent_buffers_set
                if tensor is not None and tensor.is_floating_point() and is_kept:
                    places[f"{path}.{key}" if path else key] = tensors, key
    return places
