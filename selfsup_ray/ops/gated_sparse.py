"""Numba kernels of the gated linear layer where few bits are set: one product for each of them."""

from __future__ import annotations

from typing import Any

import numpy as np
from numba import njit

from selfsup_ray.ops.patch_selection import LANES, ones


@njit(nogil=True, cache=True)
def _listed(words: Any, at: int, out: Any) -> Any:
    """Write the entries whose bit is set at a position, ascending; return how many they are."""
    used = 0
    for w in range(words.shape[1]):
        mask = words[at, w]
        while mask:
            lowest = mask & (~mask + np.uint64(1))
            out[used] = w * LANES + np.int64(ones(lowest - np.uint64(1)))
            used += 1
            mask ^= lowest
    return used


@njit(nogil=True, cache=True, fastmath=True)
def _product(a: Any, i: int, b: Any, j: int) -> Any:
    total = np.float32(0)
    for t in range(a.shape[1]):
        total += a[i, t] * b[j, t]
    return total


@njit(nogil=True, cache=True)
def _add_scaled(source: Any, i: int, factor: Any, target: Any, j: int) -> None:
    for t in range(source.shape[1]):
        target[j, t] += factor * source[i, t]


@njit(nogil=True, cache=True)
def pool_bits(
    patches: Any,
    entries: Any,
    words: Any,
    width: int,
    height: int,
    pool: int,
    first: int,
    last: int,
    out: Any,
) -> None:
    """Fill bands [first, last) of out with window means of patches' products with set entries.

    patches: (n, d) float32, of the positions of these bands in order; entries: (N, d) float32; the
    rest as `pool_bands` of the dense kernels has it.
    """
    bands = -(-height // pool)
    listed = np.empty(words.shape[1] * LANES, np.int64)
    row = 0  # of patches, where the band begins
    for band in range(first, last):
        image, y = divmod(band, bands)
        rows = min(pool, height - y * pool)
        start = (image * height + y * pool) * width
        for x in range(out.shape[1]):
            left, right = x * pool, min((x + 1) * pool, width)
            share = np.float32(1 / (rows * (right - left)))
            out[band, x] = 0
            for dy in range(rows):
                for column in range(left, right):
                    at = dy * width + column
                    for i in range(_listed(words, start + at, listed)):
                        n = listed[i]
                        out[band, x, n] += share * _product(patches, row + at, entries, n)
        row += rows * width


@njit(nogil=True, cache=True)
def add_gradients(
    gradient: Any,
    patches: Any,
    entries: Any,
    words: Any,
    width: int,
    height: int,
    pool: int,
    first: int,
    last: int,
    of_entries: Any,
    of_patches: Any,
) -> None:
    """Add to the gradients of entries (N, d), and fill that of patches (n, d): `pool_bits` back.

    gradient: (B h', w', N) float32. of_patches has no rows where it is not wanted.
    """
    bands = -(-height // pool)
    listed = np.empty(words.shape[1] * LANES, np.int64)
    of_patches[:] = 0
    row = 0
    for band in range(first, last):
        image, y = divmod(band, bands)
        rows = min(pool, height - y * pool)
        start = (image * height + y * pool) * width
        for x in range(gradient.shape[1]):
            left, right = x * pool, min((x + 1) * pool, width)
            share = np.float32(1 / (rows * (right - left)))
            for dy in range(rows):
                for column in range(left, right):
                    at = dy * width + column
                    for i in range(_listed(words, start + at, listed)):
                        n = listed[i]
                        factor = share * gradient[band, x, n]
                        _add_scaled(patches, row + at, factor, of_entries, n)
                        if of_patches.shape[0]:
                            _add_scaled(entries, n, factor, of_patches, row + at)
        row += rows * width
