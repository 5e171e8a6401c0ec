import re
import runpy
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

TOOLS = Path(__file__).parents[2] / "tools"
CONFIG = Path(__file__).parents[2] / "configs" / "fashion_mnist.yaml"
SMALL = ["MODEL.BACKBONE.WIDTHS", "(4, 8)", "MODEL.BACKBONE.BLOCKS", "(0, 1)"]
SMALL += ["MODEL.DEVICE", "cpu", "SOLVER.IMS_PER_BATCH", "8", "TEST.IMS_PER_BATCH", "5"]
SMALL += ["DATASETS.TRAIN", "('fashion_mnist_small_test',)", "SOLVER.CHECKPOINT_PERIOD", "3"]

Tool = Callable[..., tuple[int, str, str]]


@pytest.fixture
def tool(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> Tool:
    """Runs the tool as from the command line: its exit code, output and errors."""
    monkeypatch.chdir(tmp_path)

    def run(*args: Any) -> tuple[int, str, str]:
        monkeypatch.setattr("sys.argv", ["benchmark.py", *map(str, args)])
        code = 0
        try:
            runpy.run_path(str(TOOLS / "benchmark.py"), run_name="__main__")
        except SystemExit as e:
            code = int(e.code or 0)
        return code, *capsys.readouterr()

    return run


def rows(output: str) -> dict[str, tuple[float, float, float]]:
    """Milliseconds of an iteration, iterations and samples a second, by what was measured."""
    _, header, table = output.rpartition("  ms/iteration    iterations/s    samples/s\n")
    assert header, output
    found = {}
    for line in table.split("\n\n")[0].splitlines()[1:]:
        name, *numbers = re.split(r"  +", line.strip())
        first, second, third = map(float, numbers)
        found[name] = (first, second, third)
    return found


@pytest.mark.parametrize(
    ("task", "names", "samples"),
    [
        ("train", ["train, no hooks", "train"], 8),
        ("eval", ["eval"], 5),
        ("data", ["samples, in this process", "collation and transport", "loader"], 8),
    ],
)
def test_each_task_prints_rates_with_units_and_its_command(
    tool: Tool, tmp_path: Path, task: str, names: list[str], samples: int
) -> None:
    size = ["--iterations", 4, "--warmup", 2]
    code, output, _ = tool("--task", task, *size, "--config-file", CONFIG, *SMALL)
    assert code == 0
    found = rows(output)
    assert list(found) == names
    for milliseconds, iterations, per_second in found.values():
        assert milliseconds > 0
        assert iterations == pytest.approx(1e3 / milliseconds, rel=0.02)
        assert per_second == pytest.approx(samples * iterations, rel=0.01)
    assert "Medians of 4 iterations after 2 of warmup, 1 process(es), torch " in output
    command = rf"\nCommand: python \S*benchmark\.py --task {task} --iterations 4 --warmup 2 --conf"
    assert re.search(command, output)
    # Neither OUTPUT_DIR, which is ./output, nor anything else.
    assert list(tmp_path.iterdir()) == []


def test_a_run_of_the_configs_own_length_is_not_needed(tool: Tool) -> None:
    arguments = ["--task", "train", "--iterations", 4, "--warmup", 2, "--config-file", CONFIG]
    assert tool(*arguments, *SMALL, "SOLVER.MAX_ITER", 3, "SOLVER.WARMUP_ITERS", 1)[0] == 0


@pytest.mark.slow
def test_two_processes_are_measured_together(tmp_path: Path) -> None:
    command = [sys.executable, str(TOOLS / "benchmark.py"), "--task", "train", "--num-gpus", "2"]
    command += ["--iterations", "4", "--warmup", "2", "--config-file", str(CONFIG), *SMALL]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert list(rows(done.stdout)) == ["train, no hooks", "train"]
    assert ", 2 process(es), " in done.stdout


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (["--task", "trian"], 2, "invalid choice: 'trian'"),
        (["--task", "train", "--warmup", "0"], 1, "--warmup 0 --iterations 100: both"),
        (["--task", "eval", "DATASETS.TEST", "()"], 1, "DATASETS.TEST is empty"),
        (["--task", "train", "SOLVER.MAX_ITR", "3"], 1, r"SOLVER\.MAX_ITER\?"),
    ],
)
def test_bad_arguments_get_one_clear_error(
    tool: Tool, arguments: list[str], code: int, message: str
) -> None:
    found, _, error = tool(*arguments)
    assert found == code
    assert re.search(message, error), error
    assert "Traceback" not in error


def test_help_tells_what_is_measured(tool: Tool) -> None:
    code, output, _ = tool("--help")
    assert code == 0
    assert "Measures how fast a config trains (with and without hooks)" in output
    assert "--task {train,eval,data}" in output
    assert "Example:" in output
