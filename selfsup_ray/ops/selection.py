"""Numba kernels behind the cell join: keep each row's largest scores, and settle them exactly.

Scores arrive as tiles of bfloat16 numbers seen as int16: for numbers that are not negative the
order of the bits is the order of the values, so a whole vector of scores is compared at once.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numba import njit

from selfsup_ray.artifacts import Array

LOWEST = -32768  # below the ordered bits of every finite number
_LANES = 64  # scores looked at together: two AVX-512 registers
_PART = 16  # then these, where something passed


@njit(nogil=True, cache=True)
def _ordered(bits: Any) -> Any:
    """Return the bits of a bfloat16 number as an int16 that orders as the number does."""
    return np.int16(bits ^ ((bits >> 15) & 0x7FFF))


@njit(nogil=True, cache=True)
def prune(keys: Any, ids: Any, used: Any, keep: int) -> Any:
    """Move the `keep` largest of the first `used` keys to the front; return the smallest of them.

    Of equal keys on the border the ones that came first stay.
    """
    low: Any = np.int32(LOWEST)
    high: Any = np.int32(32767)
    while low < high:  # the largest bound that at least `keep` keys reach
        middle = (low + high + 1) >> 1
        count = 0
        for j in range(used):
            count += np.int32(keys[j]) >= middle
        if count >= keep:
            low = middle
        else:
            high = middle - 1
    above = 0
    for j in range(used):
        above += np.int32(keys[j]) > low
    equal, place = keep - above, 0
    for j in range(used):
        key = np.int32(keys[j])
        if key > low or (key == low and equal > 0):
            if key == low:
                equal -= 1
            keys[place], ids[place] = keys[j], ids[j]
            place += 1
    return np.int16(low)


@njit(nogil=True, cache=True)
def _below_nth(row: Any, columns: int, n: int) -> Any:
    """Return the key just below that of the n-th largest of a row of bfloat16 bits."""
    low: Any = np.int32(LOWEST)
    high: Any = np.int32(32767)
    while low < high:
        middle = (low + high + 1) >> 1
        bound, count = np.int16(middle), np.int16(0)
        for j in range(columns):
            count += np.int16(_ordered(row[j]) >= bound)
        if count >= n:
            low = middle
        else:
            high = middle - 1
    return np.int16(max(low - 1, LOWEST))


@njit(nogil=True, cache=True)
def keep_largest(
    scores: Any,
    columns: int,
    first: int,
    queries: Any,
    own: int,
    keep: int,
    keys: Any,
    ids: Any,
    used: Any,
    bound: Any,
) -> None:
    """Add a tile of scores to the candidates of its queries.

    scores: (>= m, >= columns) int16 bits; row i belongs to query queries[i], column j to the row at
    place first + j. own: the place of query 0; a query is no candidate of its own.
    keys, ids: (n, capacity) candidates of every query, `used` of them filled; `bound` is the key
    that a new one must exceed, LOWEST until `keep` are known.
    """
    capacity = keys.shape[1]
    for i in range(queries.shape[0]):
        q = queries[i]
        row = scores[i]
        limit, count, self_column = bound[q], used[q], own + q - first
        if count == 0 and columns > 2 * keep:  # the first list: what it keeps is found at once
            limit = _below_nth(row, columns, keep + 1)  # one more: the query itself may be there
        for start in range(0, columns, _LANES):
            stop = min(start + _LANES, columns)
            if limit >= 0 and stop - start == _LANES:  # negative numbers have negative bits
                largest = np.int16(LOWEST)
                for j in range(_LANES):
                    largest = max(largest, row[start + j])
                if largest <= limit:
                    continue
            for part in range(start, stop, _PART):
                end = min(part + _PART, stop)
                if limit >= 0 and end - part == _PART:
                    largest = np.int16(LOWEST)
                    for j in range(_PART):
                        largest = max(largest, row[part + j])
                    if largest <= limit:
                        continue
                for j in range(part, end):
                    key = _ordered(row[j])
                    if key > limit and j != self_column:
                        keys[q, count] = key
                        ids[q, count] = first + j
                        count += 1
                        if count == capacity:
                            limit = prune(keys[q], ids[q], count, keep)
                            count = keep
        used[q], bound[q] = count, limit


@njit(nogil=True, cache=True)
def prune_all(keys: Any, ids: Any, used: Any, keep: int) -> None:
    """Leave each query its `keep` best candidates, at the front, in no order."""
    for i in range(keys.shape[0]):
        if used[i] > keep:
            prune(keys[i], ids[i], used[i], keep)
            used[i] = keep


@njit(nogil=True, cache=True, fastmath=True)
def _product(query: Any, row: Any) -> float:
    total = 0.0
    for t in range(query.shape[0]):
        total += np.float64(query[t]) * np.float64(row[t])
    return total


@njit(nogil=True, cache=True)
def sort_places(ids: Any, used: Any) -> None:
    """Sort each query's candidates by place, in place; their keys no longer belong to them."""
    for i in range(ids.shape[0]):
        ids[i, : used[i]].sort()


