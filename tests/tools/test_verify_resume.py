"""A sound run is bit-exact after real kills, and of a broken one the culprit is named."""

import contextlib
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tools import verify_resume

CONFIG = Path(__file__).parents[2] / "configs" / "fashion_mnist.yaml"
EXAMPLES = "tests.tools.broken_examples"

Tool = Callable[..., tuple[int, str]]


@pytest.fixture
def tool(capsys: pytest.CaptureFixture[str]) -> Tool:
    """Verifies a small config, and returns the exit code and what was printed."""

    def run(*options: Any, opts: tuple[Any, ...] = (), trainer: str = "") -> tuple[int, str]:
        settings: list[Any] = ["MODEL.BACKBONE.WIDTHS", "(4, 8)", "MODEL.BACKBONE.BLOCKS", "(0, 1)"]
        settings += ["DATASETS.TRAIN", "('images',)", "DATASETS.TEST", "('images',)"]
        settings += ["SOLVER.IMS_PER_BATCH", 12, "TEST.IMS_PER_BATCH", 40, "MODEL.DEVICE", "cpu"]
        settings += ["LOG_PERIOD", 2, *opts]
        argv = ["--config-file", CONFIG, "--import", EXAMPLES, "--iterations", 7, *options]
        if trainer:
            argv += ["--trainer", f"{EXAMPLES}:{trainer}"]
        try:
            code = verify_resume.main([str(arg) for arg in (*argv, *settings)])
        except SystemExit as e:
            code = int(e.code or 0)
        captured = capsys.readouterr()
        return code, captured.out + captured.err

    return run


SOUND = (
    *("MODEL.DROPOUT", 0.3, "INPUT.ERASE_PROB", 0.5, "SOLVER.ACCUMULATE", 2),
    *("SOLVER.PRECISION", "bf16", "SOLVER.LR_SCHEDULER_NAME", "WarmupCosineLR"),
    *("TEST.BEST_METRIC", "classification/top1", "TEST.EVAL_PERIOD", 3),
)


@pytest.mark.faults
@pytest.mark.parametrize("num_workers", [0, 2])
def test_a_sound_run_is_exact_however_often_it_is_killed(tool: Tool, num_workers: int) -> None:
    options = ("--kills", 3, "--iterations", 10)
    code, text = tool(*options, opts=(*SOUND, "DATALOADER.NUM_WORKERS", num_workers))
    assert code == 0, text
    assert re.search(r"Bit-exact: 3 kill\(s\), 10 iterations, 1 rank\(s\), [\d,]+ values\.", text)
    assert "unbroken again" not in text
    assert text.splitlines()[-1].startswith("Bit-exact")


@pytest.mark.faults
@pytest.mark.slow
@pytest.mark.parametrize("num_ranks", [2, 3])
def test_a_sound_run_of_several_ranks_is_exact(tool: Tool, num_ranks: int) -> None:
    options = ("--at", "2", "--iterations", 5, "--num-gpus", num_ranks)
    code, text = tool(*options, opts=SOUND)
    assert code == 0, text
    assert f"Bit-exact: 1 kill(s), 5 iterations, {num_ranks} rank(s)" in text


NOT_RESTORED = "after the resume at iteration 3 and was .* in the unbroken run: state not restored"
CULPRITS: dict[str, list[str]] = {
    "WithGradientScaler": [
        f"hook GradientScaler: `count` is 0 {NOT_RESTORED}. Return it from the hook's state_dict",
        "gradient norm: it differs at iteration 4 .*although the gradients were the same",
    ],
    "WithHalfSaved": [
        f"hook HalfSaved: `total` is 0.0 {NOT_RESTORED}",
        r"metrics.json: total differs at iteration 3 \(0.0, in the unbroken run 10.0\)",
    ],
    "WithSaved": [
        f"state of hook Saved: `total` is 0.0 {NOT_RESTORED}. The hook's load_state_dict"
    ],
    "WithSeededNoise": [
        "layer backbone.stem.noise: its output differs at iteration 4, although inputs, parameters "
        "and randomness are the same: it is nondeterministic, or has randomness or a state of its"
    ],
    "WithNoise": [
        "Not deterministic even without a kill: layer backbone.stem.noise: its output differs at "
        "iteration 0, although inputs, parameters and randomness are the same"
    ],
    "WithForgetfulSGD": [
        f"optimizer: `momentum_buffer of backbone.stem.0.weight` is missing {NOT_RESTORED}. Return"
    ],
    "WithDriftingSGD": [
        "parameter: backbone.stem.0.weight differs at iteration 4, although the gradients are the "
        "same: the optimizer or a hook has .* a state of its own"
    ],
}


