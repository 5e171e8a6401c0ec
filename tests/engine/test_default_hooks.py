"""The hooks that a config asks for, and that they work together."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from trainkit.config.config import CfgNode
from trainkit.engine.defaults import DefaultTrainer
from trainkit.engine.hooks.callback import CallbackHook
from trainkit.engine.hooks.checkpoint import BestCheckpointer
from trainkit.engine.hooks.ema import EMA
from trainkit.engine.train_loop import SimpleTrainer
from trainkit.utils import comm

MakeCfg = Callable[..., CfgNode]

ALL: tuple[Any, ...] = (
    *("MODEL.EMA.ENABLED", True, "MODEL.EMA.DECAY", 0.5, "TEST.EVAL_PERIOD", 1),
    *("TEST.PRECISE_BN.ENABLED", True, "TEST.PRECISE_BN.NUM_ITER", 2, "SOLVER.MAX_SECONDS", 900),
    *("DATASETS.VAL", ("tiny_other",), "TEST.BEST_METRIC", "val/total_loss"),
    *("TEST.EARLY_STOPPING.METRIC", "val/total_loss", "TEST.EARLY_STOPPING.MODE", "min"),
    *(
        "LOG_PERIOD",
        1,
    ),
)


def names_of(trainer: SimpleTrainer) -> list[str]:
    return [type(hook).__name__ for hook in trainer._hooks]


def weights(trainer: SimpleTrainer) -> list[torch.Tensor]:
    return [p.detach().clone() for p in trainer.model.parameters()]


def metrics(folder: Path) -> list[dict[str, Any]]:
    rows = map(json.loads, (folder / "metrics.json").read_text().splitlines())
    timings = ("time", "data_time", "rank_data_time", "eta_seconds")
    return [{k: v for k, v in row.items() if k not in timings} for row in rows]


def test_the_default_hooks_run_in_this_order(make_cfg: MakeCfg) -> None:
    trainer = DefaultTrainer(make_cfg(*ALL))
    trainer.register_hooks([late := CallbackHook()])
    assert names_of(trainer) == [
        *("IterationTimer", "LRScheduler", "EMA", "PreciseBN", "TimeLimit"),
        *("PeriodicCheckpointer", "ValidationLoss", "EvalHook", "BestCheckpointer"),
        *("EarlyStopping", "CallbackHook", "PeriodicWriter"),
    ]
    assert trainer._hooks[-2] is late


def test_only_rank_0_writes_and_what_is_not_asked_for_is_not_there(
    make_cfg: MakeCfg, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(comm, "is_main_process", lambda: False)
    names = names_of(DefaultTrainer(make_cfg()))
    assert names == ["IterationTimer", "LRScheduler", "PeriodicCheckpointer", "EvalHook"]


def test_averaged_weights_are_evaluated_and_others_trained(make_cfg: MakeCfg) -> None:
    trained: list[torch.Tensor] = []
    evaluated: list[torch.Tensor] = []

    class Trainer(DefaultTrainer):
        @classmethod
        def test(cls, cfg: CfgNode, model: Any, evaluators: Any = None) -> dict[str, Any]:
            evaluated.append(next(model.parameters()).detach().clone())
            return super().test(cfg, model, evaluators)

    trainer = Trainer(make_cfg("MODEL.EMA.ENABLED", True, "TEST.EVAL_PERIOD", 2))
    take = CallbackHook(after_step=lambda t: trained.append(next(t.model.parameters()).clone()))
    trainer.register_hooks([take])
    trainer.train()
    averages = next(h for h in trainer._hooks if isinstance(h, EMA)).state_dict()["averages"]
    # One evaluation inside the run, one at its end.
    assert len(evaluated) == 2
    assert not torch.equal(evaluated[0], trained[1])
    assert torch.equal(evaluated[1], next(iter(averages.values())))
    assert torch.equal(next(trainer.model.parameters()), trained[3])


def test_a_run_with_all_hooks_that_is_cut_ends_like_an_unbroken_one(
    make_cfg: MakeCfg, tmp_path: Path
) -> None:
    unbroken = DefaultTrainer(make_cfg(*ALL, "OUTPUT_DIR", str(tmp_path / "unbroken")))
    unbroken.train()
    cfg = make_cfg(*ALL, "OUTPUT_DIR", str(tmp_path / "cut"))
    for stop_at in (0, 2, None):
        trainer = DefaultTrainer(cfg)
        trainer.resume_or_load(resume=True)

        def stop(t: SimpleTrainer, at: int | None = stop_at) -> None:
            if t.iter == at:
                t.request_stop("test")

        trainer.register_hooks([CallbackHook(before_step=stop)])
        trainer.train()
    pairs = zip(weights(trainer), weights(unbroken), strict=True)
    assert all(torch.equal(a, b) for a, b in pairs)
    states = (t.state_dict()["hooks"]["EMA"]["averages"] for t in (trainer, unbroken))
    found, expected = states
    assert all(torch.equal(found[name], expected[name]) for name in expected)
    assert metrics(tmp_path / "cut") == metrics(tmp_path / "unbroken")
    # Both in one line, so in one plot.
    assert {"val/total_loss", "total_loss"} <= metrics(tmp_path / "cut")[2].keys()


def test_several_sets_of_validation_data_have_curves_of_their_own(make_cfg: MakeCfg) -> None:
    trainer = DefaultTrainer(make_cfg("DATASETS.VAL", ("tiny_other", "tiny_test")))
    trainer.train()
    found = set(trainer.storage.histories())
    assert {"val/tiny_other/total_loss", "val/tiny_test/total_loss"} <= found


def test_a_length_in_epochs_is_one_in_iterations(make_cfg: MakeCfg) -> None:
    # 12 samples in batches of 4.
    trainer = DefaultTrainer(make_cfg("SOLVER.MAX_EPOCHS", 2, "SOLVER.CHECKPOINT_EPOCHS", 1))
    trainer.train()
    assert trainer.iter == 6
    assert trainer.cfg.SOLVER.CHECKPOINT_PERIOD == 3


def test_precise_statistics_are_those_of_the_averaged_weights(make_cfg: MakeCfg) -> None:
    seen: list[list[torch.Tensor]] = []

    class Trainer(DefaultTrainer):
        @classmethod
        def test(cls, cfg: CfgNode, model: Any, evaluators: Any = None) -> dict[str, Any]:
            seen.append([b.clone() for b in model.buffers() if b.is_floating_point()])
            return super().test(cfg, model, evaluators)

    averaged = ("MODEL.EMA.ENABLED", True, "OUTPUT_DIR")
    ends = []
    for precise in (False, True):
        folder = str(make_cfg().OUTPUT_DIR) + str(precise)
        trainer = Trainer(make_cfg(*averaged, folder, "TEST.PRECISE_BN.ENABLED", precise))
        trainer.train()
        ends.append(weights(trainer))
    assert any(not torch.equal(a, b) for a, b in zip(*seen, strict=True))
    assert all(torch.equal(a, b) for a, b in zip(*ends, strict=True))


def test_the_best_may_be_the_smallest(make_cfg: MakeCfg, tmp_path: Path) -> None:
    best = ("TEST.BEST_METRIC", "val/total_loss", "TEST.BEST_MODE", "min", "TEST.EVAL_PERIOD", 1)
    trainer = DefaultTrainer(make_cfg("DATASETS.VAL", ("tiny_other",), *best))
    trainer.train()
    values = [v for v, _ in trainer.storage.history("val/total_loss").values()]
    state = trainer.state_dict()["hooks"]["BestCheckpointer"]
    assert state["best"] == min(values) < max(values)


def test_a_second_run_of_a_trainer_has_a_best_of_its_own(make_cfg: MakeCfg) -> None:
    best = ("TEST.BEST_METRIC", "val/total_loss", "TEST.BEST_MODE", "min", "TEST.EVAL_PERIOD", 1)
    trainer = DefaultTrainer(make_cfg("DATASETS.VAL", ("tiny_other",), *best))
    hook = next(hook for hook in trainer._hooks if isinstance(hook, BestCheckpointer))
    trainer.train()
    # As if the first run had reached what no run reaches.
    hook._best = -1.0
    trainer.train(0, 4)
    assert hook._best != -1.0
