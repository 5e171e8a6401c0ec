"""Weights into a model, and a table of those that do not fit."""

import contextlib
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from itertools import islice
from typing import Any, NamedTuple

import numpy as np
import torch
from fvcore.common.checkpoint import _IncompatibleKeys
from tabulate import tabulate
from torch import nn
from torch.nn.parameter import is_lazy

from trainkit.checkpoint.names import align_names, match_suffixes
from trainkit.utils.errors import CheckpointError

ABSENT = "absent"

_MAX_ROWS = 10
_TRANSFER = (
    "To take over the weights that fit, set MODEL.WEIGHTS to the file and start without --resume, "
    "or in another OUTPUT_DIR."
)


class Difference(NamedTuple):
    """One key of which checkpoint and model do not hold the same, and what each holds."""

    key: str
    in_checkpoint: str
    in_model: str


def split_options(path: str) -> tuple[str, list[str]]:
    """Takes options off the end of a path, as in `a.pth?matching_heuristics=True&strict=True`."""
    end = re.search(r"([?&](matching_heuristics|strict)=(True|False))+(?=#|$)", path)
    if end is None:
        return path, []
    return path[: end.start()] + path[end.end() :], re.findall(r"\w+(?==True)", end[0])


def find_weights(data: Any, path: str) -> dict[str, Any]:
    """Returns what a file holds, with the model's weights as its entry "model".

    Args:
        data: A dict with "model", as trainkit, fvcore and detectron2 save; with "state_dict", or
            "model_state", as in detectron2's .pyth files; or weights alone.
        path: Names the file in errors.

    Raises:
        CheckpointError: If it is none of these.
    """
    if isinstance(data, dict):
        for key in ("model", "state_dict", "model_state"):
            if _is_state_dict(data.get(key)):
                return {**{k: v for k, v in data.items() if k != key}, "model": data[key]}
        if data and _is_state_dict(data) and all(map(_is_weight, data.items())):
            return {"model": data}
    keys = ", ".join(map(str, list(data)[:_MAX_ROWS])) if isinstance(data, dict) else ""
    raise CheckpointError(
        f"{path} holds no weights: it is a {type(data).__name__}{f' of {keys}' if keys else ''}. "
        "Expected is a dict with 'model' or 'state_dict', or of tensors alone."
    )


def _is_weight(item: tuple[Any, Any]) -> bool:
    # What a module's get_extra_state returns may be anything.
    return isinstance(item[1], (torch.Tensor, np.ndarray)) or item[0].endswith("_extra_state")


def load_what_fits(
    model: nn.Module, state: dict[str, Any], heuristics: bool = False
) -> _IncompatibleKeys:
    """Loads the entries of a state whose names and shapes are those of the model's.

    Args:
        model: Where to.
        state: Tensors or NumPy arrays by name; it is used up.
        heuristics: Whether entries whose names only end alike count too, see `match_suffixes`.

    Returns:
        fvcore's report: keys that are missing, but not those whose memory was loaded under another
        name; keys that the model has not; and (key, shape in `state`, shape in the model).

    Raises:
        CheckpointError: If nothing fits; the model is untouched then.
    """
    for key, value in state.items():
        if isinstance(value, np.ndarray):
            state[key] = torch.from_numpy(value)
    own = model.state_dict()
    align_names(state, own)
    if heuristics:
        match_suffixes(state, own)
    wrong = [key for key in state if key in own and not _fits(state[key], own[key])]
    if own and not (state.keys() & own.keys()) - set(wrong):
        raise CheckpointError(
            "Nothing in the checkpoint fits the model:\n"
            f"{tabulate_differences(differences(state, own))}\n"
            "Check that MODEL.WEIGHTS is a checkpoint of this kind of model. If the names only "
            "begin differently, append ?matching_heuristics=True to it."
        )
    shapes = [(key, tuple(state.pop(key).shape), tuple(own[key].shape)) for key in wrong]
    result = model.load_state_dict(state, strict=False)
    loaded = {_memory(own[key]) for key in own.keys() & state.keys()} - {0}
    missing = [key for key in result.missing_keys if key not in wrong]
    return _IncompatibleKeys(
        missing_keys=[key for key in missing if _memory(own.get(key)) not in loaded],
        unexpected_keys=result.unexpected_keys,
        incorrect_shapes=shapes,
    )


@contextlib.contextmanager
def explaining_misfit(what: str, path: str) -> Iterator[None]:
    """Turns whatever a state that does not fit makes fail into what a user can mend."""
    try:
        yield
    except CheckpointError:
        raise
    except Exception as e:
        raise CheckpointError(
            f"Cannot restore {what} from {path}: {type(e).__name__}: {e}. It was saved by another "
            f"configuration. {_TRANSFER}"
        ) from e


