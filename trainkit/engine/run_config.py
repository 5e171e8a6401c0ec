"""The config of a run: as it was given, and with what only the run itself can tell."""

import logging
from collections.abc import Callable, Iterable
from typing import Any

from torch.optim import Optimizer

from trainkit.checkpoint.checkpointer import Checkpointer
from trainkit.config.config import CfgNode
from trainkit.config.epochs import epochs_to_iterations, uses_epochs
from trainkit.data.build import TrainLoader
from trainkit.data.catalog import DatasetCatalog
from trainkit.solver.build import optimizer_implementation
from trainkit.utils.errors import ConfigError, UnknownNameError
from trainkit.utils.wrappers import known_length

logger = logging.getLogger(__name__)


def with_seed(cfg: CfgNode, seed: int) -> CfgNode:
    """Returns a copy of a config with the seed that is in use."""
    seeded = cfg.clone()
    seeded.defrost()
    seeded.SEED = seed
    if cfg.is_frozen():
        seeded.freeze()
    logger.info("The run has the seed %d.", seed)
    return seeded


def precision_of(cfg: CfgNode) -> str:
    """Returns `SOLVER.PRECISION`, or "fp16" if detectron2's `SOLVER.AMP.ENABLED` asks for it.

    Raises:
        ConfigError: If they contradict each other.
    """
    if not cfg.SOLVER.AMP.ENABLED:
        return str(cfg.SOLVER.PRECISION)
    if cfg.SOLVER.PRECISION == "bf16":
        raise ConfigError(
            "SOLVER.AMP.ENABLED is True, which means fp16, but SOLVER.PRECISION is 'bf16'. Leave "
            "AMP.ENABLED at False."
        )
    return "fp16"


def in_iterations(cfg: CfgNode, loader: Iterable[Any]) -> CfgNode:
    """Returns a config whose lengths are in iterations, also where they were stated in epochs.

    Args:
        cfg: The whole config; it stays as it is.
        loader: What the run trains on: a `TrainLoader`, or one whose `len` counts the batches.

    Raises:
        ConfigError: If the length of an epoch cannot be told.
    """
    if not uses_epochs(cfg):
        return cfg
    if isinstance(loader, TrainLoader):
        # Of the first epoch, where epochs differ in length.
        iters_per_epoch = len(loader.sampler.indices(0)) / loader.batch_size
    elif (num_batches := known_length(loader)) is not None:
        iters_per_epoch = num_batches / cfg.SOLVER.ACCUMULATE
    else:
        raise ConfigError(
            f"The training loader ({type(loader).__name__}) has no length, so SOLVER.MAX_EPOCHS "
            "and the like cannot be turned into iterations. State lengths in iterations."
        )
    resolved = epochs_to_iterations(cfg, iters_per_epoch)
    text = "An epoch has %g iterations: MAX_ITER %d, WARMUP_ITERS %d, STEPS %s"
    solver = resolved.SOLVER
    logger.info(text, iters_per_epoch, solver.MAX_ITER, solver.WARMUP_ITERS, solver.STEPS)
    return resolved


def check_data_sets(cfg: CfgNode, build_test_loader: Callable[..., Any]) -> None:
    """Finds an unknown data set of DATASETS.TEST or VAL now, not at the first evaluation.

    Args:
        cfg: The whole config.
        build_test_loader: The trainer's; one of a user's own may know other names.

    Raises:
        UnknownNameError: If one is not registered.
        ConfigError: If a `.py` config has DATASETS.VAL.
    """
    if "LAZY" in cfg and cfg.DATASETS.VAL:
        raise ConfigError(
            f"DATASETS.VAL is {cfg.DATASETS.VAL}, which a .py config cannot have: register a "
            "ValidationLoss in build_hooks instead."
        )
    is_own = build_test_loader.__qualname__ != "DefaultTrainer.build_test_loader"
    for key in () if is_own or "LAZY" in cfg else ("TEST", "VAL"):
        for name in cfg.DATASETS[key]:
            if name not in DatasetCatalog:
                raise UnknownNameError(f"data set (DATASETS.{key})", name, DatasetCatalog)


def note_implementation(optimizer: Optimizer, checkpointer: Checkpointer) -> None:
    """Notes which implementation updates parameters; one that is not the checkpoint's is said.

    Loading an optimizer's state brings the implementation with it, where this device has it.
    """
    now = optimizer_implementation(optimizer)
    checkpointer.facts["optimizer"] = now
    manifest = checkpointer.loaded_manifest
    saved = manifest.facts.get("optimizer", now) if manifest else now
    if saved != now:
        logger.warning(
            "The checkpoint was saved by a %s optimizer and goes on with a %s one: updates differ "
            "in the last bits.",
            saved,
            now,
        )
