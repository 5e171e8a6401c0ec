"""Layer-wise decay of the learning rate: the further a layer is from the output, the slower."""

import itertools
from collections.abc import Callable
from typing import Any

from torch import nn

from trainkit.utils.errors import ConfigError

NORM_MODULE_TYPES = (
    nn.BatchNorm1d,
    nn.BatchNorm2d,
    nn.BatchNorm3d,
    nn.SyncBatchNorm,
    nn.InstanceNorm1d,
    nn.InstanceNorm2d,
    nn.InstanceNorm3d,
    nn.GroupNorm,
    nn.LayerNorm,
    nn.RMSNorm,
)
"""Modules whose parameters get `SOLVER.WEIGHT_DECAY_NORM`."""


def layer_decay_func(model: nn.Module, decay: float) -> Callable[[str], float]:
    """Returns the factor `decay ** depth` of a parameter's learning rate, by its full name.

    Clark et al., "ELECTRA" (arXiv:2003.10555), app. B; for images Bao et al., "BEiT"
    (arXiv:2106.08254), whose numbers of layers this gives for a vision transformer.

    The depth is the number of layers between a parameter and the output. A model tells it by a
    method `lr_depth(name)`. For others, layers are counted in the order of registration: each item
    of an outermost `nn.Sequential` or `nn.ModuleList` is one, and so is all that stands before,
    between or behind such lists; a norm that is such an item belongs to the item before it.

    Args:
        model: The model, not wrapped for several processes.
        decay: In (0, 1].

    Raises:
        ConfigError: If the model has no layers in this sense.

    Example:
        >>> net = nn.Sequential(nn.Linear(2, 2), nn.LayerNorm(2), nn.ReLU(), nn.Linear(2, 1))
        >>> factor = layer_decay_func(net, 0.5)
        >>> [factor(name) for name, _ in net.named_parameters()]
        [0.5, 0.5, 0.5, 0.5, 1.0, 1.0]
    """
    lr_depth: Any = getattr(model, "lr_depth", None)
    if lr_depth is not None:
        # Of a compiled model too, whose names lead through its wrapper.
        return lambda name: float(decay ** lr_depth(name.replace("_orig_mod.", "")))
    layers = _layers(model)
    top = max(layers.values(), default=0)
    if top == min(layers.values(), default=0):
        raise ConfigError(
            f"SOLVER.LAYER_DECAY is {decay}, but {type(model).__name__} has no nn.Sequential or "
            "nn.ModuleList whose items would be its layers. Give it a method lr_depth(name) that "
            "returns how many layers are between a parameter and the output."
        )
    return lambda name: float(decay ** (top - layers[name]))


def _layers(model: nn.Module) -> dict[str, int]:
    """Returns the layer of each parameter, counted from the input."""
    layers: dict[str, int] = {}
    layer, current = 0, None
    for name, _ in model.named_parameters():
        path = name.rpartition(".")[0]
        # "a", "a.b", "a.b.c": the first one in a list is an item of an outermost list.
        prefixes = itertools.accumulate(path.split("."), "{}.{}".format)
        item = next((p for p in prefixes if _is_list(model, p.rpartition(".")[0])), "")
        is_own_norm = path == item and isinstance(model.get_submodule(path), NORM_MODULE_TYPES)
        layer += item != current and not is_own_norm
        layers[name], current = layer, item
    return layers


def _is_list(model: nn.Module, path: str) -> bool:
    return isinstance(model.get_submodule(path), (nn.Sequential, nn.ModuleList))
