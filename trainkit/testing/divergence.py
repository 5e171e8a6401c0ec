"""Where a run that was killed and resumed diverges from an unbroken one, and what to mend."""

from collections.abc import Callable, Sequence
from typing import NamedTuple

from trainkit.testing.step_trace import Record

Moment = tuple[int, str, int]
"""Iteration, phase and part, as in `Record`."""

# By the first word of a component that a resume was to bring back.
_MENDS = {
    "parameter": "Return it from the model's state_dict.",
    "buffer": "Register it as persistent, so that the model's state_dict returns it.",
    "optimizer": "Return it from the optimizer's state_dict and take it back in load_state_dict.",
    "data": "Return it from the loader's state_dict and take it back in load_state_dict.",
    "state": "The hook's load_state_dict must take back what its state_dict returns.",
    "hook": "Return it from the hook's state_dict and take it back in load_state_dict.",
}
_OWN = "has randomness or a state of its own, which no checkpoint holds"
# Why a value may differ when nothing before it does, by the beginning of its component.
_REASONS = {
    "data loader": f"although its position is the same: the sampler {_OWN}",
    "data set": f"although its index is the same: it, its mapper or its collate_fn {_OWN}. Draw "
    "from the global generators of Python, NumPy or torch, or define set_random_seed(seed)",
    "generators": f"although the step had seeded them: what runs before the forward pass {_OWN}",
    "layer": "although inputs, parameters and randomness are the same: it is nondeterministic, or "
    f"{_OWN}. Draw from torch's global generator, keep what it remembers in buffers, or try "
    "torch.use_deterministic_algorithms(True)",
    "loss": f"although the outputs of all layers are the same: the model's own forward {_OWN}",
    "gradient norm": f"although the gradients were the same: a hook's after_backward {_OWN}",
    "gradient": "although all losses are the same: the backward pass is nondeterministic, or ranks "
    "are summed in another order. Try torch.use_deterministic_algorithms(True)",
    "metrics.json": f"although all that was computed is the same: what puts it {_OWN}",
    "file": "although the runs came to the same end",
    "": f"although the gradients are the same: the optimizer or a hook {_OWN}",
}


class Difference(NamedTuple):
    """One value in which a run differs from an unbroken one.

    Attributes:
        order: Rises from causes to effects; values of one moment share it.
        rank, segment, iteration, phase: The moment, as in `Record`.
        component, item: The value's name.
        expected, found: The unbroken run's fingerprint and the other's; None where there is none.
    """

    order: int
    rank: int
    segment: int
    iteration: int
    phase: str
    component: str
    item: str
    expected: str | None
    found: str | None

    @property
    def is_restored(self) -> bool:
        """Whether a resume was to bring the value back."""
        return self.phase == "checkpoint" and self.segment > 0

    @property
    def is_note(self) -> bool:
        """Whether it matters only if something follows: an attribute of a hook may be anything."""
        return self.component.startswith("hook ")

    @property
    def may_be_a_time(self) -> bool:
        """Whether it may differ between runs that compute the same."""
        return self.component.startswith(("hook ", "state of hook ", "metrics.json"))


def differences(unbroken: Sequence[Record], other: Sequence[Record]) -> list[Difference]:
    """Returns all differences of a run from an unbroken one, causes before effects.

    The buffers of other ranks than 0 are passed over: no checkpoint holds them, and if they matter,
    a layer's output differs.

    Args:
        unbroken: Records of each rank, in the order in which they were written.
        other: Those of a run that may have been killed and resumed.
    """
    order = _order(unbroken, other)
    expected = {(r.rank, _moment(r)): _values(r) for r in unbroken}
    segments: dict[tuple[int, Moment], list[tuple[int, dict[tuple[str, str], str]]]] = {}
    for record in other:
        key = (record.rank, _moment(record))
        segments.setdefault(key, []).append((record.segment, _values(record)))
    found = []
    for rank, moment in {**expected, **segments}:
        before = expected.get((rank, moment), {})
        for segment, after in segments.get((rank, moment), [(0, {})]):
            where = (order[moment], rank, segment, *moment[:2])
            for name in {**before, **after}:
                is_unsaved = rank > 0 and name[0] == "buffer"
                if before.get(name) != after.get(name) and not is_unsaved:
                    found.append(Difference(*where, *name, before.get(name), after.get(name)))
    # Stable, so that the values of a record keep their order.
    return sorted(found, key=lambda d: (d.order, d.segment, d.rank))


