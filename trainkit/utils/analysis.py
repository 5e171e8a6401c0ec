"""What a model costs: FLOPs, activations and parameters, counted by fvcore; unused parameters.

fvcore traces the model on a batch. It counts a fused multiply-add as one FLOP, and nothing for
operators that it does not know, such as elementwise ones; it logs their names.
"""

import contextlib
import copy
import importlib
import math
import warnings
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping
from typing import TYPE_CHECKING, Any

import torch
from tabulate import tabulate
from torch import nn
from torch.utils._pytree import tree_flatten, tree_leaves, tree_unflatten

from trainkit.utils.errors import ConfigError
from trainkit.utils.wrappers import unwrap

if TYPE_CHECKING:
    from fvcore.nn.flop_count import FlopCountAnalysis as _Flops

_ATTENTION = "aten::scaled_dot_product_attention"


def FlopCountAnalysis(model: nn.Module, inputs: Any) -> "_Flops":  # noqa: N802  # detectron2's name
    """Returns fvcore's analysis of a model's FLOPs: `total()`, `by_module()`, `by_operator()`, ….

    It traces when it is first asked. Attention is counted too, in full also where it is causal:
    the two products of Vaswani et al. (arXiv:1706.03762), eq. 1.

    Args:
        model: In the mode to be analyzed; evaluation mode, usually.
        inputs: A tuple holds the positional arguments; anything else, such as a dict of tensors or
            a list of samples, is the only argument.
    """
    analysis = _fvcore_nn("flop_count").FlopCountAnalysis(*_traceable(model, inputs))
    return analysis.set_op_handle(_ATTENTION, _attention_flops)


def flop_count_operators(model: nn.Module, inputs: Any) -> defaultdict[str, float]:
    """Returns the GFLOPs (10⁹ multiply-adds) of each operator in evaluation mode.

    Args:
        model: Any model; its mode stays as it was.
        inputs: As for `FlopCountAnalysis`.
    """
    with inference_context(model):
        counts = FlopCountAnalysis(model, inputs).by_operator()
    return defaultdict(float, {name: count / 1e9 for name, count in counts.items()})


def activation_count_operators(model: nn.Module, inputs: Any) -> defaultdict[str, float]:
    """Like `flop_count_operators`, of the numbers that matrix products put out, in millions."""
    analysis = _fvcore_nn("activation_count").ActivationCountAnalysis(*_traceable(model, inputs))
    analysis.set_op_handle(_ATTENTION, _fvcore_nn("jit_handles").generic_activation_jit())
    with inference_context(model):
        counts = analysis.by_operator()
    return defaultdict(float, {name: count / 1e6 for name, count in counts.items()})


def parameter_count(model: nn.Module) -> defaultdict[str, int]:
    """Returns the number of elements of each parameter and of each module's; "" is the model.

    A parameter that several modules share counts once, for the first.
    """
    counts: defaultdict[str, int] = _fvcore_nn("parameter_count").parameter_count(model)
    return counts


def parameter_count_table(model: nn.Module, max_depth: int = 3) -> str:
    """Returns a table of modules, with their number of parameters, and parameters, with shapes."""
    counts = parameter_count(model)
    shapes = {name: str(tuple(p.shape)) for name, p in model.named_parameters()}
    return _table(counts, {"parameters or shape": {**counts, **shapes}}, max_depth)


def flop_count_table(flops: "_Flops", max_depth: int = 3) -> str:
    """Returns a table of the modules that have parameters or FLOPs, with both."""
    counts = {"parameters": parameter_count(flops._model), "FLOPs": flops.by_module()}
    names = [name for name, _ in flops._model.named_modules()]
    names = [name for name in names if any(count.get(name) for count in counts.values())]
    return _table(names, counts, max_depth)


