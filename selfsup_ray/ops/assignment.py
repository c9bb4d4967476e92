"""Points that are assigned to their nearest centroids on a CPU, a tile at a time.

The nearest centroid has the largest <x, c> - |c|^2 / 2. A tile of points is multiplied with all
centroids at once, in bfloat16 or float32, both counted from the mean centroid, so that no digits
go into what all of them share; the last columns of the product are |c|^2 / 2 itself.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Literal, TypeVar

import numpy as np
import torch
from torch import Tensor

from selfsup_ray.artifacts import Array

Precision = Literal["bfloat16", "float32"]
T = TypeVar("T")
log = logging.getLogger(__name__)

TILE = 512
"""Rows of one product; a multiple of it is where points may be cut without changing any bit."""
BLOCK = 32 * TILE
"""Rows that one thread takes at a time."""
_COLUMNS = 1024  # centroids of one product: a tile of bfloat16 scores is 1 MB
_EMPTY = -3e38  # the score of a column that is no centroid


@dataclass(frozen=True)
class Sums:
    """Of the points of each centroid: sums (K, d) int64 in fixed point, counts (K,) int64."""

    sums: Array
    counts: Array

    @classmethod
    def of_nothing(cls, shape: tuple[int, ...]) -> Sums:
        """Return the sums of no points, for centroids of shape (K, d)."""
        return cls(np.zeros(shape, np.int64), np.zeros(shape[0], np.int64))

    def __add__(self, other: Sums) -> Sums:
        return Sums(self.sums + other.sums, self.counts + other.counts)


@dataclass(frozen=True)
class Centroids:
    """Centroids (K, d) float32 as the products want them.

    shift: (d,) float32, what is taken away from points and centroids; bias: (K,) float64,
    -|c|^2 / 2 of the centroids less the shift, after rounding to the precision.
    """

    values: Array
    shift: Array
    moved: Tensor
    bias: Array

    @classmethod
    def prepare(cls, values: Array, precision: Precision) -> Centroids:
        """Return centroids ready for products in this precision."""
        values = np.ascontiguousarray(values, np.float32)
        shift = values.mean(axis=0, dtype=np.float64).astype(np.float32)
        moved = torch.from_numpy(values - shift).to(getattr(torch, precision))
        wide = moved.double().numpy()
        return cls(values, shift, moved, -0.5 * np.einsum("kd,kd->k", wide, wide))

    def __len__(self) -> int:
        return len(self.values)

    def columns(self) -> Tensor:
        """Return (padded K, d + 3): the centroids, and the bias in three parts that add up to it.

        Three bfloat16 numbers have the digits of a float32. The points have ones there.
        """
        k, d = self.moved.shape
        width = -(-k // 128) * 128 if k > 32 else 32
        out = torch.zeros(width, d + 3, dtype=self.moved.dtype)
        out[:k, :d], out[k:, d] = self.moved, _EMPTY
        rest = torch.from_numpy(self.bias)
        for j in range(d, d + 3):
            out[:k, j] = rest
            rest = rest - out[:k, j].double()
        return out


class _Tiles:
    """Buffers and products of one thread: nearest centroids of a tile of points after the other."""

    def __init__(self, centroids: Centroids) -> None:
        dtype = centroids.moved.dtype
        self.narrow = dtype == torch.bfloat16
        columns = centroids.columns()
        self.parts = [part.T for part in torch.split(columns, _COLUMNS)]
        self.shift = centroids.shift
        self.points = torch.ones(TILE, columns.shape[1], dtype=dtype)
        scores = torch.empty(TILE * self.parts[0].shape[1], dtype=dtype)  # one, to stay in cache
        sizes = [(TILE, part.shape[1]) for part in self.parts]
        self.scores = [scores[: rows * width].view(rows, width) for rows, width in sizes]
        bits = torch.int16 if self.narrow else torch.int32
        self.bits = [part.view(bits).numpy() for part in self.scores]
        self.best = np.empty(TILE, self.bits[0].dtype)

    def nearest(self, rows: Array, ids: Array) -> None:
        """Fill ids (n,) int32 with the nearest centroids of rows (n, d), n <= TILE."""
        from selfsup_ray.ops.kmeans_kernels import narrow, take_best

        n, d = rows.shape
        if self.narrow:
            narrow(rows, self.shift, self.points.view(torch.uint16).numpy())
        else:
            np.subtract(rows, self.shift, out=self.points.numpy()[:n, :d])
        ids[:], first = -1, 0
        for part, scores, bits in zip(self.parts, self.scores, self.bits, strict=True):
            torch.mm(self.points, part, out=scores)
            take_best(bits, first, self.best[:n], ids)
            first += part.shape[1]


@contextmanager
def one_thread_each(threads: int) -> Iterator[ThreadPoolExecutor]:
    """Yield a pool whose threads multiply alone; several products run beside each other."""
    before = torch.get_num_threads()
    try:
        with ThreadPoolExecutor(threads, initializer=torch.set_num_threads, initargs=(1,)) as pool:
            yield pool
    finally:
        torch.set_num_threads(before)


def blocks(n: int) -> list[tuple[int, int]]:
    """Return the ranges of n rows that are taken at a time."""
    return [(a, min(a + BLOCK, n)) for a in range(0, n, BLOCK)]


class TilePoints:
    """Points (n, d) float32 that are compared with centroids again and again, on a CPU.

    `threads` blocks are worked on at once. Sums and counts are exact: they do not depend on
    threads or on the order of points.
    """

    def __init__(self, rows: Array, *, threads: int = 1) -> None:
        self.rows, self.threads = np.ascontiguousarray(rows, np.float32), threads

    def __len__(self) -> int:
        return len(self.rows)

    def _over_blocks(self, work: Callable[[int, int], T]) -> list[T]:
        """Return work(start, stop) of every block."""
        with one_thread_each(self.threads) as pool:
            return list(pool.map(lambda block: work(*block), blocks(len(self))))

    def largest(self) -> float:
        """Return the largest magnitude among all numbers; not finite where one of them is not."""
        return max_magnitude(self._over_blocks(lambda a, b: float(np.abs(self.rows[a:b]).max())))

    def totals(self, exponent: int) -> tuple[Array, int]:
        """Return the sum (d,) int64 of x 2^exponent, rounded, and that of its squares."""
        parts = self._over_blocks(partial(self._totals, exponent))
        return np.asarray(sum(sums for sums, _ in parts)), sum(squares for _, squares in parts)

    def _totals(self, exponent: int, start: int, stop: int) -> tuple[Array, int]:
        from selfsup_ray.ops.kmeans_kernels import add_rows, add_squares

        rows, scale = self.rows[start:stop], np.float32(2.0**exponent)
        sums, squares = np.zeros((1, rows.shape[1]), np.int64), np.zeros(2, np.int64)
        add_rows(rows, np.zeros(len(rows), np.int32), scale, sums, np.zeros(1, np.int64))
        add_squares(rows, scale, squares)
        return sums[0], (int(squares[0]) << 30) + int(squares[1])

    def sums(self, values: Array, exponent: int, precision: Precision) -> Sums:
        """Return the sums of x 2^exponent, rounded, over the points nearest to each centroid."""
        centroids = Centroids.prepare(values, supported(precision))
        parts = np.array_split(np.array(blocks(len(self))), self.threads)
        with one_thread_each(self.threads) as pool:
            first, *others = pool.map(partial(self._sums, centroids, exponent), parts)
        return sum(others, start=first)

    def _sums(self, centroids: Centroids, exponent: int, ranges: Array) -> Sums:
        """Return the sums of some ranges of points, on this thread."""
        from selfsup_ray.ops.kmeans_kernels import add_rows

        tiles, scale = _Tiles(centroids), np.float32(2.0**exponent)
        found = Sums.of_nothing(centroids.values.shape)
        ids = np.empty(TILE, np.int32)
        for start, stop in ranges:
            for a in range(start, stop, TILE):
                rows = self.rows[a : min(a + TILE, stop)]
                tiles.nearest(rows, ids[: len(rows)])
                add_rows(rows, ids[: len(rows)], scale, found.sums, found.counts)
        return found

    def nearest(self, values: Array, precision: Precision) -> tuple[Array, Array]:
        """Return ids (n,) int32 of the nearest centroids and squared distances (n,) float32."""
        centroids = Centroids.prepare(values, supported(precision))
        ids, apart = np.empty(len(self), np.int32), np.empty(len(self), np.float32)
        self._over_blocks(partial(self._nearest, centroids, ids, apart))
        return ids, apart

    def _nearest(
        self, centroids: Centroids, ids: Array, apart: Array, start: int, stop: int
    ) -> None:
        from selfsup_ray.ops.kmeans_kernels import distances

        tiles = _Tiles(centroids)
        for a in range(start, stop, TILE):
            here = slice(a, min(a + TILE, stop))
            tiles.nearest(self.rows[here], ids[here])
            distances(self.rows[here], centroids.values, ids[here], apart[here])


def max_magnitude(parts: list[float]) -> float:
    """Return the largest of these; nan when one of them is."""
    return float(np.max(parts))


def supported(precision: Precision) -> Precision:
    """Return the precision, or float32 where this CPU has no products of bfloat16."""
    from selfsup_ray.ops.exact_graph import multiplies_bfloat16  # it imports scipy

    if precision == "bfloat16" and not multiplies_bfloat16():
        log.warning("k-means: this CPU multiplies no bfloat16; float32 is used, which is slower")
        return "float32"
    return precision
