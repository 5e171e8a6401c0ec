import logging
import math
from typing import Any

import pytest
from fvcore.common.config import CfgNode

from trainkit.evaluation.testing import (
    ResultsMismatchError,
    flatten_results_dict,
    print_csv_format,
    verify_results,
)
from trainkit.utils.errors import ConfigError

RESULTS = {"classification": {"top1": 0.9, "top5": 0.99}}


def expecting(*rows: list[Any]) -> CfgNode:
    return CfgNode({"TEST": {"EXPECTED_RESULTS": list(rows)}})


def test_csv_leaves_out_details(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO):
        print_csv_format({"classification": {"top1": 0.9, "top1-cat": 0.5, "top5": 1.0}, "fps": 3})
    assert caplog.messages == [
        "copypaste: Task: classification",
        "copypaste: top1,top5",
        "copypaste: 0.9000,1.0000",
        "copypaste: fps=3",
    ]


def test_expected_results_pass_within_their_tolerance() -> None:
    verify_results(expecting(["classification", "top1", 0.89, 0.011]), RESULTS)
    verify_results(expecting(), {})


def test_d30_every_difference_is_named_by_an_error_that_does_not_exit() -> None:
    cfg = expecting(
        ["classification", "top1", 0.8, 0.05],
        ["classification", "top5", 0.99, 0.0],
        ["classification", "top3", 0.9, 0.1],
        ["segmentation", "iou", 0.9, 0.1],
    )
    with pytest.raises(ResultsMismatchError) as caught:
        verify_results(cfg, RESULTS)
    assert str(caught.value).splitlines()[1:] == [
        "classification/top1 is 0.9, expected 0.8 within 0.05",
        "classification/top3 is missing; there are: classification/top1, classification/top5",
        "segmentation/iou is missing; there are: classification/top1, classification/top5",
    ]


def test_nan_is_never_as_expected() -> None:
    cfg = expecting(["classification", "top1", 0.9, 10.0])
    with pytest.raises(ResultsMismatchError, match=r"top1 is nan, expected 0\.9 within 10\.0"):
        verify_results(cfg, {"classification": {"top1": math.nan}})


def test_a_row_of_another_length_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"the row \['classification', 'top1', 0.9\], but a row"):
        verify_results(expecting(["classification", "top1", 0.9]), RESULTS)


def test_flattening_joins_keys_at_any_depth() -> None:
    nested = {"a": {"b": {"c": 1.0}, "d": 2.0}, "e": 3.0}
    assert flatten_results_dict(nested) == {"a/b/c": 1.0, "a/d": 2.0, "e": 3.0}
