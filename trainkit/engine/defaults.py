"""`DefaultTrainer`: model, optimizer, data, schedule, hooks and evaluation from a config."""

import logging
import weakref
from collections import Counter
from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader

from trainkit.checkpoint.checkpointer import Checkpointer
from trainkit.checkpoint.lock import hold_run_folder
from trainkit.config.checks import check_cfg
from trainkit.config.config import CfgNode
from trainkit.data.build import TrainLoader, build_test_loader, build_train_loader
from trainkit.data.catalog import DatasetCatalog, MetadataCatalog
from trainkit.engine.hook_base import HookBase
from trainkit.engine.hooks.checkpoint import BestCheckpointer, PeriodicCheckpointer
from trainkit.engine.hooks.evaluation import EvalHook
from trainkit.engine.hooks.lr_scheduler import LRScheduler
from trainkit.engine.hooks.timer import IterationTimer
from trainkit.engine.hooks.writer import PeriodicWriter
from trainkit.engine.non_finite import MAX_ROLLBACKS, NonFiniteError
from trainkit.engine.preemption import leave
from trainkit.engine.setup import (
    create_ddp_model,
    default_argument_parser,
    default_setup,
    default_writers,
    write_config,
)
from trainkit.engine.step_view import StepView
from trainkit.engine.train_loop import SimpleTrainer
from trainkit.evaluation.classification import ClassificationEvaluator
from trainkit.evaluation.evaluator import DatasetEvaluator, inference_on_dataset
from trainkit.evaluation.testing import print_csv_format, verify_results
from trainkit.modeling.build import build_model
from trainkit.solver.build import build_lr_scheduler, build_optimizer, optimizer_implementation
from trainkit.solver.clip import build_grad_clipper
from trainkit.utils import comm
from trainkit.utils.device import autocast, resolve_device
from trainkit.utils.env import seed_all_rng
from trainkit.utils.errors import UnknownNameError
from trainkit.utils.events.writer import EventWriter
from trainkit.utils.stop_signals import stop_signals, stopping

__all__ = [
    "DefaultTrainer",
    "create_ddp_model",
    "default_argument_parser",
    "default_setup",
    "default_writers",
]

logger = logging.getLogger(__name__)


