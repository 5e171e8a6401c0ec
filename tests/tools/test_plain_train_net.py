import importlib.util
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch

from trainkit.engine import default_argument_parser
from trainkit.modeling import ImageClassifier

TOOLS = Path(__file__).parents[2] / "tools"


def load_tool(name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(name, TOOLS / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def losses(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """The loss of every training forward pass."""
    seen: list[float] = []
    forward = ImageClassifier.forward

    def recording(self: ImageClassifier, batch: dict[str, torch.Tensor]) -> Any:
        output = forward(self, batch)
        if self.training:
            seen.append(output["loss_cls"].item())
        return output

    monkeypatch.setattr(ImageClassifier, "forward", recording)
    return seen


def arguments(output_dir: Path, *more: Any) -> Any:
    config = TOOLS.parent / "configs" / "fashion_mnist.yaml"
    settings = ["OUTPUT_DIR", output_dir, "SOLVER.MAX_ITER", 12, "SOLVER.WARMUP_ITERS", 4]
    settings += ["MODEL.BACKBONE.WIDTHS", "(4, 8)", "MODEL.BACKBONE.BLOCKS", "(0, 1)"]
    settings += ["MODEL.DROPOUT", 0.5, "INPUT.ERASE_PROB", 0.5, "DATALOADER.NUM_WORKERS", 0]
    settings += ["SOLVER.CLIP_GRADIENTS.ENABLED", True, "TEST.EVAL_PERIOD", 5, "LOG_PERIOD", 3]
    settings += ["DATASETS.TRAIN", "('fashion_mnist_small_test',)", "MODEL.DEVICE", "cpu"]
    words = ["--config-file", config, *settings, *more]
    return default_argument_parser().parse_args([str(word) for word in words])


def test_the_flat_loop_computes_the_losses_of_the_trainer(
    tmp_path: Path, losses: list[float]
) -> None:
    load_tool("plain_train_net").main(arguments(tmp_path / "plain"))
    plain = losses.copy()
    losses.clear()
    load_tool("train_net").main(arguments(tmp_path / "trainer"))
    assert len(plain) == 12
    assert losses == plain
    weights = [
        torch.load(tmp_path / name / "model_final.pth", weights_only=True)["model"]
        for name in ("plain", "trainer")
    ]
    assert all(torch.equal(weights[0][key], weights[1][key]) for key in weights[0])


def test_the_flat_loop_resumes_at_the_next_step(tmp_path: Path, losses: list[float]) -> None:
    tool = load_tool("plain_train_net")
    # A multi-step schedule does not depend on the length of the run.
    schedule = ["SOLVER.LR_SCHEDULER_NAME", "WarmupMultiStepLR", "SOLVER.STEPS", "(9,)"]
    tool.main(arguments(tmp_path / "unbroken", *schedule))
    unbroken = losses.copy()
    losses.clear()
    tool.main(arguments(tmp_path / "broken", *schedule, "SOLVER.MAX_ITER", 7))
    resumed = arguments(tmp_path / "broken", *schedule)
    resumed.resume = True
    tool.main(resumed)
    assert losses == unbroken
