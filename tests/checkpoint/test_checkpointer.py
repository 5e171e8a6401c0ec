"""A run's state is saved whole, resumed from the newest valid file, and never mixed."""

import collections
import errno
import gc
import json
import logging
import os
import pickle
import re
import signal
import weakref
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from tests.web import Web, serving
from trainkit.checkpoint.checkpointer import Checkpointer, DetectionCheckpointer
from trainkit.checkpoint.format import verify
from trainkit.utils import file_io
from trainkit.utils.errors import CheckpointError


class Counter:
    """Anything with a state."""

    def __init__(self, value: Any = 0) -> None:
        self.value = value

    def state_dict(self) -> dict[str, Any]:
        return {"value": self.value}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.value = state["value"]


def build(folder: Path | str, value: float = 0, width: int = 2) -> Checkpointer:
    """Returns a checkpointer of a model and a counter that hold one value everywhere."""
    model = nn.Linear(2, width)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.fill_(value)
    return Checkpointer(model, folder, counter=Counter(value))


def value_of(checkpointer: Checkpointer) -> float:
    """Returns the one value that model and counter hold."""
    weights = torch.cat([p.detach().flatten() for p in checkpointer.model.parameters()])
    (value,) = {*weights.tolist(), float(checkpointer.checkpointables["counter"].value)}
    return float(value)


def save(folder: Path, name: str, value: float) -> Path:
    build(folder, value).save(name, iteration=int(value))
    return folder / f"{name}.pth"


