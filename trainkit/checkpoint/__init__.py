"""Checkpoints that verify themselves, and appear whole or not at all."""

from trainkit.checkpoint.checkpointer import Checkpointer, DetectionCheckpointer
from trainkit.checkpoint.periodic import PeriodicCheckpointer

__all__ = ["Checkpointer", "DetectionCheckpointer", "PeriodicCheckpointer"]
