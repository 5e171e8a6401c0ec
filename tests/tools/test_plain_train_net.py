import importlib.util
import json
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch

from trainkit.engine import default_argument_parser
from trainkit.modeling import ImageClassifier
from trainkit.utils.errors import ConfigError

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


@pytest.fixture
def evaluated(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The size of every batch of evaluation."""
    sizes: list[int] = []
    forward = ImageClassifier.forward

    def recording(self: ImageClassifier, batch: dict[str, torch.Tensor]) -> Any:
        if not self.training:
            sizes.append(len(batch["image"]))
        return forward(self, batch)

    monkeypatch.setattr(ImageClassifier, "forward", recording)
    return sizes


def last_metrics(output_dir: Path) -> set[str]:
    return set(json.loads((output_dir / "metrics.json").read_text().splitlines()[-1]))


def written(output_dir: Path) -> list[list[float]]:
    """What metrics.json says of losses and rate."""
    lines = map(json.loads, (output_dir / "metrics.json").read_text().splitlines())
    names = ("iteration", "loss_cls", "total_loss", "lr")
    return [[line[name] for name in names] for line in lines if "loss_cls" in line]


def arguments(output_dir: Path, *more: Any) -> Any:
    config = TOOLS.parent / "configs" / "fashion_mnist.yaml"
    settings = ["OUTPUT_DIR", output_dir, "SOLVER.MAX_ITER", 12, "SOLVER.WARMUP_ITERS", 4]
    settings += ["MODEL.BACKBONE.WIDTHS", "(4, 8)", "MODEL.BACKBONE.BLOCKS", "(0, 1)"]
    settings += ["MODEL.DROPOUT", 0.5, "INPUT.ERASE_PROB", 0.5, "DATALOADER.NUM_WORKERS", 0]
    settings += ["SOLVER.CLIP_GRADIENTS.ENABLED", True, "TEST.EVAL_PERIOD", 5, "LOG_PERIOD", 3]
    settings += ["DATASETS.TRAIN", "('fashion_mnist_small_test',)", "MODEL.DEVICE", "cpu"]
    words = ["--config-file", config, *settings, *more]
    return default_argument_parser().parse_args([str(word) for word in words])


def test_d31_the_flat_loop_computes_the_losses_of_the_trainer(
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
    assert written(tmp_path / "plain") == written(tmp_path / "trainer")


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


@pytest.mark.parametrize("resume", [False, True])
def test_weights_of_another_run_do_not_bring_its_iteration(
    tmp_path: Path, losses: list[float], resume: bool
) -> None:
    tool = load_tool("plain_train_net")
    tool.main(arguments(tmp_path / "old", "SOLVER.MAX_ITER", 5))
    losses.clear()
    weights = tmp_path / "old" / "model_final.pth"
    args = arguments(tmp_path / "new", "SOLVER.MAX_ITER", 5, "MODEL.WEIGHTS", weights)
    args.resume = resume
    tool.main(args)
    assert len(losses) == 5


def test_limit_batches_limits_training_and_evaluation(
    tmp_path: Path, losses: list[float], evaluated: list[int]
) -> None:
    more = ["LIMIT_BATCHES", 2, "TEST.IMS_PER_BATCH", 30]
    load_tool("plain_train_net").main(arguments(tmp_path, *more))
    assert len(losses) == 2
    assert evaluated == [30, 30]


def test_every_test_data_set_is_evaluated(tmp_path: Path, evaluated: list[int]) -> None:
    names = ["fashion_mnist_small_test", "fashion_mnist_small_train"]
    more = ["DATASETS.TEST", tuple(names), "LIMIT_BATCHES", 1, "TEST.IMS_PER_BATCH", 20]
    load_tool("plain_train_net").main(arguments(tmp_path, *more))
    assert evaluated == [20, 20]
    assert {f"{name}/classification/top1" for name in names} <= last_metrics(tmp_path)


def test_a_run_without_test_data_sets_evaluates_nothing(
    tmp_path: Path, losses: list[float], evaluated: list[int]
) -> None:
    more = ["DATASETS.TEST", "()", "LIMIT_BATCHES", 2]
    load_tool("plain_train_net").main(arguments(tmp_path, *more))
    assert len(losses) == 2
    assert evaluated == []
    assert "total_loss" in last_metrics(tmp_path)


@pytest.mark.parametrize("name", ["num_gpus", "num_machines", "WORLD_SIZE"])
def test_several_processes_are_refused(
    tmp_path: Path, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    args = arguments(tmp_path)
    if name == "WORLD_SIZE":
        monkeypatch.setenv(name, "2")
    else:
        setattr(args, name, 2)
    with pytest.raises(ConfigError, match=r"leaves out 2 processes.*Use tools/train_net.py"):
        load_tool("plain_train_net").main(args)


def test_settings_that_the_flat_loop_does_not_look_at_are_refused(tmp_path: Path) -> None:
    more = ["MODEL.EMA.ENABLED", True, "SOLVER.PRECISION", "fp16", "SEED", -1]
    with pytest.raises(ConfigError, match=r"out SOLVER.PRECISION, MODEL.EMA, a drawn SEED: it"):
        load_tool("plain_train_net").main(arguments(tmp_path, *more))
