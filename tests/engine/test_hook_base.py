import logging
from dataclasses import dataclass
from typing import Any

import pytest

from trainkit.engine.hook_base import (
    HookBase,
    StepHooks,
    check_on_all_ranks,
    hook_keys,
    hooks_state_dict,
    load_hooks_state_dict,
    overriding,
    priority_of,
    warn_of_states,
)
from trainkit.utils import comm
from trainkit.utils.errors import ConfigError, UnknownNameError
from trainkit.utils.stop_signals import Interruption, StopRequested


class Counter(HookBase):
    def __init__(self, count: int = 0) -> None:
        self.count = count

    def after_step(self) -> None:
        self.count += 1

    def state_dict(self) -> dict[str, Any]:
        return {"count": self.count}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.count = state["count"]


def test_an_unregistered_hook_says_how_to_register_it() -> None:
    with pytest.raises(RuntimeError, match=r"hook Counter has no trainer yet.*register_hooks"):
        _ = Counter().trainer


def test_a_hook_of_a_dead_trainer_says_so(loop: Any) -> None:
    hook = Counter()
    loop().register_hooks([hook])
    with pytest.raises(RuntimeError, match=r"trainer of the hook Counter no longer exists.*keep"):
        _ = hook.trainer


@pytest.mark.parametrize(("name", "number"), [("VERY_HIGH", 10), ("LOWEST", 100), (0, 0), (73, 73)])
def test_priorities_are_numbers_or_names(name: int | str, number: int) -> None:
    hook = HookBase()
    hook.priority = name
    assert priority_of(hook) == number


def test_an_unknown_priority_names_the_nearest() -> None:
    hook = Counter()
    hook.priority = "VERY_LO"
    with pytest.raises(UnknownNameError, match=r"priority of Counter 'VERY_LO'.*'VERY_LOW'"):
        priority_of(hook)


@pytest.mark.parametrize("number", [-1, 101])
def test_a_priority_out_of_range_is_an_error(number: int) -> None:
    hook = Counter()
    hook.priority = number
    with pytest.raises(ConfigError, match=rf"hook Counter is {number}; it must be in \[0, 100\]"):
        priority_of(hook)


def test_only_overriding_hooks_are_found_those_of_an_instance_too() -> None:
    plain, counter, patched = HookBase(), Counter(), HookBase()
    patched.after_step = lambda: None  # type: ignore[method-assign]  # what a user may do
    assert overriding([plain, counter, patched], "after_step") == [counter, patched]
    assert overriding([plain, counter, patched], "before_step") == []


def test_hooks_of_one_class_are_numbered() -> None:
    assert hook_keys([Counter(), HookBase(), Counter(), Counter()]) == [
        "Counter",
        "HookBase",
        "Counter#2",
        "Counter#3",
    ]


def test_d10_twin_hooks_keep_separate_states() -> None:
    states = hooks_state_dict([Counter(3), HookBase(), Counter(5)])
    assert states == {"Counter": {"count": 3}, "Counter#2": {"count": 5}}
    first, second = Counter(), Counter()
    load_hooks_state_dict([first, second], states)
    assert (first.count, second.count) == (3, 5)


def test_d10_a_hook_that_only_gives_a_state_out_can_be_resumed() -> None:
    class OnlyGives(HookBase):
        def state_dict(self) -> dict[str, Any]:
            return {"count": 1}

    states = hooks_state_dict([OnlyGives(), OnlyGives()])
    assert list(states.values()) == [{"count": 1}] * 2
    assert load_hooks_state_dict([OnlyGives(), OnlyGives()], states) == {}


def test_a_hook_that_is_registered_after_loading_gets_its_state(loop: Any) -> None:
    trainer = loop()
    trainer.register_hooks([Counter()])
    trainer.train(0, 3)
    state = trainer.state_dict()
    resumed, counter = loop(), Counter()
    resumed.load_state_dict(state)
    resumed.register_hooks([counter])
    resumed.train(3, 5)
    assert counter.count == 5


def test_a_state_without_its_hook_is_left_and_named(caplog: pytest.LogCaptureFixture) -> None:
    left = load_hooks_state_dict([HookBase()], {"Counter": {"count": 1}})
    assert left == {"Counter": {"count": 1}}
    with caplog.at_level(logging.WARNING):
        warn_of_states(left)
    assert "state of the hook Counter, which is not registered" in caplog.text


def test_pending_hooks_are_those_after_the_running_one() -> None:
    seen: list[list[str]] = []

    class Noting(HookBase):
        __qualname__ = "Noting"

        def after_step(self) -> None:
            seen.append(step_hooks.pending)

    step_hooks = StepHooks([Noting(), HookBase(), Noting(), Noting()])
    assert step_hooks.pending == []
    step_hooks.note_update(4)
    assert step_hooks.last_update == 4
    assert step_hooks.pending == ["Noting", "Noting#2", "Noting#3"]
    step_hooks.after_step()
    assert seen == [["Noting#2", "Noting#3"], ["Noting#3"], []]
    assert step_hooks.pending == []
    seen.clear()
    step_hooks.after_step(["Noting#3", "Noting"])
    assert seen == [["Noting#3"], []]


def test_a_hook_that_is_cut_short_is_pending_again_with_those_behind_it() -> None:
    calls: list[str] = []

    class First(Counter):
        __qualname__ = "First"

    class Cut(HookBase):
        __qualname__ = "Cut"

        def after_step(self) -> None:
            calls.append("cut")
            if len(calls) == 1:
                raise StopRequested(Interruption("SIGTERM", 143))

    first, last = First(), Counter()
    step_hooks = StepHooks([first, Cut(), last])
    step_hooks.note_update(7)
    with pytest.raises(StopRequested):
        step_hooks.after_step()
    assert step_hooks.pending == ["Cut", "Counter"]
    step_hooks.after_step(step_hooks.pending)
    assert (first.count, len(calls), last.count) == (1, 2, 1)
    assert step_hooks.pending == []


def test_a_pending_hook_that_is_gone_is_named(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING):
        StepHooks([Counter()]).after_step(["Drawer"])
    assert "The hook Drawer had yet to run" in caplog.text


def test_hooks_that_compare_equal_are_told_apart() -> None:
    @dataclass
    class Same(HookBase):
        name: str = "x"

        def after_step(self) -> None:
            self.name = "ran"

    first, second = Same(), Same()
    step_hooks = StepHooks([first, second])
    step_hooks.after_step([hook_keys([first, second])[1]])
    assert (first.name, second.name) == ("x", "ran")


def test_collective_hooks_must_be_the_same_on_every_rank(monkeypatch: pytest.MonkeyPatch) -> None:
    hook = Counter()
    hook.is_collective = True
    check_on_all_ranks([hook, HookBase()])
    monkeypatch.setattr(comm, "all_gather", lambda keys: [keys, []])
    with pytest.raises(ConfigError, match=r"rank 0 has \['Counter'\] and rank 1 has \[\]"):
        check_on_all_ranks([hook, HookBase()])
