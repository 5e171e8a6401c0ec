"""The hooks of a `DefaultTrainer`, in the order in which they run, each with its reason."""

import weakref
from typing import Any

from trainkit.engine.hook_base import HookBase
from trainkit.engine.hooks.checkpoint import BestCheckpointer, PeriodicCheckpointer
from trainkit.engine.hooks.early_stopping import EarlyStopping
from trainkit.engine.hooks.ema import EMA
from trainkit.engine.hooks.evaluation import EvalHook
from trainkit.engine.hooks.lr_scheduler import LRScheduler
from trainkit.engine.hooks.precise_bn import PreciseBN
from trainkit.engine.hooks.time_limit import TimeLimit
from trainkit.engine.hooks.timer import IterationTimer
from trainkit.engine.hooks.validation_loss import ValidationLoss
from trainkit.engine.hooks.writer import PeriodicWriter
from trainkit.utils import comm


def default_hooks(trainer: Any) -> list[HookBase | None]:
    """Returns the hooks that the config of a `DefaultTrainer` asks for, None for all others.

    Args:
        trainer: The trainer, which owns the hooks and is not owned by them.
    """
    cfg, model, checkpointer = trainer.cfg, trainer.model, trainer.checkpointer
    test, stop, on_error = cfg.TEST, cfg.TEST.EARLY_STOPPING, cfg.CHECKPOINT.ON_ERROR
    period, num_iter = test.EVAL_PERIOD, test.PRECISE_BN.NUM_ITER
    # What cannot be built on rank 0 ends all.
    writers = comm.together(lambda: trainer.build_writers() if comm.is_main_process() else [])
    # A hook must not own its trainer.
    proxy = weakref.proxy(trainer)
    return [
        # First, so that it times the step and not the other hooks.
        IterationTimer(),
        # Before the checkpointer, which saves the rate of the next step.
        LRScheduler(metric=cfg.SOLVER.PLATEAU.METRIC),
        # What follows changes what is saved and evaluated, so it comes before both.
        EMA(model, cfg.MODEL.EMA.DECAY) if cfg.MODEL.EMA.ENABLED else None,
        PreciseBN(
            period,
            model,
            trainer.build_train_loader(cfg),
            min(num_iter, cfg.LIMIT_BATCHES or num_iter),
        )
        if test.PRECISE_BN.ENABLED
        else None,
        # Before the checkpointer, which saves a run that is asked to leave.
        TimeLimit(cfg.SOLVER.MAX_SECONDS) if cfg.SOLVER.MAX_SECONDS else None,
        # Before evaluation: a crash there costs nothing, and a resume evaluates again.
        PeriodicCheckpointer(
            checkpointer,
            cfg.SOLVER.CHECKPOINT_PERIOD,
            max_to_keep=cfg.CHECKPOINT.MAX_TO_KEEP or None,
            on_error=on_error,
            is_async=cfg.CHECKPOINT.ASYNC,
        ),
        *(_validation_loss(trainer, name) for name in cfg.DATASETS.VAL),
        EvalHook(period, lambda: proxy._evaluate()),
        # After evaluation, whose results these two judge.
        BestCheckpointer(period, checkpointer, test.BEST_METRIC, test.BEST_MODE, on_error=on_error)
        if test.BEST_METRIC
        else None,
        EarlyStopping(stop.METRIC, stop.PATIENCE, stop.MODE, stop.MIN_DELTA, stop.THRESHOLD)
        if stop.METRIC
        else None,
        # Last, so that it writes what all others have put.
        PeriodicWriter(writers, cfg.LOG_PERIOD, on_error=on_error) if writers else None,
    ]


def _validation_loss(trainer: Any, name: str) -> ValidationLoss:
    cfg = trainer.cfg
    prefix = "val" if len(cfg.DATASETS.VAL) == 1 else f"val/{name}"
    loader = trainer.build_test_loader(cfg, name)
    limit = cfg.LIMIT_BATCHES or None
    return ValidationLoss(cfg.TEST.EVAL_PERIOD, trainer.model, loader, limit, prefix)
