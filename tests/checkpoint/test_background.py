"""A save in the background: what is copied, what it writes, and how it ends."""

import contextlib
import errno
import io
import logging
import os
import threading
import weakref
from collections import OrderedDict
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from trainkit.checkpoint.background import BackgroundSaver, StateCopier
from trainkit.checkpoint.checkpointer import Checkpointer
from trainkit.checkpoint.format import write_checkpoint
from trainkit.checkpoint.manifest import read_manifest
from trainkit.utils.errors import CheckpointError, CheckpointWriteError

WRITE = "trainkit.checkpoint.checkpointer.write_checkpoint"


def nothing() -> None:
    """Follows a save without retention."""


def save(checkpointer: Checkpointer, number: int, surviving: Any = contextlib.nullcontext) -> None:
    checkpointer.save_in_background(f"model_{number:07d}", nothing, surviving, iteration=number)


def pickled(data: Any) -> bytes:
    file = io.BytesIO()
    torch.save(data, file)
    return file.getvalue()


def state() -> dict[Any, Any]:
    """A state with every kind of value, and with memory that is shared in every way."""
    torch.manual_seed(0)
    base, odd = torch.randn(4, 6), torch.randn(5, dtype=torch.complex64)
    labelled = torch.ones(3)
    labelled.label = "three"  # type: ignore[attr-defined]  # what a user may do
    parameter = nn.Parameter(torch.randn(7))
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4))
    model.to(memory_format=torch.channels_last)  # type: ignore[call-overload]  # torch's stub lacks it
    names = ["momentum", 3, 1.5, None, True, b"raw", (1, (2.5, "x")), torch.Size([2, 3])]
    return {
        "model": model.state_dict(),
        "ordered": OrderedDict(b=base, a=base[1:3, ::2]),
        "twice": [base, base, base.t(), base[0].expand(4, 6), base.as_strided((2, 2), (0, 1))],
        "odd": (odd, odd.conj(), torch._neg_view(base[1])),
        "empty": [torch.empty(0), torch.tensor(3), torch.empty(2, device="meta")],
        "parameters": {0: parameter, 1: parameter.detach(), 2: parameter.data[2:]},
        "labelled": labelled,
        "sparse": torch.eye(3).to_sparse(),
        "plain": [names, names, {1, 2, 3}, bytearray(b"xyz"), torch.float16, torch.device("cpu")],
        (1, "key"): torch.get_rng_state(),
    }


def change(data: Any) -> None:
    """Changes all tensors and containers in place."""
    if isinstance(data, torch.Tensor):
        with torch.no_grad():
            if not (data.is_sparse or data.is_meta or 0 in data.stride()):
                data.copy_(torch.zeros_like(data))
    elif isinstance(data, dict):
        for value in data.values():
            change(value)
        data["new"] = 1
    elif isinstance(data, (list, tuple)):
        for value in data:
            change(value)
        if isinstance(data, list):
            data.append("new")
    elif isinstance(data, bytearray):
        data.clear()
    elif isinstance(data, set):
        data.add("new")


def test_f20_a_copy_is_saved_as_the_bytes_of_the_state() -> None:
    data, copier = state(), StateCopier()
    for _ in range(2):
        assert pickled(copier.copy(data)) == pickled(data)


def test_f20_no_later_change_of_the_state_enters_a_copy() -> None:
    data = state()
    before = pickled(data)
    copied = StateCopier().copy(data)
    change(data)
    assert pickled(data) != before
    assert pickled(copied) == before


def test_memory_is_kept_from_one_copy_to_the_next_for_what_has_the_same_size() -> None:
    copier = StateCopier()

    def places(*sizes: int) -> list[int]:
        copied = copier.copy([torch.ones(size) for size in sizes])
        return [tensor.data_ptr() for tensor in copied]

    first = places(1000, 2000, 1000)
    assert set(places(2000, 1000, 1000)) == set(first)
    assert set(places(1000, 3000)) & set(first)
    # Memory that nothing fits is given back.
    assert sum(map(len, copier._kept.values())) == 2


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")
def test_a_copy_from_cuda_is_pinned_and_whole_once_it_is_waited_for() -> None:
    tensor = torch.randn(1 << 22, device="cuda")
    expected, copier = tensor.cpu(), StateCopier()
    copied = copier.copy({"t": tensor, "part": tensor[3:]})
    tensor.zero_()
    copier.wait()
    assert copied["t"].is_pinned()
    assert torch.equal(copied["t"], expected)
    assert torch.equal(copied["part"], expected[3:])


class Gate:
    """Holds writes until it is opened, and counts those that are under way."""

    def __init__(self) -> None:
        self.is_open = threading.Event()
        self.num_started = self.num_now = self.max_now = 0

    def pass_through(self, function: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        self.num_started += 1
        self.num_now += 1
        self.max_now = max(self.max_now, self.num_now)
        assert self.is_open.wait(30)
        try:
            return function(*args, **kwargs)
        finally:
            self.num_now -= 1

    def open_later(self) -> None:
        threading.Timer(0.2, self.is_open.set).start()


@pytest.fixture
def gate(monkeypatch: pytest.MonkeyPatch) -> Iterator[Gate]:
    gate = Gate()
    monkeypatch.setattr(WRITE, partial(gate.pass_through, write_checkpoint))
    yield gate
    gate.is_open.set()


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def net() -> nn.Module:
    torch.manual_seed(1)
    return nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Linear(4, 2))


