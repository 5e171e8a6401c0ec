"""`HookBase`, and what the loop does with several hooks: their order, and their states."""

import logging
import weakref
from collections.abc import Iterable, Sequence
from typing import Any

from trainkit.utils import comm
from trainkit.utils.errors import ConfigError, UnknownNameError
from trainkit.utils.stop_signals import StopRequested

logger = logging.getLogger(__name__)

PRIORITIES = {
    "HIGHEST": 0,
    "VERY_HIGH": 10,
    "HIGH": 30,
    "ABOVE_NORMAL": 40,
    "NORMAL": 50,
    "BELOW_NORMAL": 60,
    "LOW": 70,
    "VERY_LOW": 90,
    "LOWEST": 100,
}
"""OpenMMLab's names of priorities; a smaller number runs earlier."""


class HookBase:
    """Something that a trainer calls around its steps; override what you need.

    The trainer calls, in this order:

        before_train
        for each iteration: before_step, the step itself (with after_backward inside), after_step
        after_train

    `self.trainer.iter` is the 0-based iteration; in `after_train`, `iter == max_iter` means that
    the run came to its end. Slow work belongs in `after_step`. A hook with a memory also overrides
    `state_dict` and `load_state_dict`, of tensors and plain values; the state of rank 0 is saved.

    Attributes:
        priority: A number in [0, 100] or a name in `PRIORITIES`; hooks run in rising order, equal
            ones in the order of their registration.
        is_collective: Whether every rank must have the hook, because its methods communicate.
    """

    priority: int | str = 50
    is_collective = False
    _trainer_ref: weakref.ref[Any] | None = None

    @property
    def trainer(self) -> Any:
        """The trainer, which owns its hooks and not the other way round.

        Raises:
            RuntimeError: If the hook was never registered, or its trainer is gone.
        """
        if self._trainer_ref is None:
            raise RuntimeError(
                f"The hook {type(self).__name__} has no trainer yet: register it first, with "
                "trainer.register_hooks([hook])."
            )
        trainer = self._trainer_ref()
        if trainer is None:
            raise RuntimeError(
                f"The trainer of the hook {type(self).__name__} no longer exists: keep a reference "
                "to the trainer for as long as its hooks are used."
            )
        return trainer

    @trainer.setter
    def trainer(self, trainer: Any) -> None:
        self._trainer_ref = weakref.ref(trainer)

    def before_train(self) -> None:
        """Called once, before the first iteration."""

    def after_train(self) -> None:
        """Called once at the end, also after a failure or an interruption."""

    def before_step(self) -> None:
        """Called before each step."""

    def after_backward(self) -> None:
        """Called within each step, when the gradients are complete and not yet clipped."""

    def after_step(self) -> None:
        """Called after each step."""

    def state_dict(self) -> dict[str, Any]:
        """Returns what the hook must remember over a resume."""
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Takes back what `state_dict` returned."""


def priority_of(hook: HookBase) -> int:
    """Returns a hook's priority as a number.

    Raises:
        UnknownNameError: If it is a name that is not in `PRIORITIES`.
        ConfigError: If it is a number outside [0, 100].
    """
    priority = hook.priority
    if isinstance(priority, str):
        if priority not in PRIORITIES:
            raise UnknownNameError(f"priority of {type(hook).__name__}", priority, PRIORITIES)
        return PRIORITIES[priority]
    if not 0 <= priority <= 100:
        raise ConfigError(
            f"The priority of the hook {type(hook).__name__} is {priority}; it must be in "
            "[0, 100], where 0 runs first and 50 is normal."
        )
    return priority


def overriding(hooks: Iterable[HookBase], method: str) -> list[HookBase]:
    """Returns the hooks that do something in `method`, so that the loop calls no others."""
    base = getattr(HookBase, method)
    return [h for h in hooks if getattr(getattr(h, method), "__func__", None) is not base]


def hook_keys(hooks: Sequence[HookBase]) -> list[str]:
    """Returns a name for each hook: its class's, numbered from the second of a class on."""
    keys: list[str] = []
    for hook in hooks:
        name = type(hook).__qualname__
        count = sum(key.split("#")[0] == name for key in keys)
        keys.append(f"{name}#{count + 1}" if count else name)
    return keys


