"""Numba kernels of k-means: narrow a tile of points, find each row's best column, add rows up.

Scores arrive as bfloat16 or float32 numbers seen as int16 or int32: the bits of numbers that are
not negative order as the numbers do, those of negative ones the other way round. Points are added
up in fixed point, so that sums are the same in whatever order and parts they are formed.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numba import njit


@njit(nogil=True, cache=True)
def narrow(rows: Any, shift: Any, out: Any) -> None:
    """Write rows (n, d) float32 less shift (d,) into the first columns of out, as bfloat16 bits.

    Rounded to nearest, ties to even. out: (>= n, >= d) uint16.
    """
    for i in range(rows.shape[0]):
        for j in range(rows.shape[1]):
            bits = np.float32(rows[i, j] - shift[j]).view(np.uint32)
            even = (bits >> np.uint32(16)) & np.uint32(1)
            out[i, j] = np.uint16((bits + np.uint32(0x7FFF) + even) >> np.uint32(16))


@njit(nogil=True, cache=True)
def _largest(row: Any) -> Any:
    """Return the bits of the largest number of a row of bits."""
    largest = row[0]
    for j in range(row.shape[0]):
        largest = max(largest, row[j])
    if largest >= 0:
        return largest
    for j in range(row.shape[0]):  # all are negative
        largest = min(largest, row[j])
    return largest


@njit(nogil=True, cache=True)
def _first(row: Any, value: Any) -> Any:
    """Return the first column that holds this value; one of at most 32,767 columns must."""
    # Over all columns and by minimum: a search that stops at the first is not vectorized.
    first = np.int16(32767)
    for j in range(row.shape[0]):
        first = min(first, np.int16(j) if row[j] == value else np.int16(32767))
    return first


@njit(nogil=True, cache=True)
def take_best(scores: Any, first: int, best: Any, ids: Any) -> None:
    """Raise best and ids (n,) where a row of scores holds a larger number.

    scores: (>= n, m) bits, of the columns first, first + 1, ...; equal numbers by lower column.
    best: bits too; an id below 0 means that nothing is known yet.
    """
    for i in range(best.shape[0]):
        value = _largest(scores[i])
        if ids[i] >= 0:
            both_negative = value < 0 and best[i] < 0
            if value == best[i] or (value < best[i]) != both_negative:
                continue
        best[i], ids[i] = value, first + _first(scores[i], value)


@njit(nogil=True, cache=True)
def add_rows(rows: Any, ids: Any, scale: Any, sums: Any, counts: Any) -> None:
    """Add rows (n, d) float32, times scale and rounded to integers, to the sums of their ids.

    sums: (K, d) int64; counts: (K,) int64. scale: float32, a power of two.
    """
    for i in range(rows.shape[0]):
        k = ids[i]
        counts[k] += 1
        for j in range(rows.shape[1]):
            sums[k, j] += np.int64(np.int32(np.rint(rows[i, j] * scale)))


@njit(nogil=True, cache=True)
def add_squares(rows: Any, scale: Any, out: Any) -> None:
    """Add the squares of rows (n, d), in fixed point, to out (2,) int64: thousands and the rest.

    A square of 2^60 would leave no room for a sum, so it is kept as two numbers below 2^30.
    """
    high, low = np.int64(0), np.int64(0)
    for i in range(rows.shape[0]):
        for j in range(rows.shape[1]):
            value = np.int64(np.int32(np.rint(rows[i, j] * scale)))
            square = value * value
            high += square >> 30
            low += square & 0x3FFFFFFF
    out[0] += high
    out[1] += low


@njit(nogil=True, cache=True, fastmath=True)
def _squared_distance(a: Any, b: Any) -> float:
    total = 0.0
    for j in range(a.shape[0]):
        step = np.float64(a[j]) - np.float64(b[j])
        total += step * step
    return total


@njit(nogil=True, cache=True)
def distances(rows: Any, centroids: Any, ids: Any, out: Any) -> None:
    """Fill out (n,) float32 with the squared distance of each of rows (n, d) to its centroid."""
    for i in range(rows.shape[0]):
        out[i] = _squared_distance(rows[i], centroids[ids[i]])


@njit(nogil=True, cache=True)
def farthest(rows: Any, chosen: Any, count: int, owners: Any, nearest: Any) -> int:
    """Compare rows (n, d) with the last of `count` chosen ones; return the farthest of all.

    chosen: (>= count,) ids; nearest: (n,) squared distance of each row to the nearest chosen one,
    and owners: (n,) which that is, both brought up to date. Of equal distances the first counts.
    """
    last = rows[chosen[count - 1]]
    between = np.empty(count)
    for k in range(count):
        between[k] = _squared_distance(rows[chosen[k]], last)
    place = 0
    for i in range(rows.shape[0]):
        # The triangle inequality: twice as far from its owner as the row is, it cannot be nearer.
        if between[owners[i]] < 4.0001 * nearest[i]:
            apart = _squared_distance(rows[i], last)
            if apart < nearest[i]:
                nearest[i], owners[i] = apart, count - 1
        if nearest[i] > nearest[place]:
            place = i
    return place
