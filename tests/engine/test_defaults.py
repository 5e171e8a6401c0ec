import json
import logging
import pickle
import weakref
from collections.abc import Callable
from inspect import signature
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from trainkit.checkpoint.checkpointer import Checkpointer
from trainkit.config.config import CfgNode
from trainkit.config.defaults import get_cfg
from trainkit.config.lazy import LazyConfig
from trainkit.engine.defaults import DefaultTrainer
from trainkit.engine.hook_base import HookBase
from trainkit.engine.hooks.callback import CallbackHook
from trainkit.engine.hooks.checkpoint import PeriodicCheckpointer
from trainkit.engine.hooks.writer import PeriodicWriter
from trainkit.engine.non_finite import MAX_ROLLBACKS, NonFiniteError
from trainkit.engine.train_loop import AMPTrainer, SimpleTrainer
from trainkit.evaluation.classification import ClassificationEvaluator
from trainkit.evaluation.evaluator import DatasetEvaluator
from trainkit.evaluation.testing import ResultsMismatchError
from trainkit.utils.errors import CheckpointError, ConfigError, UnknownNameError

MakeCfg = Callable[..., CfgNode]


def weights(trainer: SimpleTrainer) -> list[torch.Tensor]:
    return [p.detach().clone() for p in trainer.model.parameters()]


def same(found: list[torch.Tensor], expected: list[torch.Tensor]) -> bool:
    return all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))


def stopping_at(iteration: int, finished: bool = False) -> HookBase:
    def stop(trainer: SimpleTrainer) -> None:
        if trainer.iter == iteration:
            trainer.request_stop("test", finished)

    return CallbackHook(before_step=stop)


def resumed(cfg: CfgNode) -> DefaultTrainer:
    trainer = DefaultTrainer(cfg)
    trainer.resume_or_load(resume=True)
    return trainer


def test_training_returns_the_results_and_leaves_its_files(
    make_cfg: MakeCfg, tmp_path: Path
) -> None:
    trainer = DefaultTrainer(make_cfg("TEST.BEST_METRIC", "classification/top1"))
    results = trainer.train()
    assert 0 <= results["classification"]["top1"] <= 1
    assert {"model_0000001.pth", "model_best.pth", "model_final.pth", "metrics.json"} <= {
        path.name for path in tmp_path.iterdir()
    }
    lines = [json.loads(line) for line in (tmp_path / "metrics.json").read_text().splitlines()]
    assert [line["iteration"] for line in lines] == [3, 4]
    assert lines[1]["classification/top1"] == results["classification"]["top1"]


def test_several_test_sets_give_results_by_name(make_cfg: MakeCfg) -> None:
    cfg = make_cfg("DATASETS.TEST", ("tiny_test", "tiny_other"), "SOLVER.MAX_ITER", 1)
    results = DefaultTrainer(cfg).train()
    assert results.keys() == {"tiny_test", "tiny_other"}
    assert "top1" in results["tiny_other"]["classification"]


@pytest.mark.parametrize("tolerance", [0.5, 0.001])
def test_expected_results_are_checked(make_cfg: MakeCfg, tolerance: float) -> None:
    row = ["classification", "top1", 0.5 if tolerance == 0.5 else 2.0, tolerance]
    trainer = DefaultTrainer(make_cfg("TEST.EXPECTED_RESULTS", [row]))
    if tolerance == 0.5:
        assert trainer.train()
        return
    with pytest.raises(ResultsMismatchError, match=r"classification/top1 is .* expected 2.0"):
        trainer.train()