def diagnose(
    unbroken: Sequence[Record], killed: Sequence[Record], again: Callable[[], Sequence[Record]]
) -> tuple[bool, list[str]]:
    """Compares a killed run with an unbroken one, and tells chance from state that was lost.

    Args:
        unbroken: Records of the unbroken run.
        killed: Those of the run that was killed and resumed.
        again: Makes another unbroken run; called only if there is any difference.

    Returns:
        Whether all that decides the future was the same; and in sentences what differs first and
        what that led to, or what is worth a look although nothing followed from it.
    """
    found = differences(unbroken, killed)
    noise = differences(unbroken, again()) if found else []
    varying = {(d.component, d.item) for d in noise if d.may_be_a_time}
    found = [d for d in found if (d.component, d.item) not in varying]
    first = next((d for d in found if not d.is_note), None)
    chance = next((d for d in noise if not d.may_be_a_time), None)
    if chance is not None and not (first and first.is_restored):
        return False, [f"Not deterministic even without a kill: {_say(chance)}"]
    lost = [_say(d) for d in _lost(found, first, unbroken, killed)]
    if first is not None:
        return False, [*lost, _say(first)]
    notes = [f"Nothing that was compared depends on it, but {text}" for text in lost]
    times = sorted(f"{c} `{item}`" for c, item in varying if not c.startswith("hook "))
    return True, notes + [f"Not compared, as it varies without a kill: {t}" for t in times]


def _moment(record: Record) -> Moment:
    return record.iteration, record.phase, record.part


def _values(record: Record) -> dict[tuple[str, str], str]:
    return {("the run", ""): "there", **record.values}


def _order(*runs: Sequence[Record]) -> dict[Moment, int]:
    moments = dict.fromkeys(_moment(record) for run in runs for record in run)
    return {moment: number for number, moment in enumerate(moments)}


def _lost(
    found: Sequence[Difference],
    first: Difference | None,
    unbroken: Sequence[Record],
    killed: Sequence[Record],
) -> list[Difference]:
    """Returns the attributes that no resume brought back, nor anything else until `first`."""
    order = _order(unbroken, killed)
    end = first.order if first else len(order)
    last: dict[int, int] = {}
    for record in killed:
        moment = _moment(record)
        if record.phase in ("checkpoint", "end", "after training") and order[moment] < end:
            last[record.segment] = order[moment]
    notes = [d for d in found if d.is_note and d.order < end]
    lasting = {(d.segment, d.component, d.item) for d in notes if d.order == last[d.segment]}
    lost: dict[tuple[str, str], Difference] = {}
    for d in notes:
        if d.is_restored and (d.segment, d.component, d.item) in lasting:
            lost.setdefault((d.component, d.item), d)
    return list(lost.values())


def _say(d: Difference) -> str:
    """Returns a sentence on a difference before which there is none."""
    rank = f" on rank {d.rank}" if d.rank else ""
    expected, found = ("missing" if v is None else v for v in (d.expected, d.found))
    if d.component == "the run":
        verb = "did not come to" if d.found is None else "came, unlike the unbroken one, to"
        return f"the run {verb} iteration {d.iteration}, {d.phase}{rank}."
    if d.is_restored:
        return (
            f"{d.component}: `{d.item}` is {found}{rank} after the resume at iteration "
            f"{d.iteration} and was {expected} in the unbroken run: state not restored. "
            f"{_MENDS[d.component.split()[0]]}"
        )
    item, _, detail = d.item.partition("; ")
    differs = (
        f"of iteration {d.iteration} differs" if detail else f"differs at iteration {d.iteration}"
    )
    # Hashes say nothing.
    values = "" if "#" in f"{expected}{found}" else f"{found}, in the unbroken run {expected}"
    told = "; ".join(filter(None, (detail, values)))
    reason = next(text for start, text in _REASONS.items() if d.component.startswith(start))
    if d.iteration < 0:
        reason = "before anything was computed: it does not follow from SEED"
    return f"{d.component}: {item} {differs}{rank}{f' ({told})' if told else ''}, {reason}."
