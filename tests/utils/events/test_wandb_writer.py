import io
import json
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from trainkit.utils.errors import ConfigError
from trainkit.utils.events.storage import EventStorage
from trainkit.utils.events.wandb_writer import WandbWriter

NewWriter = Callable[..., WandbWriter]

_BLOCK = 32768


@pytest.fixture
def new_writer(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[NewWriter]:
    """Makes writers that leave their runs in folders 0, 1, …; nothing leaves this machine."""
    settings = {"MODE": "offline", "ERROR_REPORTING": "false", "SILENT": "true", "CONSOLE": "off"}
    settings |= {"DISABLE_GIT": "true", "DISABLE_CODE": "true", "X_DISABLE_STATS": "true"}
    for name, value in settings.items():
        monkeypatch.setenv(f"WANDB_{name}", value)
    for name in ("CONFIG", "CACHE", "DATA", "ARTIFACT"):
        monkeypatch.setenv(f"WANDB_{name}_DIR", str(tmp_path / "own"))
    pytest.importorskip("wandb", reason="needs trainkit[wandb]")
    writers: list[WandbWriter] = []

    def make(**kwargs: Any) -> WandbWriter:
        # Else two runs of one id and one second would share theirs.
        folder = tmp_path / str(len(writers))
        folder.mkdir()
        writers.append(WandbWriter(dir=str(folder), **kwargs))
        return writers[-1]

    yield make
    for writer in writers:
        writer.close()


def records(path: Path) -> Iterator[Any]:
    """The records of a run's file: LevelDB's log format, behind a header of 7 bytes."""
    proto = pytest.importorskip("wandb.proto.wandb_internal_pb2")
    data, offset, parts = path.read_bytes(), 7, b""
    while offset + 7 <= len(data):
        if _BLOCK - offset % _BLOCK < 7:
            offset += _BLOCK - offset % _BLOCK
            continue
        length, kind = int.from_bytes(data[offset + 4 : offset + 6], "little"), data[offset + 6]
        parts += data[offset + 7 : offset + 7 + length]
        offset += 7 + length
        if kind in (1, 4):  # Whole, or the last part.
            record = proto.Record()
            record.ParseFromString(parts)
            parts = b""
            yield record


def runs(folder: Path) -> list[tuple[str, dict[int, dict[str, Any]]]]:
    """The id of each writer's run, and its values by step and name."""
    # Its process writes on for a moment after a run is finished.
    pytest.importorskip("wandb").teardown()
    found = []
    for path in sorted(folder.glob("[01]/wandb/offline-run-*/*.wandb")):
        steps: dict[int, dict[str, Any]] = {}
        for record in records(path):
            if record.WhichOneof("record_type") == "run":
                run_id = record.run.run_id
            if record.WhichOneof("record_type") == "history":
                values = {
                    item.key or "/".join(item.nested_key): json.loads(item.value_json)
                    for item in record.history.item
                }
                steps[values["_step"]] = {k: v for k, v in values.items() if k[0] != "_"}
        found.append((run_id, steps))
    return found


def train(
    writer: WandbWriter, storage: EventStorage, iterations: range, save_before: int | None = None
) -> dict[str, Any]:
    """Trains, with a write every 10; returns a checkpoint from inside step `save_before`."""
    saved: dict[str, Any] = {}
    with storage:
        for i in iterations:
            storage.iter = i
            storage.put_scalar("lr", i + 0.5, smoothing_hint=False)
            if i == save_before:
                file = io.BytesIO()
                torch.save({"storage": storage.state_dict(), "writer": writer.state_dict()}, file)
                file.seek(0)
                saved = torch.load(file, weights_only=True)
            if i % 10 == 9:
                writer.write()
    return saved


@pytest.mark.slow
def test_scalars_and_images_can_be_read_back(new_writer: NewWriter, tmp_path: Path) -> None:
    writer = new_writer(window_size=3, project="mine")
    with EventStorage() as storage:
        for i, value in enumerate([8.0, 1.0, 5.0, 3.0]):
            storage.iter = i
            storage.put_scalar("loss", value)
        storage.put_scalar("top1", 0.25, smoothing_hint=False, cur_iter=1)
        storage.put_scalar("top1", 0.75, smoothing_hint=False, cur_iter=3)
        storage.put_image("val/color", np.full((3, 4, 6), 200, dtype=np.uint8))
        storage.put_image("grey", torch.zeros(1, 4, 6))
        writer.write()
        # Put after the write of its iteration.
        storage.put_scalar("late", 1.0)
        writer.write()
    writer.close()
    ((_, steps),) = runs(tmp_path)
    assert list(steps) == [1, 3]
    assert steps[1] == {"top1": 0.25}
    last = steps[3]
    assert (last["loss"], last["top1"], last["late"]) == (3.0, 0.75, 1.0)
    assert (last["grey/width"], last["grey/height"]) == (6, 4)
    image = pytest.importorskip("PIL.Image")
    (folder,) = tmp_path.glob("0/wandb/offline-run-*/files")
    assert (np.asarray(image.open(folder / last["val/color/path"])) == 200).all()


@pytest.mark.slow
def test_a_resumed_run_has_the_id_of_the_first(new_writer: NewWriter, tmp_path: Path) -> None:
    killed = new_writer()
    saved = train(killed, EventStorage(), range(20), save_before=5)
    killed.close()
    writer, storage = new_writer(), EventStorage(6)
    writer.load_state_dict(saved["writer"])
    storage.load_state_dict(saved["storage"])
    train(writer, storage, range(6, 30))
    writer.close()
    (first_id, first), (second_id, second) = runs(tmp_path)
    assert first_id == second_id == saved["writer"]["run_id"]
    assert {i: values["lr"] for i, values in first.items()} == {9: 9.5, 19: 19.5}
    # Offline, a process cannot know what others have written.
    assert {i: values["lr"] for i, values in second.items()} == {9: 9.5, 19: 19.5, 29: 29.5}


class _Library:
    """Weights & Biases as it answers online: a resumed run knows its next step."""

    Error = KeyError

    def __init__(self, step: int) -> None:
        self.step = step
        self.logged: list[tuple[int, dict[str, Any]]] = []
        self.calls: list[dict[str, Any]] = []

    def init(self, **kwargs: Any) -> "_Library":
        self.calls.append(kwargs)
        return self

    def log(self, values: dict[str, Any], step: int) -> None:
        self.logged.append((step, values))

    def finish(self) -> None:
        self.calls.append({})


def test_steps_that_a_resumed_run_has_are_not_written_again(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    library = _Library(step=20)
    monkeypatch.setitem(sys.modules, "wandb", library)
    writer = WandbWriter(project="mine")
    writer.load_state_dict({"run_id": "abc", "new_values": {"written": {}, "start_iter": 0}})
    train(writer, EventStorage(), range(40))
    assert library.logged == [(29, {"lr": 29.5}), (39, {"lr": 39.5})]
    assert library.calls == [
        {"id": "abc", "resume": "allow", "reinit": "create_new", "project": "mine"}
    ]


def test_a_run_that_starts_anew_is_another_one(monkeypatch: pytest.MonkeyPatch) -> None:
    library = _Library(step=0)
    monkeypatch.setitem(sys.modules, "wandb", library)
    writer = WandbWriter()
    train(writer, EventStorage(), range(10))
    writer.reset()
    train(writer, EventStorage(), range(10))
    first, finished, second = library.calls
    assert first["id"] != second["id"]
    assert not finished


def test_missing_wandb_is_named_with_the_extra_that_brings_it(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setitem(sys.modules, "wandb", None)
    with pytest.raises(ConfigError, match=r"needs wandb: pip install 'trainkit\[wandb\]'"):
        WandbWriter()