def test_d29_precision_metrics_ddp_and_writer_follow_the_config(
    make_cfg: MakeCfg, monkeypatch: pytest.MonkeyPatch
) -> None:
    ddp: dict[str, Any] = {}

    def note(model: nn.Module, **arguments: Any) -> nn.Module:
        ddp.update(arguments)
        return model

    monkeypatch.setattr("trainkit.engine.defaults.create_ddp_model", note)
    cfg = make_cfg(
        *("SOLVER.PRECISION", "bf16", "SOLVER.ACCUMULATE", 2, "GATHER_METRIC_PERIOD", 7),
        *("SOLVER.CLIP_GRADIENTS.ENABLED", True, "SOLVER.CLIP_GRADIENTS.CLIP_TYPE", "value"),
        *("DDP.FIND_UNUSED_PARAMETERS", True, "DDP.BUCKET_CAP_MB", 5, "LOG_PERIOD", 3),
    )
    trainer = DefaultTrainer(cfg)
    assert (trainer.precision, trainer.accumulate) == ("bf16", 2)
    assert (trainer.gather_metric_period, trainer.seed, trainer.max_iter) == (7, 5, 4)
    clipper: Any = trainer.grad_clipper
    assert clipper.clip_type == "value"
    assert (ddp["find_unused_parameters"], ddp["bucket_cap_mb"]) == (True, 5)
    known = {"fp16_compression", "broadcast_buffers"}
    assert ddp.keys() - known <= signature(DistributedDataParallel).parameters.keys()
    assert next(h for h in trainer._hooks if isinstance(h, PeriodicWriter))._period == 3


def test_limit_batches_runs_dry(make_cfg: MakeCfg) -> None:
    seen: list[int] = []

    class Counting(DefaultTrainer):
        @classmethod
        def build_evaluator(cls, cfg: CfgNode, dataset_name: str) -> DatasetEvaluator:
            class Evaluator(DatasetEvaluator):
                def process(self, inputs: Any, outputs: Any) -> None:
                    seen.append(len(inputs["label"]))

                def evaluate(self) -> dict[str, Any]:
                    return {}

            return Evaluator()

    trainer = Counting(make_cfg("LIMIT_BATCHES", 2))
    trainer.train()
    assert (trainer.iter, trainer.max_iter) == (2, 2)
    assert seen == [5, 5]


def test_d45_two_trainers_of_one_seed_are_equal_and_of_another_are_not(make_cfg: MakeCfg) -> None:
    trainers = [DefaultTrainer(make_cfg("SEED", seed)) for seed in (5, 5, 6)]
    for trainer in trainers:
        trainer.train()
        torch.rand(7)
    assert same(weights(trainers[0]), weights(trainers[1]))
    assert not same(weights(trainers[0]), weights(trainers[2]))


@pytest.mark.parametrize("seed", [5, -1])
def test_an_interrupted_run_goes_on_as_the_unbroken_one(
    make_cfg: MakeCfg, tmp_path: Path, seed: int
) -> None:
    first = DefaultTrainer(make_cfg("SEED", seed))
    first.register_hooks([stopping_at(1)])
    # Nothing was evaluated.
    assert first.train() == {}
    trainer = resumed(make_cfg("SEED", seed))
    assert (trainer.start_iter, trainer.seed) == (2, first.seed)
    trainer.train()
    unbroken = DefaultTrainer(make_cfg("SEED", first.seed, "OUTPUT_DIR", str(tmp_path / "other")))
    unbroken.train()
    assert same(weights(trainer), weights(unbroken))


def test_a_negative_seed_is_drawn_and_stands_in_the_config(
    make_cfg: MakeCfg, tmp_path: Path
) -> None:
    cfg = make_cfg("SEED", -1)
    trainers = [DefaultTrainer(cfg) for _ in range(2)]
    seeds = [trainer.seed for trainer in trainers]
    assert seeds[0] != seeds[1]
    assert [trainer.cfg.SEED for trainer in trainers] == seeds
    assert cfg.SEED == -1
    trainers[0].train()
    data = torch.load(tmp_path / "model_final.pth", weights_only=True)
    assert data["trainer"]["seed"] == seeds[0]


def test_d21_resuming_a_finished_run_does_nothing_and_says_so(
    make_cfg: MakeCfg, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    DefaultTrainer(make_cfg()).train()
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir() if path.is_file()}
    trainer = resumed(make_cfg())
    iteration = trainer.iter
    with caplog.at_level(logging.INFO):
        assert trainer.train() == {}
    assert f"The run in {tmp_path} is finished: it has done 4 of 4 iterations" in caplog.text
    assert trainer.iter == iteration == 3
    assert {p.name: p.read_bytes() for p in tmp_path.iterdir() if p.is_file()} == before


