"""What a script does before it trains: arguments, folder, logs, environment; and its writers."""

import argparse
import importlib.util
import logging
import os
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import fp16_compress_hook
from torch.nn.parallel import DistributedDataParallel

from trainkit.checkpoint.lock import check_not_held
from trainkit.config.checks import check_cfg
from trainkit.config.config import CfgNode
from trainkit.config.lazy import LazyConfig
from trainkit.config.lazy_cfg import settings_of
from trainkit.utils import comm
from trainkit.utils.collect_env import collect_env_info
from trainkit.utils.env import TORCH_VERSION, seed_all_rng, setup_environment
from trainkit.utils.errors import ConfigError
from trainkit.utils.events.json_writer import JSONWriter
from trainkit.utils.events.mlflow_writer import MLflowWriter
from trainkit.utils.events.printer import CommonMetricPrinter
from trainkit.utils.events.tensorboard import TensorboardXWriter
from trainkit.utils.events.wandb_writer import WandbWriter
from trainkit.utils.events.writer import EventWriter
from trainkit.utils.file_io import write_atomically
from trainkit.utils.logger import setup_logger

logger = logging.getLogger(__name__)

_TRACKERS: dict[str, Callable[[], EventWriter]] = {"wandb": WandbWriter, "mlflow": MLflowWriter}


