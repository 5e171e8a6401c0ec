import re
import runpy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from trainkit.config import get_cfg
from trainkit.engine import DefaultTrainer
from trainkit.modeling import build_model

TOOLS = Path(__file__).parents[2] / "tools"
CONFIG = Path(__file__).parents[2] / "configs" / "fashion_mnist.yaml"
SMALL = ["MODEL.BACKBONE.WIDTHS", "(4, 8)", "MODEL.BACKBONE.BLOCKS", "(0, 1)"]
SMALL += ["MODEL.DEVICE", "cpu", "DATASETS.TEST", "('fashion_mnist_small_test',)"]

Tool = Callable[..., tuple[int, str, str]]


@pytest.fixture
def tool(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Tool:
    """Runs the tool as from the command line: its exit code, output and errors."""

    def run(*args: Any) -> tuple[int, str, str]:
        monkeypatch.setattr("sys.argv", ["analyze_model.py", *map(str, args)])
        code = 0
        try:
            runpy.run_path(str(TOOLS / "analyze_model.py"), run_name="__main__")
        except SystemExit as e:
            code = int(e.code or 0)
        return code, *capsys.readouterr()

    return run


def test_all_tasks_print_what_they_count(tool: Tool) -> None:
    tasks = ["flop", "activation", "parameter", "structure"]
    code, output, _ = tool("-n", 2, "--tasks", *tasks, "--config-file", CONFIG, *SMALL)
    assert code == 0
    cfg = get_cfg()
    cfg.merge_from_file(str(CONFIG))
    cfg.merge_from_list(SMALL)
    total = sum(p.numel() for p in build_model(cfg).parameters())
    assert re.search(rf"\| model +\| {total / 1000:.1f}K +\|\n", output)
    # 10 classes from 8 features.
    assert re.search(r"\n\|   head +\|   90 +\|   80 +\|\n", output)
    assert re.search(r"\nNot counted: .*aten::mean", output)
    assert re.search(r"\n    conv +0\.\d+\n", output)
    assert re.search(
        r"\nFLOPs per sample: 0\.\d+ G multiply-adds, standard deviation 0 over 2 batches of 1\n",
        output,
    )
    assert re.search(r"\nActivations per sample: 0\.\d+ M, standard deviation 0 over 2 b", output)
    assert "\nImageClassifier(\n" in output
    assert output.index("FLOPs per") < output.index("Activations per") < output.index("    head.w")


def test_counting_parameters_needs_no_data(tool: Tool) -> None:
    opts = [*SMALL, "DATASETS.TEST", "()"]
    assert tool("--tasks", "parameter", "--config-file", CONFIG, *opts)[0] == 0
    code, _, error = tool("--tasks", "flop", "--config-file", CONFIG, *opts)
    assert code == 1
    assert error.startswith("ConfigError: FLOPs are counted on -n 10 samples of DATASETS.TEST ()")


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (["--tasks", "flops"], 2, "invalid choice: 'flops'"),
        ([], 2, "required: --tasks"),
        (["--tasks", "flop", "-n", "0", "--config-file", CONFIG], 1, "-n 0 samples"),
        (["--tasks", "flop", "--config-file", "missing.yaml"], 1, "Cannot read .*missing.yaml"),
        (
            ["--tasks", "flop", "--config-file", CONFIG, "MODEL.DEVISE", "cpu"],
            1,
            r"MODEL\.DEVISE is not a config key.*MODEL\.DEVICE\?",
        ),
    ],
)
def test_bad_arguments_get_one_clear_error(
    tool: Tool, arguments: list[Any], code: int, message: str
) -> None:
    found, _, error = tool(*arguments)
    assert found == code
    assert re.search(message, error), error
    assert "Traceback" not in error


def test_help_tells_what_is_counted_and_how(tool: Tool) -> None:
    code, output, _ = tool("--help")
    assert code == 0
    assert "Counts the FLOPs, activations and parameters of the model" in output
    assert "--tasks {flop,activation,parameter,structure}" in output
    assert "One FLOP is one multiply-add" in output
    assert "Example:" in output


def test_counts_are_per_sample_whatever_the_batch_size(
    tool: Tool, monkeypatch: pytest.MonkeyPatch
) -> None:
    arguments = ["--tasks", "activation", "-n", 1, "--config-file", CONFIG, *SMALL]
    _, one, _ = tool(*arguments)
    build = DefaultTrainer.build_test_loader

    def build_with_own_size(cfg: Any, name: str) -> Any:
        cfg.TEST.IMS_PER_BATCH = 4
        return build(cfg, name)

    monkeypatch.setattr(DefaultTrainer, "build_test_loader", build_with_own_size)
    _, four, _ = tool(*arguments)
    assert four.endswith("over 1 batches of 4\n")
    assert four.replace("batches of 4", "batches of 1") == one