def test_a_finished_run_goes_on_when_max_iter_is_raised(make_cfg: MakeCfg) -> None:
    DefaultTrainer(make_cfg()).train()
    trainer = resumed(make_cfg("SOLVER.MAX_ITER", 6))
    assert trainer.train()
    assert trainer.iter == trainer.max_iter == 6


def test_a_run_that_failed_in_its_final_evaluation_evaluates_again(make_cfg: MakeCfg) -> None:
    class Failing(DefaultTrainer):
        @classmethod
        def build_evaluator(cls, cfg: CfgNode, dataset_name: str) -> DatasetEvaluator:
            raise RuntimeError("in evaluation")

    with pytest.raises(RuntimeError, match="in evaluation"):
        Failing(make_cfg()).train()
    trainer = resumed(make_cfg())
    assert trainer.start_iter == 4
    assert "classification" in trainer.train()


def test_a_run_interrupted_in_its_last_step_is_not_finished(make_cfg: MakeCfg) -> None:
    first = DefaultTrainer(make_cfg())
    first.register_hooks([stopping_at(3)])
    assert first.train() == {}
    trainer = resumed(make_cfg())
    assert trainer.start_iter == 4
    assert "classification" in trainer.train()
    assert resumed(make_cfg()).train() == {}


def test_a_run_that_ended_early_is_finished(make_cfg: MakeCfg) -> None:
    first = DefaultTrainer(make_cfg())
    first.register_hooks([stopping_at(1, finished=True)])
    assert "classification" in first.train()
    trainer = resumed(make_cfg())
    assert trainer.train() == {}
    assert resumed(make_cfg("SOLVER.MAX_ITER", 5)).train() != {}


def test_resume_without_a_checkpoint_starts_anew(make_cfg: MakeCfg) -> None:
    trainer = resumed(make_cfg())
    assert trainer.start_iter == 0
    trainer.train()
    assert trainer.iter == 4


def test_a_new_run_over_an_old_one_is_warned_of(
    make_cfg: MakeCfg, caplog: pytest.LogCaptureFixture
) -> None:
    DefaultTrainer(make_cfg()).train()
    trainer = DefaultTrainer(make_cfg())
    with caplog.at_level(logging.WARNING):
        trainer.resume_or_load(resume=False)
    assert "holds checkpoints of an earlier run" in caplog.text
    assert trainer.start_iter == 0


def test_another_optimizer_implementation_is_said(
    make_cfg: MakeCfg, caplog: pytest.LogCaptureFixture
) -> None:
    first = DefaultTrainer(make_cfg())
    first.checkpointer.facts["optimizer"] = "SGD, hand-made"
    first.train()
    with caplog.at_level(logging.WARNING):
        resumed(make_cfg())
    assert "saved by a SGD, hand-made optimizer" in caplog.text


def test_train_may_be_called_twice(make_cfg: MakeCfg) -> None:
    trainer = DefaultTrainer(make_cfg())
    trainer.train()
    rates = trainer.storage.history("lr").values()
    assert "classification" in trainer.train()
    assert trainer.iter == 4
    assert trainer.storage.history("lr").values() == rates


