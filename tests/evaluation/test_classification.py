import contextlib
import logging
from typing import Any

import pytest
import torch

from trainkit.evaluation.classification import ClassificationEvaluator
from trainkit.utils import comm
from trainkit.utils.errors import ConfigError

CLASSES = ["cat", "dog", "emu"]

# Six images of cats and dogs, worked by hand: (label, classes from the likeliest to the least).
RANKINGS = [
    (0, [0, 1, 2]),
    (0, [1, 0, 2]),
    (0, [2, 1, 0]),
    (0, [0, 2, 1]),
    (1, [1, 0, 2]),
    (1, [0, 2, 1]),
]
EXPECTED = {"top1": 3 / 6, "top2": 4 / 6, "top1-cat": 2 / 4, "top1-dog": 1 / 2}


def processed(rankings: list[tuple[int, list[int]]], batch_size: int = 2) -> Any:
    """An evaluator that has seen these rankings as logits."""
    evaluator = ClassificationEvaluator(CLASSES, top_k=(2, 1))
    evaluator.reset()
    for start in range(0, len(rankings), batch_size):
        batch = rankings[start : start + batch_size]
        logits = torch.zeros(len(batch), 3)
        for row, (_, order) in enumerate(batch):
            logits[row, order] = torch.tensor([2.0, 1.0, -1.0])
        evaluator.process({"label": torch.tensor([r[0] for r in batch])}, {"logits": logits})
    return evaluator


@pytest.mark.parametrize("batch_size", [1, 4, 6])
def test_accuracy_is_that_worked_by_hand(batch_size: int) -> None:
    assert processed(RANKINGS, batch_size).evaluate() == {"classification": EXPECTED}


def test_reset_forgets() -> None:
    evaluator = processed(RANKINGS)
    evaluator.reset()
    evaluator.process({"label": torch.tensor([2])}, {"logits": torch.tensor([[0.0, 0.0, 1.0]])})
    results = evaluator.evaluate()["classification"]
    assert results == {"top1": 1.0, "top2": 1.0, "top1-emu": 1.0}


@pytest.mark.parametrize("own", [0, 1, 5, 6])
def test_ranks_add_up_to_the_same_result(monkeypatch: pytest.MonkeyPatch, own: int) -> None:
    mine, other = processed(RANKINGS[:own]), processed(RANKINGS[own:])
    sent: list[torch.Tensor] = []

    def gather(counts: torch.Tensor) -> torch.Tensor:
        sent.append(counts)
        return torch.stack(sent)

    monkeypatch.setattr(comm, "all_gather_tensor", gather)
    with contextlib.suppress(ConfigError):  # A rank without images, asked alone.
        other.evaluate()
    assert mine.evaluate() == {"classification": EXPECTED}
    assert sent[0].dtype == torch.int64


def test_fewer_classes_than_k_are_all_among_the_first_k() -> None:
    evaluator = ClassificationEvaluator(["a", "b"], top_k=(1, 5))
    evaluator.process({"label": torch.tensor([0])}, {"logits": torch.tensor([[0.0, 1.0]])})
    results = evaluator.evaluate()["classification"]
    assert results == {"top1": 0.0, "top5": 1.0, "top1-a": 0.0}


def test_the_table_has_a_row_for_each_class(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO):
        processed(RANKINGS).evaluate()
    rows = [line.replace(" ", "") for line in caplog.text.splitlines() if line.startswith("|")]
    assert rows[0] == "|class|images|top1|"
    assert rows[2:] == ["|cat|4|0.5000|", "|dog|2|0.5000|", "|emu|0|-|"]


def test_only_the_main_process_logs_the_table(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(comm, "is_main_process", lambda: False)
    with caplog.at_level(logging.INFO):
        processed(RANKINGS).evaluate()
    assert not caplog.messages


def test_no_image_is_an_error_instead_of_a_division_by_zero() -> None:
    with pytest.raises(ConfigError, match="no image to compute the accuracy of"):
        ClassificationEvaluator(CLASSES).evaluate()


def test_another_number_of_classes_is_named() -> None:
    evaluator = ClassificationEvaluator(CLASSES)
    with pytest.raises(ConfigError, match=r"for 10 classes.*has 3\. Set MODEL\.NUM_CLASSES to 3"):
        evaluator.process({"label": torch.tensor([0])}, {"logits": torch.zeros(1, 10)})


@pytest.mark.parametrize("top_k", [(), (0, 1)])
def test_top_k_needs_values_of_at_least_one(top_k: tuple[int, ...]) -> None:
    with pytest.raises(ConfigError, match="needs values of at least 1"):
        ClassificationEvaluator(CLASSES, top_k)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")
def test_counting_does_not_wait_for_the_device() -> None:
    evaluator = ClassificationEvaluator(CLASSES)
    labels = torch.tensor([0, 1, 2], device="cuda")
    logits = torch.eye(3, device="cuda")
    torch.cuda.set_sync_debug_mode("error")
    try:
        evaluator.process({"label": labels}, {"logits": logits})
        evaluator.process({"label": labels}, {"logits": logits})
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert evaluator.evaluate()["classification"]["top1"] == 1.0
