"""`DefaultTrainer`: model, optimizer, data, schedule, hooks and evaluation from a config."""

import contextlib
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
from trainkit.config.auto_scale import auto_scale_workers
from trainkit.config.checks import check_cfg
from trainkit.config.config import CfgNode
from trainkit.config.lazy_cfg import build_part, cfg_from_lazy
from trainkit.data.build import TrainLoader, build_test_loader, build_train_loader
from trainkit.data.catalog import MetadataCatalog
from trainkit.engine.default_hooks import default_hooks
from trainkit.engine.hook_base import HookBase
from trainkit.engine.hooks.ema import EMA
from trainkit.engine.losses import share_buffers
from trainkit.engine.non_finite import MAX_ROLLBACKS, NonFiniteError
from trainkit.engine.predictor import DefaultPredictor
from trainkit.engine.preemption import leave
from trainkit.engine.run_config import (
    check_data_sets,
    in_iterations,
    note_implementation,
    precision_of,
    with_seed,
)
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
from trainkit.solver.build import build_lr_scheduler, build_optimizer
from trainkit.solver.clip import build_grad_clipper, cheap_grad_norm
from trainkit.utils import comm
from trainkit.utils.device import autocast, resolve_device
from trainkit.utils.env import seed_all_rng
from trainkit.utils.errors import ConfigError
from trainkit.utils.events.writer import EventWriter
from trainkit.utils.stop_signals import stop_signals, stopping

__all__ = [
    "DefaultPredictor",
    "DefaultTrainer",
    "create_ddp_model",
    "default_argument_parser",
    "default_setup",
    "default_writers",
]

logger = logging.getLogger(__name__)