def damage(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


def resume(folder: Path) -> tuple[float, dict[str, Any]]:
    checkpointer = build(folder)
    extra = checkpointer.resume_or_load("", resume=True)
    return value_of(checkpointer), extra


def test_everything_is_resumed(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    checkpointer = build(tmp_path / "new" / "folder", 3)
    checkpointer.facts["optimizer"] = "fused"
    with caplog.at_level(logging.INFO):
        checkpointer.save("model_0000007", iteration=7, note=["x"])
    path = tmp_path / "new" / "folder" / "model_0000007.pth"
    saved = rf"Saved checkpoint to {path}: {path.stat().st_size:,} bytes in \d+\.\d\d s"
    assert re.fullmatch(saved, caplog.messages[0])
    assert (path.parent / "last_checkpoint").read_text() == path.name

    resumed = build(path.parent)
    extra = resumed.resume_or_load("ignored.pth", resume=True)
    assert value_of(resumed) == 3
    assert extra == {"iteration": 7, "note": ["x"]}
    assert resumed.loaded_manifest is not None
    assert resumed.loaded_manifest.iteration == 7
    assert resumed.loaded_manifest.facts == {"optimizer": "fused"}


def test_nothing_is_saved_without_a_folder_or_when_told_not_to(tmp_path: Path) -> None:
    assert not Checkpointer(nn.Linear(1, 1)).save_untagged("a")
    silent = Checkpointer(nn.Linear(1, 1), tmp_path / "x", save_to_disk=False)
    silent.save("a")
    silent.mark_finished(1)
    silent.clear_finished()
    silent.keep_newest("model", 1)
    assert not (tmp_path / "x").exists()
    assert not silent.has_checkpoint()


def test_detectron2s_name_takes_its_arguments(tmp_path: Path) -> None:
    for save_to_disk, expected in ((None, ["a.pth", "last_checkpoint"]), (False, [])):
        folder = tmp_path / str(save_to_disk)
        folder.mkdir()
        model = nn.Linear(1, 1)
        DetectionCheckpointer(model, folder, save_to_disk=save_to_disk, c=Counter()).save("a")
        assert sorted(os.listdir(folder)) == expected


def test_a_checkpointable_has_a_free_name_and_a_state() -> None:
    checkpointer = build("")
    checkpointer.add_checkpointable("other", Counter())
    assert list(checkpointer.checkpointables) == ["counter", "other"]
    for name in ("counter", "model"):
        with pytest.raises(KeyError, match=f"already saves something as '{name}'; name it"):
            checkpointer.add_checkpointable(name, Counter())
    with pytest.raises(TypeError, match="as 'step' is a int, which needs the methods state_dict"):
        Checkpointer(nn.Linear(1, 1), step=3)


def test_weights_alone_are_read_by_all_and_resumed_from_by_none(tmp_path: Path) -> None:
    checkpointer = build(tmp_path, 3)
    checkpointer.save("model_final", iteration=5)
    checkpointer.save_weights("model_weights")
    checkpointer.save_weights("model_ema", lambda: {"weight": torch.ones(2, 2)})
    assert torch.load(tmp_path / "model_ema.pth")["weight"].tolist() == [[1, 1], [1, 1]]
    weights = nn.Linear(2, 2)
    weights.load_state_dict(torch.load(tmp_path / "model_weights.pth"))
    assert weights.bias.tolist() == [3, 3]
    assert verify(tmp_path / "model_weights.pth").state == "verified"
    assert build(tmp_path).get_all_checkpoint_files() == [str(tmp_path / "model_final.pth")]
    assert resume(tmp_path) == (3, {"iteration": 5})
    assert (tmp_path / "last_checkpoint").read_text() == "model_final.pth"
    assert Checkpointer(weights).load(str(tmp_path / "model_ema.pth")) == {}
    with pytest.raises(ValueError, match="give a file name"):
        checkpointer.save_weights("a/b")
    build("").save_weights("nowhere")


def test_an_untagged_save_leaves_the_pointer_alone(tmp_path: Path) -> None:
    save(tmp_path, "model_0000001", 1)
    assert build(tmp_path, 2).save_untagged("model_best", iteration=2)
    assert (tmp_path / "last_checkpoint").read_text() == "model_0000001.pth"


@pytest.mark.parametrize("name", ["../a", "a/b", "", "/a"])
def test_f23_a_name_cannot_leave_the_folder(tmp_path: Path, name: str) -> None:
    with pytest.raises(ValueError, match="give a file name, not a path"):
        build(tmp_path).save(name)


def test_f01_partial_files_of_dead_runs_are_removed_by_the_next_save(tmp_path: Path) -> None:
    for name in ("model_0000001", "other"):
        (tmp_path / f".{name}.pth.tmp").write_bytes(b"partial")
    save(tmp_path, "model_0000001", 1)
    assert sorted(os.listdir(tmp_path)) == ["last_checkpoint", "model_0000001.pth"]


def test_d17_a_failed_save_is_not_logged_and_leaves_the_last_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    save(tmp_path, "model_0000001", 1)

    def failing(*args: Any) -> None:
        raise OSError(errno.EIO, "Input/output error")

    monkeypatch.setattr(os, "replace", failing)
    with (
        caplog.at_level(logging.INFO),
        pytest.raises(CheckpointError, match="Input/output error"),
    ):
        save(tmp_path, "model_0000002", 2)
    monkeypatch.undo()
    assert "Saved checkpoint" not in caplog.text
    assert sorted(os.listdir(tmp_path)) == ["last_checkpoint", "model_0000001.pth"]
    assert (tmp_path / "last_checkpoint").read_text() == "model_0000001.pth"
    assert resume(tmp_path)[0] == 1


def test_a_pointer_that_cannot_be_written_is_a_warning(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "last_checkpoint" / "in the way").mkdir(parents=True)
    save(tmp_path, "model_0000001", 1)
    assert "Cannot point to model_0000001.pth" in caplog.text
    assert resume(tmp_path)[0] == 1


def test_a_folder_that_cannot_be_made_is_an_error(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x")
    with pytest.raises(
        CheckpointError, match=r"run/a\.pth: Not a directory\..*set another OUTPUT_DIR"
    ):
        build(tmp_path / "file" / "run").save("a")


def test_d26_what_would_not_load_is_refused_at_save_time(tmp_path: Path) -> None:
    checkpointer = Checkpointer(nn.Linear(1, 1), tmp_path, hook=Counter(np.float64(0.5)))
    with pytest.raises(CheckpointError, match=r"hook\.value: numpy\.float64 .* use float\(x\)"):
        checkpointer.save("a")
    assert os.listdir(tmp_path) == []


def test_a_newer_save_wins_even_if_the_clock_went_back(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    save(tmp_path, "b", 1)
    monkeypatch.setattr("time.time_ns", lambda: 1000)
    save(tmp_path, "a", 2)
    assert resume(tmp_path)[0] == 2


def test_f05_the_newest_valid_one_is_used_and_what_is_skipped_is_said(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    paths = [save(tmp_path, f"model_{i:07d}", i) for i in range(1, 5)]
    damage(paths[3])
    paths[2].write_bytes(paths[2].read_bytes()[:-30])
    assert resume(tmp_path) == (2, {"iteration": 2})
    assert f"SKIPPING A CHECKPOINT. Checkpoint {paths[3]} is damaged: its bytes" in caplog.text
    assert f"Checkpoint {paths[2]} is damaged: " in caplog.text
    caplog.clear()
    assert build(tmp_path).get_checkpoint_file() == str(paths[1])
    assert f"Skipping the damaged checkpoint {paths[3]}: its bytes" in caplog.text


@pytest.mark.parametrize("content", [b"", b"x", b"PK\x03\x04"])
def test_f06_an_empty_or_foreign_newest_file_is_skipped(tmp_path: Path, content: bytes) -> None:
    save(tmp_path, "model_0000001", 1)
    (tmp_path / "model_0000002.pth").write_bytes(content)
    assert resume(tmp_path)[0] == 1


@pytest.mark.parametrize(
    "pointer", [None, b"", b"\xff\0", b"gone.pth", b"../outside.pth", b"model_0000001.pth"]
)
def test_d17_f07_the_pointer_is_only_advice(tmp_path: Path, pointer: bytes | None) -> None:
    folder = tmp_path / "run"
    save(tmp_path, "outside", 9)
    for value in (1, 2):
        save(folder, f"model_{value:07d}", value)
    (folder / "last_checkpoint").unlink()
    if pointer is not None:
        (folder / "last_checkpoint").write_bytes(pointer)
    assert resume(folder)[0] == 2


def test_a_file_that_verifies_but_does_not_load_is_skipped(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    save(tmp_path, "model_0000001", 1)
    newest = save(tmp_path, "model_0000002", 2)
    load = torch.load

    def failing(path: Any, **kwargs: Any) -> Any:
        if Path(path) == newest:
            raise EOFError("Ran out of input")
        return load(path, **kwargs)

    monkeypatch.setattr(torch, "load", failing)
    assert resume(tmp_path)[0] == 1
    assert f"{newest} cannot be loaded: EOFError: Ran out of input" in caplog.text


def test_f05_a_run_does_not_silently_start_from_scratch(tmp_path: Path) -> None:
    paths = [save(tmp_path, f"model_{i:07d}", i) for i in range(2)]
    for path in paths:
        damage(path)
    checkpointer = build(tmp_path, 5)
    assert checkpointer.has_checkpoint()
    with pytest.raises(CheckpointError, match=r"No checkpoint .*, of 2, can be resumed") as raised:
        checkpointer.resume_or_load("", resume=True)
    assert all(str(path) in str(raised.value) for path in paths)
    assert value_of(checkpointer) == 5
    assert checkpointer.get_checkpoint_file() == ""


def test_a_resume_with_another_model_changes_nothing(tmp_path: Path) -> None:
    save(tmp_path, "model_0000001", 1)
    newest = save(tmp_path, "model_0000002", 2)
    checkpointer = build(tmp_path, 5, width=3)
    with pytest.raises(CheckpointError) as raised:
        checkpointer.resume_or_load("", resume=True)
    text = str(raised.value)
    assert f"{newest} is of another model" in text
    assert "nothing was loaded" in text
    assert "float32 (2, 2)" in text
    assert "float32 (3, 2)" in text
    assert "set MODEL.WEIGHTS to the file and start without --resume" in text
    assert "another OUTPUT_DIR" in text
    assert value_of(checkpointer) == 5


@pytest.mark.parametrize(
    "model", [nn.Linear(2, 2, bias=False), nn.Sequential(nn.Linear(2, 2)), nn.Linear(2, 2).half()]
)
def test_a_resume_is_strict_in_keys_and_dtypes(tmp_path: Path, model: nn.Module) -> None:
    save(tmp_path, "model_0000001", 1)
    with pytest.raises(CheckpointError, match="of another model"):
        Checkpointer(model, tmp_path, counter=Counter()).resume_or_load("")


def test_a_file_without_a_state_that_the_run_needs_is_skipped(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    save(tmp_path, "model_0000001", 1)
    Checkpointer(nn.Linear(2, 2), tmp_path).save("weights")
    assert resume(tmp_path)[0] == 1
    assert "weights.pth holds no state of counter" in caplog.text


@pytest.mark.parametrize("error", [ValueError("other groups"), KeyError("value")])
def test_a_state_that_does_not_fit_is_explained(tmp_path: Path, error: Exception) -> None:
    class Choosy(Counter):
        def load_state_dict(self, state: dict[str, Any]) -> None:
            raise error

    save(tmp_path, "a", 1)
    checkpointer = Checkpointer(nn.Linear(2, 2), tmp_path, counter=Choosy())
    kind = type(error).__name__
    with pytest.raises(CheckpointError, match=rf"Cannot restore counter from .*a\.pth: {kind}: "):
        checkpointer.resume_or_load("")


def test_an_older_file_is_resumed_if_there_is_no_other(tmp_path: Path) -> None:
    source = build(tmp_path, 4)
    state = {"model": source.model.state_dict(), "counter": {"value": 4}, "iteration": 4}
    torch.save(state, tmp_path / "old.pth")
    checkpointer = build(tmp_path)
    assert checkpointer.resume_or_load("") == {"iteration": 4}
    assert value_of(checkpointer) == 4
    assert checkpointer.loaded_manifest is None
    save(tmp_path, "new", 1)
    os.utime(tmp_path / "old.pth", (2**33, 2**33))
    assert resume(tmp_path)[0] == 1


def test_without_resume_only_weights_are_loaded(tmp_path: Path) -> None:
    path = save(tmp_path, "model_0000001", 1)
    checkpointer = build(tmp_path)
    assert checkpointer.resume_or_load(str(path), resume=False)["counter"] == {"value": 1}
    assert checkpointer.model.get_parameter("weight")[0, 0].item() == 1
    assert checkpointer.checkpointables["counter"].value == 0


def test_without_a_checkpoint_a_resume_loads_weights(tmp_path: Path) -> None:
    path = save(tmp_path, "model_0000001", 1)
    checkpointer = build(tmp_path / "empty")
    checkpointer.resume_or_load(str(path), resume=True)
    assert checkpointer.checkpointables["counter"].value == 0
    assert checkpointer.model.get_parameter("bias")[0].item() == 1


def test_d25_weights_that_fit_in_part_are_reported_once(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    torch.save({"weight": torch.ones(2, 2), "bias": torch.ones(3)}, tmp_path / "a.pth")
    checkpointer = build("")
    checkpointer.load(str(tmp_path / "a.pth"), checkpointables=[])
    assert checkpointer.model.get_parameter("weight")[0, 0].item() == 1
    assert checkpointer.model.get_parameter("bias")[0].item() == 0
    (record,) = [r for r in caplog.records if r.levelno == logging.WARNING]
    assert "bias   (3,)                 (2,)" in record.getMessage()


@pytest.mark.parametrize("by", ["argument", "path"])
def test_d25_strict_loading_refuses_any_difference_in_names_and_shapes(
    tmp_path: Path, by: str
) -> None:
    def load(name: str) -> float:
        checkpointer = Checkpointer(nn.Linear(2, 2))
        if by == "path":
            checkpointer.resume_or_load(f"{tmp_path}/{name}.pth?strict=True", resume=False)
        else:
            checkpointer.load(f"{tmp_path}/{name}.pth", strict=True)
        return float(checkpointer.model.get_parameter("bias")[0].detach())

    weights = nn.Linear(2, 2).state_dict() | {"bias": torch.ones(2)}
    torch.save(weights, tmp_path / "same.pth")
    torch.save(weights | {"extra.w": torch.ones(2)}, tmp_path / "more.pth")
    torch.save({"bias": torch.ones(2)}, tmp_path / "less.pth")
    torch.save(weights | {"weight": torch.ones(2, 3)}, tmp_path / "other.pth")
    assert load("same") == 1
    for name, row in (("more", "extra.w"), ("less", "weight"), ("other", "weight")):
        with pytest.raises(
            CheckpointError, match=rf"(?s){name}.pth and the model differ.*\n{row} "
        ):
            load(name)


def test_d25_weights_of_a_larger_model_are_loaded_by_heuristics(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    Checkpointer(nn.Sequential(build("", 3).model), tmp_path).save("a")
    model = nn.ModuleDict({"head": nn.Linear(3, 1), "net": nn.Sequential(nn.Linear(2, 2))})
    with caplog.at_level(logging.INFO):
        Checkpointer(model).load(f"{tmp_path}/a.pth?matching_heuristics=True")
    assert model.get_parameter("net.0.weight").tolist() == [[3, 3], [3, 3]]
    assert "took 2 entries of the checkpoint's * for the model's net.*" in caplog.text
    assert "Loaded 2 of the model's 4 entries" in caplog.text
    assert "head.{weight, bias}" in caplog.text


def test_a_file_may_ask_for_heuristics_itself(tmp_path: Path) -> None:
    weights = build("", 3).model.state_dict()
    torch.save({"model": weights, "matching_heuristics": True, "x": 1}, tmp_path / "zoo.pth")
    model = nn.Sequential(nn.Linear(2, 2))
    assert Checkpointer(model).load(f"{tmp_path}/zoo.pth", []) == {"x": 1}
    assert model.get_parameter("0.bias").tolist() == [3, 3]


def test_an_empty_path_loads_nothing() -> None:
    assert build("", 5).load("") == {}


def test_a_missing_path_names_the_nearest(tmp_path: Path) -> None:
    path = save(tmp_path, "model_final", 1)
    with pytest.raises(CheckpointError, match=f"Did you mean '{path}'"):
        build(tmp_path).load(str(tmp_path / "modle_final.pth"))


def test_a_damaged_path_is_an_error(tmp_path: Path) -> None:
    damage(save(tmp_path, "a", 1))
    checkpointer = build(tmp_path, 5)
    with pytest.raises(CheckpointError, match=r"a\.pth is damaged"):
        checkpointer.load(str(tmp_path / "a.pth"))
    assert value_of(checkpointer) == 5


def test_other_places_are_read_through_the_path_manager(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = save(tmp_path, "a", 1)
    checkpointer = build("")
    monkeypatch.setattr(
        file_io.PathManager, "get_local_path", lambda name: str(tmp_path / Path(name).name)
    )
    checkpointer.load(f"store://bucket/{path.name}")
    assert value_of(checkpointer) == 1


@pytest.fixture
def web(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Web]:
    with serving(tmp_path / "web", monkeypatch) as served:
        save(served.folder, "a", 3)
        yield served


def test_a_file_on_the_web_is_loaded_by_its_hash(web: Web) -> None:
    for load in (Checkpointer.load, Checkpointer.resume_or_load):
        checkpointer = build("")
        assert load(checkpointer, web.with_hash("a.pth"))["iteration"] == 3
        assert checkpointer.model.get_parameter("bias")[0].item() == 3
    assert web.requests == ["/a.pth"]


def test_f23_a_file_on_the_web_without_its_hash_is_not_fetched(web: Web) -> None:
    checkpointer = build("", 5)
    with pytest.raises(
        CheckpointError, match=r"Cannot fetch .*a\.pth.*Append #sha256= and its SHA"
    ):
        checkpointer.load(f"{web.address}/a.pth")
    assert web.requests == []
    with pytest.raises(CheckpointError, match=r"has the SHA-256 [0-9a-f]{64}, but 0{64} is expect"):
        checkpointer.load(f"{web.address}/a.pth#sha256={'0' * 64}")
    assert value_of(checkpointer) == 5


@pytest.mark.parametrize(
    "address", ["http://a b/x.pth", "http://[::1/x.pth", "http://h:p/x.pth", "http://x\0/", "a\0b"]
)
def test_an_address_that_is_none_is_an_error(address: str) -> None:
    with pytest.raises(CheckpointError, match=r"Cannot fetch checkpoint|There is no checkpoint"):
        build("").load(f"{address}#sha256={'0' * 64}")


def test_a_file_that_the_web_has_not_is_an_error(web: Web) -> None:
    with pytest.raises(CheckpointError, match=r"Cannot fetch checkpoint .*none\.pth.*404"):
        build("").load(f"{web.address}/none.pth#sha256={'0' * 64}")


def test_f23_a_known_file_on_the_web_runs_no_code_either(web: Web, tmp_path: Path) -> None:
    (web.folder / "evil.pkl").write_bytes(pickle.dumps({"model": Canary(tmp_path / "canary")}))
    with pytest.raises(CheckpointError, match="it is a bare pickle"):
        build("").load(web.with_hash("evil.pkl"))
    assert not (tmp_path / "canary").exists()


class Canary:
    """Makes a folder when it is unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> Any:
        return os.mkdir, (str(self.path),)


@pytest.fixture(params=["bare", "zip"])
def evil(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    """A file that makes the folder "canary" when it is unpickled."""
    (tmp_path / "run").mkdir()
    path = tmp_path / "run" / "model_0000002.pth"
    data = {"weight": torch.ones(2, 2), "made": Canary(tmp_path / "canary")}
    if request.param == "bare":
        path.write_bytes(pickle.dumps(data))
    else:
        torch.save(data, path)
    return path


def test_f23_code_in_a_file_runs_only_if_it_is_trusted(evil: Path, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"Nothing in it was run\. Only if you trust"):
        Checkpointer(nn.Linear(2, 2)).load(str(evil))
    assert not (tmp_path / "canary").exists()
    # What ran has made an entry that is no weight.
    with pytest.raises(CheckpointError, match="holds no weights"):
        Checkpointer(nn.Linear(2, 2), trust_pickle=True).load(str(evil))
    assert (tmp_path / "canary").exists()


def test_f23_trust_never_reaches_what_is_resumed_from(
    evil: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    checkpointer = Checkpointer(nn.Linear(2, 2), evil.parent, trust_pickle=True, counter=Counter())
    with pytest.raises(CheckpointError, match=r"Nothing in it was run"):
        checkpointer.resume_or_load("")
    assert "SKIPPING A CHECKPOINT" in caplog.text
    save(evil.parent, "model_0000001", 1)
    assert checkpointer.resume_or_load("")["iteration"] == 1
    assert not (tmp_path / "canary").exists()


def test_a_trusted_subclass_still_reads_its_own_formats(tmp_path: Path) -> None:
    class Reader(Checkpointer):
        def _load_file(self, f: str) -> dict[str, Any]:
            return {"model": {"weight": torch.full((1, 1), float(len(f))), "bias": torch.ones(1)}}

    (tmp_path / "own.bin").write_text("x")
    checkpointer = Reader(nn.Linear(1, 1), trust_pickle=True)
    checkpointer.load(str(tmp_path / "own.bin"))
    assert checkpointer.model.get_parameter("weight").item() == len(str(tmp_path / "own.bin"))


def test_f23_a_link_out_of_the_folder_is_skipped_and_said(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    folder = tmp_path / "run"
    save(folder, "model_0000001", 1)
    outside = save(tmp_path / "elsewhere", "model_0000009", 9)
    (folder / "model_0000009.pth").symlink_to(outside)
    assert resume(folder)[0] == 1
    assert "SKIPPING A CHECKPOINT" in caplog.text
    assert f"it is a link out of this folder, to {outside}: put that file here" in caplog.text
    assert build(folder).get_checkpoint_file() == str(folder / "model_0000001.pth")
    (folder / "model_0000001.pth").unlink()
    assert build(folder).has_checkpoint()
    with pytest.raises(CheckpointError, match="it is a link out of this folder"):
        resume(folder)


def test_f23_a_link_within_the_folder_is_read(tmp_path: Path) -> None:
    save(tmp_path / "run", "model_0000001", 1)
    (tmp_path / "run" / "model_last.pth").symlink_to("model_0000001.pth")
    (tmp_path / "link").symlink_to("run")
    assert resume(tmp_path / "link")[0] == 1


def test_f23_nothing_is_written_or_deleted_through_a_link(tmp_path: Path) -> None:
    outside = save(tmp_path / "elsewhere", "model_0000001", 9)
    folder = tmp_path / "run"
    folder.mkdir()
    before = outside.read_bytes()
    names = ["model_0000001.pth", "model_0000002.pth", ".model_0000001.pth.tmp"]
    names += ["last_checkpoint", "last_checkpoint.tmp", "finished.json", "finished.json.tmp"]
    for name in names:
        (folder / name).symlink_to(outside)
    checkpointer = build(folder, 1)
    checkpointer.save("model_0000001", iteration=1)
    checkpointer.mark_finished(1)
    checkpointer.delete("model_0000002")
    assert outside.read_bytes() == before
    assert not [path for path in folder.iterdir() if path.is_symlink()]
    assert resume(folder)[0] == 1
    for i in (3, 4):
        (folder / f"model_{i:07d}.pth").symlink_to(outside)
    checkpointer.keep_newest("model", 1)
    checkpointer.clear_finished()
    assert outside.read_bytes() == before
    assert (folder / "model_0000001.pth").exists()


@pytest.fixture
def _impatience() -> Iterator[None]:
    """Ends a test that waits for 20 s; no handler of OSError catches it."""

    def give_up(*args: object) -> None:
        raise AssertionError("waits for a file that nobody writes")

    before = signal.signal(signal.SIGALRM, give_up)
    signal.alarm(20)
    yield
    signal.alarm(0)
    signal.signal(signal.SIGALRM, before)


@pytest.mark.usefixtures("_impatience")
def test_f23_a_named_pipe_is_not_waited_for(tmp_path: Path) -> None:
    for name in ("model_0000009.pth", "last_checkpoint", "finished.json"):
        os.mkfifo(tmp_path / name)
    save(tmp_path, "model_0000001", 1)
    assert resume(tmp_path)[0] == 1
    os.unlink(tmp_path / "last_checkpoint")
    os.mkfifo(tmp_path / "last_checkpoint")
    assert resume(tmp_path)[0] == 1
    assert build(tmp_path).finished_iteration() is None


@pytest.mark.parametrize(
    "state",
    [
        {"model": {"weight": torch.ones(2, 2), "bias": 5}},
        {"model": {"weight": torch.ones(2, 2), 7: torch.ones(2)}},
        {"model": {"weight": [1]}},
        {"model": collections.OrderedDict(weight=torch.ones(2, 2, device="meta"))},
        {"model": {}, "counter": 3},
    ],
)
def test_a_state_of_odd_types_is_explained(tmp_path: Path, state: dict[str, Any]) -> None:
    path = tmp_path / "a.pth"
    torch.save({"counter": {"value": 1}, **state}, path)
    with pytest.raises(CheckpointError, match=r"a\.pth|Nothing in the checkpoint fits"):
        build("").load(str(path))
    with pytest.raises(CheckpointError, match=r"a\.pth"):
        build(tmp_path).resume_or_load("")


def test_an_address_that_cannot_be_fetched_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    def failing(name: str) -> str:
        raise OSError("no route")

    monkeypatch.setattr(file_io.PathManager, "get_local_path", failing)
    with pytest.raises(
        CheckpointError, match=r"Cannot fetch checkpoint 'https://x/a\.pth': no route"
    ):
        build("").load("https://x/a.pth")


def test_weights_in_safetensors_are_loaded(tmp_path: Path) -> None:
    save_file(build("", 3).model.state_dict(), tmp_path / "a.safetensors")
    checkpointer = build("")
    checkpointer.resume_or_load(str(tmp_path / "a.safetensors"), resume=False)
    assert checkpointer.model.get_parameter("weight")[0, 0].item() == 3


def test_subclasses_may_read_other_formats_and_change_weights(tmp_path: Path) -> None:
    class Scaled(Checkpointer):
        def _load_file(self, f: str) -> dict[str, Any]:
            return {
                "model": {k: torch.tensor(v) for k, v in json.loads(Path(f).read_text()).items()}
            }

        def _load_model(self, checkpoint: Any) -> Any:
            checkpoint["model"] = {k: v * 2 for k, v in checkpoint["model"].items()}
            super()._load_model(checkpoint)

    (tmp_path / "a.json").write_text('{"weight": [[1.0]], "bias": [1.0]}')
    checkpointer = Scaled(nn.Linear(1, 1))
    checkpointer.load(str(tmp_path / "a.json"))
    assert checkpointer.model.get_parameter("weight").item() == 2


def numbered(folder: Path) -> list[str]:
    return sorted(path.stem for path in folder.glob("*.pth"))


def test_only_the_newest_are_kept_and_other_names_stay(tmp_path: Path) -> None:
    for name in ("model_final", "model_best", "other_0000001", "model_12"):
        save(tmp_path, name, 0)
    for i in range(5):
        save(tmp_path, f"model_{i:07d}", i)
    # A later save of an earlier iteration is the newer one.
    save(tmp_path, "model_0000001", 1)
    build(tmp_path).keep_newest("model", 2)
    assert numbered(tmp_path) == [
        *("model_0000001", "model_0000004"),
        *("model_12", "model_best", "model_final", "other_0000001"),
    ]


def test_the_newest_valid_one_is_kept_when_newer_ones_are_damaged(tmp_path: Path) -> None:
    for i in range(4):
        save(tmp_path, f"model_{i:07d}", i)
    for i in (2, 3):
        damage(tmp_path / f"model_{i:07d}.pth")
    build(tmp_path).keep_newest("model", 1)
    assert numbered(tmp_path) == ["model_0000001", "model_0000003"]


def test_what_this_process_saved_is_read_again_only_if_it_changed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    read = []

    def noting(path: Path) -> Any:
        read.append(path.name)
        return verify(path)

    monkeypatch.setattr("trainkit.checkpoint.folder.verify", noting)
    checkpointer = build(tmp_path)
    for i in range(3):
        checkpointer.save(f"model_{i:07d}")
    checkpointer.keep_newest("model", 2)
    assert read == []
    damage(tmp_path / "model_0000002.pth")
    checkpointer.keep_newest("model", 1)
    assert read == ["model_0000002.pth", "model_0000001.pth"]
    assert numbered(tmp_path) == ["model_0000001", "model_0000002"]


def test_a_checkpoint_is_deleted_by_name_or_path(tmp_path: Path) -> None:
    checkpointer = build(tmp_path)
    for name in ("a", "b", "c"):
        checkpointer.save(name)
    checkpointer.delete("a")
    checkpointer.delete("b.pth")
    checkpointer.delete(tmp_path / "c.pth")
    checkpointer.delete("gone")
    assert numbered(tmp_path) == []
    with pytest.raises(ValueError, match="is not in"):
        checkpointer.delete(tmp_path.parent / "a.pth")


def test_an_old_checkpoint_that_cannot_be_deleted_is_a_warning(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "a.pth").mkdir()
    build(tmp_path).delete("a")
    assert f"Cannot delete the old checkpoint {tmp_path / 'a.pth'}" in caplog.text


def test_the_end_of_a_run_is_marked_and_taken_back(tmp_path: Path) -> None:
    checkpointer = build(tmp_path)
    assert checkpointer.finished_iteration() is None
    checkpointer.mark_finished(119)
    assert json.loads((tmp_path / "finished.json").read_text()) == {"iteration": 119}
    assert build(tmp_path).finished_iteration() == 119
    checkpointer.clear_finished()
    checkpointer.clear_finished()
    assert checkpointer.finished_iteration() is None


def test_a_wrapped_model_is_saved_without_its_wrapper(tmp_path: Path) -> None:
    model = nn.Linear(2, 2)
    checkpointer = Checkpointer(nn.DataParallel(model), tmp_path)
    assert checkpointer.model is model
    checkpointer.save("a")
    assert set(torch.load(tmp_path / "a.pth")["model"]) == {"weight", "bias"}


def test_the_model_dies_by_reference_count_alone(tmp_path: Path) -> None:
    checkpointer = build(tmp_path, 1)
    gc.collect()
    gc.disable()
    try:
        checkpointer.save("a")
        checkpointer.resume_or_load("")
        damage(tmp_path / "a.pth")
        with pytest.raises(CheckpointError):
            checkpointer.resume_or_load("")
        checkpointer.checkpointables["counter"].value = object()
        with pytest.raises(CheckpointError):
            checkpointer.save("b")
        died = weakref.ref(checkpointer.model)
        del checkpointer
        assert died() is None
    finally:
        gc.enable()