def test_every_build_method_may_be_overridden(make_cfg: MakeCfg) -> None:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.ones(3))

        def forward(self, batch: torch.Tensor) -> Any:
            return {"loss": (self.weight * batch).sum()} if self.training else self.weight

    class Own(DefaultTrainer):
        @classmethod
        def build_model(cls, cfg: CfgNode) -> nn.Module:
            return Net()

        @classmethod
        def build_optimizer(cls, cfg: CfgNode, model: nn.Module) -> torch.optim.Optimizer:
            return torch.optim.Adam(model.parameters(), lr=0.1)

        @classmethod
        def build_lr_scheduler(cls, cfg: CfgNode, optimizer: torch.optim.Optimizer) -> Any:
            return torch.optim.lr_scheduler.ConstantLR(optimizer, factor=1.0)

        @classmethod
        def build_train_loader(cls, cfg: CfgNode) -> Any:
            return [torch.ones(3)]

        @classmethod
        def test(cls, cfg: CfgNode, model: nn.Module, evaluators: Any = None) -> dict[str, Any]:
            return {"sum": model(None).sum().item() if not model.training else -1.0}

        def build_hooks(self) -> list[HookBase | None]:
            return [*super().build_hooks(), CallbackHook(after_step=lambda t: seen.append(t.iter))]

    seen: list[int] = []
    assert Own(make_cfg()).train() == {"sum": -1.0}
    assert seen == [0, 1, 2, 3]


def test_d01_after_backward_hooks_fire(make_cfg: MakeCfg) -> None:
    trainer = DefaultTrainer(make_cfg())
    fired: list[bool] = []

    def look(trainer: SimpleTrainer) -> None:
        fired.append(all(p.grad is not None for p in trainer.model.parameters()))

    trainer.register_hooks([CallbackHook(after_backward=look)])
    trainer.train()
    assert fired == [True] * 4


def test_an_overridden_run_step_may_call_that_of_the_inner_trainer(make_cfg: MakeCfg) -> None:
    class Wrapping(DefaultTrainer):
        def run_step(self) -> None:
            self._trainer.iter = self.iter
            self._trainer.run_step()
            steps.append(self.iter)

    steps: list[int] = []
    backwards: list[int] = []
    wrapping, plain = Wrapping(make_cfg()), DefaultTrainer(make_cfg())
    wrapping.register_hooks([CallbackHook(after_backward=lambda t: backwards.append(t.iter))])
    assert wrapping._trainer.model is wrapping.model
    wrapping.train()
    plain.train()
    assert steps == backwards == [0, 1, 2, 3]
    assert same(weights(wrapping), weights(plain))


class Detectron2Style(DefaultTrainer):
    """As downstream code writes it: without `DefaultTrainer.__init__`, with an inner trainer."""

    def __init__(self, cfg: CfgNode) -> None:
        super(DefaultTrainer, self).__init__()
        model = self.build_model(cfg)
        optimizer = self.build_optimizer(cfg, model)
        data_loader = self.build_train_loader(cfg)
        trainer_class = AMPTrainer if cfg.SOLVER.PRECISION == "fp16" else SimpleTrainer
        self._trainer = trainer_class(model, data_loader, optimizer)
        self.scheduler = self.build_lr_scheduler(cfg, optimizer)
        self.checkpointer = Checkpointer(model, cfg.OUTPUT_DIR, trainer=weakref.proxy(self))
        self.start_iter = 0
        self.max_iter = cfg.SOLVER.MAX_ITER
        self.cfg = cfg
        self.register_hooks(self.build_hooks())


@pytest.mark.parametrize("precision", ["fp32", "fp16"])
def test_an_assigned_inner_trainer_makes_the_step_and_shares_the_hooks(
    make_cfg: MakeCfg, precision: str
) -> None:
    trainer = Detectron2Style(make_cfg("SOLVER.PRECISION", precision))
    inner = trainer._trainer
    assert type(inner) is (AMPTrainer if precision == "fp16" else SimpleTrainer)
    assert trainer.model is inner.model
    calls: list[tuple[str, int]] = []
    trainer.register_hooks(
        [
            CallbackHook(
                after_backward=lambda t: calls.append(("backward", t.iter)),
                after_step=lambda t: calls.append(("step", t.iter)),
            )
        ]
    )
    before = weights(trainer)
    assert "classification" in trainer.train()
    assert calls == [(name, i) for i in range(4) for name in ("backward", "step")]
    assert not same(weights(trainer), before)
    assert trainer.storage.history("total_loss").values()[-1][1] == 3