@pytest.mark.faults
@pytest.mark.parametrize("trainer", CULPRITS)
def test_the_culprit_is_named(tool: Tool, trainer: str) -> None:
    code, text = tool("--at", "3", trainer=trainer)
    assert code == 1, text
    verdict, *lines = text[text.index("NOT bit-exact") :].splitlines()
    assert verdict.startswith("NOT bit-exact: 1 kill(s), 7 iterations, 1 rank(s)")
    assert len(lines) == len(CULPRITS[trainer]), text
    for pattern, line in zip(CULPRITS[trainer], lines, strict=True):
        assert re.match(pattern, line), line


@pytest.mark.faults
@pytest.mark.parametrize("num_workers", [0, 1])
def test_a_data_set_with_a_generator_of_its_own_is_named(tool: Tool, num_workers: int) -> None:
    opts = ("DATASETS.TRAIN", "('private_noise',)", "DATALOADER.NUM_WORKERS", num_workers)
    code, text = tool("--at", "3", opts=opts)
    assert code == 1, text
    assert re.search(
        r"\ndata set PrivateNoise: sample 0 of iteration 4 differs \(image; index \d+, epoch 0, "
        r"offset 48\), although its index is the same: .*define set_random_seed",
        text,
    ), text


@pytest.mark.faults
def test_what_has_no_consequences_is_told_apart(tool: Tool) -> None:
    code, text = tool("--at", "3", trainer="WithIdle")
    assert code == 0, text
    exact, *notes = text[text.index("Bit-exact") :].splitlines()
    assert exact.startswith("Bit-exact: 1 kill(s)")
    assert notes[0].startswith(
        "Nothing that was compared depends on it, but hook Idle: `calls` is 0 after the resume"
    )
    assert notes[1:] == ["Not compared, as it varies without a kill: metrics.json `clock`"]


@pytest.mark.faults
def test_a_kill_inside_the_first_or_the_last_step_is_survived(tool: Tool) -> None:
    code, text = tool("--at", "0,1,4", "--iterations", 5, opts=SOUND)
    assert code == 0, text
    assert "Bit-exact: 3 kill(s), 5 iterations" in text


@pytest.mark.faults
def test_the_runs_can_be_kept_and_the_seed_is_always_set(tool: Tool, tmp_path: Path) -> None:
    folder = tmp_path / "kept"
    options = ("--at", "1", "--iterations", 3, "--keep", folder)
    code, text = tool(*options, opts=("SEED", -1, "DATALOADER.NUM_WORKERS", 0))
    assert code == 0, text
    assert "3 iterations with SEED 0, killed after 1\n" in text
    assert {path.name for path in folder.iterdir()} == {"unbroken", "killed"}
    names = {path.name for path in (folder / "killed").iterdir()}
    assert names >= {"trace.0.rank0.jsonl", "trace.1.rank0.jsonl", "output.txt", "metrics.json"}
    assert tool(*options)[0] == 1


