"""The computed order of an epoch: a permutation that starts at once, at any entry, at any size."""

import math
from collections.abc import Iterator
from typing import overload

import numpy as np
import numpy.typing as npt

from trainkit.utils.random import hash64

_Words = npt.NDArray[np.uint64]

_TABLE_SIZE = 1 << 20
_CHUNK = 8192  # Entries computed at once: their intermediate arrays stay in the processor's cache.

_MULTIPLIER_1 = np.uint64(0xBF58476D1CE4E5B9)
_MULTIPLIER_2 = np.uint64(0x94D049BB133111EB)
_SHIFT_1, _SHIFT_2, _HALF = np.uint64(30), np.uint64(27), np.uint64(32)


class Permutation:
    """A pseudorandom permutation of `range(size)`, a pure function of its key.

    Entries are computed, not shuffled: a keyed Feistel network over mixed-radix numbers (two digits
    of about the root of `size`, modular addition) permutes the smallest such domain that holds
    `size`, and a result outside `range(size)` goes through the network again. Both parts are Black
    and Rogaway, "Ciphers with Arbitrary Finite Domains" (CT-RSA 2002), sec. 3 (cycle walking) and
    4 (generalized Feistel). The round function is the finalizer of splitmix64. It is a shuffle, not
    a cipher: 12 rounds up to 1,000 entries and 8 above make it uniform to within statistical noise.

    Every run's order follows from this computation, so it never changes.

    Args:
        size: Number of entries, at least 1. Up to about a million, the first slice computes a table
            of all entries; beyond, and for a single entry, only what is asked for is computed.
        key: Integer that chooses the permutation; its low 64 bits count.

    Raises:
        ValueError: If `size` is less than 1.

    Example:
        >>> sorted(Permutation(5, key=1)) == [0, 1, 2, 3, 4]
        True
    """

    def __init__(self, size: int, key: int) -> None:
        if size < 1:
            raise ValueError(f"size is {size}, but a permutation has at least one entry.")
        self._size = size
        # Even, because two odd radixes would permit only even permutations.
        left = (math.isqrt(size - 1) + 2) // 2 * 2
        self._radixes = (np.uint64(left), np.uint64(-(-size // left)))
        rounds = 12 if size <= 1000 else 8
        self._round_keys = [np.uint64(hash64(key, number)) for number in range(rounds)]
        self._table: npt.NDArray[np.int64] | None = None

    def __len__(self) -> int:
        return self._size

    @overload
    def __getitem__(self, item: int) -> int: ...
    @overload
    def __getitem__(self, item: slice) -> npt.NDArray[np.int64]: ...
    def __getitem__(self, item: int | slice) -> int | npt.NDArray[np.int64]:
        """Returns one entry, or a slice of them as a read-only array."""
        positions = range(self._size)[item]
        if isinstance(positions, int):
            return int(self._compute(range(positions, positions + 1))[0])
        if self._size > _TABLE_SIZE:
            return self._compute(positions)
        if self._table is None:
            self._table = self._compute(range(self._size))
        return self._table[item]

    def __iter__(self) -> Iterator[int]:
        for start in range(0, self._size, _CHUNK):
            yield from self[start : start + _CHUNK].tolist()

    def _compute(self, positions: range) -> npt.NDArray[np.int64]:
        entries = np.arange(positions.start, positions.stop, positions.step).astype(np.uint64)
        for start in range(0, len(entries), _CHUNK):
            chunk = self._encipher(entries[start : start + _CHUNK])
            # Each walk along a cycle ends: it starts inside range(size), so it comes back to it.
            while (outside := np.flatnonzero(chunk >= self._size)).size:
                chunk[outside] = self._encipher(chunk[outside])
            entries[start : start + _CHUNK] = chunk
        result = entries.astype(np.int64)
        result.flags.writeable = False
        return result

    def _encipher(self, numbers: _Words) -> _Words:
        left_radix, right_radix = self._radixes
        left = numbers // right_radix
        right = numbers - left * right_radix
        for number, round_key in enumerate(self._round_keys):
            if number % 2 == 0:
                left = _add(left, _mix(right, round_key, left_radix), left_radix)
            else:
                right = _add(right, _mix(left, round_key, right_radix), right_radix)
        return left * right_radix + right


def _add(digits: _Words, others: _Words, radix: np.uint64) -> _Words:
    # The remainder of a sum of two digits; `%` is several times slower.
    others += digits
    others -= radix * (others >= radix)
    return others


def _mix(digits: _Words, round_key: np.uint64, radix: np.uint64) -> _Words:
    # splitmix64's finalizer up to its last shift, which would only touch the lower half; the upper
    # half is then scaled to the radix. Arrays of uint64 wrap around without a warning.
    words = digits + round_key
    words ^= words >> _SHIFT_1
    words *= _MULTIPLIER_1
    words ^= words >> _SHIFT_2
    words *= _MULTIPLIER_2
    words >>= _HALF
    words *= radix
    words >>= _HALF
    return words
