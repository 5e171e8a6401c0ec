"""A job of a period runs after every period-th iteration."""

import pytest

from trainkit.utils.period import is_due


@pytest.mark.parametrize(
    ("period", "due"), [(1, [0, 1, 2, 3, 4, 5]), (2, [1, 3, 5]), (3, [2, 5]), (6, [5]), (7, [])]
)
def test_a_job_runs_after_every_period_th_iteration(period: int, due: list[int]) -> None:
    assert [iteration for iteration in range(6) if is_due(iteration, period)] == due


def test_period_zero_means_never() -> None:
    assert not any(is_due(iteration, 0) for iteration in range(100))
