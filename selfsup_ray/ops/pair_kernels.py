"""Numba kernels of the exact graph: rough scores in, the pairs that may be neighbors out.

A tile of scores serves its rows and its columns at once. Scores are bfloat16 or float32 numbers
seen as int16 or int32; `shift` is 16 or 0, the bits that bfloat16 lacks.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numba import njit

_LANES = 64  # scores compared together
_PART = 16  # then these, where something passed


@njit(nogil=True, cache=True, inline="always")
def _ordered(bits: Any, shift: int) -> Any:
    """Return an integer that orders as the number with these bits does; its own inverse."""
    if shift:
        return np.int16(bits ^ ((bits >> 15) & 0x7FFF))
    return np.int32(bits ^ ((bits >> 31) & 0x7FFFFFFF))


@njit(nogil=True, cache=True)
def _as_bits(ordered: Any) -> Any:
    """Return the bits of the float32 number with this ordered int32, or the other way round."""
    return np.int32(ordered ^ ((ordered >> 31) & 0x7FFFFFFF))


@njit(nogil=True, cache=True)
def _value(key: Any, shift: int) -> Any:
    """Return the float32 number of an ordered key."""
    bits = _as_bits(np.int64(key) << shift)
    # A negative bfloat16 number has ones in the bits that it lacks after the turn.
    return np.int32((bits >> shift) << shift).view(np.float32)


@njit(nogil=True, cache=True)
def _bound_below(key: Any, shift: int, error: float, share: float) -> Any:
    """Return a key such that rows at or below it cannot beat the row with this key.

    A score is off by at most error + share of itself, hence two by twice that.
    """
    value = _value(key, shift)
    low = np.float32(value - 2 * (error + share * abs(value)))
    return (np.int64(_as_bits(np.int64(low.view(np.int32)))) >> shift) - 1


@njit(nogil=True, cache=True)
def _kth_largest(entries: Any, used: int, k: int, shift: int) -> Any:
    """Return the k-th largest key of the first `used` entries, by halving the range of keys."""
    low, high = np.int64(-(2**31)) >> shift, np.int64(2**31 - 1) >> shift
    while low < high:
        middle = (low + high + 1) >> 1
        count, least = 0, middle << 32
        for j in range(used):
            count += entries[j] >= least
        if count >= k:
            low = middle
        else:
            high = middle - 1
    return low


@njit(nogil=True, cache=True)
def _drop_below(entries: Any, used: int, low: Any) -> int:
    """Move the entries with a key above low to the front; return how many they are."""
    place, least = 0, (np.int64(low) + 1) << 32
    for j in range(used):
        if entries[j] >= least:
            entries[place] = entries[j]
            place += 1
    return place


@njit(nogil=True, cache=True)
def _squeeze(
    q: int, k: int, shift: int, error: float, share: float, entries: Any, used: Any, bound: Any
) -> None:
    """Drop the candidates of query q, whose place is full, that cannot be among its k nearest.

    used[q] becomes -1, and nothing is added any more, when too many are too near to tell apart.
    """
    size = entries.shape[1]
    kth = _kth_largest(entries[q], size, k, shift)
    low = max(np.int64(bound[q]), _bound_below(kth, shift, error, share))
    place = _drop_below(entries[q], size, low)
    crowded = 8 * place > 7 * size
    bound[q] = (2**31 - 1) >> shift if crowded else low
    used[q] = -1 if crowded else place


@njit(nogil=True, cache=True)
def take_tile(
    scores: Any,
    first_row: int,
    first_column: int,
    both: bool,
    k: int,
    shift: int,
    error: float,
    share: float,
    row_entries: Any,
    row_used: Any,
    row_bound: Any,
    column_entries: Any,
    column_used: Any,
    column_bound: Any,
) -> None:
    """Add a tile of scores to the candidates of its rows and, if `both`, of its columns.

    scores: (height, width) bits. entries: (n, capacity) int64, key << 32 | id, `used` of them
    filled; a new key must exceed `bound`.
    """
    height, width = scores.shape
    capacity, highest = row_entries.shape[1], np.int64(2**31 - 1) >> shift
    limits = np.full(width, highest, scores.dtype)
    if both:
        limits[:] = column_bound[first_column : first_column + width]
    lowest = np.int64(limits.min())
    for i in range(height):
        q = first_row + i
        row = scores[i]
        limit = row_bound[q]
        plain = min(np.int64(limit), lowest) >= 0  # bits of negative numbers are negative
        for start in range(0, width, _LANES):
            stop = min(start + _LANES, width)
            if plain and stop - start == _LANES:
                passed = False
                for j in range(start, start + _LANES):
                    passed |= row[j] > min(limit, limits[j])
                if not passed:
                    continue
            for part in range(start, stop, _PART):
                end = min(part + _PART, stop)
                if plain and end - part == _PART:
                    passed = False
                    for j in range(part, part + _PART):
                        passed |= row[j] > min(limit, limits[j])
                    if not passed:
                        continue
                for j in range(part, end):
                    key = _ordered(row[j], shift)
                    # Written out twice: a call with its arrays takes longer than the rest.
                    if key > limit:
                        count = row_used[q]
                        row_entries[q, count] = np.int64(key) << 32 | (first_column + j)
                        row_used[q] = count + 1
                        if count + 1 == capacity:
                            _squeeze(q, k, shift, error, share, row_entries, row_used, row_bound)
                            limit = row_bound[q]
                    if key > limits[j]:
                        c = first_column + j
                        count = column_used[c]
                        column_entries[c, count] = np.int64(key) << 32 | q
                        column_used[c] = count + 1
                        if count + 1 == capacity:
                            _squeeze(
                                c, k, shift, error, share, column_entries, column_used, column_bound
                            )
                            limits[j] = column_bound[c]


@njit(nogil=True, cache=True)
def finish(k: int, shift: int, error: float, share: float, entries: Any, used: Any) -> Any:
    """Drop what cannot be among the k nearest of each query; return ids and scores, packed.

    used becomes the number of each query's entries; -1, too many to tell, becomes none.
    """
    total = 0
    for q in range(used.shape[0]):
        if used[q] > k:
            kth = _kth_largest(entries[q], used[q], k, shift)
            used[q] = _drop_below(entries[q], used[q], _bound_below(kth, shift, error, share))
        used[q] = max(0, used[q])
        total += used[q]
    ids, scores = np.empty(total, np.int32), np.empty(total, np.float32)
    place = 0
    for q in range(used.shape[0]):
        for j in range(used[q]):
            ids[place] = entries[q, j] & 0xFFFFFFFF
            scores[place] = _value(entries[q, j] >> 32, shift)
            place += 1
    return ids, scores


@njit(nogil=True, cache=True, fastmath=True)
def _product(query: Any, row: Any) -> float:
    total = 0.0
    for t in range(query.shape[0]):
        total += np.float64(query[t]) * np.float64(row[t])
    return total


@njit(nogil=True, cache=True)
def pair_products(queries: Any, rows: Any, i: Any, j: Any, out: Any) -> None:
    """Fill out (m,) float64 with the inner products of queries[i] and rows[j], float32 rows."""
    for t in range(i.shape[0]):
        out[t] = _product(queries[i[t]], rows[j[t]])


@njit(nogil=True, cache=True)
def kth_low(starts: Any, low: Any, k: int, out: Any) -> None:
    """Fill out (n,) with the k-th largest low of each query, -inf where there are fewer."""
    for q in range(starts.shape[0] - 1):
        a, b = starts[q], starts[q + 1]
        out[q] = np.sort(low[a:b])[b - a - k] if b - a >= k else np.float32(-np.inf)


@njit(nogil=True, cache=True)
def may_be_nearest(starts: Any, high: Any, floor: Any, out: Any) -> None:
    """Mark the entries whose high reaches the floor of their query.

    starts: (n + 1,) where each query's entries begin; high: no similarity is greater.
    """
    for q in range(starts.shape[0] - 1):
        for t in range(starts[q], starts[q + 1]):
            out[t] = high[t] >= floor[q]


@njit(nogil=True, cache=True)
def rank(starts: Any, ids: Any, similarity: Any, out: Any, values: Any) -> None:
    """Fill out and values (n, k) with each query's best entries, ties by lower id."""
    k = out.shape[1]
    for q in range(starts.shape[0] - 1):
        filled = 0
        for t in range(starts[q], starts[q + 1]):
            value, row = similarity[t], ids[t]
            at = filled
            if filled == k:
                last = values[q, k - 1]
                if value < last or (value == last and row > out[q, k - 1]):
                    continue
                at = k - 1
            while at > 0 and (
                values[q, at - 1] < value or (values[q, at - 1] == value and out[q, at - 1] > row)
            ):
                values[q, at], out[q, at] = values[q, at - 1], out[q, at - 1]
                at -= 1
            values[q, at], out[q, at] = value, row
            filled = min(filled + 1, k)
        assert filled == k
