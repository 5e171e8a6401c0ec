"""Fingerprints differ exactly when values do."""

import random
from collections import deque
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from trainkit.testing.fingerprint import fingerprint, fingerprints


class Boxes:
    """A batch of a class of its own."""

    def __init__(self, boxes: torch.Tensor) -> None:
        self.boxes = boxes

    def to(self, device: torch.device) -> "Boxes":
        return Boxes(self.boxes.to(device))


def linear(bias: float) -> nn.Linear:
    layer = nn.Linear(2, 2)
    nn.init.constant_(layer.weight, 1.0)
    nn.init.constant_(layer.bias, bias)
    return layer


ONES = torch.ones(2, 3)
PAIRS: dict[str, tuple[Any, Any]] = {
    "one bit": (ONES, ONES * (1 + 2**-23)),
    "the sign of zero": (torch.zeros(2), -torch.zeros(2)),
    "dtype": (torch.zeros(2), torch.zeros(2, dtype=torch.int32)),
    "shape": (torch.zeros(2, 3), torch.zeros(3, 2)),
    "bfloat16": (ONES.bfloat16(), 2 * ONES.bfloat16()),
    "conjugation": (torch.tensor([1j]), torch.tensor([1j]).conj()),
    "sparse": (ONES.to_sparse(), (2 * ONES).to_sparse()),
    "0-d": (torch.tensor(0.1), torch.tensor(0.1, dtype=torch.float64)),
    "array": (np.arange(3), np.arange(3) + 1),
    "array of objects": (np.array(["a", None]), np.array(["b", None])),
    "type": (1, 1.0),
    "a long list": (list(range(99)), [*range(98), 0]),
    "a list of tensors": ([ONES, ONES], [ONES, ONES + 1]),
    "deque": (deque([1, 2]), deque([2, 1])),
    "nested": ({"a": [{"b": ONES}]}, {"a": [{"b": -ONES}]}),
    "key": ({"a": 1}, {"b": 1}),
    "set": ({1, 2}, {1, 3}),
    "number of NumPy": (np.float32(1), np.float32(2)),
    "module": (linear(0.0), linear(1.0)),
    "torch's generator": (torch.Generator().manual_seed(0), torch.Generator().manual_seed(1)),
    "Python's generator": (random.Random(0), random.Random(1)),
    "NumPy's old generator": (np.random.RandomState(0), np.random.RandomState(1)),
    "NumPy's generator": (np.random.default_rng(0), np.random.default_rng(1)),
    "a batch class": (Boxes(ONES), Boxes(ONES + 1)),
}


@pytest.mark.parametrize("name", PAIRS)
def test_another_value_has_another_fingerprint(name: str) -> None:
    first, second = PAIRS[name]
    assert fingerprint(first) == fingerprint(first)
    assert fingerprint(first) != fingerprint(second)


def test_the_same_value_has_the_same_fingerprint_however_it_lies_in_memory() -> None:
    image = torch.rand(2, 3, 4, 4)
    assert fingerprint(image.to(memory_format=torch.channels_last)) == fingerprint(image)
    assert fingerprint(image.transpose(0, 1).transpose(0, 1).clone()) == fingerprint(image)
    assert fingerprint(image.flatten()[::2]) == fingerprint(image.flatten()[::2].clone())
    assert fingerprint(nn.Parameter(image)) == fingerprint(image)


def test_the_order_in_which_keys_were_put_in_does_not_count() -> None:
    assert fingerprint({"a": 1, "b": [2]}) == fingerprint({"b": [2], "a": 1})
    # These two collide, so that a set holds them in the order of their arrival.
    assert fingerprint({0, 8}) == fingerprint({8, 0})


def test_short_values_are_shown_and_long_ones_hashed() -> None:
    assert fingerprint([7, 0.5, "a", None]) == "[7, 0.5, 'a', None]"
    assert fingerprint(torch.tensor(7)) == "int64 7"
    assert fingerprint(ONES).startswith("float32[2, 3] #")
    assert fingerprint("a" * 99).startswith("str #")


def test_of_an_unknown_object_only_the_type_counts() -> None:
    assert fingerprint(SimpleNamespace(a=1)) == fingerprint(SimpleNamespace(a=2))
    assert fingerprint(print) == "builtin_function_or_method"


def test_nested_dicts_give_one_fingerprint_for_each_value() -> None:
    found = dict(fingerprints({"a": {"b": 1}, "c": {}, 2: ONES}))
    assert found == {"a.b": "1", "c": "{}", "2": fingerprint(ONES)}
    assert dict(fingerprints(3.0, "loss")) == {"loss": "3.0"}
