"""Every configuration key with its default and unit, and the node type that holds them."""

from trainkit.config.config import CfgNode, global_cfg, set_global_cfg
from trainkit.config.configurable import configurable
from trainkit.config.defaults import get_cfg
from trainkit.config.instantiate import instantiate
from trainkit.config.lazy import LazyCall, LazyConfig

__all__ = [
    "CfgNode",
    "LazyCall",
    "LazyConfig",
    "configurable",
    "get_cfg",
    "global_cfg",
    "instantiate",
    "set_global_cfg",
]
