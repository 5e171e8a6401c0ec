"""Which iterations are saved under which names, and how many of them are kept."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from trainkit.checkpoint.checkpointer import Checkpointer
from trainkit.checkpoint.manifest import read_manifest
from trainkit.checkpoint.periodic import PeriodicCheckpointer


def run(folder: Path, start_iter: int, end_iter: int, period: int, **kwargs: Any) -> list[str]:
    """Steps through iterations; returns the names of the files that are there at the end."""
    periodic = PeriodicCheckpointer(Checkpointer(nn.Linear(1, 1), folder), period, **kwargs)
    for iteration in range(start_iter, end_iter):
        periodic.step(iteration, note=iteration)
    return sorted(path.stem for path in folder.glob("*.pth"))


def test_every_period_and_the_end_are_saved(tmp_path: Path) -> None:
    assert run(tmp_path, 0, 8, period=3, max_iter=8) == [
        *("model_0000002", "model_0000005", "model_final")
    ]
    manifest = read_manifest(tmp_path / "model_final.pth")
    assert manifest is not None
    assert manifest.iteration == 7
    assert torch.load(tmp_path / "model_0000002.pth")["note"] == 2


def test_d22_period_zero_saves_only_the_end(tmp_path: Path) -> None:
    assert run(tmp_path, 0, 8, period=0, max_iter=8) == ["model_final"]


def test_a_run_without_end_has_no_final_checkpoint(tmp_path: Path) -> None:
    assert run(tmp_path, 0, 4, period=4) == ["model_0000003"]


def test_d20_files_of_earlier_processes_count(tmp_path: Path) -> None:
    run(tmp_path, 0, 3, period=1)
    assert run(tmp_path, 3, 5, period=1, max_iter=5, max_to_keep=2) == [
        *("model_0000003", "model_0000004", "model_final")
    ]


def test_a_prefix_has_its_own_files(tmp_path: Path) -> None:
    run(tmp_path, 0, 2, period=1)
    assert run(tmp_path, 0, 2, period=1, max_to_keep=1, file_prefix="ema") == [
        *("ema_0000001", "model_0000000", "model_0000001")
    ]


def test_a_save_of_its_own_name_is_possible_at_any_time(tmp_path: Path) -> None:
    periodic = PeriodicCheckpointer(Checkpointer(nn.Linear(1, 1), tmp_path), 10)
    periodic.save("now", iteration=4)
    assert (tmp_path / "last_checkpoint").read_text() == "now.pth"


def test_keeping_none_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="max_to_keep is 0; keep at least 1"):
        PeriodicCheckpointer(Checkpointer(nn.Linear(1, 1), tmp_path), 1, max_to_keep=0)