def hooks_by_key(hooks: Sequence[HookBase]) -> dict[str, HookBase]:
    """Returns the hooks by their keys, in order."""
    return dict(zip(hook_keys(hooks), hooks, strict=True))


class StepHooks:
    """The hooks that do something around a step: the loop calls no others.

    What follows a step is known by keys, because a checkpoint cuts it and a resume finishes it.

    Args:
        hooks: All hooks of a trainer, in order.
        last_update: The iteration before the first step.

    Attributes:
        before_step, after_backward: Those with such a method.
        last_update: The iteration whose step was done last.
        pending: The keys of those whose `after_step` has yet to follow it.
    """

    def __init__(self, hooks: Sequence[HookBase], last_update: int = -1) -> None:
        self.last_update = last_update
        self.before_step = overriding(hooks, "before_step")
        self.after_backward = overriding(hooks, "after_backward")
        keyed = hooks_by_key(hooks).items()
        self._hooks = {key: hook for key, hook in keyed if overriding([hook], "after_step")}
        self._keys = list(self._hooks)
        self.pending: list[str] = []

    def note_update(self, iteration: int) -> None:
        """Notes that a step is done, which every hook has yet to follow."""
        self.last_update, self.pending = iteration, self._keys

    def after_step(self, keys: Iterable[str] | None = None) -> None:
        """Calls `after_step` of all hooks, or of those with the given keys.

        One that is cut short by `StopRequested` is still pending, and so are those behind it.
        """
        keys = self._keys if keys is None else self._select(keys)
        for number, key in enumerate(keys, start=1):
            self.pending = keys[number:]
            try:
                self._hooks[key].after_step()
            except StopRequested:
                self.pending = keys[number - 1 :]
                raise

    def _select(self, keys: Iterable[str]) -> list[str]:
        wanted = set(keys)
        for key in sorted(wanted - self._hooks.keys()) if comm.is_main_process() else ():
            logger.warning("The hook %s had yet to run in the resumed step; it is gone.", key)
        return [key for key in self._hooks if key in wanted]


def check_on_all_ranks(hooks: Sequence[HookBase]) -> None:
    """Checks that the hooks that communicate are the same on every rank.

    Raises:
        ConfigError: On every rank, if they are not: training would wait forever.
    """
    keys = [key for key, hook in hooks_by_key(hooks).items() if hook.is_collective]
    for rank, others in enumerate(comm.all_gather(keys)):
        if others != keys:
            raise ConfigError(
                f"Hooks that communicate must be registered on every rank, but rank "
                f"{comm.get_rank()} has {keys} and rank {rank} has {others}. Register them without "
                "asking for the rank; only rank 0 writes files."
            )


def hooks_state_dict(hooks: Sequence[HookBase]) -> dict[str, Any]:
    """Returns the states of all hooks that have one, by their keys."""
    states = {key: hook.state_dict() for key, hook in hooks_by_key(hooks).items()}
    return {key: state for key, state in states.items() if state}


def load_hooks_state_dict(
    hooks: Sequence[HookBase], states: dict[str, Any] | None
) -> dict[str, Any]:
    """Gives each hook its state back, and returns the states that have no hook."""
    by_key = hooks_by_key(hooks)
    left = {}
    for key, state in (states or {}).items():
        if key in by_key:
            by_key[key].load_state_dict(state)
        else:
            left[key] = state
    return left


def warn_of_states(left: dict[str, Any]) -> None:
    """Says which states of a checkpoint found no hook; other ranks than 0 need not have all."""
    for key in left if comm.is_main_process() else ():
        logger.warning(
            "The checkpoint holds a state of the hook %s, which is not registered: dropped. "
            "Register the hook before train() to have it go on.",
            key,
        )
