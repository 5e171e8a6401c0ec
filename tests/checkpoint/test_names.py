"""Names are matched where wrappers or a larger model changed them, and never guessed."""

import logging
from typing import Any

import pytest
import torch
from torch import nn

from trainkit.checkpoint.names import align_names, match_suffixes


class Compiled(nn.Module):
    """What torch.compile returns, as far as names go."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self._orig_mod = module


def aligned(names: str, own: str) -> dict[str, str]:
    """Returns the old names by the new ones."""
    state = {name: name for name in names.split()}
    align_names(state, own.split())
    return state


def matched(names: str, own: str) -> dict[str, str]:
    state = {name: name for name in names.split()}
    match_suffixes(state, own.split())
    return {new: old for new, old in state.items() if new != old}


@pytest.mark.parametrize("name", ["module._orig_mod.a.w", "a.module.w", "_orig_mod.a._orig_mod.w"])
@pytest.mark.parametrize("own", ["a.w", "module.a.w", "a._orig_mod.module.w"])
def test_d25_wrappers_anywhere_in_a_name_are_passed_over(name: str, own: str) -> None:
    # The second name has the wrapper that is before all of them.
    first = "module." if name.startswith("module.") else ""
    own_first = "module." if own.startswith("module.") else ""
    expected = {own: name, f"{own_first}b": f"{first}b"}
    assert aligned(f"{name} {first}b", f"{own} {own_first}b") == expected


@pytest.mark.parametrize(
    ("names", "own", "expected"),
    [
        # A module that is called "module", of a model that is wrapped, or of both, or of none.
        ("module.w", "module.w", {"module.w": "module.w"}),
        ("module.module.w", "module.w", {"module.w": "module.module.w"}),
        (
            "module.module.w module.w",
            "module.w w",
            {"module.w": "module.module.w", "w": "module.w"},
        ),
        ("a.module.w a.w", "a.w a.module.w", {"a.module.w": "a.module.w", "a.w": "a.w"}),
        # Which of two is meant is not known.
        ("a.module.w b", "a.module.module.w module.a.w b", {"a.module.w": "a.module.w", "b": "b"}),
        ("_orig_mod.w w", "w", {"_orig_mod.w": "_orig_mod.w", "w": "w"}),
        # What the model has not is reported without its wrappers.
        ("module.a module._orig_mod.x", "a", {"a": "module.a", "x": "module._orig_mod.x"}),
    ],
)
def test_a_name_is_changed_only_if_it_can_mean_no_other(
    names: str, own: str, expected: dict[str, str]
) -> None:
    assert aligned(names, own) == expected


def test_versions_of_modules_move_with_their_names() -> None:
    def net() -> nn.Module:
        return nn.Sequential(nn.Linear(2, 3), nn.Sequential(nn.BatchNorm1d(3)))

    plain, compiled = net().state_dict(), Compiled(net()).state_dict()
    state: Any = nn.DataParallel(Compiled(net())).state_dict()
    align_names(state, plain)
    assert list(state) == list(plain)
    assert state._metadata == plain._metadata  # type: ignore[attr-defined]  # torch sets it
    align_names(state, compiled)
    assert state._metadata["_orig_mod.1.0"] == {"version": 2}
    state = nn.Sequential(net()).state_dict()
    match_suffixes(state, [f"backbone.{name}" for name in plain])
    assert state._metadata["backbone.1.0"] == {"version": 2}


def test_the_longest_common_end_wins() -> None:
    assert matched(
        "encoder.res2.conv.w encoder.res3.conv.w encoder.fc.b",
        "net.body.res2.conv.w net.body.res3.conv.w net.body.res4.conv.w head.cls.b",
    ) == {
        "net.body.res2.conv.w": "encoder.res2.conv.w",
        "net.body.res3.conv.w": "encoder.res3.conv.w",
    }


def test_equal_names_come_first() -> None:
    assert matched("a.b.w", "a.b.w x.a.b.w") == {}
    assert matched("a.b.w x.b.w", "a.b.w y.b.w") == {"y.b.w": "x.b.w"}


def test_one_part_is_enough_only_if_it_is_a_whole_name() -> None:
    assert matched("fc.w", "head.w") == {}
    assert matched("w b", "head.w head.b") == {"head.w": "w", "head.b": "b"}
    assert matched("fc.w fc.b", "w b") == {"w": "fc.w", "b": "fc.b"}


def test_what_is_ambiguous_stays_and_is_reported(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO):
        assert matched("enc.conv.w enc.norm.w", "left.conv.w right.conv.w left.norm.w") == {
            "left.norm.w": "enc.norm.w"
        }
    assert caplog.messages == [
        "matching_heuristics took 1 entries of the checkpoint's enc.* for the model's left.*",
        "matching_heuristics left out 1 ends that are ambiguous, such as\n"
        "  enc.conv.w may be left.conv.w, right.conv.w",
    ]


def test_two_entries_never_become_one() -> None:
    assert matched("a.x.w b.x.w", "c.x.w") == {}


def test_names_of_any_number_are_matched_in_no_time() -> None:
    names = " ".join(f"enc.layer{i}.{j}.attn.w" for i in range(300) for j in range(10))
    found = matched(names, names.replace("enc.", "model.text.enc2."))
    assert len(found) == 3000
    assert all(new == old.replace("enc.", "model.text.enc2.") for new, old in found.items())


def test_no_names_are_no_error() -> None:
    assert matched("", "") == {}
    assert aligned("", "a") == {}
    state = {"a": torch.zeros(1)}
    match_suffixes(state, [])
    assert list(state) == ["a"]
