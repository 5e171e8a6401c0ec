"""Trains or evaluates what a config describes; copy this file and change what you need.

To bring a model, data, evaluator or hooks of your own, override the methods of `Trainer` below.
"""

import argparse
from typing import Any

from trainkit.checkpoint import Checkpointer
from trainkit.config import CfgNode
from trainkit.config.lazy_cfg import load_cfg
from trainkit.engine import (
    DefaultTrainer,
    default_argument_parser,
    default_setup,
    exit_codes,
    launch,
)
from trainkit.engine.hooks import averaged_weights
from trainkit.evaluation import verify_results
from trainkit.utils.errors import ConfigError


class Trainer(DefaultTrainer):
    """The trainer; every `build_*` method of `DefaultTrainer` can be overridden here."""


def setup(args: argparse.Namespace) -> CfgNode:
    """Merges defaults, config file and command line, and starts logging."""
    cfg = load_cfg(args.config_file, args.opts)
    cfg.freeze()
    default_setup(cfg, args)
    return cfg


def main(args: argparse.Namespace) -> dict[str, Any]:
    """Runs on every process."""
    cfg = setup(args)
    if args.eval_only and not args.resume and not cfg.MODEL.WEIGHTS:
        raise ConfigError("--eval-only needs weights: pass --resume, or set MODEL.WEIGHTS.")
    if args.eval_only:
        model = Trainer.build_model(cfg)
        checkpointer = Checkpointer(model, cfg.OUTPUT_DIR, trust_pickle=cfg.MODEL.TRUST_PICKLE)
        checkpoint = checkpointer.resume_or_load(cfg.MODEL.WEIGHTS, resume=args.resume)
        with averaged_weights(model, checkpoint if cfg.MODEL.EMA.ENABLED else {}):
            results = Trainer.test(cfg, model)
        verify_results(cfg, results)
        return results
    trainer = Trainer(cfg)
    trainer.resume_or_load(resume=args.resume)
    return trainer.train()


if __name__ == "__main__":
    args = default_argument_parser().parse_args()
    with exit_codes(debug=args.debug):
        launch(
            main,
            args.num_gpus,
            num_machines=args.num_machines,
            machine_rank=args.machine_rank,
            dist_url=args.dist_url,
            args=(args,),
        )