def test_an_assigned_inner_trainer_resumes(make_cfg: MakeCfg, tmp_path: Path) -> None:
    first = Detectron2Style(make_cfg())
    first.register_hooks([stopping_at(1)])
    assert first.train() == {}
    trainer = Detectron2Style(make_cfg())
    trainer.resume_or_load()
    assert trainer.start_iter == 2
    assert "classification" in trainer.train()


def test_a_bad_step_of_an_assigned_inner_trainer_raises(make_cfg: MakeCfg) -> None:
    trainer = Detectron2Style(make_cfg("SOLVER.BASE_LR", 1e30, "SOLVER.WARMUP_ITERS", 0))
    with pytest.raises(FloatingPointError, match="Iteration"):
        trainer.train(max_iter=100)


def test_a_checkpoint_of_detectron2_is_read(make_cfg: MakeCfg, tmp_path: Path) -> None:
    first = DefaultTrainer(make_cfg())
    first.register_hooks([stopping_at(1)])
    first.train()
    momentum = first.optimizer.state_dict()
    data = {
        "model": first.model.state_dict(),
        "iteration": 1,
        "trainer": {
            "iteration": 1,
            "hooks": {"LRScheduler": first.scheduler.state_dict()},
            "_trainer": {"iteration": 0, "hooks": {}, "optimizer": momentum},
        },
    }
    folder = tmp_path / "old"
    folder.mkdir()
    torch.save(data, folder / "model_0000001.pth")
    (folder / "last_checkpoint").write_text("model_0000001.pth")
    trainer = resumed(make_cfg("OUTPUT_DIR", str(folder)))
    assert (trainer.iter, trainer.start_iter) == (1, 2)
    assert same(weights(trainer), weights(first))
    loaded = trainer.optimizer.state_dict()["state"][0]["momentum_buffer"]
    assert torch.equal(loaded, momentum["state"][0]["momentum_buffer"])
    assert trainer.scheduler.last_epoch == 2
    trainer.train()
    assert trainer.iter == 4


def test_build_hooks_saves_before_it_evaluates(make_cfg: MakeCfg) -> None:
    hooks = DefaultTrainer(make_cfg("CHECKPOINT.MAX_TO_KEEP", 0)).build_hooks()
    (checkpointer,) = (hook for hook in hooks if isinstance(hook, PeriodicCheckpointer))
    assert checkpointer._periodic.max_to_keep is None


@pytest.mark.parametrize("fails", [False, True])
def test_a_default_trainer_dies_by_reference_count(
    make_cfg: MakeCfg, no_gc: Any, fails: bool
) -> None:
    # pytest keeps log records, which hold the exception and so the frames.
    logging.disable()
    try:
        trainer = DefaultTrainer(make_cfg("TEST.BEST_METRIC", "classification/top1"))

        def fail(trainer: SimpleTrainer) -> None:
            if fails and trainer.iter == 2:
                raise RuntimeError("now")

        trainer.register_hooks([CallbackHook(after_backward=fail)])
        failed = False
        try:
            trainer.train()
        except RuntimeError:
            failed = True
        assert failed == fails
        alive = no_gc(trainer.model, trainer.optimizer, trainer, trainer.checkpointer)
        del trainer
        assert [ref() for ref in alive] == [None] * 4
    finally:
        logging.disable(logging.NOTSET)


