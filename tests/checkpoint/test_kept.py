"""F24: files of earlier versions and of other libraries load, or explain why they do not.

`kept/make.py` made them.
"""

import logging
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from tests.checkpoint.kept.make import FOLDER, ITERATION, Model
from trainkit.checkpoint.checkpointer import Checkpointer
from trainkit.checkpoint.format import verify
from trainkit.config import CfgNode, get_cfg
from trainkit.engine import DefaultTrainer
from trainkit.utils.errors import CheckpointError

LOADABLE = {
    "schema_1.pth": "verified",
    "torch.pth": "unverified",
    "torch_legacy.pth": "unverified",
    "weights.pth": "unverified",
    "fvcore.pth": "unverified",
    "detectron2.pth": "unverified",
}


def is_loaded(model: nn.Module) -> bool:
    expected = Model(scale=1).state_dict()
    return all(torch.equal(value, expected[name]) for name, value in model.state_dict().items())


def test_f24_every_kept_file_has_a_test() -> None:
    kept = {path.name for path in FOLDER.iterdir() if path.suffix in (".pth", ".pkl")}
    assert kept == {*LOADABLE, "schema_2.pth", "detectron2.pkl"}


@pytest.mark.parametrize("name", LOADABLE)
def test_f24_weights_of_an_earlier_file_load(name: str) -> None:
    model = Model()
    extra = Checkpointer(model).load(str(FOLDER / name))
    assert is_loaded(model)
    assert extra.get("iteration", ITERATION) == ITERATION
    assert verify(FOLDER / name).state == LOADABLE[name]


@pytest.mark.parametrize("name", LOADABLE)
def test_f24_a_run_goes_on_from_an_earlier_file(tmp_path: Path, name: str) -> None:
    shutil.copy(FOLDER / name, tmp_path)
    model = Model()
    extra = Checkpointer(model, tmp_path).resume_or_load("")
    assert is_loaded(model)
    assert extra.get("iteration", ITERATION) == ITERATION


def test_f24_the_manifest_of_schema_1_is_read() -> None:
    checkpointer = Checkpointer(Model())
    checkpointer.load(str(FOLDER / "schema_1.pth"))
    manifest = checkpointer.loaded_manifest
    assert manifest is not None
    assert (manifest.schema, manifest.iteration, manifest.facts) == (1, ITERATION, {"kept": True})
    assert set(manifest.versions) == {"trainkit", "torch", "python"}


def test_f24_a_later_schema_is_explained() -> None:
    model = Model()
    with pytest.raises(CheckpointError, match=r"schema_2\.pth .* schema 2, so a later .* Update"):
        Checkpointer(model).load(str(FOLDER / "schema_2.pth"))
    # Whoever takes the risk reads it with plain torch.
    assert set(torch.load(FOLDER / "schema_2.pth", weights_only=True)) == {"model", "iteration"}


def test_f24_beside_a_file_of_a_later_schema_an_earlier_one_is_used(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    shutil.copy(FOLDER / "schema_1.pth", tmp_path)
    shutil.copy(FOLDER / "schema_2.pth", tmp_path)
    model = Model()
    assert Checkpointer(model, tmp_path).resume_or_load("")["iteration"] == ITERATION
    assert is_loaded(model)
    assert "SKIPPING A CHECKPOINT" in caplog.text
    assert "Update trainkit" in caplog.text


def test_f24_a_pickle_of_detectron2s_model_zoo_loads_if_it_is_trusted(tmp_path: Path) -> None:
    path = str(FOLDER / "detectron2.pkl")
    model = Model()
    with pytest.raises(
        CheckpointError, match=r"is a bare pickle, .* run\. Only if you trust .* MODEL.TRUST_PICKLE"
    ):
        Checkpointer(model).load(path)
    extra = Checkpointer(model, tmp_path, trust_pickle=True).resume_or_load(path)
    assert is_loaded(model)
    assert extra == {"__author__": "Detectron2 Model Zoo"}


class Trainer(DefaultTrainer):
    @classmethod
    def build_model(cls, cfg: CfgNode) -> nn.Module:
        return Model()


def test_f24_a_run_of_detectron2_goes_on(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    shutil.copy(FOLDER / "detectron2.pth", tmp_path / "model_0000099.pth")
    (tmp_path / "last_checkpoint").write_text("model_0000099.pth")
    cfg = get_cfg()
    settings: list[Any] = ["OUTPUT_DIR", str(tmp_path), "MODEL.DEVICE", "cpu"]
    cfg.merge_from_list([*settings, "DATALOADER.NUM_WORKERS", 0])
    trainer = Trainer(cfg)
    with caplog.at_level(logging.WARNING):
        trainer.resume_or_load(resume=True)
    assert trainer.start_iter == ITERATION + 1
    assert is_loaded(trainer.model)
    buffers = [state["momentum_buffer"] for state in trainer.optimizer.state.values()]
    assert all(bool((buffer == 7).all()) for buffer in buffers)
    assert len(buffers) == 2
