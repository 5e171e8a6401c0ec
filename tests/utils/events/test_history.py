import math
import sys

import pytest
import torch

from trainkit.utils.events.history import HistoryBuffer


def filled(count: int, max_length: int = 5) -> HistoryBuffer:
    """A history whose value at iteration i is 10 * i."""
    history = HistoryBuffer(max_length)
    for i in range(count):
        history.update(10.0 * i, i)
    return history


@pytest.mark.parametrize("count", [0, 1, 4, 5, 6, 9, 10, 13])
def test_ring_keeps_the_newest_values_in_order(count: int) -> None:
    expected = [(10.0 * i, i) for i in range(count)][-5:]
    assert filled(count).values() == expected


def test_d37_memory_stops_growing_when_the_ring_is_full() -> None:
    history = filled(1024, max_length=1024)

    def size() -> int:
        return sum(sys.getsizeof(value) for value in vars(history).values())

    full = size()
    for i in range(1024, 5000):
        history.update(float(i), i)
    # The sum and the count are numbers that may need a few bytes more.
    assert size() <= full + 64
    assert len(history.values()) == 1024


def test_statistics_against_values_computed_by_hand() -> None:
    history = HistoryBuffer(max_length=4)
    for i, value in enumerate([8.0, 1.0, 7.0, 2.0, 6.0]):
        history.update(value, i)
    assert history.latest() == 6.0
    assert history.median(3) == 6.0  # Of 7, 2, 6.
    assert history.median(4) == 4.0  # Of 1, 7, 2, 6: between 2 and 6.
    assert history.avg(3) == 5.0
    assert history.avg(100) == 4.0  # Of the four that are kept.
    assert history.global_avg() == 4.8  # Of all five.
    assert history.last(2) == [(2.0, 3), (6.0, 4)]


def test_iteration_defaults_to_the_number_of_values_so_far() -> None:
    history = HistoryBuffer(max_length=2)
    for value in (5.0, 6.0, 7.0):
        history.update(value)
    assert history.values() == [(6.0, 1), (7.0, 2)]


@pytest.mark.parametrize("value", [math.nan, math.inf])
@pytest.mark.parametrize("place", range(5))
def test_statistics_survive_values_that_are_not_finite(value: float, place: int) -> None:
    values = [5.0, 1.0, 2.0, 4.0]
    values.insert(place, value)
    history = HistoryBuffer()
    for i, v in enumerate(values):
        history.update(v, i)
    assert not math.isfinite(history.avg(5))
    # An infinity is the largest value; a NaN has no place among the others.
    assert history.median(5) == pytest.approx(4.0 if value == math.inf else math.nan, nan_ok=True)


def test_infinities_of_both_signs_average_to_nan() -> None:
    history = HistoryBuffer()
    history.update(math.inf, 0)
    history.update(-math.inf, 1)
    assert math.isnan(history.avg(2))


@pytest.mark.parametrize("count", [3, 5, 8])
def test_after_returns_later_values_newest_first(count: int) -> None:
    history = filled(count)
    assert history.after(count - 3) == [(10.0 * i, i) for i in (count - 1, count - 2)]
    assert history.after(count - 1) == []
    assert len(history.after(-1)) == min(count, 5)


@pytest.mark.parametrize("count", [4, 5, 8])
def test_replace_after_puts_other_values_of_the_same_iterations(count: int) -> None:
    history = filled(count)
    history.replace_after(count - 3, {count - 2: -1.0, count - 1: -2.0})
    expected = [(10.0 * i, i) for i in range(count - 2)] + [(-1.0, count - 2), (-2.0, count - 1)]
    assert history.values() == expected[-5:]
    total = sum(10.0 * i for i in range(count - 2)) - 3.0
    assert history.global_avg() == pytest.approx(total / count)


@pytest.mark.parametrize("count", [4, 5, 8])
def test_replace_after_may_change_the_number_of_values(count: int) -> None:
    history = filled(count)
    history.replace_after(count - 2, {count - 1: 1.0, count: 2.0, count + 1: 3.0})
    expected = [(10.0 * i, i) for i in range(count - 1)]
    expected += [(1.0, count - 1), (2.0, count), (3.0, count + 1)]
    assert history.values() == expected[-5:]
    assert history.global_avg() == pytest.approx(sum(v for v, _ in expected) / len(expected))
    history.replace_after(count - 2, {})
    assert history.latest() == 10.0 * (count - 2)


@pytest.mark.parametrize("count", [4, 8])
def test_ring_works_on_after_a_replacement(count: int) -> None:
    history = filled(count)
    history.replace_after(count - 2, {count - 1: 1.0})
    for i in range(count, count + 12):
        history.update(10.0 * i, i)
    assert history.values() == [(10.0 * i, i) for i in range(count + 7, count + 12)]


def test_replace_after_fills_an_empty_history() -> None:
    history = HistoryBuffer()
    history.replace_after(-1, {3: 1.5})
    assert history.values() == [(1.5, 3)]


@pytest.mark.parametrize("count", [0, 3, 5, 7])
def test_state_brings_everything_back_and_the_ring_goes_on(count: int) -> None:
    original, resumed = filled(count), HistoryBuffer(5)
    resumed.load_state_dict(original.state_dict())
    for i in range(count, count + 3):
        original.update(10.0 * i, i)
        resumed.update(10.0 * i, i)
        assert resumed.values() == original.values()
        assert resumed.global_avg() == original.global_avg()
    assert resumed.median(3) == original.median(3)


def test_state_of_a_longer_history_fits_into_a_shorter_one() -> None:
    history = HistoryBuffer(3)
    history.load_state_dict(filled(9, max_length=8).state_dict())
    history.update(90.0, 9)
    assert history.values() == [(70.0, 7), (80.0, 8), (90.0, 9)]
    assert history.global_avg() == 45.0


def test_state_keeps_every_bit_of_a_value() -> None:
    history, resumed = HistoryBuffer(), HistoryBuffer()
    history.update(0.1 + 0.2, 2**40)
    state = history.state_dict()
    assert state["values"].dtype == torch.float64
    resumed.load_state_dict(state)
    assert resumed.values() == [(0.1 + 0.2, 2**40)]


def test_empty_history_says_so() -> None:
    history = HistoryBuffer()
    assert history.values() == []
    assert history.after(0) == []
    for read in (history.latest, lambda: history.median(3), lambda: history.avg(3)):
        with pytest.raises(IndexError, match="The history is empty: nothing was put into it yet"):
            read()
