"""Numba kernels of Sinkhorn-Knopp: form the kernel matrix once, then one read of it an iteration.

The matrix is kept as the upper `32 - shift` bits of float32 numbers: bfloat16 as uint16 with a
shift of 16, float32 as uint32 with a shift of 0.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
from numba import njit

_LOG2_E = np.float32(1.44269504)
_LN_2_HIGH, _LN_2_LOW = np.float32(0.693359375), np.float32(-2.12194440e-4)
_LOWEST = np.float32(-87.0)  # below, exp leaves the normal float32 numbers
_P = tuple(np.float32(1 / math.factorial(n)) for n in range(2, 8))
_P2, _P3, _P4, _P5, _P6, _P7 = _P
_ONE, _ZERO, _HALF = np.float32(1), np.float32(0), np.float32(0.5)
_FLUSH = 256  # rows whose sums are formed in float32 before they enter the float64 ones


@njit(nogil=True, cache=True)
def _exp(x: Any) -> Any:
    """Return exp(x) of a float32 x <= 0, to 1e-5 of it; 0 below -87. It vectorizes."""
    n = np.floor(x * _LOG2_E + _HALF)
    f = x - n * _LN_2_HIGH - n * _LN_2_LOW
    p = _P6 + f * _P7
    p = _P5 + f * p
    p = _P4 + f * p
    p = _P3 + f * p
    p = _P2 + f * p
    p = _ONE + f * (_ONE + f * p)
    scale = np.uint32((np.int32(max(n, np.float32(-126))) + np.int32(127)) << np.int32(23))
    return p * np.uint32(scale).view(np.float32) if x >= _LOWEST else _ZERO


@njit(nogil=True, cache=True)
def _wide(bits: Any, shift: Any) -> Any:
    """Return the float32 whose upper bits these are."""
    return np.uint32(np.uint32(bits) << shift).view(np.float32)


@njit(nogil=True, cache=True)
def _upper(value: Any, shift: Any) -> Any:
    """Return the upper bits of a float32, rounded to nearest, ties to even."""
    bits = np.float32(value).view(np.uint32)
    if shift == 0:
        return bits
    return (bits + np.uint32(0x7FFF) + ((bits >> np.uint32(16)) & np.uint32(1))) >> np.uint32(16)


@njit(nogil=True, cache=True, fastmath={"reassoc"})
def _is_finite(row: Any) -> Any:
    """Return whether all numbers of a float32 row are finite: times 0, others are not 0."""
    zeros = _ZERO
    for k in range(row.shape[0]):
        zeros += row[k] * _ZERO
    return zeros == _ZERO


@njit(nogil=True, cache=True)
def _ordered(bits: Any) -> Any:
    """Return int32 bits of a float32 as an integer of the same order; it is its own inverse."""
    return bits ^ ((bits >> np.int32(31)) & np.int32(0x7FFFFFFF))


@njit(nogil=True, cache=True)
def _highest(row: Any) -> Any:
    """Return the largest number of a float32 row of finite ones."""
    highest = np.int32(-0x7FFFFFFF)  # a maximum of floats is not vectorized
    for k in range(row.shape[0]):
        highest = max(highest, np.int32(_ordered(np.float32(row[k]).view(np.int32))))
    return np.int32(_ordered(highest)).view(np.float32)


@njit(nogil=True, cache=True, fastmath={"reassoc", "contract", "nsz"})
def _first(row: Any, value: Any) -> Any:
    """Return the first column that holds this value."""
    width = np.int32(row.shape[0])
    first = width
    for k in range(row.shape[0]):  # by minimum: a search that stops early is not vectorized
        first = min(first, np.int32(k) if row[k] == value else width)
    return first


@njit(nogil=True, cache=True, fastmath={"reassoc", "contract", "nsz"})
def form(logits: Any, lam: Any, added: Any, shift: Any, out: Any, spread: Any, line: Any) -> int:
    """Write exp(lam l + added - its row's maximum) of logits (n, K) float32 to out (n, K).

    spread: (n,) float64, becomes log sum exp(l - max l), which is -log of the row's largest
    probability. line: (K,) float32 room. Returns the first row that is not finite, or -1.
    """
    n, width = logits.shape
    for i in range(n):
        if not _is_finite(logits[i]):
            return i
        highest, total = _highest(logits[i]), _ZERO
        for k in range(width):
            line[k] = lam * (logits[i, k] - highest) + added[k]
            total += _exp(logits[i, k] - highest)
        spread[i] = math.log(total)
        top = _highest(line)
        for k in range(width):
            out[i, k] = _upper(_exp(line[k] - top), shift)
    return -1


@njit(nogil=True, cache=True, fastmath={"reassoc", "contract", "nsz"})
def weighted_sums(rows: Any, shift: Any, weights: Any, sums: Any) -> None:
    """Add the rows (n, K), times weights (n,) float64, to sums (K,) float64."""
    for i in range(rows.shape[0]):
        weight = weights[i]
        for k in range(rows.shape[1]):
            sums[k] += weight * np.float64(_wide(rows[i, k], shift))


@njit(nogil=True, cache=True, fastmath={"reassoc", "contract", "nsz"})
def sweep(rows: Any, shift: Any, r: Any, before: Any, line: Any, sums: Any) -> float:
    """Do both halves of an iteration over rows (n, K), reading each once; return sum |c/c' - 1|.

    r: (K,) float32. before: (n,) float32, 1/c of the last iteration, replaced by that of this one.
    sums: (K,) float64, to which A c is added. line: (K,) float32 room.
    """
    n, width = rows.shape
    change = 0.0
    line[:] = _ZERO
    for i in range(0, n - n % 4, 4):
        s0, s1, s2, s3 = _ZERO, _ZERO, _ZERO, _ZERO
        for k in range(width):
            rk = r[k]
            s0 += _wide(rows[i, k], shift) * rk
            s1 += _wide(rows[i + 1, k], shift) * rk
            s2 += _wide(rows[i + 2, k], shift) * rk
            s3 += _wide(rows[i + 3, k], shift) * rk
        c0, c1, c2, c3 = _ONE / s0, _ONE / s1, _ONE / s2, _ONE / s3
        for k in range(width):
            line[k] += (
                _wide(rows[i, k], shift) * c0
                + _wide(rows[i + 1, k], shift) * c1
                + _wide(rows[i + 2, k], shift) * c2
                + _wide(rows[i + 3, k], shift) * c3
            )
        for j, s in enumerate((s0, s1, s2, s3)):
            change += abs(np.float64(s) / np.float64(before[i + j]) - 1.0)
            before[i + j] = s
        if (i + 4) % _FLUSH == 0:
            for k in range(width):
                sums[k] += np.float64(line[k])
                line[k] = _ZERO
    for i in range(n - n % 4, n):
        s0 = _ZERO
        for k in range(width):
            s0 += _wide(rows[i, k], shift) * r[k]
        c0 = _ONE / s0
        for k in range(width):
            line[k] += _wide(rows[i, k], shift) * c0
        change += abs(np.float64(s0) / np.float64(before[i]) - 1.0)
        before[i] = s0
    for k in range(width):
        sums[k] += np.float64(line[k])
    return change


@njit(nogil=True, cache=True, fastmath={"reassoc", "contract", "nsz"})
def choose(logits: Any, lam: Any, log_r: Any, labels: Any, line: Any) -> float:
    """Write argmax_k (lam l + log_r) of each row, ties to the lower k; return sum -log p(label).

    logits: (n, K) float32; log_r: (K,) float32; labels: (n,) int32; line: (K,) float32 room.
    """
    cost, width = 0.0, logits.shape[1]
    for i in range(logits.shape[0]):
        highest, total = _highest(logits[i]), _ZERO
        for k in range(width):
            line[k] = lam * (logits[i, k] - highest) + log_r[k]
            total += _exp(logits[i, k] - highest)
        labels[i] = _first(line, _highest(line))
        cost += math.log(total) - np.float64(logits[i, labels[i]] - highest)
    return cost
