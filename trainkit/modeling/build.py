"""Where `MODEL.META_ARCHITECTURE` and `MODEL.BACKBONE.NAME` find their classes.

A registered class is built by its classmethod `from_config(cfg)`, which returns the module itself,
or where it has none, as `cls(cfg)`.
"""

from typing import Any

import torch
from fvcore.common.config import CfgNode
from torch import nn

from trainkit.utils.device import resolve_device
from trainkit.utils.registry import Registry

META_ARCH_REGISTRY = Registry("MODEL.META_ARCHITECTURE")
"""Whole models. In training they return a dict of losses, in evaluation their outputs."""

BACKBONE_REGISTRY = Registry("MODEL.BACKBONE.NAME")
"""Modules that turn images into features."""


def build_model(cfg: CfgNode) -> nn.Module:
    """Builds `MODEL.META_ARCHITECTURE` on `MODEL.DEVICE`; does not load `MODEL.WEIGHTS`.

    Raises:
        UnknownNameError: If the model or its backbone is unknown.
        ConfigError: If the device does not exist here.
    """
    # A device that is not there is to be known before a large model is built.
    device = resolve_device(cfg.MODEL.DEVICE)
    model = _build(META_ARCH_REGISTRY.get(cfg.MODEL.META_ARCHITECTURE), cfg).to(device)
    if cfg.MODEL.CHANNELS_LAST:
        model.to(memory_format=torch.channels_last)  # type: ignore[call-overload]  # not annotated
    return model


def build_backbone(cfg: CfgNode) -> nn.Module:
    """Builds `MODEL.BACKBONE.NAME`, on the CPU.

    Raises:
        UnknownNameError: If the backbone is unknown.
    """
    return _build(BACKBONE_REGISTRY.get(cfg.MODEL.BACKBONE.NAME), cfg)


def _build(registered: Any, cfg: CfgNode) -> nn.Module:
    from_config = getattr(registered, "from_config", None)
    if any(hasattr(x, "__wrapped__") for x in (registered, registered.__init__)):
        # @configurable: the call itself takes the config.
        from_config = None
    module = registered(cfg) if from_config is None else from_config(cfg)
    if not isinstance(module, nn.Module):
        raise TypeError(
            f"{registered.__qualname__}{'' if from_config is None else '.from_config'} returned a "
            f"{type(module).__name__}, but has to return the torch.nn.Module itself."
        )
    return module
