"""What is done with results: print them to be copied, compare them to what was expected."""

import logging
from collections.abc import Mapping
from typing import Any

from fvcore.common.config import CfgNode

from trainkit.utils.errors import ConfigError

_logger = logging.getLogger(__name__)


class ResultsMismatchError(AssertionError):
    """Results are not what `TEST.EXPECTED_RESULTS` says; the message names each difference."""


def print_csv_format(results: Mapping[str, Any]) -> None:
    """Logs main metrics as comma-separated lines, to be pasted into a table.

    Args:
        results: {task: {metric: number}}; metrics whose name has a "-" are details and left out.
    """
    for task, metrics in results.items():
        if not isinstance(metrics, Mapping):
            _logger.info("copypaste: %s=%s", task, metrics)
            continue
        main = {name: value for name, value in metrics.items() if "-" not in name}
        _logger.info("copypaste: Task: %s", task)
        _logger.info("copypaste: %s", ",".join(main))
        _logger.info("copypaste: %s", ",".join(f"{value:.4f}" for value in main.values()))


def verify_results(cfg: CfgNode, results: Mapping[str, Mapping[str, float]]) -> None:
    """Compares results to `TEST.EXPECTED_RESULTS`, rows of [task, metric, value, tolerance].

    Args:
        cfg: Without expected results nothing is compared.
        results: {task: {metric: number}}.

    Raises:
        ResultsMismatchError: If a metric is missing, NaN, or further from its value than its
            tolerance.
        ConfigError: If a row is not four entries.
    """
    rows = cfg.TEST.EXPECTED_RESULTS
    for row in rows:
        if len(row) != 4:
            raise ConfigError(
                f"TEST.EXPECTED_RESULTS has the row {row}, but a row is [task, metric, value, "
                "tolerance]."
            )
    faults = [fault for row in rows if (fault := _difference(results, *row))]
    if faults:
        raise ResultsMismatchError(
            "The results are not those of TEST.EXPECTED_RESULTS:\n" + "\n".join(faults)
        )
    if rows:
        _logger.info("All %d results are as TEST.EXPECTED_RESULTS says.", len(rows))


def _difference(
    results: Mapping[str, Mapping[str, float]],
    task: str,
    metric: str,
    expected: float,
    tolerance: float,
) -> str | None:
    if metric not in results.get(task, {}):
        known = ", ".join(flatten_results_dict(results)) or "none"
        return f"{task}/{metric} is missing; there are: {known}"
    actual = results[task][metric]
    # A NaN is further away than anything, so the comparison must not be turned round.
    if abs(actual - expected) <= tolerance:
        return None
    return f"{task}/{metric} is {actual}, expected {expected} within {tolerance}"


def flatten_results_dict(results: Mapping[str, Any]) -> dict[str, Any]:
    """Joins the keys of nested dicts with "/".

    Example:
        >>> flatten_results_dict({"classification": {"top1": 0.9}, "seconds": 3.0})
        {'classification/top1': 0.9, 'seconds': 3.0}
    """
    flat = {}
    for key, value in results.items():
        if isinstance(value, Mapping):
            flat.update({f"{key}/{k}": v for k, v in flatten_results_dict(value).items()})
        else:
            flat[key] = value
    return flat