def test_a_new_run_in_a_used_folder_is_not_taken_for_the_old_one(
    make_cfg: MakeCfg, tmp_path: Path
) -> None:
    DefaultTrainer(make_cfg()).train()
    opts = ["SOLVER.BASE_LR", 0.02, "SOLVER.CHECKPOINT_PERIOD", 0, "LOG_PERIOD", 1]
    new = DefaultTrainer(make_cfg(*opts))
    new.resume_or_load(resume=False)

    def fail(trainer: DefaultTrainer) -> None:
        if trainer.iter == 2:
            raise OSError("killed before its first checkpoint")

    class Starting(HookBase):
        """Has nothing to save before it was started."""

        def before_train(self) -> None:
            self.count = 0

        def state_dict(self) -> dict[str, Any]:
            return {"count": self.count}

    new.register_hooks([CallbackHook(before_step=fail), Starting()])
    with pytest.raises(OSError, match="killed"):
        new.train()
    earlier = (tmp_path / "metrics.previous.json").read_bytes()
    resumed = DefaultTrainer(make_cfg("SOLVER.BASE_LR", 0.02))
    resumed.resume_or_load(resume=True)
    assert resumed.start_iter == 0
    assert resumed.optimizer.param_groups[0]["initial_lr"] == 0.02
    resumed.train()
    # What the earlier run wrote is still aside, and not what the killed one did.
    assert (tmp_path / "metrics.previous.json").read_bytes() == earlier
    lines = (tmp_path / "metrics.json").read_text().splitlines()
    iterations = [json.loads(line)["iteration"] for line in lines]
    assert iterations == sorted(set(iterations))


def poisoning(iteration: int, times: int = 1) -> HookBase:
    """Makes the gradients of an iteration NaN, for so many times."""
    left = [times]

    def poison(trainer: DefaultTrainer) -> None:
        if trainer.iter == iteration and left[0] > 0:
            left[0] -= 1
            for parameter in trainer.model.parameters():
                assert parameter.grad is not None
                parameter.grad.fill_(torch.nan)

    return CallbackHook(after_backward=poison)


@pytest.mark.parametrize(("bad", "back_to"), [(0, 0), (1, 0), (3, 2)])
def test_a_run_goes_back_to_its_last_checkpoint_and_passes_a_bad_batch_over(
    make_cfg: MakeCfg, caplog: pytest.LogCaptureFixture, bad: int, back_to: int
) -> None:
    trainer = DefaultTrainer(make_cfg("SOLVER.NON_FINITE", "rollback"))
    starts: list[int] = []
    trainer.register_hooks(
        [poisoning(bad), CallbackHook(before_train=lambda t: starts.append(t.start_iter))]
    )
    with caplog.at_level(logging.WARNING):
        results = trainer.train()
    assert starts == [0, back_to]
    assert f"Rolled back from iteration {bad} to {back_to}" in caplog.text
    assert "classification" in results
    assert trainer.checkpointer.finished_iteration() == 3
    # The data set has 12 images, and a batch 4 of them.
    epoch, offset = divmod(4 * bad, 12)
    end_epoch, end_offset = divmod(4 * (bad + 1), 12)
    state = trainer.data_loader.state_dict()  # type: ignore[attr-defined]  # a TrainLoader
    assert state["passed_over"] == [[epoch, offset, end_epoch, end_offset]]
    assert (state["epoch"], state["offset"]) == divmod(4 * 5, 12)


def test_a_run_that_goes_back_in_vain_gives_up(
    make_cfg: MakeCfg, caplog: pytest.LogCaptureFixture
) -> None:
    trainer = DefaultTrainer(make_cfg("SOLVER.NON_FINITE", "rollback"))
    trainer.register_hooks([poisoning(3, times=100)])
    with pytest.raises(NonFiniteError, match="Iteration 3 on rank 0"):
        trainer.train()
    assert caplog.text.count("Rolled back from iteration 3 to 2") == MAX_ROLLBACKS
    assert f"Rolled back {MAX_ROLLBACKS} times to one checkpoint: giving up" in caplog.text
    assert trainer.checkpointer.finished_iteration() is None


def test_only_the_policy_that_says_so_goes_back(make_cfg: MakeCfg) -> None:
    raising = DefaultTrainer(make_cfg())
    raising.register_hooks([poisoning(3)])
    with pytest.raises(NonFiniteError, match="Iteration 3 on rank 0"):
        raising.train()
    skipping = DefaultTrainer(make_cfg("SOLVER.NON_FINITE", "skip"))
    skipping.register_hooks([poisoning(3)])
    skipping.train()
    assert skipping.storage.history("skipped_steps").values() == [(1.0, 3)]


