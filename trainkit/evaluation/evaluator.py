"""The loop over a data set, and the interface of what judges its outputs."""

import datetime
import itertools
import logging
import math
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from functools import partial
from typing import Any

import torch
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from trainkit.utils import comm
from trainkit.utils.analysis import inference_context as inference_context  # detectron2's path
from trainkit.utils.errors import ConfigError, UnknownNameError
from trainkit.utils.nested import move_to
from trainkit.utils.period import is_due
from trainkit.utils.stop_signals import raise_if_stopping
from trainkit.utils.wrappers import known_length

_LOG_PERIOD_SECONDS = 5.0
_MOMENTS = ("on_start", "before_inference", "after_inference", "on_end")
# Batches between two agreements of several ranks on whether to leave.
_STOP_PERIOD = 20


class DatasetEvaluator:
    """Judges a model's outputs over a data set.

    `inference_on_dataset` calls `reset` once, `process` for each batch, and `evaluate` at the end.
    """

    def reset(self) -> None:
        """Forgets what was processed."""

    def process(self, inputs: Any, outputs: Any) -> None:
        """Takes in one batch.

        Args:
            inputs: The batch as the model got it.
            outputs: What the model returned for it.
        """
        raise NotImplementedError(f"{type(self).__name__} does not define process().")

    def evaluate(self) -> dict[str, Any] | None:
        """Judges all that was processed, on all ranks; every rank calls it.

        Returns:
            {task: {metric: number}}, or None or an empty dict where this rank has nothing to say.
        """
        raise NotImplementedError(f"{type(self).__name__} does not define evaluate().")


class DatasetEvaluators(DatasetEvaluator):
    """Several evaluators as one, whose results are merged.

    Args:
        evaluators: Their results must not have a task in common.
    """

    def __init__(self, evaluators: Sequence[DatasetEvaluator]) -> None:
        self._evaluators = evaluators

    def reset(self) -> None:
        """Resets each evaluator."""
        for evaluator in self._evaluators:
            evaluator.reset()

    def process(self, inputs: Any, outputs: Any) -> None:
        """Gives the batch to each evaluator."""
        for evaluator in self._evaluators:
            evaluator.process(inputs, outputs)

    def evaluate(self) -> dict[str, Any]:
        """Merges the results of all evaluators.

        Raises:
            ConfigError: If two evaluators have a result of the same name.
        """
        # Each one's evaluate may be collective: all are called before any result is judged.
        results = [evaluator.evaluate() or {} for evaluator in self._evaluators]
        # Only rank 0 may have results.
        return comm.together(lambda: _merged(results))


def _merged(results: list[dict[str, Any]]) -> dict[str, Any]:
    merged: dict[str, Any] = {}
    for result in results:
        if twice := merged.keys() & result.keys():
            raise ConfigError(
                f"Two evaluators both have results named {', '.join(sorted(twice))}. Give one "
                "of them another name."
            )
        merged.update(result)
    return merged


def inference_on_dataset(
    model: nn.Module,
    data_loader: Iterable[Any],
    evaluator: DatasetEvaluator | Sequence[DatasetEvaluator] | None,
    callbacks: Mapping[str, Callable[[], object]] | None = None,
    *,
    limit_batches: int | None = None,
    move_batch: Callable[[Any], Any] | None = None,
) -> dict[str, Any]:
    """Runs a model over a data set in evaluation mode, without gradients.

    Nothing in the loop waits for the device, unless the evaluator does; it may run under autocast.

    Args:
        model: Takes a batch; on every rank the same.
        data_loader: This rank's share of the batches; need not have a length.
        evaluator: Judges the outputs; a list is merged, None only runs the model.
        callbacks: Functions without arguments: "on_start" and "on_end" run before and after all
            batches, "before_inference" and "after_inference" around each call of the model.
        limit_batches: At most so many batches on each rank; None runs all.
        move_batch: Readies a batch for the model; None moves its tensors to the model's device.

    Returns:
        What the evaluator returned; {} for None.

    Raises:
        UnknownNameError: If a callback has another name.
        StopRequested: On every rank, if a signal asked any of them to leave.
    """
    call = _calling(callbacks or {})
    if evaluator is None or isinstance(evaluator, Sequence):
        evaluator = DatasetEvaluators(evaluator or [])
    if isinstance(model, DistributedDataParallel):
        # Its forward may broadcast buffers, and ranks may have different numbers of batches.
        model = model.module
    move_batch = move_batch or partial(move_to, device=_device_of(model))
    evaluator.reset()
    # Not inference_mode: what a model caches in evaluation could then never be trained with.
    with inference_context(model), torch.no_grad():
        call("on_start")
        for batch in _until_stopped(data_loader, limit_batches):
            inputs = move_batch(batch)
            call("before_inference")
            outputs = model(inputs)
            call("after_inference")
            evaluator.process(inputs, outputs)
        call("on_end")
    # Once more, when all have come to their ends.
    raise_if_stopping()
    return _as_dict(evaluator.evaluate(), type(evaluator).__name__)


def _calling(callbacks: Mapping[str, Callable[[], object]]) -> Callable[[str], object]:
    for name in callbacks:
        if name not in _MOMENTS:
            raise UnknownNameError("callback", name, _MOMENTS)
    return lambda moment: callbacks[moment]() if moment in callbacks else None


def _as_dict(results: Any, evaluator: str) -> dict[str, Any]:
    if results is not None and not isinstance(results, Mapping):
        raise TypeError(
            f"{evaluator}.evaluate() must return a dict of results by task or None, but returned "
            f"{results!r}. Return it under names, as in {{'task': {{'top1': 0.9}}}}."
        )
    return dict(results or {})


def _device_of(model: nn.Module) -> torch.device:
    tensor = next(itertools.chain(model.parameters(), model.buffers()), None)
    return torch.device("cpu") if tensor is None else tensor.device


def _until_stopped(data_loader: Iterable[Any], limit: int | None) -> Iterator[Any]:
    """Yields at most `limit` batches, and leaves when a rank was asked to stop.

    Ranks agree now and then, as long as all of them are known to have batches.
    """
    total = known_length(data_loader)
    if limit is not None:
        total = limit if total is None else min(limit, total)
    num_common, period = math.inf, 1
    if comm.get_world_size() > 1:
        num_common = int(comm.all_gather_tensor(torch.tensor(total or 0)).min())
        period = _STOP_PERIOD
    batches = _with_progress(itertools.islice(data_loader, limit), total)
    for number, batch in enumerate(batches):
        yield batch
        if number < num_common and is_due(number, period):
            raise_if_stopping()


def _with_progress(batches: Iterable[Any], total: int | None) -> Iterator[Any]:
    """Yields batches, and logs speed and time to go every few seconds."""
    logger = logging.getLogger(__name__)
    logger.info("Start inference on %s batches", "an unknown number of" if total is None else total)
    start = last_log = time.perf_counter()
    done = 0
    for done, batch in enumerate(batches, start=1):
        yield batch
        now = time.perf_counter()
        if now - last_log >= _LOG_PERIOD_SECONDS:
            last_log = now
            logger.info(_progress(done, total, (now - start) / done))
    seconds = time.perf_counter() - start
    logger.info("Inference on %d batches took %.1f s", done, seconds)


def _progress(done: int, total: int | None, seconds_per_batch: float) -> str:
    text = (
        f"Inference done {done}/{'?' if total is None else total}. {seconds_per_batch:.4f} s/batch."
    )
    if total is None:
        return text
    eta = datetime.timedelta(seconds=int(seconds_per_batch * (total - done)))
    return f"{text} ETA={eta}"