def find_unused_parameters(model: nn.Module, inputs: Any) -> list[str]:
    """Returns the trainable parameters that the loss does not depend on, by name.

    Gradients stay as they were; buffers (running statistics) do not.

    Args:
        model: Returns a loss, or a dict of them, in training mode, in which it must be.
        inputs: As for `FlopCountAnalysis`.

    Raises:
        ConfigError: If the model is not in training mode, or returns no loss.
    """
    outputs = model(*_arguments(inputs)) if model.training else None
    losses = [x for x in tree_leaves(outputs) if isinstance(x, torch.Tensor) and x.requires_grad]
    if not losses:
        raise ConfigError(
            "Unused parameters are found from the loss, of which the model returned none in "
            f"{'training' if model.training else 'evaluation'} mode. Call model.train() first, and "
            "return a loss that requires a gradient, or a dict of them."
        )
    parameters = {name: p for name, p in model.named_parameters() if p.requires_grad}
    total = torch.stack([loss.sum() for loss in losses]).sum()
    gradients = torch.autograd.grad(total, list(parameters.values()), allow_unused=True)
    return [name for name, grad in zip(parameters, gradients, strict=True) if grad is None]


@contextlib.contextmanager
def inference_context(model: nn.Module) -> Iterator[None]:
    """Puts a model into evaluation mode, and then each of its modules back into its own."""
    modes = {module: module.training for module in model.modules()}
    try:
        model.eval()
        yield
    finally:
        for module, training in modes.items():
            module.training = training


def _fvcore_nn(name: str) -> Any:
    """Imports a module of fvcore.nn, which compiles functions of its own as it is imported."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "`torch.jit.script`", DeprecationWarning)
        return importlib.import_module(f"fvcore.nn.{name}")


def _arguments(inputs: Any) -> tuple[Any, ...]:
    return inputs if isinstance(inputs, tuple) else (inputs,)


def _traceable(model: nn.Module, inputs: Any) -> tuple[nn.Module, tuple[torch.Tensor, ...]]:
    """Returns a copy of the model that shares its modules but takes and returns flat tensors."""
    # fvcore would unwrap some too, and trace what is in there.
    inner = unwrap(model)
    leaves, structure = tree_flatten(_arguments(inputs))
    places = [i for i, leaf in enumerate(leaves) if isinstance(leaf, torch.Tensor)]

    def forward(*tensors: torch.Tensor) -> tuple[torch.Tensor, ...]:
        filled = list(leaves)
        for place, tensor in zip(places, tensors, strict=True):
            filled[place] = tensor
        outputs = inner.forward(*tree_unflatten(filled, structure))
        return tuple(leaf for leaf in tree_leaves(outputs) if isinstance(leaf, torch.Tensor))

    flat = copy.copy(inner)
    # A wrapper module would stand in the name of every module.
    flat.forward = forward
    return flat, tuple(leaves[i] for i in places)


def _attention_flops(inputs: list[Any], outputs: list[Any]) -> int:
    """Counts softmax(Q Kᵀ) V: Q is (…, L, E), K is (…, S, E), V is (…, S, Ev)."""
    query, _, value = (list[int](x.type().sizes()) for x in inputs[:3])
    return math.prod(query[:-1]) * value[-2] * (query[-1] + value[-1])


def _readable(count: float) -> str:
    for scale, unit in ((1e9, "G"), (1e6, "M"), (1e3, "K")):
        if count >= scale:
            return f"{count / scale:.1f}{unit}"
    return f"{count:g}"


def _table(
    names: Iterable[str], columns: Mapping[str, Mapping[str, float | str]], max_depth: int
) -> str:
    """Returns a table of modules, indented by depth; the model itself has the name ""."""
    rows = []
    for name in names:
        depth = name.count(".") + 1 if name else 0
        cells = [column.get(name, "") for column in columns.values()]
        cells = [cell if isinstance(cell, str) else _readable(cell) for cell in cells]
        if depth <= max_depth:
            rows.append(["  " * depth + str(cell) for cell in (name or "model", *cells)])
    # As an argument: the module's variable of this name does nothing since tabulate 0.10.
    return tabulate(
        rows, ["name", *columns], tablefmt="pipe", disable_numparse=True, preserve_whitespace=True
    )