class DefaultTrainer(SimpleTrainer):
    """Trains what a config describes.

    Override the `build_*` class methods to bring a model, data, optimizer or evaluator of your own,
    and `build_hooks` to bring hooks. Everything else reads the config no more.

    Args:
        cfg: The whole config. A negative SEED is replaced by one that is drawn.

    Attributes:
        cfg: The config, frozen as it was given, with the seed in use.
        scheduler: The schedule of the learning rate.
        checkpointer: Saves to and loads from `OUTPUT_DIR`.
    """

    _assigned_trainer: SimpleTrainer | None = None
    _last_results: dict[str, Any]
    _is_seed_drawn = False

    def __init__(self, cfg: CfgNode) -> None:
        check_cfg(cfg)
        self._check_test_names(cfg)
        self._is_seed_drawn = cfg.SEED < 0
        if self._is_seed_drawn:
            cfg = _with_seed(cfg, comm.shared_random_seed())
        # Every rank draws the same initial weights.
        seed_all_rng(cfg.SEED)
        model = self.build_model(cfg).to(resolve_device(cfg.MODEL.DEVICE))
        optimizer = self.build_optimizer(cfg, model)
        super().__init__(
            create_ddp_model(model, broadcast_buffers=False),
            self.build_train_loader(cfg),
            optimizer,
            cfg.GATHER_METRIC_PERIOD,
            precision=cfg.SOLVER.PRECISION,
            accumulate=cfg.SOLVER.ACCUMULATE,
            grad_clipper=build_grad_clipper(cfg),
            seed=cfg.SEED,
            non_finite=cfg.SOLVER.NON_FINITE,
        )
        self.cfg = cfg
        self.scheduler = self.build_lr_scheduler(cfg, optimizer)
        self.checkpointer = Checkpointer(
            model, cfg.OUTPUT_DIR, trust_pickle=cfg.MODEL.TRUST_PICKLE, trainer=weakref.proxy(self)
        )
        self._num_rollbacks: Counter[int] = Counter()
        if cfg.SOLVER.NON_FINITE == "rollback":
            self._batches.check_can_pass_over()
        self._note_implementation()
        self.max_iter = min(cfg.SOLVER.MAX_ITER, cfg.LIMIT_BATCHES or cfg.SOLVER.MAX_ITER)
        self.register_hooks(self.build_hooks())

    def resume_or_load(self, resume: bool = True) -> None:
        """Goes on from the newest valid checkpoint, or starts from `MODEL.WEIGHTS`.

        Args:
            resume: Whether to look for a checkpoint in `OUTPUT_DIR`. If there is none, and without
                `resume`, only weights are loaded, from `MODEL.WEIGHTS` if that is set.

        Raises:
            CheckpointError: If every checkpoint is damaged, or one is of another model.
        """
        has_checkpoint = self.checkpointer.has_checkpoint()
        self.checkpointer.resume_or_load(self.cfg.MODEL.WEIGHTS, resume=resume)
        if resume and has_checkpoint:
            self.start_iter = self.iter + 1
            self._note_implementation()
        elif has_checkpoint:
            logger.warning(
                "OUTPUT_DIR %s holds checkpoints of an earlier run, which this run starts to "
                "replace. To go on with that run, pass --resume.",
                self.cfg.OUTPUT_DIR,
            )

    def train(self, start_iter: int | None = None, max_iter: int | None = None) -> dict[str, Any]:
        """Trains to the end, evaluates, and checks `TEST.EXPECTED_RESULTS`.

        Args:
            start_iter: The first iteration; where `resume_or_load` left it by default.
            max_iter: The end; the config's by default.

        Returns:
            The results of the final evaluation. Resuming a finished run does nothing and returns
            an empty dict.

        Raises:
            ResultsMismatchError: If the results are not the expected ones.
        """
        start_iter = self.start_iter if start_iter is None else start_iter
        max_iter = self.max_iter if max_iter is None else max_iter
        if start_iter > 0 and self._is_finished(start_iter, max_iter):
            logger.info(
                "The run in %s is finished: it has done %d of %d iterations. To train longer, "
                "raise SOLVER.MAX_ITER; to evaluate, pass --resume --eval-only.",
                self.cfg.OUTPUT_DIR,
                start_iter,
                max_iter,
            )
            return {}
        self._last_results = {}
        with hold_run_folder(self.cfg.OUTPUT_DIR), stop_signals(self.request_stop):
            self.checkpointer.clear_finished()
            write_config(self.cfg)
            while True:
                try:
                    super().train(start_iter, max_iter)
                    break
                except NonFiniteError as error:
                    if not self._roll_back(error.iteration):
                        raise
                # A signal that came meanwhile; there is nothing newer to be saved.
                leave(stopping())
                start_iter = self.start_iter
            self._finish()
        return self._last_results

    def _finish(self) -> None:
        """Marks a run that came to its end, and judges its results."""
        if self.iter == self.max_iter and self.interruption is None:
            # Only now, on every rank: until here a resume has something left to do.
            comm.synchronize()
            self.checkpointer.mark_finished(self.iter - 1)
            if self.cfg.TEST.EXPECTED_RESULTS:
                verify_results(self.cfg, self._last_results)

    def _roll_back(self, iteration: int) -> bool:
        """Goes back to the last checkpoint and passes over a batch, if that is to help."""
        place = self._metrics.places.get(iteration)
        if self.cfg.SOLVER.NON_FINITE != "rollback" or place is None:
            return False
        self.resume_or_load()
        self._num_rollbacks[self.start_iter] += 1
        if self._num_rollbacks[self.start_iter] > MAX_ROLLBACKS:
            logger.error("Rolled back %d times to one checkpoint: giving up.", MAX_ROLLBACKS)
            return False
        self._batches.pass_over(place)
        text = "Rolled back from iteration %d to %d; the samples of the former are passed over."
        logger.warning(text, iteration, self.start_iter)
        return True

    def before_train(self) -> None:
        """Calls the hooks' `before_train`, and marks where a new run in a used folder starts."""
        super().before_train()
        goes_back = self.cfg.SOLVER.NON_FINITE == "rollback"
        if self.start_iter == 0 and (goes_back or self.checkpointer.has_checkpoint()):
            # Newer than all that an earlier run left: a resume does not take that for this run.
            self.checkpointer.save("model_start", iteration=-1)

    def run_step(self) -> None:
        """One optimizer step: `SimpleTrainer`'s, or that of a trainer assigned to `_trainer`."""
        if self._assigned_trainer is None:
            super().run_step()
        else:
            for name in ("iter", "max_iter", "storage", "_step_hooks", "_must_rehearse"):
                setattr(self._assigned_trainer, name, getattr(self, name))
            self._assigned_trainer.run_step()
            self._must_rehearse = False

    @property
    def _trainer(self) -> Any:
        """This trainer's own step, as code for detectron2 expects it; see `StepView`.

        Assigning a trainer makes its step, model, data and optimizer this trainer's, and shares the
        hooks.
        """
        return self._assigned_trainer or StepView(weakref.proxy(self), SimpleTrainer.run_step)

    @_trainer.setter
    def _trainer(self, trainer: SimpleTrainer) -> None:
        for name in ("model", "optimizer", "data_loader", "_batches"):
            if hasattr(trainer, name):
                setattr(self, name, getattr(trainer, name))
        trainer._metrics, trainer._guard = self._metrics, self._guard
        if trainer.seed is None:
            trainer.seed = self.seed
        self._assigned_trainer = trainer

    def build_hooks(self) -> list[HookBase | None]:
        """Returns the default hooks, in the order in which they run."""
        cfg = self.cfg
        # A hook must not own its trainer.
        trainer = weakref.proxy(self)
        checkpointer, on_error = self.checkpointer, cfg.CHECKPOINT.ON_ERROR
        return [
            # First, so that it times the step and not the other hooks.
            IterationTimer(),
            # Before the checkpointer, which saves the rate of the next step.
            LRScheduler(),
            # Before evaluation: a crash there costs nothing, and a resume evaluates again.
            PeriodicCheckpointer(
                checkpointer,
                cfg.SOLVER.CHECKPOINT_PERIOD,
                max_to_keep=cfg.CHECKPOINT.MAX_TO_KEEP or None,
                on_error=on_error,
            ),
            EvalHook(cfg.TEST.EVAL_PERIOD, lambda: trainer._evaluate()),
            # After evaluation, whose result it judges.
            BestCheckpointer(
                cfg.TEST.EVAL_PERIOD, checkpointer, cfg.TEST.BEST_METRIC, on_error=on_error
            )
            if cfg.TEST.BEST_METRIC
            else None,
            # Last, so that it writes what all others have put.
            PeriodicWriter(self.build_writers(), cfg.LOG_PERIOD, on_error=on_error)
            if comm.is_main_process()
            else None,
        ]

    def build_writers(self) -> list[EventWriter]:
        """Returns the writers; only rank 0 asks for them."""
        return default_writers(self.cfg.OUTPUT_DIR, self.max_iter)

    @classmethod
    def build_model(cls, cfg: CfgNode) -> nn.Module:
        """Returns the model, on its device."""
        model = build_model(cfg)
        logger.info("Model:\n%s", model)
        return model

    @classmethod
    def build_optimizer(cls, cfg: CfgNode, model: nn.Module) -> torch.optim.Optimizer:
        """Returns the optimizer over the model's trainable parameters."""
        return build_optimizer(cfg, model)

    @classmethod
    def build_lr_scheduler(cls, cfg: CfgNode, optimizer: torch.optim.Optimizer) -> Any:
        """Returns the schedule of the optimizer's learning rates."""
        return build_lr_scheduler(cfg, optimizer)

    @classmethod
    def build_train_loader(cls, cfg: CfgNode) -> Iterable[Any]:
        """Returns the loader of training batches."""
        return build_train_loader(cfg)

    @classmethod
    def build_test_loader(cls, cfg: CfgNode, dataset_name: str) -> DataLoader[Any]:
        """Returns the loader of one test data set, sharded by rank."""
        return build_test_loader(cfg, dataset_name)

    @classmethod
    def build_evaluator(cls, cfg: CfgNode, dataset_name: str) -> DatasetEvaluator:
        """Returns what judges the outputs on one test data set: accuracy, by default."""
        numbers = [str(number) for number in range(cfg.MODEL.NUM_CLASSES)]
        return ClassificationEvaluator(MetadataCatalog.get(dataset_name).get("classes", numbers))

    @classmethod
    def test(
        cls,
        cfg: CfgNode,
        model: nn.Module,
        evaluators: Sequence[DatasetEvaluator] | DatasetEvaluator | None = None,
    ) -> dict[str, Any]:
        """Evaluates a model on every data set of `DATASETS.TEST`.

        Args:
            cfg: The config.
            model: The model, without a wrapper for several processes.
            evaluators: One for each data set; `build_evaluator` builds them by default.

        Returns:
            The results by data set, or those of the data set if there is only one.
        """
        if isinstance(evaluators, DatasetEvaluator):
            evaluators = [evaluators]
        results = {}
        for index, name in enumerate(cfg.DATASETS.TEST):
            loader = cls.build_test_loader(cfg, name)
            evaluator = evaluators[index] if evaluators else cls.build_evaluator(cfg, name)
            with autocast(cfg.SOLVER.PRECISION, next(model.parameters()).device):
                results[name] = inference_on_dataset(
                    model, loader, evaluator, limit_batches=cfg.LIMIT_BATCHES or None
                )
            if comm.is_main_process():
                logger.info("Results on %s:", name)
                print_csv_format(results[name])
        return next(iter(results.values())) if len(results) == 1 else results

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Takes back a `state_dict`, or one of detectron2's DefaultTrainer."""
        if self._is_seed_drawn and state.get("seed") is not None:
            self.cfg = _with_seed(self.cfg, state["seed"])
            if isinstance(self.data_loader, TrainLoader):
                self.data_loader.seed = state["seed"]
        super().load_state_dict({**state.get("_trainer", {}), **state})

    def _evaluate(self) -> dict[str, Any]:
        model = self.model
        if isinstance(model, DistributedDataParallel):
            model = model.module
            # Running statistics differ from rank to rank; all judge the model that rank 0 saves.
            for buffer in model.buffers():
                torch.distributed.broadcast(buffer, src=0)
        self._last_results = self.test(self.cfg, model)
        return self._last_results

    def _is_finished(self, start_iter: int, max_iter: int) -> bool:
        """Whether a resumed run has nothing left to do, the hooks at its end included."""
        if self._loaded.get("planned_iter") == max_iter:
            # Less than was planned if the run ended early.
            max_iter = self._loaded["max_iter"]
        is_marked = self.checkpointer.finished_iteration() == start_iter - 1
        return start_iter > max_iter or (start_iter == max_iter and is_marked)

    @classmethod
    def _check_test_names(cls, cfg: CfgNode) -> None:
        """Finds an unknown test data set now, not at the first evaluation."""
        overrides = cls.build_test_loader.__func__ is not DefaultTrainer.build_test_loader.__func__  # type: ignore[attr-defined]  # of a class method
        for name in () if overrides else cfg.DATASETS.TEST:
            if name not in DatasetCatalog:
                raise UnknownNameError("data set (DATASETS.TEST)", name, DatasetCatalog.list())

    def _note_implementation(self) -> None:
        """Notes which implementation updates parameters; one that is not the checkpoint's is said.

        Loading an optimizer's state brings the implementation with it, where this device has it.
        """
        now = optimizer_implementation(self.optimizer)
        self.checkpointer.facts["optimizer"] = now
        manifest = self.checkpointer.loaded_manifest
        saved = manifest.facts.get("optimizer", now) if manifest else now
        if saved != now:
            logger.warning(
                "The checkpoint was saved by a %s optimizer and goes on with a %s one: updates "
                "differ in the last bits.",
                saved,
                now,
            )


def _with_seed(cfg: CfgNode, seed: int) -> CfgNode:
    seeded = cfg.clone()
    seeded.defrost()
    seeded.SEED = seed
    if cfg.is_frozen():
        seeded.freeze()
    logger.info("The run has the seed %d.", seed)
    return seeded
