"""The loop over a data set, evaluators that judge outputs, and checks of their results."""

from trainkit.evaluation.classification import ClassificationEvaluator
from trainkit.evaluation.evaluator import (
    DatasetEvaluator,
    DatasetEvaluators,
    inference_context,
    inference_on_dataset,
)
from trainkit.evaluation.testing import (
    ResultsMismatchError,
    flatten_results_dict,
    print_csv_format,
    verify_results,
)

__all__ = [
    "ClassificationEvaluator",
    "DatasetEvaluator",
    "DatasetEvaluators",
    "ResultsMismatchError",
    "flatten_results_dict",
    "inference_context",
    "inference_on_dataset",
    "print_csv_format",
    "verify_results",
]
