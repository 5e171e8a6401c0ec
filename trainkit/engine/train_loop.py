"""The loop, shown as the loop: `TrainerBase`, and `SimpleTrainer`'s step."""

import logging
import time
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import nn
from torch.amp.grad_scaler import GradScaler

import trainkit.engine.losses as losses
from trainkit.engine.batch_stream import BatchStream
from trainkit.engine.failures import call_each, log_failure
from trainkit.engine.grad_scaling import build_grad_scaler, check_scale
from trainkit.engine.hook_base import (
    HookBase,
    StepHooks,
    check_on_all_ranks,
    hooks_state_dict,
    load_hooks_state_dict,
    priority_of,
    warn_of_states,
)
from trainkit.engine.non_finite import NonFiniteGuard
from trainkit.engine.preemption import leave
from trainkit.engine.step_metrics import StepMetrics, StopRequest, write_metrics
from trainkit.engine.trainer_state import PER_RANK, load_local_state, local_state
from trainkit.solver.clip import GradientClipper, cheap_grad_norm
from trainkit.utils import comm
from trainkit.utils.device import PRECISIONS, autocast
from trainkit.utils.errors import ConfigError
from trainkit.utils.events.storage import EventStorage
from trainkit.utils.nested import move_to
from trainkit.utils.period import is_due
from trainkit.utils.random import seed_step, set_rng_state
from trainkit.utils.stop_signals import Interruption, StopRequested, stop_signals

__all__ = ["AMPTrainer", "HookBase", "SimpleTrainer", "TrainerBase"]

logger = logging.getLogger(__name__)

# What a loader draws in this process must not be what the forward pass draws.
_FETCH_TAG = 1


