"""CpuSpread: the labels L_t on a CPU, by the numba kernels of `spmm`."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from typing import Any, Literal

import numpy as np

from selfsup_ray.artifacts import Array
from selfsup_ray.ops import spmm
from selfsup_ray.ops.adjacency import Adjacency
from selfsup_ray.ops.spreading import Seeds, Variant, column_width, scales, shortened, widened

DENSE_SHARE = 0.6
"""Share of nodes with a label above which looking for those without no longer pays."""


class CpuSpread:
    """Spread by the kernels of `spmm`, on several threads."""

    def __init__(
        self,
        graph: Adjacency,
        seeds: Array,
        first: int,
        stop: int,
        *,
        threads: int,
        dtype: Literal["float32", "bfloat16"],
        variant: Variant,
    ) -> None:
        assert graph.values is None or dtype == "float32", "weighted links need float32"
        self.graph, self.variant, self.threads, self.first = graph, variant, threads, first
        self.seeds = Seeds.of(seeds, first, stop)
        self.labelled = np.flatnonzero(seeds >= 0) if variant.reset_seeds else None
        self.width = column_width(stop - first)
        self.is_short = dtype == "bfloat16"
        self._x = aligned((len(graph), self.width), np.uint16 if self.is_short else np.float32)
        self._y = aligned(self._x.shape, self._x.dtype)
        self._reached = np.zeros(len(graph), np.uint8)
        self._reached[self.seeds.places] = 1
        self._x[self.seeds.places, self.seeds.columns] = 0x3F80 if self.is_short else 1.0
        self._note(self.seeds.counts(self.width))

    def _note(self, totals: Array) -> None:
        self._totals = totals
        self.mass = totals[: self.seeds.num]
        self._scale = scales(totals, self.variant.normalizes)

    def step(self) -> None:
        """Go from L_t to L_{t + 1}."""
        active = self._reached
        if int(np.count_nonzero(active)) > DENSE_SHARE * len(active):
            active = np.empty(0, np.uint8)
        self._reached = np.zeros(len(self.graph), np.uint8)
        parts = multiply_rows(
            self.graph,
            self._x,
            self._y,
            self._scale,
            self.graph.blocks(),
            threads=self.threads,
            active=active,
            reached=self._reached,
        )
        self._x, self._y = self._y, self._x
        totals = np.zeros(self.width)
        for part in parts:
            totals += part
        variant = self.variant
        if variant.reset_seeds:
            self._x[self.labelled] = 0
            self._x[self.seeds.places, self.seeds.columns] = 0x3F80 if self.is_short else 1.0
            totals = self._column_sums()
        scale = np.ones(self.width, np.float32)
        for _ in range(variant.sinkhorn):
            self._normalize_rows(scale)
            totals = self._column_sums()
            scale = scales(totals)
        self._note(totals)

    def _values(self, start: int, stop: int) -> Array:
        """Return rows as stored, in float32."""
        part = self._x[start:stop]
        return widened(part) if self.is_short else part

    def _column_sums(self) -> Array:
        parts = [
            self._values(*block).sum(axis=0, dtype=np.float64) for block in self.graph.blocks()
        ]
        return np.asarray(np.sum(parts, axis=0))

    def _normalize_rows(self, scale: Array) -> None:
        for start, stop in self.graph.blocks():
            values = self._values(start, stop) * scale
            sums = values.sum(axis=1, keepdims=True)
            values /= np.where(sums > 0, sums, 1)
            self._x[start:stop] = shortened(values) if self.is_short else values

    def sums(self, lists: Array) -> Array:
        """Return (n, C) float32: L_t summed over the places of each list (n, k), -1 = none."""
        lists = np.ascontiguousarray(lists, np.int32)
        out = np.empty((len(lists), self.seeds.num), np.float32)

        def fill(start: int) -> None:
            part = slice(start, start + 4096)
            row, kept = aligned((1, self.width), np.float32)[0], np.empty(lists.shape[1], np.int32)
            spmm.sum_lists(lists[part], self._x, self._scale, out[part], row, kept)

        in_threads(fill, range(0, len(lists), 4096), self.threads)
        return out

    def top(self, places: Array, num: int) -> tuple[Array, Array]:
        """Return the `num` best classes of L_t at these places and their values, both (n, num)."""
        places = np.ascontiguousarray(places, np.int32)
        starts = range(0, len(places), 65536)

        def best(start: int) -> tuple[Array, Array]:
            part = places[start : start + 65536]
            return top_of(self._x, self._scale, num, self.seeds.num, places=part)

        parts = in_threads(best, starts, self.threads)
        columns = np.concatenate([np.empty((0, num), np.int32), *(part[0] for part in parts)])
        values = np.concatenate([np.empty((0, num), np.float32), *(part[1] for part in parts)])
        return columns + np.int32(self.first), values


def multiply_rows(
    graph: Adjacency,
    x: Array,
    y: Array,
    scale: Array,
    blocks: list[tuple[int, int]],
    *,
    threads: int,
    active: Array | None = None,
    reached: Array | None = None,
) -> list[Array]:
    """Write blocks of rows of y = W x diag(scale); return each block's column sums, float64.

    x: rows that the ids of `graph` point to, y: its own rows; float32, or bfloat16 as uint16, of
    whole vectors. active, reached: see `spmm.multiply_floats`; without, every neighbor is read.
    """
    active = np.empty(0, np.uint8) if active is None else active
    reached = np.zeros(len(graph), np.uint8) if reached is None else reached

    def multiply(block: tuple[int, int]) -> Array:
        kernel: Any
        totals, row = np.zeros(x.shape[1]), aligned((1, x.shape[1]), np.float32)[0]
        place: Any = (x, y, scale, *block)
        if graph.values is not None:
            kernel = spmm.multiply_weighted
            kernel(graph.indptr, graph.ids, graph.values, *place, reached, totals, row)
            return totals
        kept = np.empty(graph.longest + 1 if len(active) else 0, np.int32)
        kernel = spmm.multiply_shorts if x.dtype == np.uint16 else spmm.multiply_floats
        matrix = (graph.indptr, graph.ids, graph.twice)
        kernel(*matrix, *place, active, reached, totals, row, kept)
        return totals

    return in_threads(multiply, blocks, threads)


def top_of(
    x: Array, scale: Array, num: int, columns: int, *, places: Array | None = None
) -> tuple[Array, Array]:
    """Return the `num` best columns of rows of x and their scaled values, both (n, num)."""
    places = np.arange(len(x), dtype=np.int32) if places is None else places
    best = np.empty((len(places), num), np.int32)
    values = np.empty((len(places), num), np.float32)
    spmm.top_columns(places, x, scale, best, values, columns)
    return best, values


def aligned(shape: tuple[int, ...], dtype: Any) -> Array:
    """Return zeros whose rows of whole vectors begin at cache lines."""
    size = int(np.prod(shape)) * np.dtype(dtype).itemsize
    raw = np.zeros(size + 64, np.uint8)
    start = -raw.ctypes.data % 64
    made: Array = raw[start : start + size].view(dtype).reshape(shape)
    return made


def in_threads(call: Callable[[Any], Any], items: Iterable[Any], threads: int) -> list[Any]:
    """Return call(item) of every item in their order; the calls run on so many threads."""
    if threads == 1:
        return [call(item) for item in items]
    with ThreadPoolExecutor(threads) as pool:
        return list(pool.map(call, items))
