"""The policies in small; whole runs with a poisoned sample are in test_fault_non_finite.py."""

import copy
import math
import pickle
from typing import Any

import pytest
import torch
from torch import nn

from trainkit.engine.non_finite import MAX_IN_A_ROW, NonFiniteError, NonFiniteGuard
from trainkit.utils.errors import ConfigError
from trainkit.utils.events.storage import EventStorage

GOOD, BAD = torch.tensor(1.0), torch.tensor(math.nan)
SAMPLES = "Its samples, as epoch:offset=index: 0:4=7. "


def skip(guard: NonFiniteGuard, storage: EventStorage, model: nn.Module | None = None) -> None:
    """Does a bad step."""
    guard.begin_step(model or nn.BatchNorm1d(2))
    assert guard.must_skip(BAD)
    guard.skip(storage, {"loss_a": torch.tensor(0.5), "total_loss": BAD}, SAMPLES)


def test_an_unknown_policy_names_the_known_ones() -> None:
    with pytest.raises(ConfigError, match=r"'ignore'; it must be one of 'raise', 'skip', 'roll"):
        NonFiniteGuard("ignore")


@pytest.mark.parametrize(("policy", "judges"), [("raise", False), ("skip", True)])
def test_only_policies_that_judge_each_step_wait_for_a_device(policy: str, judges: bool) -> None:
    assert NonFiniteGuard(policy).judges_now == judges


@pytest.mark.parametrize("policy", ["raise", "rollback"])
def test_other_policies_skip_nothing_and_do_not_read_the_norm(policy: str, fake_cuda: Any) -> None:
    assert not NonFiniteGuard(policy).must_skip(fake_cuda(BAD))


@pytest.mark.parametrize("norm", [math.nan, math.inf])
def test_a_bad_gradient_is_to_be_skipped_and_a_good_one_not(norm: float) -> None:
    guard = NonFiniteGuard("skip")
    assert guard.must_skip(torch.tensor(norm))
    assert not guard.must_skip(GOOD)


def test_a_skipped_step_is_counted_and_said_with_its_values_and_samples(
    caplog: pytest.LogCaptureFixture,
) -> None:
    guard, storage = NonFiniteGuard("skip"), EventStorage(9)
    skip(guard, storage)
    assert storage.latest() == {"skipped_steps": (1.0, 9)}
    assert caplog.messages == [
        "The gradient of iteration 9 is not finite. The losses of rank 0: loss_a=0.5, "
        f"total_loss=nan. {SAMPLES}The update is skipped, 1 so far."
    ]


def test_a_skipped_step_leaves_the_buffers_as_they_were() -> None:
    guard, model = NonFiniteGuard("skip"), nn.BatchNorm1d(2)
    model(torch.randn(4, 2))
    before = copy.deepcopy(model.state_dict())
    guard.begin_step(model)
    model(torch.full((4, 2), math.nan))
    guard.skip(EventStorage(), {"total_loss": BAD}, "")
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_too_many_skipped_steps_in_a_row_end_the_run() -> None:
    guard = NonFiniteGuard("skip")
    for iteration in range(MAX_IN_A_ROW - 1):
        skip(guard, EventStorage(iteration))
    with pytest.raises(
        NonFiniteError, match=rf"n {MAX_IN_A_ROW} is .*0:4=7.*the 19 .*BASE_LR"
    ) as e:
        skip(guard, EventStorage(MAX_IN_A_ROW))
    assert e.value.iteration == MAX_IN_A_ROW


def test_a_good_step_begins_the_row_anew() -> None:
    guard = NonFiniteGuard("skip")
    for iteration in range(3 * MAX_IN_A_ROW):
        if iteration % 2:
            skip(guard, EventStorage(iteration))
        else:
            guard.must_skip(GOOD)
    assert guard.num_skipped == 1.5 * MAX_IN_A_ROW


def test_the_counts_travel_in_the_state() -> None:
    guard, resumed = NonFiniteGuard("skip"), NonFiniteGuard("skip")
    for iteration in range(MAX_IN_A_ROW - 1):
        skip(guard, EventStorage(iteration))
    resumed.load_state_dict(guard.state_dict())
    assert resumed.num_skipped == MAX_IN_A_ROW - 1
    with pytest.raises(NonFiniteError, match="steps before, which were skipped"):
        skip(resumed, EventStorage(20))


def test_a_state_from_before_there_were_policies_begins_at_zero() -> None:
    guard = NonFiniteGuard("skip")
    skip(guard, EventStorage())
    guard.load_state_dict({})
    assert guard.num_skipped == 0


def test_the_error_tells_the_iteration_and_survives_its_way_between_processes() -> None:
    error = pickle.loads(pickle.dumps(NonFiniteError("Iteration 7 …", 7)))
    assert (str(error), error.iteration) == ("Iteration 7 …", 7)
