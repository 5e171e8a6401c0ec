import subprocess
import sys
from typing import Any

import pytest
import torch
import torch.nn.functional as F  # noqa: N812  # As torch's own documentation calls it.
from torch import nn

from trainkit.utils.analysis import (
    FlopCountAnalysis,
    activation_count_operators,
    find_unused_parameters,
    flop_count_operators,
    flop_count_table,
    inference_context,
    parameter_count,
    parameter_count_table,
)
from trainkit.utils.errors import ConfigError


class Net(nn.Module):
    """A convolution, then a linear layer; takes the inputs in several forms."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, 8, 1, bias=False))
        self.head = nn.Linear(8, 5)

    def forward(self, batch: Any, scale: float = 1.0) -> dict[str, torch.Tensor]:
        image = batch["image"] if isinstance(batch, dict) else batch
        if isinstance(image, list):
            image = torch.stack([sample["image"] for sample in image])
        if self.training:
            raise RuntimeError("it was traced in training mode")
        return {"logits": self.head(self.stem(image * scale).mean((2, 3)))}


IMAGE = torch.ones(2, 3, 4, 4)
CONV, LINEAR = 2 * 3 * 8 * 16, 2 * 8 * 5


class Attention(nn.Module):
    def __init__(self, heads: int = 4, size: int = 6) -> None:
        super().__init__()
        self.query = nn.Parameter(torch.ones(heads, 3, size))

    def forward(self, keys: torch.Tensor, values: torch.Tensor) -> torch.Tensor:
        query = self.query.expand(len(keys), *self.query.shape)
        return F.scaled_dot_product_attention(query, keys, values)


@pytest.mark.parametrize(
    "inputs",
    [
        (IMAGE,),
        IMAGE,
        {"image": IMAGE, "name": "x"},
        {"image": [{"image": IMAGE[0]}, {"image": IMAGE[1]}]},
        ({"image": IMAGE}, 2.0),
    ],
)
def test_flops_are_multiply_adds_whatever_form_the_batch_has(inputs: Any) -> None:
    model = Net().train()
    counts = flop_count_operators(model, inputs)
    assert counts == {"conv": CONV / 1e9, "linear": LINEAR / 1e9}
    assert counts["none"] == 0
    assert model.training


def test_modules_keep_their_names_and_have_their_own_shares() -> None:
    flops = FlopCountAnalysis(Net().eval(), {"image": IMAGE})
    expected = {"": CONV + LINEAR, "stem": CONV, "stem.0": CONV, "head": LINEAR}
    assert flops.by_module() == expected
    assert flops.total("head") == LINEAR
    assert flops.by_operator("stem") == {"conv": CONV}


def test_the_model_is_left_as_it_was() -> None:
    model = Net().eval()
    before = dict(vars(model))
    FlopCountAnalysis(model, IMAGE).total()
    assert vars(model) == before
    assert "logits" in model(IMAGE)
    assert [len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules()] == [0] * 4


def test_activations_are_what_convolutions_and_products_put_out() -> None:
    counts = activation_count_operators(Net(), IMAGE)
    assert counts == {"conv": 2 * 8 * 16 / 1e6, "linear": 2 * 5 / 1e6}


def test_attention_is_counted() -> None:
    keys, values = torch.ones(2, 4, 7, 6), torch.ones(2, 4, 7, 9)
    counts = flop_count_operators(Attention(), (keys, values))
    # Per head and query of a sample: 7 scores of 6 products each, then 9 sums of 7 each.
    flops = (2 * 4 * 3) * (7 * 6 + 9 * 7)
    assert counts == {"scaled_dot_product_attention": flops / 1e9}
    by_hand = torch.ones(2, 4, 3, 6) @ keys.transpose(-1, -2)
    assert flops == by_hand.numel() * 6 + (by_hand @ values).numel() * 7
    activations = activation_count_operators(Attention(), (keys, values))
    assert activations == {"scaled_dot_product_attention": 2 * 4 * 3 * 9 / 1e6}


def test_layers_of_a_transformer_are_counted() -> None:
    layer = nn.TransformerEncoderLayer(d_model=8, nhead=2, dim_feedforward=16, batch_first=True)
    counts = flop_count_operators(layer, torch.ones(1, 5, 8))
    linear = 5 * (8 * 24 + 8 * 8 + 8 * 16 + 16 * 8)
    assert counts["linear"] * 1e9 == pytest.approx(linear)
    assert counts["scaled_dot_product_attention"] * 1e9 == pytest.approx(2 * 5 * 5 * 8)


@pytest.mark.slow
def test_a_wrapped_model_is_counted_as_it_would_be_without(one_process_group: None) -> None:
    wrapped = nn.parallel.DistributedDataParallel(Net().eval())
    batch = {"image": [{"image": image} for image in (*IMAGE, *IMAGE)]}
    counts = FlopCountAnalysis(wrapped, batch).by_module()
    assert counts == FlopCountAnalysis(wrapped.module, batch).by_module()
    assert counts["stem"] == 2 * CONV


@pytest.fixture
def one_process_group(tmp_path: Any) -> Any:
    store = f"file://{tmp_path}/store"
    torch.distributed.init_process_group("gloo", init_method=store, rank=0, world_size=1)
    yield
    torch.distributed.destroy_process_group()


def test_parameters_are_counted_by_module_and_shared_ones_once() -> None:
    model = Net()
    assert parameter_count(model)[""] == 24 + 45
    assert parameter_count(model)["head"] == 45
    tied = nn.ModuleDict({"a": model.head, "b": model.head})
    assert parameter_count(tied)[""] == 45


def test_d50_tables_are_indented_by_depth() -> None:
    lines = parameter_count_table(Net()).splitlines()
    assert lines == [
        "| name                | parameters or shape   |",
        "|:--------------------|:----------------------|",
        "| model               | 69                    |",
        "|   stem              |   24                  |",
        "|     stem.0          |     24                |",
        "|       stem.0.weight |       (8, 3, 1, 1)    |",
        "|   head              |   45                  |",
        "|     head.weight     |     (5, 8)            |",
        "|     head.bias       |     (5,)              |",
    ]
    assert len(parameter_count_table(Net(), max_depth=1).splitlines()) == 5


def test_d50_table_of_flops_is_indented_and_leaves_out_what_costs_nothing() -> None:
    model = nn.Sequential(Net(), nn.Identity()).eval()
    # A module that costs nothing.
    model[1].forward = lambda outputs: outputs["logits"]
    table = flop_count_table(FlopCountAnalysis(model, torch.ones(1000, 3, 4, 4)), max_depth=2)
    assert table.splitlines()[2:] == [
        "| model      | 69           | 424.0K     |",
        "|   0        |   69         |   424.0K   |",
        "|     0.stem |     24       |     384.0K |",
        "|     0.head |     45       |     40.0K  |",
    ]


@pytest.mark.slow
def test_d50_using_fvcore_nn_warns_of_nothing() -> None:
    # In a process of its own: what was imported before would warn no more.
    code = (
        "import torch; from trainkit.utils.analysis import FlopCountAnalysis, parameter_count; "
        "net = torch.nn.Linear(2, 3); print(parameter_count(net)['']); "
        "print(FlopCountAnalysis(net, torch.ones(1, 2)).total())"
    )
    command = [sys.executable, "-W", "error", "-c", code]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout, done.stderr) == (0, "9\n6\n", "")


class WithUnused(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.used = nn.Linear(2, 1)
        self.unused = nn.Linear(2, 1)
        self.frozen = nn.Linear(2, 1).requires_grad_(False)

    def forward(self, batch: dict[str, torch.Tensor]) -> Any:
        loss = self.used(batch["x"]).mean()
        return {"loss": loss, "accuracy": loss.detach()}


def test_unused_parameters_are_named_and_gradients_kept() -> None:
    model = WithUnused()
    model.used.bias.grad = torch.ones(1)
    names = find_unused_parameters(model, {"x": torch.ones(3, 2)})
    assert names == ["unused.weight", "unused.bias"]
    assert model.used.weight.grad is None
    assert torch.equal(model.used.bias.grad, torch.ones(1))


def test_unused_parameters_need_a_loss() -> None:
    batch = {"x": torch.ones(3, 2)}
    with pytest.raises(ConfigError, match=r"in evaluation mode\. Call model\.train\(\) first"):
        find_unused_parameters(WithUnused().eval(), batch)
    with pytest.raises(ConfigError, match=r"returned none in training mode"):
        find_unused_parameters(nn.Flatten(), torch.ones(3, 2))


def test_evaluating_puts_each_module_back_into_its_own_mode() -> None:
    model = nn.Sequential(nn.BatchNorm1d(2).eval(), nn.Dropout())
    with inference_context(model):
        assert not any(module.training for module in model.modules())
    assert [module.training for module in model.modules()] == [True, False, True]
    with pytest.raises(OSError, match="x"), inference_context(model):
        raise OSError("x")
    assert [module.training for module in model.modules()] == [True, False, True]
