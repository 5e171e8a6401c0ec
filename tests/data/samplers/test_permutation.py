import numpy as np
import pytest

from trainkit.data.samplers.permutation import Permutation

SIZES = [1, 2, 3, 4, 5, 7, 10, 16, 17, 99, 100, 101, 1000, 1001, 10_007, 65_536]
GOLDEN_10 = [1, 7, 8, 2, 3, 0, 5, 4, 6, 9]
GOLDEN_1001 = [611, 814, 415, 84, 233, 407, 161, 686]
GOLDEN_LARGE = [86382261, 66237569, 53465533, 30085406, 29923447, 61301385, 14192962, 56455214]


@pytest.mark.parametrize("size", SIZES)
def test_every_index_appears_exactly_once(size: int) -> None:
    for key in (0, 1, 2**64 - 1):
        order = Permutation(size, key)[:]
        assert order.dtype == np.int64
        assert np.array_equal(np.sort(order), np.arange(size))


def test_every_small_size_is_a_permutation() -> None:
    for size in range(1, 200):
        assert sorted(Permutation(size, key=size)) == list(range(size))


def test_the_order_never_changes_between_versions() -> None:
    assert list(Permutation(10, key=0)) == GOLDEN_10
    assert Permutation(1001, key=12345)[:8].tolist() == GOLDEN_1001
    assert Permutation(10**8, key=2**64 - 1)[99_999_992:].tolist() == GOLDEN_LARGE


def test_keys_give_different_orders() -> None:
    orders = {tuple(Permutation(50, key)) for key in range(100)}
    assert len(orders) == 100


def test_entries_and_slices_agree() -> None:
    for size in (1001, 2**20 + 1):
        order = Permutation(size, key=5)
        alone = [Permutation(size, key=5)[i] for i in range(20, 30)]
        assert all(type(entry) is int for entry in alone)
        assert order[20:30].tolist() == alone
        assert order[-1] == order[size - 1] == order[-3:][-1]
        assert order[10:2].size == 0
        assert order[size - 2 : size + 9].size == 2
        assert order[40:20:-5].tolist() == [order[i] for i in (40, 35, 30, 25)]
        with pytest.raises(IndexError):
            _ = order[size]


def test_iteration_crosses_chunks_in_order() -> None:
    order = Permutation(20_000, key=1)
    assert list(order) == order[:].tolist()


def test_a_slice_cannot_change_the_order() -> None:
    with pytest.raises(ValueError, match="read-only"):
        Permutation(10, key=0)[:5][0] = 3


def test_a_huge_order_starts_anywhere_and_computes_only_what_is_asked() -> None:
    order = Permutation(10**12, key=3)
    assert len(order) == 10**12
    entries = order[5 * 10**11 : 5 * 10**11 + 1000]
    assert len(set(entries.tolist())) == 1000
    assert entries.min() >= 0
    assert entries.max() < 10**12
    assert entries[17] == order[5 * 10**11 + 17]


def chi_square(counts: np.ndarray[tuple[int, ...], np.dtype[np.int64]]) -> float:
    expected = counts.sum() / counts.size
    return float(((counts - expected) ** 2).sum() / expected)


@pytest.mark.parametrize("size", [2, 3, 4])
def test_all_orders_of_few_entries_are_equally_frequent(size: int) -> None:
    drawn = [tuple(Permutation(size, key)) for key in range(2000)]
    _, counts = np.unique(drawn, axis=0, return_counts=True)
    orders = {2: 2, 3: 6, 4: 24}[size]
    assert len(counts) == orders
    # Mean orders - 1, standard deviation sqrt(2 (orders - 1)); five of them above the mean.
    assert chi_square(counts) < orders - 1 + 5 * (2 * (orders - 1)) ** 0.5


def is_odd(order: list[int]) -> bool:
    inversions = sum(a > b for i, a in enumerate(order) for b in order[i + 1 :])
    return inversions % 2 == 1


@pytest.mark.parametrize("size", [7, 9, 25])
def test_even_and_odd_orders_are_equally_frequent(size: int) -> None:
    odd = sum(is_odd(list(Permutation(size, key))) for key in range(400))
    assert abs(odd - 200) < 5 * 10


@pytest.mark.parametrize("size", [10, 100, 1001])
def test_every_entry_is_equally_frequent_at_every_place(size: int) -> None:
    places = 10
    counts = np.zeros((places, 10), dtype=np.int64)
    for key in range(1000):
        first = Permutation(size, key)[:places]
        counts[np.arange(places), first * 10 // size] += 1
    for at_place in counts:
        assert chi_square(at_place) < 9 + 5 * 18**0.5


def test_neighbours_are_not_related() -> None:
    order = Permutation(100_000, key=9)[:].astype(np.float64)
    lags = [np.corrcoef(order[:-lag], order[lag:])[0, 1] for lag in (1, 2, 316, 317)]
    assert np.abs(lags).max() < 5 / 100_000**0.5
    assert abs(np.corrcoef(order, np.arange(100_000))[0, 1]) < 5 / 100_000**0.5


def test_epochs_of_one_seed_are_not_related() -> None:
    first, second = (Permutation(10_000, key)[:] for key in (0, 1))
    # Matches of two random permutations are Poisson distributed with mean 1.
    assert (first == second).sum() < 8


def test_an_empty_permutation_is_refused() -> None:
    with pytest.raises(ValueError, match="size is 0"):
        Permutation(0, key=0)
