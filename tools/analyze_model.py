"""Counts the FLOPs, activations and parameters of the model that a config describes.

FLOPs and activations are counted in evaluation mode on samples of the first data set of
DATASETS.TEST, one at a time. One FLOP is one multiply-add; cheap operators are not counted.
"""

import argparse
import itertools
import logging
import statistics
import sys
from collections.abc import Callable
from typing import Any

from torch import nn

from trainkit.config import CfgNode
from trainkit.config.checks import check_cfg
from trainkit.config.lazy_cfg import load_cfg
from trainkit.engine import DefaultTrainer, exit_codes
from trainkit.utils.analysis import (
    FlopCountAnalysis,
    activation_count_operators,
    flop_count_operators,
    flop_count_table,
    inference_context,
    parameter_count_table,
)
from trainkit.utils.device import resolve_device
from trainkit.utils.errors import ConfigError
from trainkit.utils.nested import batch_size, move_to

TASKS = ("flop", "activation", "parameter", "structure")


def parse_args() -> argparse.Namespace:
    """Parses the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__,
        epilog=f"Example:\n\n    {sys.argv[0]} --tasks flop parameter "
        "--config-file configs/fashion_mnist.yaml MODEL.BACKBONE.WIDTHS '(8, 16)'",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "--tasks", nargs="+", choices=TASKS, required=True, help="what to print, in this order"
    )
    parser.add_argument("--config-file", default="", metavar="FILE", help="a .yaml or .py config")
    parser.add_argument(
        "-n",
        "--num-inputs",
        type=int,
        default=10,
        help="samples to count on, or batches of a .py config's own loader (default: 10)",
    )
    parser.add_argument("--max-depth", type=int, default=3, help="of modules shown (default: 3)")
    parser.add_argument("--debug", action="store_true", help="show tracebacks of all errors")
    parser.add_argument(
        "opts",
        nargs=argparse.REMAINDER,
        metavar="KEY VALUE",
        help="settings that override the config; with them, give --tasks before --config-file",
    )
    return parser.parse_args()


def setup(args: argparse.Namespace) -> CfgNode:
    """Merges defaults, config file and command line, with batches of one sample."""
    one_by_one = ["TEST.IMS_PER_BATCH", 1, "DATALOADER.NUM_WORKERS", 0]
    cfg = load_cfg(args.config_file, args.opts)
    cfg.merge_from_list(one_by_one)
    check_cfg(cfg)
    return cfg


def load_batches(cfg: CfgNode, num_inputs: int) -> list[Any]:
    """Returns the first batches of the first test data set, on the model's device.

    Raises:
        ConfigError: If there is no test data set, or `num_inputs` is below 1.
    """
    if not cfg.DATASETS.TEST or num_inputs < 1:
        raise ConfigError(
            f"FLOPs are counted on -n {num_inputs} samples of DATASETS.TEST {cfg.DATASETS.TEST}. "
            "Name a data set there, and take at least one sample."
        )
    loader = DefaultTrainer.build_test_loader(cfg, cfg.DATASETS.TEST[0])
    device = resolve_device(cfg.MODEL.DEVICE)
    return [move_to(batch, device) for batch in itertools.islice(loader, num_inputs)]


def print_counts(
    what: str, unit: str, count: Callable[..., dict[str, float]], model: nn.Module, batches: Any
) -> None:
    """Prints each operator's share, and the mean and spread of the total over all batches."""
    by_batch = [count(model, batch) for batch in batches]
    # A loader of the user's own may not heed TEST.IMS_PER_BATCH.
    sizes = [batch_size(batch) or 1 for batch in batches]
    totals = [sum(c.values()) / size for c, size in zip(by_batch, sizes, strict=True)]
    print(f"\n{what} of each operator, per sample of the first batch ({unit}):")
    for name, value in sorted(by_batch[0].items(), key=lambda item: -item[1]):
        print(f"    {name:30} {value / sizes[0]:12.6g}")
    mean, spread = statistics.fmean(totals), statistics.pstdev(totals)
    print(f"{what} per sample: {mean:.6g} {unit}, standard deviation {spread:.3g} over ", end="")
    print(f"{len(totals)} batches of {sizes[0]}")


def main(args: argparse.Namespace) -> None:
    """Prints what each task asks for."""
    cfg = setup(args)
    model = DefaultTrainer.build_model(cfg).to(resolve_device(cfg.MODEL.DEVICE))
    needs_batches = {"flop", "activation"} & set(args.tasks)
    batches = load_batches(cfg, args.num_inputs) if needs_batches else []
    # What is not counted is named once, in the output.
    logging.getLogger("fvcore.nn.jit_analysis").setLevel(logging.ERROR)
    for task in args.tasks:
        if task == "flop":
            with inference_context(model):
                flops = FlopCountAnalysis(model, batches[0])
                print(f"\nThe first batch:\n\n{flop_count_table(flops, args.max_depth)}")
                print("Not counted:", ", ".join(sorted(flops.unsupported_ops())) or "nothing")
            print_counts("FLOPs", "G multiply-adds", flop_count_operators, model, batches)
        elif task == "activation":
            print_counts("Activations", "M", activation_count_operators, model, batches)
        elif task == "parameter":
            print(f"\n{parameter_count_table(model, args.max_depth)}")
        else:
            print(f"\n{model}")


if __name__ == "__main__":
    args = parse_args()
    with exit_codes(debug=args.debug):
        main(args)
