"""What a model returns in training, and how micro-batches add up to one batch."""

import contextlib
import copy
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from trainkit.utils import comm
from trainkit.utils.errors import ConfigError
from trainkit.utils.events.storage import EventStorage
from trainkit.utils.nested import batch_size
from trainkit.utils.random import get_rng_state, set_rng_state


def parse_losses(output: Any) -> tuple[dict[str, torch.Tensor], torch.Tensor]:
    """Splits a model's training output into named values and the loss to backpropagate.

    Args:
        output: A scalar loss, or a dict of scalars: those that require a gradient are losses and
            add up, the others are metrics.

    Returns:
        The values by name, each 0-d, and their total, which requires a gradient.

    Raises:
        ConfigError: If there is no loss in the output.
    """
    values = {"total_loss": output} if isinstance(output, torch.Tensor) else output
    if not isinstance(values, dict) or not values:
        raise ConfigError(
            "In training, the model must return a scalar loss or a dict of scalar losses, but it "
            f"returned {_describe(output)}. Compute the loss in the model's forward, when "
            "self.training is true."
        )
    named = {n: v if isinstance(v, torch.Tensor) else torch.tensor(v) for n, v in values.items()}
    losses = [value for value in named.values() if value.requires_grad]
    if not losses or any(value.ndim for value in named.values()):
        raise ConfigError(
            "In training, the model must return scalars, and at least one of them a loss that "
            f"requires a gradient, but it returned {_describe(output)}. Reduce losses with mean(), "
            "and keep them attached to the parameters (no detach, no_grad or item)."
        )
    return named, losses[0] if len(losses) == 1 else torch.stack(losses).sum()


def check_accumulation(data_loader: Any, accumulate: int) -> None:
    """Checks that a loader which knows of micro-batches yields as many as a trainer takes.

    Raises:
        ConfigError: If it does not.
    """
    count = getattr(data_loader, "accumulate", accumulate)
    if count != accumulate:
        raise ConfigError(
            f"The data loader yields {count} micro-batches for each step, but the trainer takes "
            f"{accumulate} (SOLVER.ACCUMULATE). Pass accumulate={accumulate} to the loader, or "
            f"accumulate={count} to the trainer."
        )


def micro_batch_weights(batches: Sequence[Any]) -> list[float]:
    """Returns each micro-batch's share of the samples, which weights its mean loss.

    With these weights the gradients add up to that of one large batch, also when the last
    micro-batch is smaller. Batches whose size cannot be told count alike.
    """
    if len(batches) == 1:
        return [1.0]
    sizes = [batch_size(batch) for batch in batches]
    known = [size for size in sizes if size]
    if len(known) < len(batches):
        return [1 / len(batches)] * len(batches)
    return [size / sum(known) for size in known]


def weighted(loss: torch.Tensor, weight: float) -> torch.Tensor:
    """Returns a loss times its weight, without an operation for a weight of 1."""
    return loss if weight == 1.0 else loss * weight


def add_losses(
    sums: dict[str, torch.Tensor], values: dict[str, torch.Tensor], weight: float
) -> None:
    """Adds a micro-batch's values, each times its weight, to those of the whole batch."""
    for name, value in values.items():
        # The values of one micro-batch alone are read before their graph is in anybody's way.
        share = value if weight == 1.0 else value.detach() * weight
        sums[name] = sums[name] + share if name in sums else share


def clear_gradients(optimizer: torch.optim.Optimizer) -> list[nn.Parameter]:
    """Drops the gradients of what an optimizer updates, and returns all of that.

    An optimizer's own `zero_grad` does the same, with 20 µs of accounting around it.
    """
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    if type(optimizer).zero_grad is not torch.optim.Optimizer.zero_grad:
        optimizer.zero_grad()
    for parameter in parameters:
        parameter.grad = None
    return parameters


def poisoned(loss: torch.Tensor, judges_now: bool = False) -> torch.Tensor:
    """Returns a loss so that, if it is not finite, neither are its gradients.

    The norm of the reduced gradients, which all ranks know alike, then tells before the update.

    Args:
        loss: 0-d.
        judges_now: Whether updates are judged by that norm on an accelerator too, as always on the
            CPU. There it is done without waiting.
    """
    if loss.device.type == "cpu":
        return loss if math.isfinite(loss.item()) else loss * math.nan
    return torch.where(loss.isfinite(), loss, loss * math.nan) if judges_now else loss


