"""What passes is what `torch.load(weights_only=True)` loads, and what does not is named."""

import collections
import enum
import io
import pathlib
from typing import Any

import numpy as np
import pytest
import torch

from trainkit.checkpoint.storable import check_storable, tensor_bytes
from trainkit.utils.errors import CheckpointError


class Color(enum.IntEnum):
    RED = 1


class Words(dict[str, int]):
    pass


class Image(torch.Tensor):
    pass


Point = collections.namedtuple("Point", "x")


def loads(value: Any) -> bool:
    """Whether torch really loads it."""
    buffer = io.BytesIO()
    try:
        torch.save(value, buffer)
        buffer.seek(0)
        torch.load(buffer, weights_only=True)
    except Exception:
        return False
    return True


def with_attribute(value: Any) -> torch.Tensor:
    tensor = torch.zeros(2)
    tensor.note = value  # type: ignore[attr-defined]  # users do this
    return tensor


STORABLE = {
    "none": None,
    "bool": True,
    "int": -(2**40),
    "large int": 2**2039 - 1,
    "float": float("inf"),
    "complex": 1j,
    "str": "\u00e4",
    "bytes": b"\xff",
    "bytearray": bytearray(b"x"),
    "size": torch.Size([2]),
    "dtype": torch.bfloat16,
    "device": torch.device("cpu"),
    "layout": torch.strided,
    "tensor": torch.zeros(2),
    "parameter": torch.nn.Parameter(torch.zeros(2)),
    "tensor with a note": with_attribute(1),
    "sparse": torch.eye(2).to_sparse(),
    "dict": {"a": 1, 2: [3], (4, 5): 6},
    "OrderedDict": collections.OrderedDict(a=1),
    "Counter": collections.Counter("aab"),
    "list": [1, (2, {3})],
    "state_dict": torch.nn.BatchNorm1d(2).state_dict(),
}

REFUSED = {
    "huge int": 2**2039,
    "numpy scalar": np.float64(1),
    "array": np.zeros(2),
    "enum": Color.RED,
    "dict subclass": Words(a=1),
    "defaultdict": collections.defaultdict(int),
    "namedtuple": Point(1),
    "frozenset": frozenset({1}),
    "tensor subclass": torch.zeros(2).as_subclass(Image),
    "tensor with a bad note": with_attribute(np.float64(1)),
    "lazy": torch.nn.UninitializedParameter(),
    "path": pathlib.PurePosixPath("x"),
    "class": int,
    "function": len,
    "range": range(3),
    "generator": torch.Generator(),
    "key": {np.int64(1): 2},
}


@pytest.mark.parametrize("name", STORABLE)
def test_what_passes_loads_again(name: str) -> None:
    check_storable({"state": STORABLE[name]})
    assert loads({"state": STORABLE[name]})


@pytest.mark.parametrize("name", REFUSED)
def test_what_is_refused_would_not_load(name: str) -> None:
    with pytest.raises(CheckpointError, match="state"):
        check_storable({"state": REFUSED[name]})
    assert not loads({"state": REFUSED[name]})


def test_the_path_of_keys_the_type_and_the_mend_are_named() -> None:
    data = {"trainer": {"hooks": {"Foo": {"best": np.float64(0.5), "last": [1, np.zeros((2, 3))]}}}}
    with pytest.raises(CheckpointError) as raised:
        check_storable(data)
    text = str(raised.value)
    assert "trainer.hooks.Foo.best: numpy.float64 np.float64(0.5); use float(x)" in text
    assert "trainer.hooks.Foo.last[1]: numpy.ndarray of shape (2, 3); use torch.from_numpy" in text


@pytest.mark.parametrize(
    ("value", "advice"),
    [
        (np.int64(3), r"use int\(x\)"),
        (np.bool_(True), r"use bool\(x\)"),
        (Color.RED, r"Color.*use int\(x\)"),
        (collections.defaultdict(int), r"collections.defaultdict; use dict\(x\)"),
        (Point(1), r"use tuple\(x\)"),
        (frozenset({1}), r"use set\(x\)"),
        (2**5000, r"int of 5001 bits; use str\(x\)"),
        (torch.zeros(1).as_subclass(Image), "use a plain tensor"),
        (object(), "use tensors, numbers"),
    ],
)
def test_advice_fits_the_type(value: Any, advice: str) -> None:
    with pytest.raises(CheckpointError, match=advice):
        check_storable([value])


def test_a_bad_key_is_told_from_a_bad_value() -> None:
    with pytest.raises(CheckpointError, match=r"state \(a key\): numpy.int64"):
        check_storable({"state": {np.int64(1): 2}})


def test_many_offences_are_cut_short() -> None:
    with pytest.raises(CheckpointError, match="and 95 more") as raised:
        check_storable([np.float32(i) for i in range(100)])
    assert len(str(raised.value).splitlines()) == 7


def test_a_container_that_holds_itself_is_walked_once() -> None:
    data: dict[str, Any] = {"x": 1}
    data["self"] = data
    check_storable(data)


def test_classes_made_known_to_torch_pass() -> None:
    with torch.serialization.safe_globals([Words]):
        check_storable({"state": Words(a=1)})


def test_bytes_count_shared_memory_once() -> None:
    weight = torch.zeros(100)
    assert tensor_bytes({"a": weight, "b": [weight[:10], torch.zeros(2, dtype=torch.int64)]}) == 416
