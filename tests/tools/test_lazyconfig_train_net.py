import json
import os
import runpy
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from trainkit.config import LazyConfig
from trainkit.data import DatasetCatalog
from trainkit.modeling import ImageClassifier

TOOLS = Path(__file__).parents[2] / "tools"
CONFIG = TOOLS.parent / "configs" / "lazy" / "fashion_mnist.py"
SMALL = [
    *("model.backbone.widths=[4,8]", "model.backbone.blocks=[0,1]", "+model.dropout=0.5"),
    *("train.device=cpu", "train.eval_period=5", "train.log_period=3"),
    "dataloader.train.dataset.name=fashion_mnist_small_test",
]

Tool = Callable[..., int]


@pytest.fixture
def tool(monkeypatch: pytest.MonkeyPatch) -> Tool:
    """Runs a tool as from the command line, with few test images, and returns its exit code."""
    if "few" not in DatasetCatalog:
        small = DatasetCatalog.get("fashion_mnist_small_test")
        DatasetCatalog.register("few", lambda: torch.utils.data.Subset(small, range(96)))

    def run(output: Path, *args: str, name: str = "lazyconfig_train_net.py") -> int:
        flags = [arg for arg in args if arg.startswith("--")]
        opts = [arg for arg in args if not arg.startswith("--")]
        argv = [name, "--config-file", str(CONFIG), *flags, *SMALL, f"train.output_dir={output}"]
        argv += ["train.max_iter=12", "dataloader.test.dataset.name=few", *opts]
        monkeypatch.setattr("sys.argv", argv)
        try:
            runpy.run_path(str(TOOLS / name), run_name="__main__")
        except SystemExit as e:
            return int(e.code or 0)
        return 0

    return run


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


def test_a_run_resumes_evaluates_and_writes_down_its_config(
    tool: Tool, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert tool(tmp_path) == 0
    names = {path.name for path in tmp_path.iterdir()}
    assert names >= {"log.txt", "config.yaml", "model_final.pth", "model_best.pth", "finished.json"}
    assert LazyConfig.load(tmp_path / "config.yaml").model.backbone.widths == [4, 8]
    lines = [json.loads(line) for line in (tmp_path / "metrics.json").read_text().splitlines()]
    evaluated = [line["iteration"] for line in lines if "classification/top1" in line]
    assert evaluated[:2] == [4, 9]
    capsys.readouterr()
    assert tool(tmp_path, "--resume") == 0
    assert "is finished" in capsys.readouterr().out
    assert tool(tmp_path, "--resume", "--eval-only") == 0
    assert "copypaste: top1,top5" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("opts", "message"),
    [
        (["train.max_itr=5"], r"Did you mean train.max_iter?"),
        (["model.num_clases=5"], "Did you mean model.num_classes?"),
        (["train.max_iter=-1"], "max_iter is -1"),
        (["train.log_period=-1"], "LOG_PERIOD is -1"),
        (["optimizer._target_=torch.optim.SDG"], "optimizer: There is no 'torch.optim.SDG'"),
        (["+optimizer.lrr=3"], "optimizer: SGD(params, lr, "),
        (["--eval-only"], "--eval-only needs weights"),
    ],
)
def test_bad_settings_get_one_clear_error(
    tool: Tool, tmp_path: Path, opts: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert tool(tmp_path, *opts) == 1
    error = capsys.readouterr().err
    assert message in error
    assert "Traceback" not in error


def test_d51_the_flat_script_and_the_default_trainer_compute_the_same(
    tool: Tool, tmp_path: Path, losses: list[float]
) -> None:
    assert tool(tmp_path / "flat") == 0
    flat = losses.copy()
    losses.clear()
    assert tool(tmp_path / "trainer", name="train_net.py") == 0
    assert losses == flat
    assert len(flat) == 12
    results = [
        json.loads((tmp_path / name / "metrics.json").read_text().splitlines()[-1])
        for name in ("flat", "trainer")
    ]
    assert results[0]["classification/top1"] == results[1]["classification/top1"]


@pytest.mark.faults
def test_a_run_that_is_killed_and_resumed_ends_as_an_unbroken_one(
    tool: Tool, tmp_path: Path
) -> None:
    opts = ["train.checkpointer.period=4", "train.log_period=1", "train.eval_period=0"]
    command = [sys.executable, str(TOOLS / "lazyconfig_train_net.py"), "--config-file", str(CONFIG)]
    run = subprocess.Popen(
        [*command, *SMALL, f"train.output_dir={tmp_path / 'killed'}", "train.max_iter=12", *opts],
        stdout=subprocess.PIPE,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONUNBUFFERED": "1"},
    )
    assert run.stdout is not None
    for line in run.stdout:
        if "iter: 6 " in line:
            run.send_signal(signal.SIGKILL)
            break
    run.communicate(timeout=60)
    assert run.returncode == -signal.SIGKILL
    assert not (tmp_path / "killed" / "model_final.pth").exists()
    states = []
    for name in ("killed", "unbroken"):
        assert tool(tmp_path / name, "--resume", *opts) == 0
        path = tmp_path / name / "model_final.pth"
        states.append(torch.load(path, weights_only=True))
    killed, unbroken = states
    assert all(torch.equal(killed["model"][k], v) for k, v in unbroken["model"].items())
    momenta = [state["trainer"]["optimizer"]["state"] for state in states]
    assert all(
        torch.equal(momenta[0][k]["momentum_buffer"], v["momentum_buffer"])
        for k, v in momenta[1].items()
    )
    lines = [(tmp_path / name / "metrics.json").read_text() for name in ("killed", "unbroken")]
    losses = [[json.loads(line)["loss_cls"] for line in text.splitlines()[:12]] for text in lines]
    assert losses[0] == losses[1]