def test_going_back_needs_a_loader_that_can_pass_samples_over(make_cfg: MakeCfg) -> None:
    class PlainLoader(DefaultTrainer):
        @classmethod
        def build_train_loader(cls, cfg: CfgNode) -> Any:
            return [1, 2]

    with pytest.raises(ConfigError, match=r"'rollback', but the data loader \(list\) cannot pass"):
        PlainLoader(make_cfg("SOLVER.NON_FINITE", "rollback"))


def test_a_second_run_in_the_folder_is_refused_while_the_first_one_trains(
    make_cfg: MakeCfg,
) -> None:
    first, second = DefaultTrainer(make_cfg()), DefaultTrainer(make_cfg())
    refused: list[str] = []

    def train_too(trainer: DefaultTrainer) -> None:
        with pytest.raises(ConfigError, match="is in use by another trainer of this process") as e:
            second.train()
        refused.append(str(e.value))

    first.register_hooks([CallbackHook(before_train=train_too)])
    first.train()
    assert len(refused) == 1
    second.train()


def test_an_unknown_test_data_set_is_found_at_start(make_cfg: MakeCfg) -> None:
    with pytest.raises(UnknownNameError, match=r"DATASETS\.TEST\) 'tiny_tst'.*'tiny_test'"):
        DefaultTrainer(make_cfg("DATASETS.TEST", ("tiny_tst",)))


def test_an_impossible_value_is_found_at_start(make_cfg: MakeCfg) -> None:
    with pytest.raises(ConfigError, match=r"MODEL\.DROPOUT is 2\.0"):
        DefaultTrainer(make_cfg("MODEL.DROPOUT", 2.0))


def test_the_config_is_written_with_the_seed_in_use(make_cfg: MakeCfg, tmp_path: Path) -> None:
    trainer = DefaultTrainer(make_cfg("SEED", -1))
    trainer.train()
    written = get_cfg()
    written.merge_from_file(str(tmp_path / "config.yaml"))
    assert written.SEED == trainer.seed == trainer.cfg.SEED >= 0


def test_a_resumed_run_takes_over_a_drawn_seed_silently(
    make_cfg: MakeCfg, caplog: pytest.LogCaptureFixture
) -> None:
    first = DefaultTrainer(make_cfg("SEED", -1))
    first.train()
    resumed = DefaultTrainer(make_cfg("SEED", -1, "SOLVER.MAX_ITER", 6))
    with caplog.at_level(logging.WARNING):
        resumed.resume_or_load(resume=True)
    assert "seed" not in caplog.text
    assert resumed.seed == resumed.cfg.SEED == first.seed


def test_old_pickles_load_only_where_the_config_trusts_them(
    make_cfg: MakeCfg, tmp_path: Path
) -> None:
    weights = DefaultTrainer(make_cfg()).model.state_dict()
    path = tmp_path / "old.pkl"
    path.write_bytes(pickle.dumps({"model": {k: (v + 1).numpy() for k, v in weights.items()}}))
    opts = ("MODEL.WEIGHTS", str(path))
    with pytest.raises(CheckpointError, match=r"MODEL\.TRUST_PICKLE"):
        DefaultTrainer(make_cfg(*opts)).resume_or_load(resume=False)
    trainer = DefaultTrainer(make_cfg(*opts, "MODEL.TRUST_PICKLE", True))
    trainer.resume_or_load(resume=False)
    assert all(torch.equal(v, weights[k] + 1) for k, v in trainer.model.state_dict().items())


def test_d51_a_lazy_config_is_taken_as_it_is(tmp_path: Path) -> None:
    cfg = LazyConfig.load(Path(__file__).parents[2] / "configs" / "lazy" / "fashion_mnist.py")
    cfg.train.update(max_iter=2, output_dir=str(tmp_path), device="cpu")
    cfg.model.backbone.update(widths=[4], blocks=[1])
    trainer = DefaultTrainer(cfg)
    assert trainer.train()["classification"]["top1"] > 0
    assert len(trainer.storage.history("total_loss").values()) == 2


