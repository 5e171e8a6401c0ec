import json
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from iopath.common.file_io import NativePathHandler, PathManager

from trainkit.engine.hooks import profiler
from trainkit.engine.hooks.callback import CallbackHook
from trainkit.engine.hooks.profiler import AutogradProfiler, TorchProfiler
from trainkit.engine.train_loop import SimpleTrainer
from trainkit.utils import comm

MakeTrainer = Callable[..., SimpleTrainer]


def names(trace: Path) -> list[str]:
    """The events of a trace, by name."""
    return [event["name"] for event in json.loads(trace.read_bytes())["traceEvents"]]


def second_and_fourth(trainer: Any) -> bool:
    return trainer.iter in (1, 3)


def test_each_enabled_step_has_a_chrome_trace_of_its_own(
    simple: MakeTrainer, tmp_path: Path
) -> None:
    trainer = simple()
    trainer.register_hooks([TorchProfiler(second_and_fourth, tmp_path, save_tensorboard=False)])
    trainer.train(0, 5)
    traces = sorted(tmp_path.iterdir())
    assert [t.name for t in traces] == ["profiler-trace-iter1.json", "profiler-trace-iter3.json"]
    for trace in traces:
        # One step and not two.
        assert names(trace).count("aten::linear") == 1
        assert "MseLossBackward0" not in names(trace)
        assert any("Optimizer.step" in name for name in names(trace))
    linear = next(
        event
        for event in json.loads(traces[0].read_bytes())["traceEvents"]
        if event["name"] == "aten::linear"
    )
    assert linear["args"]["Input Dims"][:2] == [[2, 4], [1, 4]]
    assert any("[memory]" in name for name in names(traces[0]))


def test_traces_for_tensorboard_are_in_a_folder_for_each_step(
    simple: MakeTrainer, tmp_path: Path
) -> None:
    trainer = simple()
    trainer.register_hooks([TorchProfiler(second_and_fourth, tmp_path)])
    trainer.train(0, 5)
    folders = sorted((tmp_path / "log").iterdir())
    assert [f.name for f in folders] == ["profiler-tensorboard-iter1", "profiler-tensorboard-iter3"]
    for folder in folders:
        (trace,) = folder.iterdir()
        assert trace.match("worker0.*.pt.trace.json")
        assert names(trace).count("aten::linear") == 1


def test_ranks_do_not_write_into_one_file(
    simple: MakeTrainer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(comm, "get_rank", lambda: 2)
    trainer = simple()
    trainer.register_hooks([TorchProfiler(second_and_fourth, tmp_path, save_tensorboard=False)])
    trainer.train(0, 2)
    assert [path.name for path in tmp_path.iterdir()] == ["profiler-trace-iter1-rank2.json"]


@pytest.mark.parametrize("place", ["step", "hook"])
def test_a_step_that_fails_leaves_no_profiler_running(
    simple: MakeTrainer, tmp_path: Path, place: str
) -> None:
    def fail(trainer: SimpleTrainer) -> None:
        raise KeyError(trainer.iter)

    trainer = simple()
    failing = CallbackHook(**{"after_backward" if place == "step" else "before_step": fail})
    trainer.register_hooks([TorchProfiler(lambda _: True, tmp_path), failing])
    with pytest.raises(KeyError):
        trainer.train(0, 5)
    assert not list(tmp_path.iterdir())
    assert not torch.autograd.profiler._is_profiler_enabled


class _Remote(NativePathHandler):  # type: ignore[misc]  # iopath is untyped
    """A store that is known by a scheme, and takes whole files only."""

    def __init__(self, folder: Path) -> None:
        super().__init__()
        self.folder = folder

    def _get_supported_prefixes(self) -> list[str]:
        return ["remote://"]

    def _mkdirs(self, path: str, **kwargs: Any) -> None:
        (self.folder / path.removeprefix("remote://")).mkdir(parents=True, exist_ok=True)

    def _copy_from_local(
        self, local_path: str, dst_path: str, overwrite: bool = False, **kwargs: Any
    ) -> None:
        target = self.folder / dst_path.removeprefix("remote://")
        target.write_bytes(Path(local_path).read_bytes())


@pytest.mark.parametrize("save_tensorboard", [False, True])
def test_traces_may_go_to_a_remote_store(
    simple: MakeTrainer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, save_tensorboard: bool
) -> None:
    manager = PathManager()
    manager.register_handler(_Remote(tmp_path))
    monkeypatch.setattr(profiler, "PathManager", manager)
    trainer = simple()
    trainer.register_hooks(
        [TorchProfiler(second_and_fourth, "remote://run", save_tensorboard=save_tensorboard)]
    )
    trainer.train(0, 2)
    (trace,) = (path for path in tmp_path.rglob("*") if path.is_file())
    folder = "run/log/profiler-tensorboard-iter1" if save_tensorboard else "run"
    assert trace.parent == tmp_path / folder
    assert names(trace).count("aten::linear") == 1


@pytest.mark.parametrize("arguments", [{}, {"use_cuda": True}, {"use_cuda": False}])
def test_d47_the_older_profiler_takes_its_arguments_and_works(
    simple: MakeTrainer, tmp_path: Path, arguments: dict[str, bool]
) -> None:
    trainer = simple()
    trainer.register_hooks([AutogradProfiler(second_and_fourth, tmp_path, **arguments)])
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        trainer.train(0, 2)
    (trace,) = tmp_path.iterdir()
    assert trace.name == "profiler-trace-iter1.json"
    assert names(trace).count("aten::linear") == 1
    assert not caught