@pytest.mark.parametrize(
    ("options", "opts", "message"),
    [
        (("--at", "3,7"), (), "--at is 3,7, but only 7 iterations are run"),
        (("--at", "-1"), (), "--at is -1, but only 7 iterations"),
        (("--at", "x"), (), "argument --at: invalid iterations value: 'x'"),
        (("--at", "1", "--kills", 2), (), "--kills: not allowed with argument --at"),
        (("--kills", 7), (), "--kills is 7, but 7 iterations are run .*: give 1 to 6"),
        (("--kills", 3), ("LIMIT_BATCHES", 2), "--kills is 3, but 2 iterations are run"),
        (("--resume",), (), "--num-machines and torchrun have no place"),
        (("--import", "no_such_module"), (), "Cannot find 'no_such_module'.*No module named"),
        (("--trainer", "tests.tools"), (), "--trainer is 'tests.tools', .* MODULE:CLASS"),
        (("--trainer", f"{EXAMPLES}:Nose"), (), "Cannot find '.*:Nose'.*no attribute 'Nose'"),
        (("--trainer", f"{EXAMPLES}:Noise"), (), "--trainer is .*which is no DefaultTrainer"),
        ((), ("SOLVER.MAX_ITR", 5), "SOLVER.MAX_ITR.*MAX_ITER"),
    ],
)
def test_a_bad_argument_is_one_clear_error(
    tool: Tool, options: tuple[Any, ...], opts: tuple[Any, ...], message: str
) -> None:
    code, text = tool(*options, opts=opts)
    assert code in (1, 2)
    assert re.search(message, text, re.DOTALL), text
    assert "Running" not in text
    assert "Traceback" not in text


@pytest.mark.faults
@pytest.mark.parametrize(
    ("opts", "trainer", "message"),
    [
        (("SOLVER.OPTIMIZER", "SDG"), "", "^UnknownNameError: .*Did you mean 'SGD'"),
        ((), "Failing", "exit code 1, saying last:.*ZeroDivisionError"),
        ((), "Stopping", "The run ended before it could be killed after iteration 5. .*--at"),
    ],
)
def test_a_run_that_fails_by_itself_says_why(
    tool: Tool, opts: tuple[Any, ...], trainer: str, message: str
) -> None:
    code, text = tool("--at", "5", opts=opts, trainer=trainer)
    assert code == 1
    assert re.search(message, text, re.DOTALL | re.MULTILINE), text


def test_a_config_in_python_is_taken_too(tmp_path: Path) -> None:
    config = Path(__file__).parents[2] / "configs" / "lazy" / "fashion_mnist.py"
    args = verify_resume.parse_args(["--config-file", str(config), "train.max_iter=7"])
    cfg = verify_resume.build_cfg(args, tmp_path)
    assert cfg.SOLVER.MAX_ITER == 7
    assert Path(cfg.OUTPUT_DIR) == tmp_path
    assert "model" in cfg.LAZY


def test_the_places_are_drawn_by_their_own_seed() -> None:
    def places(*options: str) -> list[int]:
        return verify_resume.choose_places(verify_resume.parse_args(options), 30)

    assert places() == places()
    assert places() != places("--kill-seed", "1")
    assert len(places("--kills", "29")) == 29
    assert places("--at", "7,1,7") == [1, 7]


@pytest.mark.faults
@pytest.mark.parametrize("signum", [signal.SIGINT, signal.SIGTERM])
def test_the_end_of_the_tool_is_the_end_of_its_runs(tmp_path: Path, signum: signal.Signals) -> None:
    command = [sys.executable, verify_resume.__file__, "--config-file", str(CONFIG)]
    command += ["--trainer", f"{EXAMPLES}:Endless", "--iterations", "2000", "--keep", str(tmp_path)]
    command += ["DATASETS.TRAIN", "('images',)", "MODEL.DEVICE", "cpu"]
    with subprocess.Popen(command, stdout=subprocess.DEVNULL, cwd=CONFIG.parents[1]) as tool:
        pid = _wait_for(lambda: (tmp_path / "unbroken" / "pid").read_text())
        tool.send_signal(signum)
        assert tool.wait(60) == 130
    _wait_for(lambda: str(not Path("/proc", pid).exists() or ""))


def _wait_for(function: Callable[[], str]) -> str:
    """Returns the first text that is not empty."""
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline:
        with contextlib.suppress(FileNotFoundError):
            if text := function():
                return text
        time.sleep(0.02)
    raise AssertionError("timed out")