@njit(nogil=True, cache=True)
def settle(
    queries: Any,
    rows: Any,
    order: Any,
    last: int,
    ids: Any,
    used: Any,
    done: Any,
    out: Any,
    values: Any,
) -> None:
    """Merge each query's candidates at places < last into its best (n, k) by float64 product.

    queries: (n, d) float32; rows: (N, d) float32; order: (N,) the image at each place; ids and
    used: candidates, by place unless `last` is N; done: (n,) how many of them earlier calls have
    settled. Best first, ties in float32 by lower image id; a query with fewer than k candidates is
    left as it is.
    """
    k = out.shape[1]
    for i in range(queries.shape[0]):
        count = used[i]
        if count < k:
            continue
        j = done[i]
        while j < count and ids[i, j] < last:
            place = np.int64(ids[i, j])
            value = np.float32(_product(queries[i], rows[place]))
            at = min(j, k)
            j += 1
            if at == k:
                worst = values[i, k - 1]
                if value < worst or (value == worst and order[place] > order[out[i, k - 1]]):
                    continue
                at = k - 1
            while at > 0 and (
                values[i, at - 1] < value
                or (values[i, at - 1] == value and order[out[i, at - 1]] > order[place])
            ):
                values[i, at], out[i, at] = values[i, at - 1], out[i, at - 1]
                at -= 1
            values[i, at], out[i, at] = value, place
        done[i] = j


def empty_candidates(n: int, capacity: int) -> tuple[Array, Array, Array, Array]:
    """Return keys, ids, used and bound for n queries that have no candidate yet."""
    keys = np.empty((n, capacity), np.int16)
    ids = np.empty((n, capacity), np.int32)  # places: 2^31 rows at most
    return keys, ids, np.zeros(n, np.int32), np.full(n, LOWEST, np.int16)


@njit(nogil=True, cache=True)
def _largest(row: Any) -> Any:
    """Return the ordered key of the largest of a row of bfloat16 bits, and its first column."""
    largest = np.int16(LOWEST)
    for j in range(row.shape[0]):
        largest = max(largest, row[j])
    if largest < 0:  # all numbers are negative: their bits order the other way round
        largest = np.int16(LOWEST)
        for j in range(row.shape[0]):
            largest = max(largest, _ordered(row[j]))
        largest = _ordered(largest)
    column = 0
    while row[column] != largest:
        column += 1
    return _ordered(largest), column


@njit(nogil=True, cache=True)
def _largest_columns(scores: Any, out: Any) -> None:
    for i in range(scores.shape[0]):
        _, out[i] = _largest(scores[i])


def largest_columns(scores: Array) -> Array:
    """Return (n,) int64 columns of the largest of (n, m) bfloat16 bits, ties by lower column."""
    out = np.empty(len(scores), np.int64)
    _largest_columns(scores, out)
    return out


@njit(nogil=True, cache=True)
def raise_best(scores: Any, owners: Any, first: int, best: Any, column: Any) -> None:
    """Raise each owner's best key and column where its row of scores has a larger one.

    scores: (n, m) bfloat16 bits of the columns first, first + 1, ...; owners: (n,) distinct.
    """
    for i in range(scores.shape[0]):
        key, j = _largest(scores[i])
        if key > best[owners[i]]:
            best[owners[i]], column[owners[i]] = key, first + j


@njit(nogil=True, cache=True)
def _hash_rows(bits: Any, out: Any) -> None:
    for i in range(bits.shape[0]):
        total = np.uint64(0)
        for j in range(bits.shape[1]):
            total += np.uint64(bits[i, j]) * (np.uint64(2 * j + 1) * np.uint64(0x9E3779B97F4A7C15))
        out[i] = total


def hash_rows(rows: Array) -> Array:
    """Return a 64-bit hash of the bits of each of rows (n, d) float32: equal rows, equal hashes."""
    out = np.empty(len(rows), np.uint64)
    _hash_rows(np.ascontiguousarray(rows).view(np.uint32), out)
    return out
