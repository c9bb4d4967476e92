"""Points that are assigned to their nearest centroids: fast on a CPU, plain torch elsewhere.

The nearest centroid has the largest <x, c> - |c|^2 / 2. A tile of points is multiplied with all
centroids at once, in bfloat16 or float32, both counted from the mean centroid, so that no digits
go into what all of them share; the last columns of the product are |c|^2 / 2 itself.
"""

from __future__ import annotations

import importlib.util
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

TILE = 256
"""Rows of one product; a multiple of it is where points may be cut without changing any bit."""
BLOCK = 64 * TILE
"""Rows that one thread takes at a time."""
_COLUMNS = 1024  # centroids of one product: a tile of bfloat16 scores is 512 KB, half an L2 cache
_EMPTY = -3e38  # the score of a column that is no centroid
_TORCH_BYTES = 2**28  # float32 scores held at once without kernels


@dataclass(frozen=True)
class Sums:
    """Of the points of each centroid: sums (K, d) int64 in fixed point, counts (K,) int64."""

    sums: Array
    counts: Array

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
        self.scores = [torch.empty(TILE, part.shape[1], dtype=dtype) for part in self.parts]
        bits = torch.int16 if self.narrow else torch.int32
        self.bits = [scores.view(bits).numpy() for scores in self.scores]
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


def has_kernels() -> bool:
    """Return whether numba is installed; without it everything goes through torch."""
    return importlib.util.find_spec("numba") is not None


