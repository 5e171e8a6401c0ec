"""The hooks that come with trainkit."""

from trainkit.engine.hook_base import HookBase
from trainkit.engine.hooks.callback import CallbackHook
from trainkit.engine.hooks.checkpoint import BestCheckpointer, PeriodicCheckpointer
from trainkit.engine.hooks.early_stopping import EarlyStopping
from trainkit.engine.hooks.ema import EMA, averaged_weights
from trainkit.engine.hooks.evaluation import EvalHook
from trainkit.engine.hooks.lr_scheduler import LRScheduler
from trainkit.engine.hooks.memory import TorchMemoryStats
from trainkit.engine.hooks.precise_bn import PreciseBN
from trainkit.engine.hooks.profiler import AutogradProfiler, TorchProfiler
from trainkit.engine.hooks.time_limit import TimeLimit
from trainkit.engine.hooks.timer import IterationTimer
from trainkit.engine.hooks.validation_loss import ValidationLoss
from trainkit.engine.hooks.writer import PeriodicWriter

__all__ = [
    "EMA",
    "AutogradProfiler",
    "BestCheckpointer",
    "CallbackHook",
    "EarlyStopping",
    "EvalHook",
    "HookBase",
    "IterationTimer",
    "LRScheduler",
    "PeriodicCheckpointer",
    "PeriodicWriter",
    "PreciseBN",
    "TimeLimit",
    "TorchMemoryStats",
    "TorchProfiler",
    "ValidationLoss",
    "averaged_weights",
]
