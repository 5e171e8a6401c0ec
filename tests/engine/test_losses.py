from collections.abc import Mapping
from typing import Any

import pytest
import torch

from trainkit.engine.losses import micro_batch_weights, parse_losses
from trainkit.utils.errors import ConfigError


def loss(value: float, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.tensor(value, dtype=dtype, requires_grad=True)


def test_a_scalar_is_the_total_loss() -> None:
    scalar = loss(2.0)
    values, total = parse_losses(scalar)
    assert values == {"total_loss": scalar}
    assert total is scalar


def test_losses_add_up_and_metrics_do_not() -> None:
    output = {"loss_a": loss(1.0), "loss_b": loss(2.0), "accuracy": torch.tensor(0.5), "seen": 3}
    values, total = parse_losses(output)
    assert total.item() == 3.0
    assert total.requires_grad
    assert {name: value.item() for name, value in values.items()} == {
        "loss_a": 1.0,
        "loss_b": 2.0,
        "accuracy": 0.5,
        "seen": 3,
    }


def test_losses_of_two_dtypes_add_up() -> None:
    _, total = parse_losses({"a": loss(1.0, torch.bfloat16), "b": loss(0.1)})
    assert total.dtype == torch.float32
    assert total.item() == pytest.approx(1.1)


@pytest.mark.parametrize(
    ("output", "text"),
    [
        (None, "returned None"),
        ({}, r"returned \{\}"),
        ("nothing", "returned 'nothing'"),
        ((torch.zeros(1),), r"returned \(tensor"),
        ({"loss": torch.tensor(1.0)}, r"'loss': a tensor of shape \(\), requires_grad=False"),
        (torch.zeros(2, 10, requires_grad=True), r"a tensor of shape \(2, 10\)"),
        ({"loss": torch.zeros(3, requires_grad=True)}, r"'loss': a tensor of shape \(3,\)"),
    ],
)
def test_a_model_without_a_loss_is_told_what_it_returned(output: Any, text: str) -> None:
    with pytest.raises(ConfigError, match=f"In training, the model must return .*{text}"):
        parse_losses(output)


@pytest.mark.parametrize("logits", [torch.zeros(4, 3), {"logits": torch.zeros(4, 3)}])
def test_logits_are_not_a_loss(logits: torch.Tensor | Mapping[str, torch.Tensor]) -> None:
    with pytest.raises(ConfigError, match=r"shape \(4, 3\).*Reduce losses with mean\(\)"):
        parse_losses(logits)


def test_micro_batches_weigh_by_their_samples() -> None:
    batches = [{"x": torch.zeros(6, 2)}, {"x": torch.zeros(2, 2)}]
    assert micro_batch_weights(batches) == [0.75, 0.25]


def test_micro_batches_of_unknown_size_weigh_alike() -> None:
    assert micro_batch_weights([torch.zeros(3), "?"]) == [0.5, 0.5]
    assert micro_batch_weights([torch.zeros(3)]) == [1.0]
