"""`PreciseBN`: the statistics of batch norm layers, measured with the weights of one moment."""

import contextlib
import logging
from collections.abc import Iterable
from typing import Any

import torch
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from trainkit.engine.batch_stream import BatchStream
from trainkit.engine.hook_base import HookBase
from trainkit.engine.hooks.ema import EMA
from trainkit.engine.undisturbed import undisturbed
from trainkit.evaluation.evaluator import inference_on_dataset
from trainkit.utils import comm
from trainkit.utils.device import autocast
from trainkit.utils.errors import ConfigError
from trainkit.utils.period import is_due
from trainkit.utils.wrappers import unwrap

logger = logging.getLogger(__name__)


class PreciseBN(HookBase):
    """Replaces running statistics, which trail behind the weights, by those of the weights now.

    They are the means over all batches and ranks of each batch's mean and unbiased variance: Wu and
    Johnson, "Rethinking 'Batch' in BatchNorm" (arXiv:2105.07576), sec. 3. Training does not feel
    it otherwise. With an `EMA` hook they are those of the averaged weights. It runs before the
    checkpointer and evaluation, every `period` iterations and after the last one; never if no batch
    norm layer is in training mode.

    Args:
        period: Iterations between two measurements; 0 measures only after the last one.
        model: The trainer's model.
        data_loader: Batches as in training, from a loader of its own. Each measurement goes on
            where the one before ended; checkpoints hold the place.
        num_iter: Batches of a measurement on each rank, at least 1; of a loader that accumulates,
            all micro-batches of so many steps.

    Raises:
        ConfigError: If `num_iter` is below 1.
    """

    is_collective = True

    def __init__(
        self, period: int, model: nn.Module, data_loader: Iterable[Any], num_iter: int
    ) -> None:
        if num_iter < 1:
            raise ConfigError(
                f"num_iter of PreciseBN (TEST.PRECISE_BN.NUM_ITER) is {num_iter}; it is at least 1."
            )
        self._period = period
        self._model = unwrap(model)
        self._batches = BatchStream(data_loader)
        # The place in the data is known at whole steps.
        self._num_iter = num_iter * getattr(data_loader, "accumulate", 1)
        self._layers: list[_BatchNorm] = []

    def before_train(self) -> None:
        """Finds the layers."""
        modules = [m for m in self._model.modules() if isinstance(m, _BatchNorm) and m.training]
        self._layers = [module for module in modules if module.track_running_stats]
        if not self._layers:
            logger.info("PreciseBN does nothing: no batch norm layer is in training mode.")

    def after_step(self) -> None:
        """Measures if it is due, and after the last step."""
        trainer = self.trainer
        is_last = trainer.iter == trainer.max_iter - 1
        if not self._layers or not (is_last or is_due(trainer.iter, self._period)):
            return
        logger.info("Measuring the statistics of %d batch norm layers", len(self._layers))
        place = self._batches.state_dict()
        # Averaged weights are what is evaluated, with statistics of their own.
        ema = next((hook for hook in trainer._hooks if isinstance(hook, EMA)), None)
        try:
            with ema.applied() if ema else contextlib.nullcontext():
                means = self._measure()
        except BaseException:
            # A resume that makes up for it takes the same batches.
            self._batches.load_state_dict(place)
            raise
        measured = _statistics(self._layers)
        places = ema.averages_of(measured) if ema else measured
        with torch.no_grad():
            for statistics, mean in zip(places, means, strict=True):
                statistics.copy_(mean)

    def state_dict(self) -> dict[str, Any]:
        """Returns the place in the data."""
        return self._batches.state_dict()

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Goes on from the place in the data."""
        self._batches.load_state_dict(state)

    def _measure(self) -> list[torch.Tensor]:
        trainer = self.trainer
        momenta = [layer.momentum for layer in self._layers]
        batches = (next(self._batches) for _ in range(self._num_iter))
        with undisturbed(self._model) as model, autocast(trainer.precision, trainer.device):
            try:
                for layer in self._layers:
                    # The mean over all batches since this count was 0; see torch's BatchNorm2d.
                    assert layer.num_batches_tracked is not None
                    layer.num_batches_tracked.zero_()
                    layer.momentum = None
                inference_on_dataset(
                    model,
                    batches,
                    None,
                    limit_batches=self._num_iter,
                    move_batch=trainer.move_batch,
                )
            finally:
                for layer, momentum in zip(self._layers, momenta, strict=True):
                    layer.momentum = momentum
            own = _statistics(self._layers)
            table = comm.all_gather_tensor(torch.cat(own).cpu())
        return list(table.mean(dim=0).split([len(statistics) for statistics in own]))


def _statistics(layers: Iterable[_BatchNorm]) -> list[torch.Tensor]:
    pairs = [(layer.running_mean, layer.running_var) for layer in layers]
    return [statistics for pair in pairs for statistics in pair if statistics is not None]