def test_f20_what_is_saved_is_the_state_when_save_returned_in_the_same_bytes(
    tmp_path: Path, gate: Gate
) -> None:
    model, extra = net(), {"plain": [1, {"a": torch.ones(2)}]}
    optimizer = torch.optim.Adam(model.parameters())
    model(torch.randn(5, 3)).sum().backward()
    optimizer.step()
    checkpointer = Checkpointer(model, tmp_path, optimizer=optimizer)
    checkpointer.facts["device"] = "then"
    gate.is_open.set()
    checkpointer.save("synchronous", iteration=7, **extra)
    gate.is_open.clear()
    checkpointer.save_in_background("behind", nothing, contextlib.nullcontext, iteration=7, **extra)
    model(torch.randn(5, 3)).sum().backward()
    optimizer.step()
    change(extra)
    checkpointer.facts["device"] = "now"
    # Nothing says that it is saved before it is.
    assert not (tmp_path / "behind.pth").exists()
    assert (tmp_path / "last_checkpoint").read_text() == "synchronous.pth"
    gate.is_open.set()
    checkpointer.background.wait()
    assert (tmp_path / "last_checkpoint").read_text() == "behind.pth"
    paths = tmp_path / "synchronous.pth", tmp_path / "behind.pth"
    manifests = [read_manifest(path) for path in paths]
    assert manifests[0] is not None
    assert manifests[1] is not None
    parts = [path.read_bytes()[: manifests[0].bytes - 2] for path in paths]
    assert parts[0] == parts[1]
    told = [{**vars(manifest), "saved_at_ns": 0} for manifest in manifests]
    assert told[0] == told[1]


@pytest.mark.parametrize(
    "next_one",
    [
        lambda c: save(c, 2),
        lambda c: c.save("model_final"),
        lambda c: c.save_untagged("model_best"),
        lambda c: c.save_weights("model_weights"),
        lambda c: c.resume_or_load(""),
        lambda c: c.get_checkpoint_file(),
        lambda c: c.has_checkpoint(),
        lambda c: c.background.wait(),
        lambda c: c.background.wait(alone=True),
    ],
)
def test_f20_whatever_comes_next_waits_for_the_one_in_flight(
    tmp_path: Path, gate: Gate, next_one: Callable[[Checkpointer], object]
) -> None:
    checkpointer = Checkpointer(net(), tmp_path)
    save(checkpointer, 1)
    checkpointer.background.poll()
    assert names(tmp_path) == []
    gate.open_later()
    next_one(checkpointer)
    assert "model_0000001.pth" in names(tmp_path)
    checkpointer.background.wait()
    assert gate.max_now == 1
    assert not list(tmp_path.glob(".*.tmp"))


def fail(monkeypatch: pytest.MonkeyPatch) -> None:
    def fsync(descriptor: int) -> None:
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    monkeypatch.setattr(os, "fsync", fsync)


def test_f20_an_error_is_raised_once_when_somebody_asks_and_the_next_save_succeeds(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    checkpointer = Checkpointer(net(), tmp_path)
    save(checkpointer, 1)
    checkpointer.background.wait()
    before = names(tmp_path)
    with caplog.at_level(logging.INFO), monkeypatch.context() as patch:
        fail(patch)
        save(checkpointer, 2)
        with pytest.raises(CheckpointWriteError, match=r"model_0000002\.pth: Input/output error.*"):
            checkpointer.save("model_final")
    assert "Saved" not in caplog.text
    assert names(tmp_path) == before
    assert (tmp_path / "last_checkpoint").read_text() == "model_0000001.pth"
    checkpointer.background.wait()
    checkpointer.background.poll()
    save(checkpointer, 3)
    checkpointer.background.wait()
    assert (tmp_path / "last_checkpoint").read_text() == "model_0000003.pth"


def test_f20_an_error_that_is_survived_keeps_no_other_save_from_being_made(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    checkpointer = Checkpointer(net(), tmp_path)
    with monkeypatch.context() as patch:
        fail(patch)
        save(checkpointer, 1, partial(contextlib.suppress, CheckpointWriteError))
        assert checkpointer.background._is_over.wait(30)
    checkpointer.save_untagged("model_best")
    assert names(tmp_path) == ["model_best.pth"]


def test_a_state_that_cannot_be_stored_or_copied_is_named_at_once(tmp_path: Path) -> None:
    checkpointer = Checkpointer(net(), tmp_path)
    with pytest.raises(CheckpointError, match=r"lock: _thread\.lock"):
        checkpointer.save_in_background("x", nothing, contextlib.nullcontext, lock=threading.Lock())
    checkpointer.background.wait()
    assert names(tmp_path) == []


def test_a_wait_that_ctrl_c_ends_leaves_the_save_in_flight(
    tmp_path: Path, gate: Gate, monkeypatch: pytest.MonkeyPatch
) -> None:
    checkpointer = Checkpointer(net(), tmp_path)
    save(checkpointer, 1)

    def interrupted(saver: BackgroundSaver) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(BackgroundSaver, "_join", interrupted)
        with pytest.raises(KeyboardInterrupt):
            checkpointer.background.wait()
    gate.open_later()
    checkpointer.save("model_final")
    assert gate.max_now == 1
    assert names(tmp_path) == ["last_checkpoint", "model_0000001.pth", "model_final.pth"]


def test_without_a_folder_nothing_is_saved() -> None:
    checkpointer = Checkpointer(net(), "")
    save(checkpointer, 1)
    checkpointer.background.wait()
    assert checkpointer.background._is_over.is_set()


def test_an_error_of_a_save_keeps_nothing_alive(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    saver = BackgroundSaver()

    def write(data: Any) -> None:
        raise ValueError("boom")

    saver.start(write, [torch.ones(1)])
    with pytest.raises(ValueError, match="boom"):
        saver.wait()
    dead = weakref.ref(saver)
    del saver
    assert dead() is None
