"""The run of `tools/train_net.py` as one flat loop, to read and to take apart.

Models, data, optimizer, schedule, metrics and checkpoints are the same parts, in a script instead
of a trainer with hooks; it computes the same loss at every iteration. It runs in one process, in
fp32, answers no signals, and a resume starts at the step after the checkpoint.
"""

import argparse
import logging
import os
from typing import Any

import torch

from trainkit.checkpoint import Checkpointer, PeriodicCheckpointer
from trainkit.checkpoint.lock import hold_run_folder
from trainkit.config import CfgNode, get_cfg
from trainkit.config.lazy_cfg import load_cfg
from trainkit.data import MetadataCatalog, build_test_loader, build_train_loader
from trainkit.engine import default_argument_parser, default_setup, default_writers, exit_codes
from trainkit.evaluation import (
    ClassificationEvaluator,
    flatten_results_dict,
    inference_on_dataset,
    print_csv_format,
)
from trainkit.modeling import build_model
from trainkit.solver import build_grad_clipper, build_lr_scheduler, build_optimizer
from trainkit.utils.device import resolve_device
from trainkit.utils.errors import ConfigError
from trainkit.utils.events import EventStorage
from trainkit.utils.nested import move_to
from trainkit.utils.period import is_due
from trainkit.utils.random import seed_step

logger = logging.getLogger("trainkit")


LEFT_OUT = {
    "SOLVER": ("ACCUMULATE", "PRECISION", "AMP", "NON_FINITE", "MAX_EPOCHS", "MAX_SECONDS"),
    "MODEL": ("EMA",),
    "DATASETS": ("VAL",),
    "TEST": ("PRECISE_BN", "EARLY_STOPPING", "EVAL_EPOCHS"),
}
"""Settings that the flat loop does not look at, so they must be as in the default config."""


def check_flat(cfg: CfgNode, world_size: int) -> None:
    """Checks that nothing is asked for that the flat loop leaves out.

    Raises:
        ConfigError: If something is; it names all of that.
    """
    default = get_cfg()
    keys = [(section, name) for section, names in LEFT_OUT.items() for name in names]
    asked = [f"{s}.{n}" for s, n in keys if cfg[s][n] != default[s][n]]
    asked += ["the calls of a .py config"] * ("LAZY" in cfg)
    asked += [f"{world_size} processes"] * (world_size > 1) + ["a drawn SEED"] * (cfg.SEED < 0)
    if asked:
        raise ConfigError(
            f"The flat loop leaves out {', '.join(asked)}: it runs in one process, with a SEED of "
            "at least 0, and these settings as by default. Use tools/train_net.py for the rest."
        )


def evaluate(cfg: CfgNode, model: torch.nn.Module) -> dict[str, Any]:
    """Judges the model on every test data set; the results are by data set if there are several."""
    results = {}
    for name in cfg.DATASETS.TEST:
        evaluator = ClassificationEvaluator(MetadataCatalog.get(name).classes)
        results[name] = inference_on_dataset(
            model, build_test_loader(cfg, name), evaluator, limit_batches=cfg.LIMIT_BATCHES or None
        )
        logger.info("Results on %s:", name)
        print_csv_format(results[name])
    return next(iter(results.values())) if len(results) == 1 else results


def train(cfg: CfgNode, model: torch.nn.Module, resume: bool) -> None:
    """Trains the model: the whole loop."""
    device = resolve_device(cfg.MODEL.DEVICE)
    optimizer = build_optimizer(cfg, model)
    data_loader = build_train_loader(cfg)
    scheduler = build_lr_scheduler(cfg, optimizer)
    clip_gradients = build_grad_clipper(cfg)
    parameters = [p for group in optimizer.param_groups for p in group["params"]]

    checkpointer = Checkpointer(
        model,
        cfg.OUTPUT_DIR,
        trust_pickle=cfg.MODEL.TRUST_PICKLE,
        optimizer=optimizer,
        scheduler=scheduler,
        data=data_loader,
    )
    # Weights from another run come with its iteration too, which is not this run's.
    resumed = resume and checkpointer.has_checkpoint()
    extra = checkpointer.resume_or_load(cfg.MODEL.WEIGHTS, resume=resume)
    start_iter = extra.get("iteration", -1) + 1 if resumed else 0
    max_iter = min(cfg.SOLVER.MAX_ITER, cfg.LIMIT_BATCHES or cfg.SOLVER.MAX_ITER)
    periodic_checkpointer = PeriodicCheckpointer(
        checkpointer, cfg.SOLVER.CHECKPOINT_PERIOD, max_iter, cfg.CHECKPOINT.MAX_TO_KEEP or None
    )
    writers = default_writers(cfg.OUTPUT_DIR, max_iter)

    model.train()
    batches = iter(data_loader)
    with EventStorage(start_iter) as storage:
        for iteration in range(start_iter, max_iter):
            storage.iter = iteration
            batch = move_to(next(batches), device)
            # What the step draws, dropout for one, depends on nothing that ran before.
            seed_step(cfg.SEED, rank=0, iteration=iteration, micro_batch=0, device=device)

            optimizer.zero_grad()
            loss_dict = model(batch)
            loss = sum(loss_dict.values())
            loss.backward()
            if clip_gradients is not None:
                clip_gradients(parameters)
            optimizer.step()

            storage.put_scalars(total_loss=loss, **loss_dict)
            storage.put_scalar("lr", optimizer.param_groups[0]["lr"], smoothing_hint=False)
            scheduler.step()
            periodic_checkpointer.step(iteration)
            is_last = iteration == max_iter - 1
            if is_due(iteration, cfg.TEST.EVAL_PERIOD) or is_last:
                for name, value in flatten_results_dict(evaluate(cfg, model)).items():
                    storage.put_scalar(name, value, smoothing_hint=False)
            if is_due(iteration, cfg.LOG_PERIOD) or is_last:
                for writer in writers:
                    writer.write()
    for writer in writers:
        writer.close()


def main(args: argparse.Namespace) -> None:
    """Merges the config, then evaluates or trains."""
    cfg = load_cfg(args.config_file, args.opts)
    check_flat(cfg, max(args.num_gpus * args.num_machines, int(os.environ.get("WORLD_SIZE", "1"))))
    cfg.freeze()
    default_setup(cfg, args)
    model = build_model(cfg)
    if args.eval_only:
        checkpointer = Checkpointer(model, cfg.OUTPUT_DIR, trust_pickle=cfg.MODEL.TRUST_PICKLE)
        checkpointer.resume_or_load(cfg.MODEL.WEIGHTS, resume=args.resume)
        evaluate(cfg, model)
    else:
        with hold_run_folder(cfg.OUTPUT_DIR):
            train(cfg, model, resume=args.resume)


if __name__ == "__main__":
    args = default_argument_parser().parse_args()
    with exit_codes(debug=args.debug):
        main(args)
