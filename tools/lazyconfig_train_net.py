"""Trains or evaluates what a LazyConfig describes, as a flat script; copy it and change it.

It shows all parts of a run, where tools/train_net.py has them in `DefaultTrainer`. What the config
has to have is in configs/lazy/fashion_mnist.py.
"""

import argparse
import logging
from typing import Any

from torch import nn

from trainkit.checkpoint import Checkpointer
from trainkit.checkpoint.lock import hold_run_folder
from trainkit.config import LazyConfig, instantiate
from trainkit.engine import (
    AMPTrainer,
    SimpleTrainer,
    create_ddp_model,
    default_argument_parser,
    default_setup,
    default_writers,
    exit_codes,
    hooks,
    launch,
)
from trainkit.engine.losses import share_buffers
from trainkit.evaluation import inference_on_dataset, print_csv_format
from trainkit.utils import comm
from trainkit.utils.device import resolve_device
from trainkit.utils.env import seed_all_rng
from trainkit.utils.errors import ConfigError

logger = logging.getLogger("trainkit")

EXAMPLE = """
Example:

    tools/lazyconfig_train_net.py --config-file configs/lazy/fashion_mnist.py train.max_iter=100
"""


def build_model(cfg: Any) -> nn.Module:
    """Returns the model on its device, with the same weights on every rank."""
    seed_all_rng(cfg.train.seed)
    model: nn.Module = instantiate(cfg.model)
    return model.to(resolve_device(cfg.train.device))


def do_test(cfg: Any, model: nn.Module) -> dict[str, Any] | None:
    """Evaluates the model, if the config says how."""
    if "evaluator" not in cfg.dataloader:
        return None
    # Running statistics differ from rank to rank.
    share_buffers(model)
    test_loader = instantiate(cfg.dataloader.test)
    results = inference_on_dataset(model, test_loader, instantiate(cfg.dataloader.evaluator))
    if comm.is_main_process():
        print_csv_format(results)
    return results


def do_train(cfg: Any, resume: bool) -> None:
    """Trains to the end, from the newest valid checkpoint if `resume`."""
    train = cfg.train
    model = build_model(cfg)
    logger.info("Model:\n%s", model)
    cfg.optimizer.params.model = model
    optimizer = instantiate(cfg.optimizer)
    trainer = (AMPTrainer if train.amp.enabled else SimpleTrainer)(
        create_ddp_model(model, **train.ddp),
        instantiate(cfg.dataloader.train),
        optimizer,
        seed=train.seed,
    )
    checkpointer = Checkpointer(model, train.output_dir, trainer=trainer)
    trainer.register_hooks(
        [
            hooks.IterationTimer(),
            hooks.LRScheduler(scheduler=instantiate(cfg.lr_multiplier)),
            hooks.PeriodicCheckpointer(checkpointer, **train.checkpointer),
            hooks.EvalHook(train.eval_period, lambda: do_test(cfg, model)),
            hooks.BestCheckpointer(train.eval_period, checkpointer, train.best_metric)
            if train.get("best_metric")
            else None,
            hooks.PeriodicWriter(
                default_writers(train.output_dir, train.max_iter), period=train.log_period
            )
            if comm.is_main_process()
            else None,
        ]
    )
    start_iter = 0
    if resume and checkpointer.has_checkpoint():
        checkpointer.resume_or_load("", resume=True)
        start_iter = trainer.iter + 1
    else:
        checkpointer.resume_or_load(train.init_checkpoint, resume=False)
    if checkpointer.finished_iteration() == start_iter - 1 == train.max_iter - 1:
        logger.info("The run in %s is finished. Raise train.max_iter to go on.", train.output_dir)
        return
    with hold_run_folder(train.output_dir):
        checkpointer.clear_finished()
        trainer.train(start_iter, train.max_iter)
        comm.synchronize()
        if trainer.interruption is None and trainer.iter == trainer.max_iter:
            checkpointer.mark_finished(trainer.iter - 1)


def main(args: argparse.Namespace) -> None:
    """Runs on every process."""
    if not args.config_file.endswith(".py"):
        raise ConfigError(
            f"--config-file is {args.config_file!r}, but this script makes the calls that a .py "
            "config notes. Give one, such as configs/lazy/fashion_mnist.py; for .yaml there is "
            "tools/train_net.py."
        )
    cfg = LazyConfig.apply_overrides(LazyConfig.load(args.config_file), args.opts)
    if cfg.train.get("seed", -1) < 0:
        cfg.train.seed = comm.shared_random_seed()
    default_setup(cfg, args)
    if args.eval_only:
        if not args.resume and not cfg.train.init_checkpoint:
            raise ConfigError("--eval-only needs weights: pass --resume or train.init_checkpoint=…")
        model = build_model(cfg)
        checkpointer = Checkpointer(model, cfg.train.output_dir)
        checkpointer.resume_or_load(cfg.train.init_checkpoint, resume=args.resume)
        do_test(cfg, model)
        return
    do_train(cfg, args.resume)


if __name__ == "__main__":
    args = default_argument_parser(epilog=EXAMPLE).parse_args()
    with exit_codes(debug=args.debug):
        launch(
            main,
            args.num_gpus,
            num_machines=args.num_machines,
            machine_rank=args.machine_rank,
            dist_url=args.dist_url,
            args=(args,),
        )
