"""`ValidationLoss`: the training losses, on held-out data."""

import weakref
from collections import Counter
from collections.abc import Iterable
from typing import Any

import torch
from torch import nn

from trainkit.engine.hooks.evaluation import EvalHook
from trainkit.engine.losses import parse_losses
from trainkit.engine.undisturbed import undisturbed
from trainkit.evaluation.evaluator import DatasetEvaluator, inference_on_dataset
from trainkit.utils import comm
from trainkit.utils.device import autocast
from trainkit.utils.errors import ConfigError
from trainkit.utils.nested import batch_size
from trainkit.utils.wrappers import unwrap


class ValidationLoss(EvalHook):
    """Puts each loss on held-out data as `val/…`, beside the training curve of the same name.

    The model runs as it trains: with the weights that are trained, in its mode, in which it returns
    losses, so with dropout and the statistics of each batch. Training does not feel it.

    Args:
        period: Iterations between two runs; 0 runs only at the end.
        model: The trainer's model.
        data_loader: This rank's share of the batches, which look like training batches.
        num_iter: At most so many batches on each rank; None runs all.
        prefix: Put before each name, with a slash.
    """

    def __init__(
        self,
        period: int,
        model: nn.Module,
        data_loader: Iterable[Any],
        num_iter: int | None = None,
        prefix: str = "val",
    ) -> None:
        # One that held itself would outlive its trainer.
        hook = weakref.proxy(self)
        super().__init__(period, lambda: {prefix: hook._mean_losses()})
        self._model = unwrap(model)
        self._data_loader = data_loader
        self._num_iter = num_iter

    def _mean_losses(self) -> dict[str, Any]:
        trainer = self.trainer
        with undisturbed(self._model) as model, autocast(trainer.precision, trainer.device):
            return inference_on_dataset(
                _Losses(model),
                self._data_loader,
                _Means(),
                limit_batches=self._num_iter,
                move_batch=trainer.move_batch,
            )


class _Losses(nn.Module):
    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self._model = model

    def forward(self, batch: Any) -> dict[str, torch.Tensor]:
        # Losses are known by their graph, which keeps nothing here that takes memory.
        saving_nothing = torch.autograd.graph.saved_tensors_hooks(lambda _: None, _refuse)
        with torch.enable_grad(), saving_nothing:
            values, total = parse_losses(self._model(batch))
        return {name: v.detach() for name, v in {**values, "total_loss": total}.items()}


def _refuse(_: None) -> Any:
    raise RuntimeError(
        "ValidationLoss keeps nothing for a backward pass, but the model differentiates inside its "
        "forward. Leave the hook out, and compute such a loss in an evaluator."
    )


class _Means(DatasetEvaluator):
    """Means over all ranks' samples; batches whose size cannot be told count alike."""

    def reset(self) -> None:
        self._sums: Any = Counter()
        self._sizes: Counter[str] = Counter()

    def process(self, inputs: Any, outputs: dict[str, torch.Tensor]) -> None:
        size = batch_size(inputs) or 1
        for name, value in outputs.items():
            self._sums[name] += value.float() * size
            self._sizes[name] += size

    def evaluate(self) -> dict[str, float]:
        sums: Any = Counter()
        sizes: Counter[str] = Counter()
        own = {name: value.item() for name, value in self._sums.items()}
        for rank_sums, rank_sizes in comm.all_gather((own, self._sizes)):
            sums.update(rank_sums)
            sizes.update(rank_sizes)
        if not sums:
            raise ConfigError(
                "The data loader of ValidationLoss (DATASETS.VAL) yields no batch on any rank. "
                "Give it data, or leave the hook out."
            )
        return {name: value / sizes[name] for name, value in sums.items()}
