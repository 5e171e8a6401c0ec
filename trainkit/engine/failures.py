"""What failed, and where: the first error of several, on which rank, in what part of a run."""

import contextlib
import logging
import traceback
from collections.abc import Callable, Iterator, Sequence

from trainkit.data.common import WorkerDiedError
from trainkit.engine.hook_base import HookBase
from trainkit.evaluation.testing import ResultsMismatchError
from trainkit.utils import comm
from trainkit.utils.errors import USER_ERRORS, add_note
from trainkit.utils.stop_signals import Interruption, StopRequested

logger = logging.getLogger(__name__)


class RankDiedError(RuntimeError):
    """A process of several that ended without an error of its own, as by SIGKILL."""


MESSAGE_ERRORS = (
    *(*USER_ERRORS, ResultsMismatchError, FloatingPointError),
    *(RankDiedError, WorkerDiedError),
)
"""Errors whose text says all; a traceback would hide it."""

_HOOK_METHODS = frozenset(name for name in vars(HookBase) if not name.startswith("_"))
_PLACES = {
    "draw_batches": "fetching a batch",
    "_forward_backward": "in the forward or backward pass",
    "run_step": "in the step",
    "inference_on_dataset": "in evaluation",
}
_NOTES = ("Training failed", "Failed")


def call_each(
    functions: Sequence[Callable[[], object]], failure: BaseException | None = None
) -> Interruption | None:
    """Calls all functions, even when some raise.

    Args:
        functions: Called in order.
        failure: What has failed before and will be raised by the caller; errors become its notes.

    Returns:
        The first reason for which one of them was cut short, if any was.

    Raises:
        Exception: The first error, with the texts of the others as its notes; none after a failure.
    """
    first, interruption = failure, None
    try:
        for function in functions:
            try:
                function()
            except StopRequested as stop:
                interruption = interruption or stop.interruption
            except Exception as e:
                if first is None:
                    first = e
                else:
                    logger.exception("%s failed as well:", function.__qualname__)
                    own = f"{function.__qualname__} raised too: {e!r}"
                    for note in (own, *getattr(e, "__notes__", [])):
                        add_note(first, note)
        if first is not None and failure is None:
            raise first
        return interruption
    finally:
        # An exception in a local of a frame that it passed through is a reference cycle.
        del first, failure


def checked_policy(on_error: str) -> str:
    """Returns what follows a failed write, if it is a policy: "raise" or "warn".

    Raises:
        ValueError: If it is not.
    """
    if on_error not in ("raise", "warn"):
        raise ValueError(
            f"on_error (CHECKPOINT.ON_ERROR) is {on_error!r}; it must be 'raise' or 'warn'."
        )
    return on_error


@contextlib.contextmanager
def surviving(kind: type[Exception], on_error: str, what: str) -> Iterator[None]:
    """Trains on without `what`, whose write the storage refused, raising `kind`, if that is set."""
    try:
        yield
    except kind as e:
        if on_error == "raise":
            raise
        logger.error("TRAINING GOES ON WITHOUT %s. %s", what, str(e))


def place_of(failure: BaseException) -> str:
    """Returns in which part of a run an error was raised, by its traceback; "" if in none."""
    place = ""
    for frame, _ in traceback.walk_tb(failure.__traceback__):
        name = frame.f_code.co_name
        place = _PLACES.get(name, place)
        # Asked of no other frame: one that still runs would keep its locals, the error among them.
        owner = frame.f_locals.get("self") if name in _HOOK_METHODS else None
        if isinstance(owner, HookBase):
            place = f"in the hook {type(owner).__qualname__}.{name}"
    return place


def note_place(failure: BaseException, iteration: int | None = None) -> str:
    """Leaves on an error the note where a run failed, once, for whoever shows it.

    Args:
        failure: The error, caught where all of the run is below.
        iteration: The iteration; None outside the loop.

    Returns:
        The note: "Training failed in iteration 7 on rank 1, in the hook Foo.after_step."
    """
    place = place_of(failure)
    if iteration is None:
        note, place = "Failed", place or "outside of training"
    else:
        note = f"Training failed in iteration {iteration}"
    if comm.get_world_size() > 1:
        note += f" on rank {comm.get_rank()}"
    note += f", {place}." if place else "."
    if not any(n.startswith(_NOTES) for n in getattr(failure, "__notes__", [])):
        add_note(failure, note)
    return note


def log_failure(iteration: int, failure: BaseException) -> None:
    """Logs what ended a run and where, with a traceback unless its text says all."""
    says_all = isinstance(failure, (*MESSAGE_ERRORS, KeyboardInterrupt))
    note = note_place(failure, iteration)
    if says_all:
        logger.error("%s %s: %s", note, type(failure).__name__, failure)
    else:
        logger.exception("%s %s", note, summary(failure))


def summary(failure: BaseException) -> str:
    """Returns an error in a line; that of a loader's worker holds a whole traceback."""
    return f"{type(failure).__name__}: {failure}".partition("\n")[0]
