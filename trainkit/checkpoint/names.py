"""Names of weights: which of a checkpoint's and which of a model's mean the same."""

import logging
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Mapping, MutableMapping
from typing import Any

_COMPILED, _WRAPPED = "_orig_mod", "module"
_MAX_ROWS = 10

logger = logging.getLogger(__name__)


def align_names(state: MutableMapping[str, Any], model_state: Iterable[str]) -> None:
    """Renames entries in place where only a wrapper makes the difference.

    torch.compile puts "_orig_mod." into names and DistributedDataParallel "module.", before all of
    them or further inside; either side may have been wrapped. A name that may stand for two stays.
    """
    own = dict.fromkeys(model_state)
    strip, strip_own = _unwrapping(state), _unwrapping(own)
    names = _pairs({name: strip(name) for name in state}, {name: strip_own(name) for name in own})
    # Further inside "module." may be a module's own name: only where nothing else fits.
    left, own_left = (
        {name: _without(name, _COMPILED, _WRAPPED) for name in side if name not in found}
        for side, found in ((state, names), (own, set(names.values())))
    )
    names |= _pairs(left, own_left)
    for name in state:
        # Those that the model has not are reported without their wrappers.
        names.setdefault(name, name if strip(name) in own else strip(name))
    _rename(state, names, strip)


def match_suffixes(state: MutableMapping[str, Any], model_state: Iterable[str]) -> None:
    """Renames entries in place to names of the model's that end alike, and logs which.

    As "encoder.conv1.weight" and "backbone.net.conv1.weight" do. An end counts if it has two parts
    or is a whole name. Equal names come first, then longer ends; of those that more than two names
    share, none is renamed.
    """
    own = dict.fromkeys(model_state)
    left = {name: name.split(".") for name in state if name not in own}
    own_left = {name: name.split(".") for name in own if name not in state}
    names: dict[str, str] = {}
    parts: Counter[tuple[str, str]] = Counter()
    ambiguous = []
    longest = max((len(split) for split in [*left.values(), *own_left.values()]), default=0)
    for length in range(longest, 0, -1):
        ends, own_ends = _by_end(left, length), _by_end(own_left, length)
        for end in [end for end in ends if end in own_ends]:
            theirs, ours = ends[end], own_ends[end]
            if length == 1 and end not in theirs + ours:
                continue
            if len(theirs) == len(ours) == 1:
                names[theirs[0]] = ours[0]
                parts[theirs[0].removesuffix(end), ours[0].removesuffix(end)] += 1
            else:
                ambiguous.append(f"  {', '.join(theirs)} may be {', '.join(ours)}")
            for name in theirs:
                del left[name]
            for name in ours:
                del own_left[name]
    _rename(state, names, str)
    for (prefix, own_prefix), count in parts.items():
        text = "matching_heuristics took %d entries of the checkpoint's %s* for the model's %s*"
        # Names that both begin otherwise may mean another part.
        level = logging.WARNING if prefix and own_prefix else logging.INFO
        logger.log(level, text, count, prefix, own_prefix)
    if ambiguous:
        first = "\n".join(ambiguous[:_MAX_ROWS])
        text = "matching_heuristics left out %d ends that are ambiguous, such as\n%s"
        logger.warning(text, len(ambiguous), first)


def _unwrapping(names: Iterable[str]) -> Callable[[str], str]:
    """Returns what takes "_orig_mod." out of a name, and "module." that all names begin with."""
    plain = [_without(name, _COMPILED) for name in names]
    prefix = ""
    while plain and all(name.startswith(f"{prefix}{_WRAPPED}.") for name in plain):
        prefix += f"{_WRAPPED}."
    return lambda name: _without(name, _COMPILED).removeprefix(prefix)


def _without(name: str, *parts: str) -> str:
    return ".".join(part for part in name.split(".") if part not in parts)


def _pairs(keys: Mapping[str, str], own_keys: Mapping[str, str]) -> dict[str, str]:
    """Returns names of the model's by names whose key is equal, and of one name on each side."""
    counts, own_counts = Counter(keys.values()), Counter(own_keys.values())
    own = {key: name for name, key in own_keys.items() if own_counts[key] == 1}
    return {name: own[key] for name, key in keys.items() if counts[key] == 1 and key in own}


def _by_end(names: Mapping[str, list[str]], length: int) -> dict[str, list[str]]:
    """Returns names by their last `length` parts, those that have so many."""
    ends = defaultdict(list)
    for name, split in names.items():
        if len(split) >= length:
            ends[".".join(split[-length:])].append(name)
    return ends


def _rename(
    state: MutableMapping[str, Any], names: Mapping[str, str], strip: Callable[[str], str]
) -> None:
    """Renames entries, and the versions of modules, which go by the modules' names, with them."""
    modules = {old.rpartition(".")[0]: new.rpartition(".")[0] for old, new in names.items()}
    renamed = {names.get(name, name): value for name, value in state.items()}
    state.clear()
    state.update(renamed)
    metadata = getattr(state, "_metadata", {})
    renamed = {
        modules.get(name, strip(f"{name}.").removesuffix(".")): value
        for name, value in metadata.items()
    }
    metadata.clear()
    metadata.update(renamed)
