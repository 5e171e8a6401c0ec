import importlib.util
import json
import re
import runpy
import statistics
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
    # As Python does for a script.
    monkeypatch.syspath_prepend(TOOLS)

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


def compared(output: str, title: str) -> dict[str, list[str]]:
    """The cells of a table of comparisons, by what was compared."""
    _, _, table = output.partition(f"\n{title}, ")
    assert table, output
    _, _, *lines = table.split("\n\n")[0].splitlines()
    return {(cells := re.split(r"  +", line.strip()))[0]: cells[1:] for line in lines[1:]}


def values_of(file: Path, title: str) -> dict[str, list[float]]:
    """The seconds of all rounds, as they stand in the JSON."""
    comparisons = json.loads(file.read_text("utf-8"))["comparisons"]
    (values,) = (found["values"] for found in comparisons if found["title"] == title)
    return dict(values)


@pytest.mark.slow
def test_loops_are_compared_in_rounds_in_processes_of_their_own(tool: Tool, tmp_path: Path) -> None:
    files = ["--json", tmp_path / "loop.json", "--plot", tmp_path / "loop.png"]
    size = ["--iterations", 10, "--warmup", 2, "--rounds", 3]
    code, output, error = tool("--task", "loop", *size, *files)
    assert code == 0, error
    values = values_of(tmp_path / "loop.json", "a step")
    assert list(values)[:5] == ["raw", "raw-again", "raw-fused", "raw-duties", "trainkit"]
    assert {len(rounds) for rounds in values.values()} == {3}
    found = compared(output, "a step, µs")
    assert list(found) == list(values)
    for name, rounds in values.items():
        assert float(found[name][0]) == pytest.approx(1e6 * min(rounds), abs=0.01)
        assert float(found[name][1]) == pytest.approx(1e6 * statistics.median(rounds), abs=0.01)
    differences = [1e6 * (a - b) for a, b in zip(values["trainkit"], values["raw"], strict=True)]
    assert f"{statistics.median(differences):+.2f} [{min(differences):+.2f}, " in output
    # What trainkit's process did is in no file of ours.
    assert sorted(path.name for path in tmp_path.iterdir()) == ["loop.json", "loop.png"]
    assert (tmp_path / "loop.png").read_bytes().startswith(b"\x89PNG")
    for library in ("lightning", "ignite"):
        missing = importlib.util.find_spec(library) is None
        assert (f"{library} is not installed: left out." in output) == missing


@pytest.mark.slow
@pytest.mark.parametrize("task", ["loop", "startup"])
def test_the_engine_is_compared_on_a_config_of_ones_own(
    tool: Tool, tmp_path: Path, task: str
) -> None:
    size = ["--iterations", 3, "--warmup", 1, "--rounds", 1, "--json", tmp_path / "x.json"]
    clip = ["SOLVER.CLIP_GRADIENTS.ENABLED", "True"]
    code, _, error = tool("--task", task, *size, "--config-file", CONFIG, *SMALL, *clip)
    assert code == 0, error
    if task == "loop":
        assert list(values_of(tmp_path / "x.json", "a step")) == ["raw", "raw-again", "trainkit"]
    else:
        steps = values_of(tmp_path / "x.json", "start to first step")
        assert list(steps) == ["import torch", "raw", "trainkit"]
        assert steps["import torch"] < steps["trainkit"]
        (seconds,) = values_of(tmp_path / "x.json", "imports after torch")["trainkit"]
        assert 0 < seconds < steps["trainkit"][0]


def test_saving_and_loading_are_compared_with_pytorchs(tool: Tool, tmp_path: Path) -> None:
    size = ["--megabytes", 1, "--rounds", 2, "--json", tmp_path / "x.json"]
    code, output, error = tool("--task", "checkpoint", *size)
    assert code == 0, error
    names = {
        "saving 1 MB": ["torch.save", "bare write", "Checkpointer.save"],
        "loading 1 MB": ["torch.load", "Checkpointer.load", "verify alone"],
    }
    for title, expected in names.items():
        assert list(compared(output, f"{title}, ms")) == expected
        values = values_of(tmp_path / "x.json", title)
        assert {len(rounds) for rounds in values.values()} == {2}
    assert list(tmp_path.iterdir()) == [tmp_path / "x.json"]


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (["--task", "trian"], 2, "invalid choice: 'trian'"),
        (["--task", "train", "--warmup", "0"], 1, "--warmup 0: it is at least 1"),
        (["--task", "loop", "--rounds", "0"], 1, "--rounds 0: it is at least 1"),
        (["--task", "loop", "--num-gpus", "2"], 1, "--num-gpus 2: --task loop takes one process"),
        (["--task", "eval", "--json", "x"], 1, "they are for --task loop, startup, checkpoint"),
        (["--task", "startup", "SOLVER.MAX_ITR", "3"], 1, r"SOLVER\.MAX_ITER\?"),
        (["--task", "loop", "SOLVER.ACCUMULATE", "2"], 1, "SOLVER.ACCUMULATE is 2 and"),
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
    assert "--task {train,eval,data,loop,startup,checkpoint}" in output
    assert "Example:" in output