def default_argument_parser(epilog: str | None = None) -> argparse.ArgumentParser:
    """Returns the parser of `tools/train_net.py`, to which a script may add its own arguments."""
    parser = argparse.ArgumentParser(
        epilog=epilog
        or f"""
Examples:

    {sys.argv[0]} --config-file configs/fashion_mnist.yaml
    {sys.argv[0]} --config-file configs/fashion_mnist.yaml --resume
    {sys.argv[0]} --config-file configs/fashion_mnist.yaml --num-gpus 2 SOLVER.BASE_LR 0.05
    torchrun --nproc-per-node 2 {sys.argv[0]} --config-file configs/fashion_mnist.yaml
""",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--config-file", default="", metavar="FILE", help="a .yaml or .py config")
    parser.add_argument(
        "--resume", action="store_true", help="go on from the newest valid checkpoint, if any"
    )
    parser.add_argument("--eval-only", action="store_true", help="evaluate, do not train")
    parser.add_argument("--num-gpus", type=int, default=1, help="processes on this machine")
    parser.add_argument("--num-machines", type=int, default=1, help="number of machines")
    parser.add_argument("--machine-rank", type=int, default=0, help="number of this machine")
    parser.add_argument(
        "--dist-url", default="auto", help="where processes meet: tcp://HOST:PORT, or auto"
    )
    parser.add_argument("--debug", action="store_true", help="show tracebacks of all errors")
    parser.add_argument(
        "opts",
        nargs=argparse.REMAINDER,
        metavar="KEY VALUE",
        help="settings that override the config, as in SOLVER.BASE_LR 0.05; of a .py config as in "
        "train.max_iter=100",
    )
    return parser


def default_setup(cfg: Any, args: argparse.Namespace) -> None:
    """Makes the output folder, starts the logs, writes down the config, seeds, sets torch up.

    Args:
        cfg: The whole config: a `CfgNode`, or a LazyConfig with its settings in `train`.
        args: What `default_argument_parser` parsed.

    Raises:
        ConfigError: On every rank, if a value is impossible, the folder cannot be written, or
            another run trains in it.
    """
    setup_environment()
    lazy, cfg = (None, cfg) if isinstance(cfg, CfgNode) else (cfg, settings_of(cfg))
    check_cfg(cfg)
    is_eval, is_resume = (getattr(args, name, False) for name in ("eval_only", "resume"))
    if not is_eval:
        check_not_held(cfg.OUTPUT_DIR)
    comm.on_main(lambda: _make_writable(cfg.OUTPUT_DIR))
    setup_logger(cfg.OUTPUT_DIR, distributed_rank=comm.get_rank())
    logger.info("Rank %d of %d", comm.get_rank(), comm.get_world_size())
    logger.info("Environment:\n%s", collect_env_info())
    logger.info("Command line: %s", args)
    logger.info("Config:\n%s", LazyConfig.to_py(lazy) if lazy else cfg.dump())
    # A run that is looked at, or goes on, keeps its config until training starts.
    if not is_eval and not is_resume:
        write_config(cfg)
        if lazy and comm.is_main_process():
            _write_lazy_config(lazy, Path(cfg.OUTPUT_DIR, "config.yaml"))
    if cfg.SEED >= 0:
        seed_all_rng(cfg.SEED)
    torch.backends.cudnn.benchmark = cfg.CUDNN_BENCHMARK and not is_eval
    if cfg.DETERMINISTIC:
        # cuBLAS reads it when it is first used.
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
        torch.use_deterministic_algorithms(True)
        torch.backends.cudnn.benchmark = False
    if cfg.FLOAT32_PRECISION:
        torch.set_float32_matmul_precision(cfg.FLOAT32_PRECISION)


def write_config(cfg: CfgNode) -> None:
    """Writes `config.yaml` into the output folder, on rank 0."""
    if comm.is_main_process():
        os.makedirs(cfg.OUTPUT_DIR, exist_ok=True)
        write_atomically(Path(cfg.OUTPUT_DIR, "config.yaml"), cfg.dump())


def _write_lazy_config(cfg: Any, path: Path) -> None:
    try:
        LazyConfig.save(cfg, path)
    except ConfigError as e:
        logger.warning("%s holds the settings only, not the whole config: %s", path, str(e))


def default_writers(
    output_dir: str, max_iter: int | None = None, trackers: Sequence[str] = ()
) -> list[EventWriter]:
    """Returns the writers of a run: the log, `metrics.json`, and TensorBoard if it is installed.

    Args:
        output_dir: The run's folder.
        max_iter: Its length, for the log's estimate of the time that is left.
        trackers: Experiment trackers beside these: "wandb", "mlflow".

    Raises:
        ConfigError: If a tracker is not installed.
    """
    writers: list[EventWriter] = [
        CommonMetricPrinter(max_iter),
        JSONWriter(Path(output_dir, "metrics.json")),
    ]
    if importlib.util.find_spec("tensorboard"):
        writers.append(TensorboardXWriter(output_dir))
    else:
        logger.info("No TensorBoard events: pip install 'trainkit[tensorboard]' to get them.")
    return writers + [_TRACKERS[name]() for name in trackers]


def create_ddp_model(
    model: nn.Module,
    *,
    fp16_compression: bool = False,
    broadcast_buffers: bool = True,
    **kwargs: Any,
) -> nn.Module:
    """Wraps a model in DistributedDataParallel if there are several processes.

    Args:
        model: On its device.
        fp16_compression: Whether gradients travel between processes in fp16.
        broadcast_buffers: Whether each forward pass first gives all ranks rank 0's buffers.
        kwargs: Further arguments of DistributedDataParallel.
    """
    # torch 2.13 renamed the argument.
    name = "broadcast_buffers" if TORCH_VERSION < (2, 13) else "forward_sync_buffers"
    kwargs = {name: broadcast_buffers, **kwargs}
    if comm.get_world_size() == 1:
        return model
    device = next(model.parameters()).device
    kwargs.setdefault("device_ids", [device.index] if device.type == "cuda" else None)
    ddp = DistributedDataParallel(model, **kwargs)
    if fp16_compression:
        ddp.register_comm_hook(None, fp16_compress_hook)
    return ddp


def _make_writable(output_dir: str) -> None:
    probe = Path(output_dir, f".writable-{os.getpid()}")
    try:
        probe.parent.mkdir(parents=True, exist_ok=True)
        probe.write_bytes(b"")
        probe.unlink()
    except OSError as e:
        raise ConfigError(
            f"OUTPUT_DIR is {output_dir!r}, where nothing can be written: {e.strerror}. Set "
            "OUTPUT_DIR to a folder that you may write to."
        ) from None