class Points:
    """Points (n, d) float32 that are compared with centroids again and again.

    On a CPU `threads` blocks are worked on at once; on another device, or without numba, torch
    does it all. Sums and counts are exact: they do not depend on threads or the order of points.
    """

    def __init__(self, rows: Array, *, threads: int = 1, device: str = "cpu") -> None:
        self.rows, self.threads, self.device = rows, threads, device
        self.plain = device != "cpu" or not has_kernels()
        self.tensor = torch.from_numpy(np.ascontiguousarray(rows, np.float32)).to(device)
        self.rows = rows if self.plain else self.tensor.numpy()

    def __len__(self) -> int:
        return len(self.rows)

    def _over_blocks(self, work: Callable[[int, int], T]) -> Iterator[T]:
        """Yield work(start, stop) of every block."""
        if self.plain:
            yield from (work(a, b) for a, b in blocks(len(self)))
            return
        with one_thread_each(self.threads) as pool:
            yield from pool.map(lambda block: work(*block), blocks(len(self)))

    def largest(self) -> float:
        """Return the largest magnitude among all numbers; not finite where one of them is not."""
        found = [float(self.tensor[a:b].abs().max()) for a, b in blocks(len(self))]
        return float(np.max(found))

    def totals(self, exponent: int) -> tuple[Array, int]:
        """Return the sum (d,) int64 of x 2^exponent, rounded, and that of its squares."""
        if self.plain:
            found = [self._torch_totals(a, b, exponent) for a, b in blocks(len(self))]
        else:
            found = list(self._over_blocks(partial(self._totals, exponent)))
        total = np.asarray(sum(sums for sums, _ in found))
        return total, sum(squares for _, squares in found)

    def _totals(self, exponent: int, start: int, stop: int) -> tuple[Array, int]:
        from selfsup_ray.ops.kmeans_kernels import add_rows, add_squares

        rows, scale = self.rows[start:stop], np.float32(2.0**exponent)
        sums, squares = np.zeros((1, rows.shape[1]), np.int64), np.zeros(2, np.int64)
        add_rows(rows, np.zeros(len(rows), np.int32), scale, sums, np.zeros(1, np.int64))
        add_squares(rows, scale, squares)
        return sums[0], (int(squares[0]) << 30) + int(squares[1])

    def _torch_totals(self, start: int, stop: int, exponent: int) -> tuple[Array, int]:
        fixed = _fixed(self.tensor[start:stop], exponent)
        squares = fixed * fixed
        high, low = int((squares >> 30).sum()), int((squares & 0x3FFFFFFF).sum())
        return fixed.sum(dim=0).cpu().numpy(), (high << 30) + low

    def sums(self, values: Array, exponent: int, precision: Precision) -> Sums:
        """Return the sums of x 2^exponent, rounded, over the points nearest to each centroid."""
        centroids = Centroids.prepare(values, precision)
        if self.plain:
            return self._torch_sums(centroids, exponent)
        total = Sums(np.zeros(values.shape, np.int64), np.zeros(len(values), np.int64))
        ranges = np.array_split(np.array(blocks(len(self))), self.threads)
        with one_thread_each(self.threads) as pool:
            for part in pool.map(partial(self._sums, centroids, exponent), ranges):
                total = total + part
        return total

    def _sums(self, centroids: Centroids, exponent: int, ranges: Array) -> Sums:
        """Return the sums of some ranges of points, on this thread."""
        from selfsup_ray.ops.kmeans_kernels import add_rows

        tiles, scale = _Tiles(centroids), np.float32(2.0**exponent)
        shape = centroids.values.shape
        found = Sums(np.zeros(shape, np.int64), np.zeros(shape[0], np.int64))
        ids = np.empty(TILE, np.int32)
        for start, stop in ranges:
            for a in range(start, stop, TILE):
                rows = self.rows[a : min(a + TILE, stop)]
                tiles.nearest(rows, ids[: len(rows)])
                add_rows(rows, ids[: len(rows)], scale, found.sums, found.counts)
        return found

    def _torch_sums(self, centroids: Centroids, exponent: int) -> Sums:
        sums = torch.zeros(centroids.values.shape, dtype=torch.int64, device=self.device)
        counts = torch.zeros(len(centroids), dtype=torch.int64, device=self.device)
        for a, ids in self._torch_nearest(centroids):
            sums.index_add_(0, ids, _fixed(self.tensor[a : a + len(ids)], exponent))
            counts += torch.bincount(ids, minlength=len(centroids))
        return Sums(sums.cpu().numpy(), counts.cpu().numpy())

    def _torch_nearest(self, centroids: Centroids) -> Iterator[tuple[int, Tensor]]:
        """Yield (first row, nearest centroid of it and those after it)."""
        columns = centroids.moved.to(self.device).T
        bias = torch.from_numpy(centroids.bias).float().to(self.device)
        shift = torch.from_numpy(centroids.shift).to(self.device)
        step = max(1, _TORCH_BYTES // (4 * len(centroids)))
        for a in range(0, len(self), step):
            rows = (self.tensor[a : a + step] - shift).to(columns.dtype)
            yield a, (_product(rows, columns) + bias).argmax(dim=1)

    def nearest(self, values: Array, precision: Precision) -> tuple[Array, Array]:
        """Return ids (n,) int32 of the nearest centroids and squared distances (n,) float32."""
        centroids = Centroids.prepare(values, precision)
        ids, apart = np.empty(len(self), np.int32), np.empty(len(self), np.float32)
        if self.plain:
            known = torch.from_numpy(centroids.values).to(self.device)
            for a, found in self._torch_nearest(centroids):
                ids[a : a + len(found)] = found.cpu().numpy()
                steps = (self.tensor[a : a + len(found)] - known[found]).double()
                apart[a : a + len(found)] = steps.square().sum(dim=1).float().cpu().numpy()
            return ids, apart
        for _ in self._over_blocks(partial(self._nearest, centroids, ids, apart)):
            pass
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


def _fixed(rows: Tensor, exponent: int) -> Tensor:
    """Return rows x 2^exponent, rounded to int64."""
    return (rows * 2.0**exponent).round().long()


def _product(rows: Tensor, columns: Tensor) -> Tensor:
    """Return the product in float32, of factors that may be bfloat16."""
    if rows.dtype == torch.float32:
        return rows @ columns
    if rows.is_cuda:
        return torch.mm(rows, columns, out_dtype=torch.float32)
    return rows.float() @ columns.float()