class TrainerBase:
    """A loop with hooks; it knows no model, no data and no optimizer.

    Attributes:
        iter: The current iteration, 0-based; `max_iter` after a run that came to its end.
        start_iter, max_iter: Where this run starts and ends.
        storage, interruption: The metrics; why the run leaves before its end, or None.
    """

    def __init__(self) -> None:
        self.iter = self.start_iter = self.max_iter = self._planned_iter = 0
        self.storage = EventStorage()
        self.interruption: Interruption | None = None
        self._hooks: list[HookBase] = []
        self._started: list[HookBase] = []
        self._step_hooks = StepHooks([])
        self._loaded: dict[str, Any] = {}

    def register_hooks(self, hooks: Iterable[HookBase | None]) -> None:
        """Adds hooks, in their place by priority; None is passed over."""
        new = [hook for hook in hooks if hook is not None]
        for hook in new:
            hook.trainer = self
        self._hooks = sorted([*self._hooks, *new], key=priority_of)

    def train(self, start_iter: int, max_iter: int) -> Any:
        """Runs the iterations from `start_iter` up to, not including, `max_iter`.

        The first error reaches the caller, later ones as its notes; a signal by `leave`.
        """
        self._begin(start_iter, max_iter)
        with stop_signals(self.request_stop), self.storage:
            try:
                self.before_train()
                self._finish_cut_step()
                while self.iter < self.max_iter and self.interruption is None:
                    self.before_step()
                    self.run_step()
                    self._step_hooks.note_update(self.iter)
                    self.after_step()
                    self.iter += 1
            except StopRequested as stop:
                self.interruption = stop.interruption
                self.iter = self._step_hooks.last_update + 1
            except BaseException as failure:
                # Inside a step there is nothing whole to save; before the first, nothing to finish.
                self.interruption, self.iter = None, min(self.iter, self.max_iter - 1)
                log_failure(self.iter, failure)
                call_each([self.after_train], failure)
                raise
            self.after_train()
            leave(self.interruption)

    def run_step(self) -> None:
        """One iteration; subclasses say what it is."""
        raise NotImplementedError(f"{type(self).__name__} must define run_step.")

    def before_train(self) -> None:
        """Calls the hooks' `before_train`."""
        for hook in self._hooks:
            hook.before_train()
            self._started.append(hook)

    def after_train(self) -> None:
        """Calls `after_train` of every hook that was started, even when one of them raises."""
        self.storage.iter = self.iter
        self.interruption = call_each([h.after_train for h in self._started]) or self.interruption

    def before_step(self) -> None:
        """Calls the hooks' `before_step`."""
        self.storage.iter = self.iter
        for hook in self._step_hooks.before_step:
            hook.before_step()

    def after_backward(self) -> None:
        """Calls the hooks' `after_backward`; a `run_step` of your own should call it too."""
        for hook in self._step_hooks.after_backward:
            hook.after_backward()

    def after_step(self) -> None:
        """Calls the hooks' `after_step`."""
        self._step_hooks.after_step()

    def request_stop(self, reason: str, finished: bool = False, exit_code: int = 0) -> None:
        """Ends the run after this step: as a success with a lower `max_iter`, or to be resumed."""
        if finished:
            self.max_iter = min(self.max_iter, self.iter + 1)
        else:
            self.interruption = Interruption(reason, exit_code)

    def sync_metrics(self) -> None:
        """Brings metrics and requests of all ranks together; this class has none."""

    def state_dict(self) -> dict[str, Any]:
        """Returns where the run stands: the last update, and the hooks yet to run after it."""
        return {
            "iteration": self._step_hooks.last_update,
            "pending": self._step_hooks.pending,
            "max_iter": self.max_iter,
            "planned_iter": self._planned_iter,
            "hooks": hooks_state_dict(self._hooks),
            "storage": self.storage.state_dict(),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Takes back a `state_dict`, for later hooks too; go on with `train(iter + 1, …)`."""
        self.iter = self._step_hooks.last_update = state["iteration"]
        self._loaded = {**state, "hooks": load_hooks_state_dict(self._hooks, state.get("hooks"))}

    def _begin(self, start_iter: int, max_iter: int) -> None:
        """Starts from the loaded state, if this run goes on where that was cut."""
        logger.info("Starting training from iteration %d", start_iter)
        self.iter = self.start_iter = start_iter
        self.interruption, self._started = None, []
        self._step_hooks = StepHooks(self._hooks, start_iter - 1)
        warn_of_states(load_hooks_state_dict(self._hooks, self._loaded.get("hooks")))
        self._loaded = self._loaded if self._loaded.get("iteration") == start_iter - 1 else {}
        self.storage = EventStorage(start_iter)
        self.storage.load_state_dict(self._loaded.get("storage", {}))
        self._planned_iter = self.max_iter = max_iter
        # A run that ended early stays at its end, unless it is now meant to be longer.
        if self._loaded.get("planned_iter") == max_iter:
            self.max_iter = self._loaded.get("max_iter", max_iter)

    def _finish_cut_step(self) -> None:
        """Runs the hooks that a checkpoint was taken before, and frees the loaded state."""
        pending, self._loaded = self._loaded.get("pending", []), {}
        self.iter = self.storage.iter = self.start_iter - 1
        self._step_hooks.after_step(pending)
        self.iter = self.start_iter


class SimpleTrainer(TrainerBase):
    """Trains one model with one optimizer on one stream of batches.

    Called without arguments it only initializes the loop, for subclasses that bring a `run_step`.

    Args:
        model: Returns a scalar loss or a dict of them in training mode. It is put into that mode.
        data_loader: Any iterable of batches; one that ends is begun again.
        optimizer: Updates the model's parameters.
        gather_metric_period: Iterations between two reductions of metrics over ranks, which are
            also when an accelerator's metrics are checked and several ranks agree to stop.
        zero_grad_before_forward, async_write_metrics: For detectron2's callers, without effect: the
            first is always so, and metrics keep no step waiting.
        precision: "fp32", or "bf16" or "fp16" by autocast, fp16 with a gradient scaler.
        accumulate: Micro-batches drawn for each optimizer step.
        grad_clipper: Clips gradients and returns their norm before.
        seed: Seeds the generators before each forward pass, from (seed, rank, iteration,
            micro-batch).
        non_finite: What follows a loss or gradient that is not finite; see `NonFiniteGuard`.

    Raises:
        ConfigError: If precision or policy is unknown, or `accumulate` is below 1.
    """

    def __init__(
        self,
        model: nn.Module | None = None,
        data_loader: Iterable[Any] | None = None,
        optimizer: torch.optim.Optimizer | None = None,
        gather_metric_period: int = 20,
        zero_grad_before_forward: bool = True,
        async_write_metrics: bool = True,
        *,
        precision: str = "fp32",
        accumulate: int = 1,
        grad_clipper: GradientClipper | None = None,
        seed: int | None = None,
        non_finite: str = "raise",
    ) -> None:
        super().__init__()
        autocast(precision, torch.device("cpu"))  # Raises now if it is unknown.
        if accumulate < 1:
            raise ConfigError(f"accumulate (SOLVER.ACCUMULATE) is {accumulate}; it is at least 1.")
        self.gather_metric_period, self.accumulate = gather_metric_period, accumulate
        self.precision, self.seed = precision, seed
        self.grad_clipper = grad_clipper or cheap_grad_norm
        self._is_inside_update = self._must_rehearse = False
        self._parameter: nn.Parameter | None = None
        self._guard = NonFiniteGuard(non_finite)
        self._metrics = StepMetrics(self._guard.judges_now)
        self.grad_scaler = build_grad_scaler(precision, optimizer, non_finite)
        if model is None or data_loader is None or optimizer is None:
            return
        self.model, self.optimizer = model.train(), optimizer
        self.reset_data_loader(data_loader)

    def reset_data_loader(self, data_loader_builder: Callable[[], Any] | Iterable[Any]) -> None:
        """Draws the next batches from another loader, given or built, from its beginning."""
        build: Any = data_loader_builder
        self.data_loader: Iterable[Any] = build() if callable(build) else build
        losses.check_accumulation(self.data_loader, self.accumulate)
        self._batches = self._data_loader_iter = BatchStream(self.data_loader)  # detectron2's name

    @property
    def device(self) -> torch.device:
        """Where the model is."""
        if self._parameter is None:
            self._parameter = next(self.model.parameters())
        return self._parameter.device

    def run_step(self) -> None:
        """One optimizer step: batches, losses, backward, clip, update."""
        start = time.perf_counter()
        batches = self.draw_batches()
        data_time = time.perf_counter() - start

        self._is_inside_update = True
        self._guard.begin_step(self.model)
        parameters = losses.clear_gradients(self.optimizer)
        loss_dict = self._forward_backward(batches)
        self.grad_scaler.unscale_(self.optimizer)
        self.after_backward()
        grad_norm = self.grad_clipper(parameters)
        if self._guard.must_skip(grad_norm):
            samples = self._batches.describe(self._metrics.places[self.iter], comm.get_rank())
            self._guard.skip(self.storage, loss_dict, samples)
        else:
            grad_norm = self._guard.norm_of_update(grad_norm, self.grad_scaler)
            self._write_metrics(loss_dict, data_time, grad_norm=grad_norm)
            self.grad_scaler.step(self.optimizer)
        self.grad_scaler.update()
        self._is_inside_update = False
        self._step_hooks.note_update(self.iter)

    def move_batch(self, batch: Any) -> Any:
        """Returns a batch on the model's device; override it for batches of your own kind."""
        return move_to(batch, self.device)

    def draw_batches(self) -> list[Any]:
        """Returns the micro-batches of this step, for a `run_step` of your own too."""
        self._metrics.places[self.iter] = self._batches.place
        if self._batches.draws_global_randomness:
            self._seed_generators(tag=_FETCH_TAG)
        batches = [next(self._batches) for _ in range(self.accumulate)]
        if self._must_rehearse:
            self._must_rehearse = False
            losses.rehearse(self.model, self._forward_backward, batches, self.start_iter)
        return batches

    def _forward_backward(self, batches: list[Any]) -> dict[str, torch.Tensor]:
        """Accumulates the gradients of all micro-batches and returns the values of the batch."""
        loss_dict: dict[str, torch.Tensor] = {}
        for index, weight in enumerate(losses.micro_batch_weights(batches)):
            self._seed_generators(index)
            with losses.reducing_gradients(self.model, index == len(batches) - 1):
                with autocast(self.precision, self.device):
                    values, loss = losses.parse_losses(self.model(self.move_batch(batches[index])))
                share = losses.weighted(losses.poisoned(loss, self._guard.judges_now), weight)
                self.grad_scaler.scale(share).backward()
            losses.add_losses(loss_dict, {**values, "total_loss": loss}, weight)
        if self.iter == self.start_iter:
            losses.check_all_used(self.model)
        return loss_dict

    def _seed_generators(self, index: int = 0, tag: int = 0) -> None:
        if self.seed is not None:
            seed_step(self.seed, comm.get_rank(), self.iter, index, self.device, tag)

    def _write_metrics(
        self,
        loss_dict: dict[str, torch.Tensor],
        data_time: float,
        prefix: str = "",
        grad_norm: torch.Tensor | float | None = None,
    ) -> None:
        """Puts a step into the storage; raises if it is known not to be finite."""
        if not self._metrics.put(self.storage, loss_dict, data_time, prefix, grad_norm):
            self.sync_metrics()

    write_metrics = staticmethod(write_metrics)

    def sync_metrics(self) -> None:
        """Reduces metrics over ranks, checks that they are finite, and agrees on a stop.

        Every rank calls it, in the same iteration; NonFiniteError is raised on all ranks or none.
        """
        check_scale(self.grad_scaler, self.iter)
        agreed = self._metrics.sync(self.storage, lambda *at: self._batches.describe(*at))
        if agreed is not None:
            super().request_stop(*agreed)

    def request_stop(self, reason: str, finished: bool = False, exit_code: int = 0) -> None:
        """Ends the run after this step, or with several ranks when they next sync metrics."""
        if comm.get_world_size() == 1:
            super().request_stop(reason, finished, exit_code)
        else:
            self._metrics.ask(StopRequest(reason, finished, exit_code))

    def after_step(self) -> None:
        """Calls the hooks' `after_step`, with metrics of all ranks where they are due."""
        if is_due(self.iter, self.gather_metric_period) or self.iter + 1 >= self.max_iter:
            self.sync_metrics()
        super().after_step()

    def state_dict(self) -> dict[str, Any]:
        """Returns all that decides the future, if all steps were finite; every rank calls it."""
        if self._is_inside_update:
            raise RuntimeError(
                f"Inside the update of iteration {self.iter} there is no whole state to save. Save "
                "in a hook's before_step or after_step."
            )
        self.sync_metrics()
        state = comm.together(lambda: {**TrainerBase.state_dict(self), **local_state(self)})
        return {k: comm.all_gather(v) if k in PER_RANK else v for k, v in state.items()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Takes back a `state_dict`, that of another world size included."""
        load_local_state(self, state)  # First: hooks may set the rates of another schedule.
        super().load_state_dict(state)

    def _begin(self, start_iter: int, max_iter: int) -> None:
        self._metrics.begin(start_iter)
        self._is_inside_update = False
        # Not of a run's first step, which is the first one of an unbroken run too.
        self._must_rehearse = start_iter > 0
        check_on_all_ranks(self._hooks)
        super()._begin(start_iter, max_iter)

    def _finish_cut_step(self) -> None:
        # As late as possible: the hooks' before_train may draw random numbers.
        if states := self._loaded.get("rng"):
            set_rng_state(states[comm.get_rank() % len(states)], self.device)
        super()._finish_cut_step()


class AMPTrainer(SimpleTrainer):
    """`SimpleTrainer` in mixed precision with detectron2's arguments: a dtype, and a scaler."""

    def __init__(
        self,
        model: nn.Module,
        data_loader: Iterable[Any],
        optimizer: torch.optim.Optimizer,
        gather_metric_period: int = 20,
        zero_grad_before_forward: bool = True,
        grad_scaler: GradScaler | None = None,
        precision: torch.dtype = torch.float16,
        log_grad_scaler: bool = False,
        **kwargs: Any,
    ) -> None:
        kwargs["precision"] = next((n for n, d in PRECISIONS.items() if d is precision), precision)
        super().__init__(model, data_loader, optimizer, gather_metric_period, **kwargs)
        self.grad_scaler = grad_scaler or self.grad_scaler
        self._log_grad_scaler = log_grad_scaler

    def run_step(self) -> None:
        """One optimizer step; logging the scale waits for an accelerator."""
        super().run_step()
        if self._log_grad_scaler:
            self.storage.put_scalar("[metric]grad_scaler", self.grad_scaler.get_scale())
