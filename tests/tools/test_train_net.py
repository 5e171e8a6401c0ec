import os
import re
import runpy
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from trainkit.data import DatasetCatalog
from trainkit.modeling import META_ARCH_REGISTRY

TOOLS = Path(__file__).parents[2] / "tools"
CONFIGS = Path(__file__).parents[2] / "configs"

Tool = Callable[..., int]


@META_ARCH_REGISTRY.register()
class ModelWithoutLoss(nn.Module):
    def __init__(self, cfg: Any) -> None:
        super().__init__()
        self.layer = nn.Linear(784, 10)

    def forward(self, batch: dict[str, torch.Tensor]) -> torch.Tensor:
        logits: torch.Tensor = self.layer(batch["image"].flatten(1).float())
        return logits


@pytest.fixture
def tool(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Tool:
    """Runs a tool as from the command line, on a small model, and returns its exit code."""
    if "tiny" not in DatasetCatalog:
        small = DatasetCatalog.get("fashion_mnist_small_test")
        DatasetCatalog.register("tiny", lambda: torch.utils.data.Subset(small, range(96)))
        DatasetCatalog.register("nothing", list)

    def run(*args: Any, name: str = "train_net.py", config: str = "fashion_mnist.yaml") -> int:
        settings: list[Any] = ["MODEL.BACKBONE.WIDTHS", "(4, 8)", "MODEL.BACKBONE.BLOCKS", "(0, 1)"]
        settings += ["DATASETS.TRAIN", "('tiny',)", "SOLVER.MAX_ITER", 6, "LOG_PERIOD", 2]
        settings += ["SOLVER.WARMUP_ITERS", 2, "DATALOADER.NUM_WORKERS", 0, "LIMIT_BATCHES", 6]
        settings += ["SOLVER.IMS_PER_BATCH", 12, "TEST.IMS_PER_BATCH", 20, "MODEL.DEVICE", "cpu"]
        settings += ["OUTPUT_DIR", tmp_path / "output"]
        flags = [arg for arg in args if str(arg).startswith("--")]
        opts = [arg for arg in args if not str(arg).startswith("--")]
        argv = [name, "--config-file", CONFIGS / config, *flags, *settings, *opts]
        monkeypatch.setattr("sys.argv", [str(arg) for arg in argv])
        try:
            runpy.run_path(str(TOOLS / name), run_name="__main__")
        except SystemExit as e:
            return int(e.code or 0)
        return 0

    return run


@pytest.fixture
def output(tmp_path: Path) -> Path:
    return tmp_path / "output"


def test_a_run_leaves_what_the_readme_lists(tool: Tool, output: Path) -> None:
    assert tool() == 0
    names = {path.name for path in output.iterdir()}
    assert names >= {"log.txt", "config.yaml", "metrics.json", "last_checkpoint", "finished.json"}
    assert names >= {"model_final.pth", "model_best.pth"}
    assert any(name.startswith("events.out.tfevents") for name in names)


def test_a_finished_run_is_left_alone_and_can_be_evaluated(
    tool: Tool, output: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert tool() == 0
    metrics = (output / "metrics.json").read_bytes()
    assert tool("--resume") == 0
    assert "is finished" in capsys.readouterr().out
    assert tool("--resume", "--eval-only") == 0
    assert "copypaste: top1,top5" in capsys.readouterr().out
    assert (output / "metrics.json").read_bytes() == metrics


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (["SOLVER.MAX_ITR", 5], r"SOLVER\.MAX_ITR is not a config key.*SOLVER\.MAX_ITER\?"),
        (["SOLVER.MAX_ITER", "many"], r"SOLVER\.MAX_ITER is 'many', of type str.*type int"),
        (["SOLVER.MAX_ITER"], "Settings come in pairs"),
        (["MODEL.META_ARCHITECTURE", "ImageClasifier"], "Did you mean 'ImageClassifier'"),
        (["MODEL.BACKBONE.NAME", "SmallResnet"], "Did you mean 'SmallResNet'"),
        (["DATASETS.TRAIN", "('fashion_mnist_smal_train',)"], "'fashion_mnist_small_train'"),
        (["DATASETS.TRAIN", "('nothing',)"], "nothing.*(empty|no samples)"),
        (["SOLVER.ACCUMULATE", 5], r"SOLVER\.IMS_PER_BATCH is 12.*SOLVER\.ACCUMULATE"),
        (["SOLVER.WARMUP_ITERS", 500], r"WARMUP_ITERS is 500 but SOLVER\.MAX_ITER is only 6"),
        (["SOLVER.OPTIMIZER", "SDG"], "Did you mean 'SGD'"),
        (["SOLVER.PRECISION", "fp8"], r"SOLVER\.PRECISION\) is 'fp8'"),
        (["MODEL.WEIGHTS", "missing.pth"], r"no checkpoint 'missing\.pth'"),
        (["MODEL.META_ARCHITECTURE", "ModelWithoutLoss"], "return scalars, and at least one.*loss"),
    ],
)
def test_bad_settings_get_one_clear_error(
    tool: Tool, settings: list[Any], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert tool(*settings) == 1
    assert_one_error(capsys, message)


def assert_one_error(capsys: pytest.CaptureFixture[str], message: str) -> None:
    error = capsys.readouterr().err
    assert re.search(message, error, re.DOTALL), error
    assert "Traceback" not in error


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is CUDA here")
def test_a_device_that_is_not_there_is_named(
    tool: Tool, capsys: pytest.CaptureFixture[str]
) -> None:
    assert tool("MODEL.DEVICE", "cuda") == 1
    assert_one_error(capsys, "MODEL.DEVICE is 'cuda' but torch .* sees 0 cuda")


def test_a_folder_that_cannot_be_written_is_named(
    tool: Tool, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "file").write_text("in the way")
    assert tool("OUTPUT_DIR", tmp_path / "file" / "output") == 1
    assert_one_error(capsys, "OUTPUT_DIR is .*nothing can be written")


@pytest.mark.parametrize(("content", "message"), [(None, "Cannot read"), ("", "is empty")])
def test_a_config_that_is_missing_or_empty_is_named(
    tool: Tool,
    tmp_path: Path,
    content: str | None,
    message: str,
    capsys: pytest.CaptureFixture[str],
) -> None:
    config = tmp_path / "config.yaml"
    if content is not None:
        config.write_text(content)
    assert tool(config=str(config)) == 1
    assert_one_error(capsys, message)


def test_a_resume_with_another_model_is_refused(
    tool: Tool, capsys: pytest.CaptureFixture[str]
) -> None:
    assert tool() == 0
    assert tool("--resume", "MODEL.BACKBONE.WIDTHS", "(4, 6)") == 1
    assert_one_error(capsys, "is of another model.*nothing was loaded")


def test_weights_of_another_model_are_used_where_they_fit(
    tool: Tool, output: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert tool() == 0
    opts = ["MODEL.WEIGHTS", output / "model_final.pth", "OUTPUT_DIR", tmp_path / "other"]
    assert tool(*opts, "MODEL.BACKBONE.WIDTHS", "(4, 6)") == 0
    assert "What fits the model was loaded" in capsys.readouterr().out
    assert tool(*opts, "MODEL.META_ARCHITECTURE", "ModelWithoutLoss") == 1
    assert_one_error(capsys, "Nothing in the checkpoint fits")


def test_damaged_checkpoints_are_said_and_never_taken_for_none(
    tool: Tool, output: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert tool() == 0
    for path in output.glob("*.pth"):
        damaged = bytearray(path.read_bytes())
        damaged[len(damaged) // 2] ^= 1
        path.write_bytes(damaged)
    assert tool("--resume") == 1
    assert_one_error(capsys, "No checkpoint in .* can be resumed from.*SHA-256")


def test_looking_at_a_run_keeps_its_config(tool: Tool, output: Path) -> None:
    assert tool() == 0
    config = (output / "config.yaml").read_text()
    assert tool("--resume", "--eval-only", "TEST.IMS_PER_BATCH", 30) == 0
    assert tool("--resume", "MODEL.BACKBONE.WIDTHS", "(4, 6)") == 1
    assert (output / "config.yaml").read_text() == config


def test_an_evaluation_without_weights_is_refused(
    tool: Tool, capsys: pytest.CaptureFixture[str]
) -> None:
    assert tool("--eval-only") == 1
    assert_one_error(capsys, "--eval-only needs weights")


@pytest.mark.slow
def test_an_interrupt_of_the_launching_process_alone_saves_on_all_ranks(tmp_path: Path) -> None:
    settings = ["OUTPUT_DIR", str(tmp_path), "SOLVER.MAX_ITER", "100000", "LOG_PERIOD", "1"]
    settings += ["MODEL.BACKBONE.WIDTHS", "(4, 8)", "MODEL.BACKBONE.BLOCKS", "(0, 1)"]
    command = [sys.executable, str(TOOLS / "train_net.py"), "--num-gpus", "2", "--config-file"]
    command += [str(CONFIGS / "fashion_mnist.yaml"), *settings, "MODEL.DEVICE", "cpu"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONUNBUFFERED": "1"}
    run = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment)
    assert run.stdout is not None
    for line in run.stdout:
        if "iter: 3 " in line:
            run.send_signal(signal.SIGINT)
            break
    run.communicate(timeout=120)
    assert run.returncode == 130
    (saved,) = tmp_path.glob("model_*.pth")
    # Ranks agree at the next reduction of metrics.
    assert saved.name in ("model_0000019.pth", "model_0000039.pth")


def test_debug_keeps_the_traceback(tool: Tool) -> None:
    with pytest.raises(ValueError, match="IMS_PER_BATCH"):
        tool("--debug", "SOLVER.ACCUMULATE", 5)