# What a trainer whose step is taken needs of the one that runs the loop.
_SHARED = ("iter", "start_iter", "max_iter", "storage", "_step_hooks", "_must_rehearse")


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

    auto_scale_workers = staticmethod(auto_scale_workers)
    _assigned_trainer: SimpleTrainer | None = None
    _last_eval_results: dict[str, Any]
    _is_seed_drawn = _shares_seed = False

    def __init__(self, cfg: CfgNode) -> None:
        cfg = cfg if isinstance(cfg, CfgNode) else cfg_from_lazy(cfg)
        check_cfg(cfg)
        cfg = self.auto_scale_workers(cfg, comm.get_world_size())
        check_data_sets(cfg, self.build_test_loader)
        self._is_seed_drawn = cfg.SEED < 0
        if self._is_seed_drawn:
            cfg = with_seed(cfg, comm.shared_random_seed())
        # Every rank draws the same initial weights.
        seed_all_rng(cfg.SEED)
        model = self.build_model(cfg).to(resolve_device(cfg.MODEL.DEVICE))
        optimizer = self.build_optimizer(cfg, model)
        data_loader = self.build_train_loader(cfg)
        cfg = in_iterations(cfg, data_loader)
        super().__init__(
            create_ddp_model(model, **{key.lower(): value for key, value in cfg.DDP.items()}),
            data_loader,
            optimizer,
            cfg.GATHER_METRIC_PERIOD,
            precision=precision_of(cfg),
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
        note_implementation(self.optimizer, self.checkpointer)
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
            note_implementation(self.optimizer, self.checkpointer)
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
        self._last_eval_results = {}
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
        return {} if self.interruption else self._last_eval_results

    def _finish(self) -> None:
        """Marks a run that came to its end, and judges its results."""
        if self.iter == self.max_iter and self.interruption is None:
            # Only now, on every rank: until here a resume has something left to do.
            comm.synchronize()
            if self.cfg.CHECKPOINT.SAVE_WEIGHTS:
                with self._averaged_weights():
                    self.checkpointer.save_weights("model_weights")
            self.checkpointer.mark_finished(self.iter - 1)
            if self.cfg.TEST.EXPECTED_RESULTS:
                verify_results(self.cfg, self._last_eval_results)

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
        self._configure_assigned_trainer()
        super().before_train()
        goes_back = self.cfg.SOLVER.NON_FINITE == "rollback"
        if self.start_iter == 0 and (goes_back or self.checkpointer.has_checkpoint()):
            # Newer than all that an earlier run left: a resume does not take that for this run.
            self.checkpointer.save("model_start", iteration=-1)

    def before_step(self) -> None:
        """Calls the hooks' `before_step`, and has an assigned trainer take the step."""
        super().before_step()
        # Here, since a `run_step` of a subclass may call that trainer's itself.
        if self._assigned_trainer is not None:
            for name in _SHARED:
                setattr(self._assigned_trainer, name, getattr(self, name))
            self._must_rehearse = False
            if self._shares_seed:
                self._assigned_trainer.seed = self.seed

    def run_step(self) -> None:
        """One optimizer step: `SimpleTrainer`'s, or that of a trainer assigned to `_trainer`."""
        if self._assigned_trainer is None:
            super().run_step()
        else:
            self._assigned_trainer.run_step()

    @property
    def _trainer(self) -> Any:
        """This trainer's own step, as code for detectron2 expects it; see `StepView`.

        Assigning a trainer makes its step, model, data and optimizer this trainer's, and shares the
        hooks.
        """
        return self._assigned_trainer or StepView(weakref.proxy(self), SimpleTrainer.run_step)

    @_trainer.setter
    def _trainer(self, trainer: SimpleTrainer) -> None:
        for name in ("model", "optimizer", "grad_scaler", "data_loader", "_batches"):
            if hasattr(trainer, name):
                setattr(self, name, getattr(trainer, name))
        trainer._metrics, trainer._guard = self._metrics, self._guard
        self._shares_seed = getattr(trainer, "seed", None) is None
        self.precision = getattr(trainer, "precision", self.precision)
        self._assigned_trainer = trainer

    def _configure_assigned_trainer(self) -> None:
        """Has a trainer that was assigned to `_trainer` do what the config says."""
        step, policy = self._assigned_trainer, self.cfg.SOLVER.NON_FINITE
        if isinstance(step, SimpleTrainer) and step.grad_clipper is cheap_grad_norm:
            step.grad_clipper = build_grad_clipper(self.cfg) or cheap_grad_norm
        if step is not None and self._guard.policy != policy:
            self._guard.policy = policy
            self._metrics.judges_now = self._guard.judges_now

    def build_hooks(self) -> list[HookBase | None]:
        """Returns the default hooks, in the order in which they run."""
        return default_hooks(self)

    def build_writers(self) -> list[EventWriter]:
        """Returns the writers; only rank 0 asks for them."""
        return default_writers(self.cfg.OUTPUT_DIR, self.max_iter, self.cfg.TRACKERS)

    @classmethod
    def build_model(cls, cfg: CfgNode) -> nn.Module:
        """Returns the model, on its device."""
        model = build_part(cfg, "model", lambda: build_model(cfg))
        logger.info("Model:\n%s", model)
        return model.to(resolve_device(cfg.MODEL.DEVICE))

    @classmethod
    def build_optimizer(cls, cfg: CfgNode, model: nn.Module) -> torch.optim.Optimizer:
        """Returns the optimizer over the model's trainable parameters."""
        more = {"params": {"model": model}}
        return build_part(cfg, "optimizer", lambda: build_optimizer(cfg, model), **more)

    @classmethod
    def build_lr_scheduler(cls, cfg: CfgNode, optimizer: torch.optim.Optimizer) -> Any:
        """Returns the schedule of the optimizer's learning rates."""
        return build_part(cfg, "lr_multiplier", lambda: build_lr_scheduler(cfg, optimizer))

    @classmethod
    def build_train_loader(cls, cfg: CfgNode) -> Iterable[Any]:
        """Returns the loader of training batches."""
        accumulate = cfg.SOLVER.ACCUMULATE
        more = {"accumulate": accumulate} if accumulate > 1 else {}
        return build_part(cfg, "dataloader.train", lambda: build_train_loader(cfg), **more)

    @classmethod
    def build_test_loader(cls, cfg: CfgNode, dataset_name: str) -> DataLoader[Any]:
        """Returns the loader of one test data set, sharded by rank."""
        return build_part(cfg, "dataloader.test", lambda: build_test_loader(cfg, dataset_name))

    @classmethod
    def build_evaluator(cls, cfg: CfgNode, dataset_name: str) -> DatasetEvaluator:
        """Returns what judges the outputs on one test data set: accuracy, by default."""
        numbers = [str(number) for number in range(cfg.MODEL.NUM_CLASSES)]
        classes = MetadataCatalog.get(dataset_name).get("classes", numbers)
        return build_part(cfg, "dataloader.evaluator", lambda: ClassificationEvaluator(classes))

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
        if evaluators and len(evaluators) != len(cfg.DATASETS.TEST):
            raise ConfigError(
                f"{len(evaluators)} evaluators cannot judge the {len(cfg.DATASETS.TEST)} data sets "
                "of DATASETS.TEST. Give one for each."
            )
        results: dict[str, Any] = {}
        for index, name in enumerate(cfg.DATASETS.TEST):
            loader = cls.build_test_loader(cfg, name)
            try:
                evaluator = evaluators[index] if evaluators else cls.build_evaluator(cfg, name)
            except NotImplementedError:
                logger.warning("build_evaluator has none for %s, which is not evaluated.", name)
                results[name] = {}
                continue
            with autocast(precision_of(cfg), next(model.parameters()).device):
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
            self.cfg = with_seed(self.cfg, state["seed"])
            if isinstance(self.data_loader, TrainLoader):
                self.data_loader.seed = state["seed"]
        super().load_state_dict({**state.get("_trainer", {}), **state})

    def _evaluate(self) -> dict[str, Any]:
        model = self.model
        if isinstance(model, DistributedDataParallel):
            model = model.module
        with self._averaged_weights():
            share_buffers(model)
            self._last_eval_results = self.test(self.cfg, model)
        return self._last_eval_results

    def _averaged_weights(self) -> contextlib.AbstractContextManager[None]:
        """Returns the context in which the model has its averaged weights, if there are any."""
        ema = next((hook for hook in self._hooks if isinstance(hook, EMA)), None)
        return ema.applied() if ema else contextlib.nullcontext()

    def _is_finished(self, start_iter: int, max_iter: int) -> bool:
        """Whether a resumed run has nothing left to do, the hooks at its end included."""
        if self._loaded.get("planned_iter") == max_iter:
            # Less than was planned if the run ended early.
            max_iter = self._loaded["max_iter"]
        is_marked = self.checkpointer.finished_iteration() == start_iter - 1
        return start_iter > max_iter or (start_iter == max_iter and is_marked)
