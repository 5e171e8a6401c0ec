"""Scripts written for detectron2 run here after `s/detectron2/trainkit/` and nothing else."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import trainkit

SCRIPTS = Path(__file__).with_name("detectron2_style")
pytestmark = pytest.mark.slow


class Project:
    """A folder with the renamed scripts."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.output = folder / "output"
        for path in SCRIPTS.iterdir():
            text = path.read_text("utf-8").replace("detectron2", "trainkit")
            (folder / path.name.replace(".txt", ".py")).write_text(text, "utf-8")

    def run(self, script: str, *arguments: str) -> str:
        """Runs a script to its end, and returns what it printed."""
        root = Path(trainkit.__file__).parents[1]
        done = subprocess.run(
            [sys.executable, "-W", "error::FutureWarning", script, *arguments],
            cwd=self.folder,
            env={**os.environ, "PYTHONPATH": str(root), "OMP_NUM_THREADS": "1"},
            capture_output=True,
            text=True,
            timeout=120,
            check=False,
        )
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout

    def metrics(self) -> dict[str, dict[int, float]]:
        """Returns what metrics.json says, by name and iteration."""
        found: dict[str, dict[int, float]] = {}
        for text in (self.output / "metrics.json").read_text("utf-8").splitlines():
            line = json.loads(text)
            for name, value in line.items():
                found.setdefault(name, {})[line["iteration"]] = value
        return found


def weights(folder: Path) -> dict[str, torch.Tensor]:
    model: dict[str, torch.Tensor]
    model = torch.load(folder / "model_final.pth", weights_only=True)["model"]
    return model


def accuracy_in(pattern: str, printed: str) -> float:
    found = re.search(pattern, printed)
    assert found, printed
    return float(found[1])


@pytest.fixture
def project(tmp_path: Path) -> Project:
    return Project(tmp_path)


CONFIG = ["--config-file", "points.yaml"]


def test_a_project_around_default_trainer_trains_resumes_and_evaluates(project: Project) -> None:
    # The schedule depends on the length of the run in the last bits only.
    project.run("train_points.py", *CONFIG, "SOLVER.MAX_ITER", "20")
    project.run("train_points.py", *CONFIG, "--resume")
    printed = project.run("train_points.py", *CONFIG, "--eval-only", "--resume")
    assert accuracy_in(r"accuracy (\d+\.\d) of 50", printed) > 80

    metrics = project.metrics()
    # What is put at the end belongs to no step.
    assert list(metrics["validation_loss"]) == [9, 19, 29]
    assert list(metrics["points/accuracy"]) == [9, 19, 30]
    assert list(metrics["points_again/accuracy"]) == [30]
    assert {"loss_cls", "loss_reg", "total_loss", "lr", "my_grad_norm"} <= metrics.keys()
    best = torch.load(project.output / "model_best.pth", weights_only=True)
    assert best["trainer"]["iteration"] == best["iteration"]

    project.run("train_points.py", *CONFIG, "OUTPUT_DIR", "unbroken")
    torch.testing.assert_close(weights(project.output), weights(project.folder / "unbroken"))


@pytest.mark.parametrize("trainer", ["own_step", "own_init", "plain"])
def test_trainers_and_loops_of_its_own_train_and_resume(project: Project, trainer: str) -> None:
    project.run("train_points.py", *CONFIG, "--trainer", trainer, "SOLVER.MAX_ITER", "20")
    assert 19 in project.metrics()["total_loss"]
    printed = project.run("train_points.py", *CONFIG, "--trainer", trainer, "--resume")
    assert "Starting training from iteration 20" in printed
    assert 29 in project.metrics()["total_loss"]


def test_two_processes_train(project: Project) -> None:
    project.run("train_points.py", *CONFIG, "--num-gpus", "2", "SOLVER.MAX_ITER", "10")
    assert list(project.metrics()["points/accuracy"]) == [10]


def test_a_project_on_lazy_configs_trains_resumes_and_evaluates(project: Project) -> None:
    pytest.importorskip("omegaconf")
    arguments = ["--config-file", "lazy_points.py"]
    project.run("lazy_train.py", *arguments, "train.max_iter=20")
    project.run("lazy_train.py", *arguments, "--resume")
    printed = project.run("lazy_train.py", *arguments, "--eval-only", "--resume")
    assert accuracy_in(r"'accuracy': (\d+\.\d)", printed) > 80
    assert list(project.metrics()["points/accuracy"]) == [9, 19, 30]
