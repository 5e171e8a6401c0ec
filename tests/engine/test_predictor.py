"""A predictor gives the trained model's answer to one sample, as an evaluation would."""

import logging
from pathlib import Path

import numpy as np
import pytest
import torch

from trainkit.checkpoint.checkpointer import Checkpointer
from trainkit.config import CfgNode, get_cfg
from trainkit.config.lazy_cfg import load_cfg
from trainkit.engine.predictor import DefaultPredictor
from trainkit.modeling import build_model
from trainkit.utils.errors import CheckpointError


@pytest.fixture
def cfg(tmp_path: Path) -> CfgNode:
    cfg = get_cfg()
    cfg.merge_from_list(["MODEL.DEVICE", "cpu", "MODEL.WEIGHTS", str(tmp_path / "a.pth")])
    Checkpointer(build_model(cfg), tmp_path).save("a", iteration=3)
    return cfg


def test_a_sample_gets_the_answer_of_the_trained_model(cfg: CfgNode) -> None:
    predictor = DefaultPredictor(cfg)
    model = build_model(cfg)
    Checkpointer(model).load(cfg.MODEL.WEIGHTS)
    image = torch.randint(256, (1, 28, 28), dtype=torch.uint8)
    with torch.no_grad():
        expected = model.eval()({"image": image[None]})["logits"]
    outputs = predictor({"image": image})
    assert torch.equal(outputs["logits"], expected)
    assert not outputs["logits"].requires_grad
    assert not predictor.model.training
    # Arrays and labels pass too.
    again = predictor({"image": image.numpy(), "label": np.int64(3)})["logits"]
    assert torch.equal(again, expected)


def test_the_precision_of_the_config_is_used(cfg: CfgNode) -> None:
    sample = {"image": torch.randint(256, (1, 28, 28), dtype=torch.uint8)}
    full = DefaultPredictor(cfg)(sample)["logits"]
    cfg.SOLVER.PRECISION = "bf16"
    half = DefaultPredictor(cfg)(sample)["logits"]
    assert not torch.equal(full, half)
    assert torch.allclose(full, half, atol=0.1)


def test_a_python_config_brings_its_own_model(tmp_path: Path) -> None:
    pytest.importorskip("omegaconf")
    path = tmp_path / "net.py"
    path.write_text(
        "import torch\nfrom trainkit.config.lazy import LazyCall as L\n"
        "model = L(torch.nn.Linear)(in_features=2, out_features=1)\n"
        f"train = dict(device='cpu', init_checkpoint='{tmp_path}/a.pth')\n"
    )
    model = torch.nn.Linear(2, 1)
    Checkpointer(model, tmp_path).save("a")
    point = torch.tensor([1.0, 2.0])
    assert torch.equal(DefaultPredictor(load_cfg(str(path)))(point), model(point[None]))


def test_a_damaged_file_is_refused(cfg: CfgNode) -> None:
    path = Path(cfg.MODEL.WEIGHTS)
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)
    with pytest.raises(CheckpointError, match=r"a\.pth is damaged"):
        DefaultPredictor(cfg)


def test_without_weights_the_answer_is_random_and_that_is_said(
    caplog: pytest.LogCaptureFixture,
) -> None:
    with caplog.at_level(logging.WARNING):
        DefaultPredictor(get_cfg())
    assert "MODEL.WEIGHTS is empty: the model answers at random" in caplog.text


def test_the_config_of_the_caller_stays_its_own(cfg: CfgNode) -> None:
    predictor = DefaultPredictor(cfg)
    cfg.SOLVER.PRECISION = "bf16"
    assert predictor.cfg.SOLVER.PRECISION == "fp32"
