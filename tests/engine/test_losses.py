import copy
import gc
import math
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from trainkit.engine.losses import (
    TensorCopies,
    check_all_used,
    micro_batch_weights,
    parse_losses,
    poisoned,
    reducing_gradients,
    rehearse,
)
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


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_a_loss_that_is_not_finite_makes_each_gradient_so_even_one_that_would_be_zero(
    bad: float,
) -> None:
    used, unused = loss(1.0), loss(1.0)
    poisoned(used + 0.0 * unused + torch.tensor(bad)).backward()
    assert used.grad is not None
    assert unused.grad is not None
    assert [used.grad.isnan().item(), unused.grad.isnan().item()] == [True, True]


def test_a_finite_loss_stays_as_it_is() -> None:
    finite = loss(2.0)
    assert poisoned(finite) is finite


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_on_a_device_nothing_waits_for_the_loss(fake_cuda: Any, bad: float) -> None:
    fine, broken = fake_cuda(torch.tensor(2.0)), fake_cuda(torch.tensor(bad))
    # Where updates are not judged before they are made, nothing is done either.
    assert poisoned(broken) is broken
    judged = [poisoned(value, judges_now=True) for value in (fine, broken)]
    assert fake_cuda.num_transfers == 0
    with fake_cuda.transfers_allowed():
        assert judged[0].item() == 2.0
        assert math.isnan(judged[1].item())


class Normalized(nn.Module):
    """Has running statistics, and draws random numbers in its forward pass."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.BatchNorm1d(3)
        self.dropout = nn.Dropout(0.5)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        output: torch.Tensor = self.dropout(self.norm(x)).sum()
        return output


def test_buffers_are_put_back_those_included_that_were_poisoned() -> None:
    model = Normalized()
    model(torch.randn(4, 3))
    before = copy.deepcopy(model.state_dict())
    buffers = TensorCopies(lambda: dict(model.named_buffers()))
    model(torch.full((4, 3), math.nan))
    assert model.norm.running_mean is not None
    assert model.norm.running_mean.isnan().all()
    buffers.restore()
    after = model.state_dict()
    assert all(torch.equal(after[name], before[name]) for name in before)


def test_a_buffer_that_the_model_replaced_is_put_back_too() -> None:
    model = Normalized()
    buffers = TensorCopies(lambda: dict(model.named_buffers()))
    model.norm.running_mean = torch.full((3,), math.nan)
    buffers.restore()
    assert torch.equal(model.norm.running_mean, torch.zeros(3))


@pytest.fixture
def make_ddp(tmp_path: Path) -> Iterator[type[DistributedDataParallel]]:
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/s", rank=0, world_size=1)
    yield DistributedDataParallel
    # A model that outlives the group ends gloo's threads, which may wait for the interpreter then.
    gc.collect()
    dist.destroy_process_group()


def test_a_rehearsal_leaves_model_and_generators_as_they_were(
    make_ddp: type[DistributedDataParallel],
) -> None:
    ddp = make_ddp(Normalized())
    before, rng = copy.deepcopy(ddp.state_dict()), torch.get_rng_state()
    rehearsed: list[bool] = []

    def forward_backward(batches: Any) -> None:
        ddp(torch.randn(4, 3)).backward()
        rehearsed.append(ddp.module.norm.weight.grad is not None)

    rehearse(ddp, forward_backward, [torch.ones(1)], num_done=1)
    assert rehearsed == [True]
    assert all(torch.equal(value, before[name]) for name, value in ddp.state_dict().items())
    assert torch.equal(torch.get_rng_state(), rng)
    assert all(p.grad is None for p in ddp.parameters())


def test_a_model_of_one_process_needs_no_rehearsal() -> None:
    rehearse(Normalized(), lambda batches: pytest.fail("it has no buckets"), [], num_done=1)


@pytest.mark.parametrize(("is_last", "reduces"), [(True, True), (False, False)])
def test_only_the_last_micro_batch_reduces_over_ranks(
    make_ddp: type[DistributedDataParallel], is_last: bool, reduces: bool
) -> None:
    ddp = make_ddp(Normalized())
    with reducing_gradients(ddp, is_last):
        assert ddp.require_backward_grad_sync == reduces


class HalfUsed(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.used, self.left, self.frozen = nn.Linear(1, 1), nn.Linear(1, 1), nn.Linear(1, 1)
        self.frozen.requires_grad_(False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        output: torch.Tensor = self.used(x).sum()
        return output


def test_parameters_without_a_gradient_are_named_before_ddp_waits_for_them(
    make_ddp: type[DistributedDataParallel],
) -> None:
    model = make_ddp(HalfUsed())
    model(torch.ones(1)).backward()
    with pytest.raises(
        ConfigError, match=r"2 parameters got no gradient: left.weight, left.bias\."
    ):
        check_all_used(model)
    looking = make_ddp(HalfUsed(), find_unused_parameters=True)
    looking(torch.ones(1)).backward()
    check_all_used(looking)


def test_one_process_waits_for_no_gradient() -> None:
    model = HalfUsed()
    model(torch.ones(1)).backward()
    check_all_used(model)


def test_a_buffer_that_has_grown_gets_its_size_back() -> None:
    model = Normalized()
    model.register_buffer("cache", torch.ones(2))
    buffers = TensorCopies(lambda: dict(model.named_buffers()))
    model.cache = torch.zeros(5)
    model.register_buffer("late", torch.ones(1))
    buffers.restore()
    assert torch.equal(model.cache, torch.ones(2))