def reducing_gradients(model: nn.Module, is_last: bool) -> contextlib.AbstractContextManager[None]:
    """Returns the context in which only the last micro-batch's backward reduces over ranks."""
    # A static graph fails in no_sync (torch 2.13); reducing each time comes to the same sum.
    if isinstance(model, DistributedDataParallel) and not is_last and not model.static_graph:
        return model.no_sync()
    return contextlib.nullcontext()


def rehearse(
    model: nn.Module, forward_backward: Callable[[Any], Any], batches: Any, num_done: int
) -> None:
    """Runs the first step of a resumed run in vain, and leaves everything as it was.

    DistributedDataParallel orders its gradient buckets by its first backward, and thereby the sums
    of more than two ranks. A resumed run's first step must not be that first one.

    Args:
        model: The model; only one of DistributedDataParallel needs it.
        forward_backward: Called with copies of the batches, which a model may change.
        batches: Those of the step.
        num_done: Steps that the run has done.
    """
    if isinstance(model, DistributedDataParallel):
        device = next(model.parameters()).device
        copies, rng_state = TensorCopies(lambda: _tensors(model)), get_rng_state(device)
        # What the model puts there is put once more by the step itself.
        with EventStorage():
            # A static graph is known a step later.
            for _ in range(min(num_done, 2 if model.static_graph else 1)):
                forward_backward(copy.deepcopy(batches))
        model.zero_grad()
        copies.restore()
        set_rng_state(rng_state, device)


def check_all_used(model: nn.Module) -> None:
    """Checks after a backward pass that each trainable parameter took part in it.

    DistributedDataParallel waits for the gradients of all, and would fail in the next step.

    Args:
        model: Only one of DistributedDataParallel that does not look for unused parameters counts.

    Raises:
        ConfigError: If any did not; it names them.
    """
    if not isinstance(model, DistributedDataParallel):
        return
    if model.find_unused_parameters or model.static_graph:
        return
    params = model.module.named_parameters()
    unused = [name for name, p in params if p.requires_grad and p.grad is None]
    if unused:
        raise ConfigError(
            f"{len(unused)} parameters got no gradient: {', '.join(unused)}. With several "
            "processes all must take part in the loss: use them, freeze them (requires_grad_("
            "False)), or set DDP.FIND_UNUSED_PARAMETERS True (find_unused_parameters=True)."
        )


def own_buffers(model: nn.Module) -> dict[str, torch.Tensor]:
    """Returns the buffers of this rank's model where ranks differ; {} with one rank."""
    return dict(model.named_buffers()) if comm.get_world_size() > 1 else {}


def share_buffers(model: nn.Module) -> None:
    """Gives all ranks rank 0's buffers, for all to judge the model that rank 0 saves."""
    for buffer in model.buffers() if comm.get_world_size() > 1 else ():
        torch.distributed.broadcast(buffer, src=0)


@torch.no_grad()
def load_own_buffers(model: nn.Module, states: list[dict[str, torch.Tensor]]) -> None:
    """Takes back this rank's buffers; with another number of ranks, those of rank 0 stay."""
    if len(states) == comm.get_world_size() > 1:
        buffers = dict(model.named_buffers())
        for name, value in states[comm.get_rank()].items():
            buffers[name].copy_(value)


def _tensors(model: nn.Module) -> dict[str, torch.Tensor]:
    return {**dict(model.named_parameters()), **dict(model.named_buffers())}


class TensorCopies:
    """Tensors of a model, such as running statistics, as they are now.

    Args:
        get: Returns them by name; asked again when they are restored, for a model may put another
            tensor in the place of one.
    """

    def __init__(self, get: Callable[[], Mapping[str, torch.Tensor]]) -> None:
        self._get = get
        self._copies = {name: tensor.clone() for name, tensor in get().items()}

    @torch.no_grad()
    def restore(self) -> None:
        """Gives the tensors their values back."""
        for name, tensor in self._get().items():
            if (copy := self._copies.get(name)) is not None:
                if tensor.shape != copy.shape:  # A cache that has grown.
                    tensor.resize_(copy.shape)
                tensor.copy_(copy)


def _describe(output: Any) -> str:
    if isinstance(output, torch.Tensor):
        return f"a tensor of shape {tuple(output.shape)}, requires_grad={output.requires_grad}"
    if isinstance(output, dict):
        return "{" + ", ".join(f"{k!r}: {_describe(v)}" for k, v in output.items()) + "}"
    return repr(output)[:200]
