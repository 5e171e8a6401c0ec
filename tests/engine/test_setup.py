import gc
import importlib.util
import json
import logging
import os
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import nn

from trainkit.config.config import CfgNode
from trainkit.config.defaults import get_cfg
from trainkit.config.lazy import LazyCall, LazyConfig
from trainkit.config.lazy_files import lazy_dict
from trainkit.engine.setup import (
    create_ddp_model,
    default_argument_parser,
    default_setup,
    default_writers,
)
from trainkit.utils import comm
from trainkit.utils.errors import ConfigError
from trainkit.utils.events.storage import EventStorage


def cfg_of(folder: Path, *opts: Any) -> CfgNode:
    cfg = get_cfg()
    cfg.merge_from_list(["OUTPUT_DIR", str(folder), "SEED", 3, *opts])
    cfg.freeze()
    return cfg


def test_arguments_have_detectron2s_names_and_defaults() -> None:
    args = default_argument_parser().parse_args([])
    assert vars(args) == {
        "config_file": "",
        "resume": False,
        "eval_only": False,
        "num_gpus": 1,
        "num_machines": 1,
        "machine_rank": 0,
        "dist_url": "auto",
        "debug": False,
        "opts": [],
    }


def test_what_stands_at_the_end_overrides_the_config() -> None:
    line = "--config-file a.yaml --resume --num-gpus 2 SOLVER.BASE_LR 0.05 OUTPUT_DIR --x"
    args = default_argument_parser().parse_args(line.split())
    assert (args.config_file, args.resume, args.num_gpus) == ("a.yaml", True, 2)
    assert args.opts == ["SOLVER.BASE_LR", "0.05", "OUTPUT_DIR", "--x"]


def test_help_shows_the_scripts_own_examples(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        default_argument_parser(epilog="Only this.").parse_args(["--help"])
    assert "Only this." in capsys.readouterr().out
    with pytest.raises(SystemExit):
        default_argument_parser().parse_args(["--help"])
    assert "torchrun --nproc-per-node 2" in capsys.readouterr().out


def test_setup_makes_the_folder_with_the_config_and_the_log(tmp_path: Path) -> None:
    folder = tmp_path / "runs" / "a"
    cfg = cfg_of(folder, "SOLVER.STEPS", (3, 4), "FLOAT32_PRECISION", "high")
    precision = torch.get_float32_matmul_precision()
    try:
        default_setup(cfg, default_argument_parser().parse_args([]))
        assert torch.get_float32_matmul_precision() == "high"
    finally:
        torch.set_float32_matmul_precision(precision)
    assert sorted(path.name for path in folder.iterdir()) == ["config.yaml", "log.txt"]
    again = get_cfg()
    again.merge_from_file(str(folder / "config.yaml"))
    assert again == cfg
    assert "SOLVER" in (folder / "log.txt").read_text()


def test_setup_seeds(tmp_path: Path) -> None:
    args = default_argument_parser().parse_args([])
    drawn = []
    for _ in range(2):
        default_setup(cfg_of(tmp_path), args)
        drawn.append(torch.rand(1).item())
    assert drawn[0] == drawn[1]


def test_d45_deterministic_mode_refuses_what_has_no_deterministic_kernel(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("CUBLAS_WORKSPACE_CONFIG", raising=False)
    monkeypatch.setattr(torch.backends.cudnn, "benchmark", False)
    args = default_argument_parser().parse_args([])
    default_setup(cfg_of(tmp_path, "DETERMINISTIC", True, "CUDNN_BENCHMARK", True), args)
    assert torch.are_deterministic_algorithms_enabled()
    assert not torch.backends.cudnn.benchmark
    assert os.environ["CUBLAS_WORKSPACE_CONFIG"] == ":4096:8"
    with pytest.raises(RuntimeError, match="does not have a deterministic implementation"):
        torch.zeros(4).put_(torch.tensor([0, 0]), torch.ones(2))


@pytest.mark.parametrize("below", ["", "deeper"])
def test_an_output_folder_that_cannot_be_written_is_an_error(tmp_path: Path, below: str) -> None:
    (tmp_path / "file").write_text("in the way")
    folder = tmp_path / "file" / below
    with pytest.raises(ConfigError, match=r"OUTPUT_DIR is '.*/file.*', where nothing can be writ"):
        default_setup(cfg_of(folder), default_argument_parser().parse_args([]))


def test_writers_write_the_log_metrics_and_tensorboard(tmp_path: Path) -> None:
    writers = default_writers(str(tmp_path), max_iter=10)
    names = ["CommonMetricPrinter", "JSONWriter", "TensorboardXWriter"]
    if importlib.util.find_spec("tensorboard") is None:
        names.pop()
    assert [type(writer).__name__ for writer in writers] == names
    with EventStorage() as storage:
        storage.put_scalar("loss", 0.5)
        for writer in writers[:2]:
            writer.write()
            writer.close()
    assert json.loads((tmp_path / "metrics.json").read_text())["loss"] == 0.5


def test_without_tensorboard_it_is_said_how_to_get_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with caplog.at_level(logging.INFO):
        writers = default_writers(str(tmp_path))
    assert [type(writer).__name__ for writer in writers] == ["CommonMetricPrinter", "JSONWriter"]
    assert "pip install 'trainkit[tensorboard]'" in caplog.text


def test_one_process_needs_no_ddp(regression: Any) -> None:
    model = regression()
    assert create_ddp_model(model, find_unused_parameters=True) is model


def test_several_processes_get_ddp_with_its_options_and_gradients_in_fp16(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    torch.manual_seed(0)
    model, batch = nn.Linear(3, 2), torch.randn(4, 3)
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/s", rank=0, world_size=1)
    monkeypatch.setattr(comm, "get_world_size", lambda: 2)
    try:
        ddp: Any = create_ddp_model(model, fp16_compression=True, find_unused_parameters=True)
        assert ddp.find_unused_parameters
        ddp(batch).square().sum().backward()
        found = [p.grad.clone() for p in ddp.parameters()]
        # A model that outlives the group ends gloo's threads, which may wait for the interpreter.
        del ddp
        gc.collect()
    finally:
        dist.destroy_process_group()
    model.zero_grad()
    model(batch).square().sum().backward()
    exact: list[Any] = [p.grad for p in model.parameters()]
    assert all(torch.equal(a, b.half().float()) for a, b in zip(found, exact, strict=True))
    assert not torch.equal(found[0], exact[0])


def test_a_lazy_config_is_written_down_whole_or_it_is_said_what_is_missing(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    train = {"output_dir": str(tmp_path), "seed": 3, "mine": 1}
    cfg = lazy_dict({"train": train, "model": LazyCall(nn.Linear)(in_features=1, out_features=2)})
    args = default_argument_parser().parse_args([])
    default_setup(cfg, args)
    assert torch.initial_seed() == 3
    assert LazyConfig.load(tmp_path / "config.yaml").model._target_ == "torch.nn.Linear"
    cfg.train.log_period = -1
    with pytest.raises(ConfigError, match="LOG_PERIOD is -1"):
        default_setup(cfg, args)
    cfg.train.log_period = 5
    cfg.model.f = lambda: 1
    default_setup(cfg, args)
    assert "not the whole config: model.f is <function" in (tmp_path / "log.txt").read_text()