@pytest.mark.parametrize("has_own_init", [False, True])
def test_an_assigned_trainer_clips_and_judges_as_the_config_says(
    make_cfg: MakeCfg, has_own_init: bool
) -> None:
    clip = ("SOLVER.CLIP_GRADIENTS.ENABLED", True, "SOLVER.CLIP_GRADIENTS.CLIP_VALUE", 0.01)
    cfg = make_cfg(*clip, "SOLVER.NON_FINITE", "skip")
    trainer = Detectron2Style(cfg) if has_own_init else DefaultTrainer(cfg)
    if not has_own_init:
        trainer._trainer = SimpleTrainer(trainer.model, trainer.data_loader, trainer.optimizer)
    norms: list[float] = []

    def take(trainer: SimpleTrainer) -> None:
        grads = [p.grad for p in trainer.model.parameters() if p.grad is not None]
        norms.append(torch.nn.utils.get_total_norm(grads).item())

    trainer.register_hooks([CallbackHook(after_step=take)])
    trainer.train()
    assert norms == pytest.approx([0.01] * 4, rel=1e-3)
    assert trainer._guard.policy == "skip"


def test_an_assigned_trainer_resumes_with_a_seed_that_was_drawn(
    make_cfg: MakeCfg, tmp_path: Path
) -> None:
    def assigned(cfg: CfgNode) -> DefaultTrainer:
        trainer = DefaultTrainer(cfg)
        trainer._trainer = SimpleTrainer(trainer.model, trainer.data_loader, trainer.optimizer)
        trainer.resume_or_load(resume=True)
        return trainer

    cfg = make_cfg("SEED", -1, "MODEL.DROPOUT", 0.5)
    assigned(cfg).train()
    (tmp_path / "model_final.pth").unlink()
    (tmp_path / "finished.json").unlink()
    (tmp_path / "model_0000003.pth").unlink()
    ends = []
    for _ in range(2):
        trainer = assigned(cfg)
        assert trainer.start_iter == 2
        trainer.train()
        ends.append(weights(trainer))
        for name in ("model_final.pth", "finished.json", "model_0000003.pth"):
            (tmp_path / name).unlink()
    assert same(*ends)


def test_a_loader_of_other_micro_batches_is_refused(make_cfg: MakeCfg) -> None:
    trainer = DefaultTrainer(make_cfg("SOLVER.ACCUMULATE", 2))
    with pytest.raises(ConfigError, match=r"yields 2 micro-batches.* takes 1 .*accumulate=2"):
        SimpleTrainer(trainer.model, trainer.data_loader, trainer.optimizer)


def test_an_evaluator_that_is_not_there_evaluates_nothing(
    make_cfg: MakeCfg, caplog: pytest.LogCaptureFixture
) -> None:
    class Trainer(DefaultTrainer):
        @classmethod
        def build_evaluator(cls, cfg: CfgNode, dataset_name: str) -> DatasetEvaluator:
            raise NotImplementedError

    trainer = Trainer(make_cfg())
    assert trainer.train() == {}
    assert "build_evaluator has none for tiny_test" in caplog.text
    with pytest.raises(ConfigError, match="2 evaluators cannot judge the 1 data sets"):
        Trainer.test(trainer.cfg, trainer.model, [ClassificationEvaluator(["a"])] * 2)


def test_an_interrupted_run_has_no_results(make_cfg: MakeCfg) -> None:
    trainer = DefaultTrainer(make_cfg("TEST.EVAL_PERIOD", 1))
    trainer.register_hooks([stopping_at(2)])
    assert trainer.train() == {}


def test_a_compiled_model_is_trained_and_evaluated(make_cfg: MakeCfg) -> None:
    class Trainer(DefaultTrainer):
        @classmethod
        def build_model(cls, cfg: CfgNode) -> nn.Module:
            compiled: Any = torch.compile(super().build_model(cfg), backend="eager")
            return compiled  # type: ignore[no-any-return]  # a module

    trainer = Trainer(make_cfg("MODEL.EMA.ENABLED", True))
    assert trainer.train()["classification"]["top1"] >= 0