def check_has_all(checkpoint: Mapping[str, Any], path: str, names: Iterable[str]) -> None:
    """Raises a CheckpointError if a checkpoint lacks a state that a run needs."""
    missing = [name for name in names if name not in checkpoint]
    if missing:
        raise CheckpointError(
            f"{path} holds no state of {', '.join(missing)}, so the run cannot go on from it. "
            f"{_TRANSFER}"
        )


def check_is_same(state: dict[str, Any], path: str, model: nn.Module) -> None:
    """Raises a CheckpointError if a state is not exactly of this model, wrappers aside."""
    own = model.state_dict()
    align_names(state, own)
    found = differences(state, own)
    if found:
        raise CheckpointError(
            f"{path} is of another model, so the run cannot go on from it, and nothing was "
            f"loaded:\n{tabulate_differences(found)}\nTo go on with that run, use its config. "
            f"{_TRANSFER}"
        )


def check_none(found: Sequence[Difference], path: str) -> None:
    """Raises a CheckpointError if there are differences."""
    if found:
        raise CheckpointError(
            f"{path} and the model differ, which strict loading refuses:\n"
            f"{tabulate_differences(found)}\nTo take over what fits, load without strict."
        )


def list_incompatible(model: nn.Module, incompatible: _IncompatibleKeys) -> list[Difference]:
    """Returns fvcore's report in the form that `tabulate_differences` takes."""
    own = model.state_dict()
    found = [Difference(key, str(a), str(b)) for key, a, b in incompatible.incorrect_shapes]
    found += [Difference(k, ABSENT, _describe(own.get(k))) for k in incompatible.missing_keys]
    return found + [Difference(k, "not used", ABSENT) for k in incompatible.unexpected_keys]


def differences(state: Mapping[str, Any], model_state: Mapping[str, Any]) -> list[Difference]:
    """Returns what keeps a model from taking over a state exactly: keys, shapes, dtypes."""
    found = (
        Difference(
            key,
            _describe(state[key]) if key in state else ABSENT,
            _describe(model_state[key]) if key in model_state else ABSENT,
        )
        for key in dict.fromkeys([*model_state, *state])
        # A lazy module takes whatever shape comes.
        if not (key in state and key in model_state and is_lazy(model_state[key]))
    )
    return [d for d in found if d.in_checkpoint != d.in_model]


def tabulate_differences(found: Sequence[Difference]) -> str:
    """Returns a table with at most 10 rows of each kind: mismatched, missing, unused.

    Of the last two, what one module holds shares a row.
    """
    kinds: list[dict[str, list[Difference]]] = [{}, {}, {}]
    for difference in found:
        is_missing, is_unused = difference.in_checkpoint == ABSENT, difference.in_model == ABSENT
        module, dot, _ = difference.key.rpartition(".")
        shared = module + dot if is_missing or is_unused else ""
        group = kinds[1 if is_missing else 2 if is_unused else 0]
        group.setdefault(shared or difference.key, []).append(difference)
    rows = []
    for kind in kinds:
        rows += [_row(shared, group) for shared, group in islice(kind.items(), _MAX_ROWS)]
        if len(kind) > _MAX_ROWS:
            rows.append(Difference(f"… and {len(kind) - _MAX_ROWS} more like these", "", ""))
    # Numbers are not to be aligned: a shape is no number.
    return tabulate(
        rows, headers=["key", "in the checkpoint", "in the model"], disable_numparse=True
    )


def _row(shared: str, group: Sequence[Difference]) -> Difference:
    if len(group) == 1:
        return group[0]
    keys, *others = zip(*group, strict=True)
    names = ", ".join(key.removeprefix(shared) for key in keys)
    return Difference(f"{shared}{{{names}}}", *("; ".join(dict.fromkeys(told)) for told in others))


def _is_state_dict(value: Any) -> bool:
    parts = (value, getattr(value, "_metadata", {}))
    return all(isinstance(p, dict) and all(isinstance(key, str) for key in p) for p in parts)


def _fits(value: Any, own: Any) -> bool:
    """Whether a model's entry can take a value; what is no tensor has its own rules."""
    if is_lazy(own) or not isinstance(own, torch.Tensor) or not isinstance(value, torch.Tensor):
        return True
    return value.shape == own.shape


def _describe(value: Any) -> str:
    """Returns the dtype and shape of a tensor, such as "float32 (16, 3)"; else the type's name."""
    if not isinstance(value, torch.Tensor) or is_lazy(value):
        return type(value).__name__
    return f"{str(value.dtype).removeprefix('torch.')} {tuple(value.shape)}"


def _memory(value: Any) -> int:
    """Returns where a tensor's memory begins, or 0."""
    return value.data_ptr() if isinstance(value, torch.Tensor) and not is_lazy(value) else 0
