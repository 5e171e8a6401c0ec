"""A config for another number of processes than the one that it was written for."""

import logging

from trainkit.config.config import CfgNode
from trainkit.utils.errors import ConfigError


def auto_scale_workers(cfg: CfgNode, num_workers: int) -> CfgNode:
    """Fits a config that is written for `SOLVER.REFERENCE_WORLD_SIZE` processes to `num_workers`.

    Each process keeps its share of the batch: IMS_PER_BATCH, BASE_LR and BASE_LR_END grow with the
    processes (the linear scaling rule of Goyal et al., arXiv:1706.02677, sec. 2.1), and MAX_ITER,
    WARMUP_ITERS, STEPS, CHECKPOINT_PERIOD and TEST.EVAL_PERIOD shrink, each to the nearest integer
    and, unless it is 0, to no less than 1.

    Args:
        cfg: A config, which stays as it is.
        num_workers: Processes that will train, at least 1.

    Returns:
        A new config, frozen if `cfg` is, whose REFERENCE_WORLD_SIZE is `num_workers`; `cfg` itself
        if that is the number already, or 0.

    Raises:
        ConfigError: If the batch cannot be shared evenly by the processes of the reference.
    """
    reference = cfg.SOLVER.REFERENCE_WORLD_SIZE
    if reference in (0, num_workers):
        return cfg
    _check_scalable(cfg)

    def shrunk(iterations: int) -> int:
        return max(1, round(iterations * reference / num_workers)) if iterations else 0

    scaled = cfg.clone()
    scaled.defrost()
    solver = scaled.SOLVER
    solver.REFERENCE_WORLD_SIZE = num_workers
    solver.IMS_PER_BATCH = cfg.SOLVER.IMS_PER_BATCH // reference * num_workers
    for key in ("BASE_LR", "BASE_LR_END"):
        solver[key] *= num_workers / reference
    for key in ("MAX_ITER", "WARMUP_ITERS", "CHECKPOINT_PERIOD"):
        solver[key] = shrunk(solver[key])
    solver.STEPS = type(solver.STEPS)(map(shrunk, solver.STEPS))
    scaled.TEST.EVAL_PERIOD = shrunk(scaled.TEST.EVAL_PERIOD)
    if cfg.is_frozen():
        scaled.freeze()
    logging.getLogger(__name__).info(
        "Scaled the config from %d processes to %d:\n%s", reference, num_workers, solver
    )
    return scaled


def _check_scalable(cfg: CfgNode) -> None:
    batch_size, reference = cfg.SOLVER.IMS_PER_BATCH, cfg.SOLVER.REFERENCE_WORLD_SIZE
    if "LAZY" in cfg:
        raise ConfigError(
            f"SOLVER.REFERENCE_WORLD_SIZE is {reference}, but it cannot scale the loader and the "
            "optimizer that a .py config makes. Set it to 0."
        )
    if batch_size % reference:
        raise ConfigError(
            f"SOLVER.IMS_PER_BATCH is {batch_size}, which is no multiple of "
            f"SOLVER.REFERENCE_WORLD_SIZE, {reference}. Change one of them; 0 scales nothing."
        )
