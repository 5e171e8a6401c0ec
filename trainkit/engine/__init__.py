"""The trainers, their hooks, and how they are launched."""

from trainkit.engine.defaults import DefaultTrainer
from trainkit.engine.exit_codes import exit_codes
from trainkit.engine.hooks.callback import CallbackHook
from trainkit.engine.hooks.checkpoint import BestCheckpointer, PeriodicCheckpointer
from trainkit.engine.hooks.early_stopping import EarlyStopping
from trainkit.engine.hooks.ema import EMA
from trainkit.engine.hooks.evaluation import EvalHook
from trainkit.engine.hooks.lr_scheduler import LRScheduler
from trainkit.engine.hooks.memory import TorchMemoryStats
from trainkit.engine.hooks.precise_bn import PreciseBN
from trainkit.engine.hooks.profiler import AutogradProfiler, TorchProfiler
from trainkit.engine.hooks.time_limit import TimeLimit
from trainkit.engine.hooks.timer import IterationTimer
from trainkit.engine.hooks.validation_loss import ValidationLoss
from trainkit.engine.hooks.writer import PeriodicWriter
from trainkit.engine.launch import DEFAULT_TIMEOUT, launch
from trainkit.engine.predictor import DefaultPredictor
from trainkit.engine.setup import (
    create_ddp_model,
    default_argument_parser,
    default_setup,
    default_writers,
)
from trainkit.engine.train_loop import AMPTrainer, HookBase, SimpleTrainer, TrainerBase

__all__ = [
    "DEFAULT_TIMEOUT",
    "EMA",
    "AMPTrainer",
    "AutogradProfiler",
    "BestCheckpointer",
    "CallbackHook",
    "DefaultPredictor",
    "DefaultTrainer",
    "EarlyStopping",
    "EvalHook",
    "HookBase",
    "IterationTimer",
    "LRScheduler",
    "PeriodicCheckpointer",
    "PeriodicWriter",
    "PreciseBN",
    "SimpleTrainer",
    "TimeLimit",
    "TorchMemoryStats",
    "TorchProfiler",
    "TrainerBase",
    "ValidationLoss",
    "create_ddp_model",
    "default_argument_parser",
    "default_setup",
    "default_writers",
    "exit_codes",
    "launch",
]
