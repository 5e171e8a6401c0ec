"""Accuracy of a classifier, over all images and for each class."""

import logging
from collections.abc import Sequence
from typing import Any

import torch
from tabulate import tabulate

from trainkit.evaluation.evaluator import DatasetEvaluator
from trainkit.utils import comm
from trainkit.utils.errors import ConfigError


class ClassificationEvaluator(DatasetEvaluator):
    """Counts how often the label is among the k classes with the largest logits.

    It keeps whole numbers on the model's device, so nothing waits for that before `evaluate`, and
    the result does not depend on how the images were spread over batches and ranks.

    Args:
        classes: Names of the classes, in the order of the labels.
        top_k: The values of k, each at least 1; the smallest is also reported for each class.

    Raises:
        ConfigError: If `top_k` is empty or has a value below 1.

    Example:
        >>> evaluator = ClassificationEvaluator(["cat", "dog"], top_k=(1,))
        >>> evaluator.process({"label": torch.tensor([0, 1])},
        ...                   {"logits": torch.tensor([[0.9, 0.1], [0.8, 0.2]])})
        >>> evaluator.evaluate()
        {'classification': {'top1': 0.5, 'top1-cat': 1.0, 'top1-dog': 0.0}}
    """

    def __init__(self, classes: Sequence[str], top_k: Sequence[int] = (1, 5)) -> None:
        if not top_k or min(top_k) < 1:
            raise ConfigError(f"top_k is {tuple(top_k)}, but needs values of at least 1.")
        self._classes = list(classes)
        self._top_k = sorted(set(top_k))
        self._counts: torch.Tensor | None = None

    def reset(self) -> None:
        """Sets all counts to 0."""
        self._counts = None

    def process(
        self, inputs: dict[str, torch.Tensor], outputs: dict[str, torch.Tensor] | torch.Tensor
    ) -> None:
        """Counts one batch.

        Args:
            inputs: "label", int64 (N,), in [0, number of classes).
            outputs: "logits", (N, number of classes), on the same device; or that tensor itself.

        Raises:
            ConfigError: If the model has another number of classes than the data set.
        """
        labels = inputs["label"]
        logits = outputs if isinstance(outputs, torch.Tensor) else outputs["logits"]
        if logits.shape[1] != len(self._classes):
            raise ConfigError(
                f"The model has logits for {logits.shape[1]} classes, but the data set has "
                f"{len(self._classes)}. Set MODEL.NUM_CLASSES to {len(self._classes)}."
            )
        largest = logits.topk(min(self._top_k[-1], len(self._classes)), dim=1).indices
        hits = largest == labels[:, None]
        rows = [torch.ones_like(labels), *(hits[:, :k].any(dim=1) for k in self._top_k)]
        if self._counts is None:
            self._counts = self._no_counts(labels.device)
        self._counts.index_add_(1, labels, torch.stack([row.long() for row in rows]))

    def evaluate(self) -> dict[str, dict[str, float]]:
        """Sums the counts of all ranks, and logs a table of the classes on the main process.

        Returns:
            On every rank {"classification": {"top1": …, "top5": …, "top1-<class>": …}}, fractions
            in [0, 1]; classes without an image are left out.

        Raises:
            ConfigError: If no image was processed on any rank.
        """
        own = self._no_counts(torch.device("cpu")) if self._counts is None else self._counts.cpu()
        images, *hits = comm.all_gather_tensor(own).sum(dim=0).tolist()
        total = sum(images)
        if total == 0:
            raise ConfigError(
                "There is no image to compute the accuracy of. Is the test set empty, or was the "
                "evaluation limited to 0 batches?"
            )
        metrics = {f"top{k}": sum(row) / total for k, row in zip(self._top_k, hits, strict=True)}
        first = f"top{self._top_k[0]}"
        accuracies = [hit / n if n else None for hit, n in zip(hits[0], images, strict=True)]
        if comm.is_main_process():
            self._log_table(first, images, accuracies)
        for name, accuracy in zip(self._classes, accuracies, strict=True):
            if accuracy is not None:
                metrics[f"{first}-{name}"] = accuracy
        return {"classification": metrics}

    def _no_counts(self, device: torch.device) -> torch.Tensor:
        # Row 0 counts images, row i those whose label was among the first top_k[i - 1]; int64.
        shape = (1 + len(self._top_k), len(self._classes))
        return torch.zeros(shape, dtype=torch.int64, device=device)

    def _log_table(self, metric: str, images: list[int], accuracies: list[Any]) -> None:
        table = tabulate(
            zip(self._classes, images, accuracies, strict=True),
            headers=["class", "images", metric],
            floatfmt=".4f",
            missingval="-",
            tablefmt="pipe",
        )
        logging.getLogger(__name__).info("Accuracy of each class:\n%s", table)
