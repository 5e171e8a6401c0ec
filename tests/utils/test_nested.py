from collections import OrderedDict
from typing import Any, NamedTuple

import pytest
import torch

from trainkit.utils.nested import batch_size, move_to

META = torch.device("meta")
CPU = torch.device("cpu")


class Pair(NamedTuple):
    image: Any
    label: Any


class Boxes:
    """Something of the user's own that can move."""

    def __init__(self, device: torch.device) -> None:
        self.device = device

    def to(self, device: torch.device) -> "Boxes":
        return Boxes(device)


def test_tensors_move_in_every_nesting_and_other_leaves_stay() -> None:
    x = torch.zeros(2)
    batch = {"list": [x, "name"], "tuple": (x, 1), "pair": Pair(x, None), "boxes": Boxes(CPU)}
    moved = move_to(batch, META)
    assert moved["list"][0].device == META
    assert moved["list"][1] == "name"
    assert moved["tuple"][0].device == META
    assert moved["tuple"][1] == 1
    assert isinstance(moved["tuple"], tuple)
    assert isinstance(moved["pair"], Pair)
    assert moved["pair"].image.device == META
    assert moved["pair"].label is None
    assert moved["boxes"].device == META
    assert x.device == CPU


def test_what_is_already_there_is_not_copied() -> None:
    x = torch.zeros(2)
    assert move_to([x], CPU)[0] is x


@pytest.mark.parametrize(
    ("batch", "size"),
    [
        (torch.zeros(8, 3), 8),
        (torch.tensor(1.0), None),
        ([torch.zeros(5, 3), torch.zeros(5)], 5),
        ((torch.zeros(5, 3), torch.zeros(5)), 5),
        (OrderedDict(name="x", image=torch.zeros(4, 1)), 4),
        ({"scale": torch.tensor(2.0), "image": torch.zeros(4, 1)}, 4),
        ({"names": ["a", "b"], "inputs": {"image": torch.zeros(6, 1)}}, 6),
        ([{"image": torch.zeros(3, 32, 32)}, {"image": torch.zeros(3, 16, 16)}], 2),
        ([], None),
        ("text", None),
        (7, None),
    ],
)
def test_batch_size_is_read_off_the_usual_shapes(batch: Any, size: int | None) -> None:
    assert batch_size(batch) == size
