"""Every configuration key with its default and unit, and the node type that holds them."""

from trainkit.config.config import CfgNode
from trainkit.config.defaults import get_cfg

__all__ = ["CfgNode", "get_cfg"]
