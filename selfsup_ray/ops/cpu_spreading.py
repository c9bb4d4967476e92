"""CpuSpread: the labels L_t on a CPU, by the numba kernels of `spmm`."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from typing import Any, Literal

import numpy as np

from selfsup_ray.artifacts import Array
from selfsup_ray.ops import spmm
from selfsup_ray.ops.adjacency import Adjacency
from selfsup_ray.ops.spreading import Seeds, Variant, scales, shortened, widened

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
        self.graph, self.variant, self.threads = graph, variant, threads
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
        self._scale = scales(totals, self.variant.normalize_columns)

    def step(self) -> None:
        """Go from L_t to L_{t + 1}."""
        active = self._reached
        if int(np.count_nonzero(active)) > DENSE_SHARE * len(active):
            active = np.empty(0, np.uint8)
        self._reached = np.zeros(len(self.graph), np.uint8)
        blocks = self.graph.blocks()
        parts = in_threads(lambda block: self._multiply(block, active), blocks, self.threads)
        self._x, self._y = self._y, self._x
        totals = np.zeros(self.width)
        for part in parts:
            totals += part
        variant = self.variant
        if variant.reset_seeds:
            self._x[self.labelled] = 0
            self._x[self.seeds.places, self.seeds.columns] = 0x3F80 if self.is_short else 1.0
            totals = self._column_sums()
        for _ in range(variant.sinkhorn):
            self._normalize_rows(scales(totals, variant.normalize_columns))
            totals = self._column_sums()
        self._note(totals)

    def _multiply(self, block: tuple[int, int], active: Array) -> Array:
        """Write one block of rows of the product; return its column sums."""
        multiply: Any
        graph, totals = self.graph, np.zeros(self.width)
        row = aligned((1, self.width), np.float32)[0]
        place: Any = (self._x, self._y, self._scale, *block)
        if graph.values is not None:
            matrix: Any = (graph.indptr, graph.ids, graph.values)
            multiply = spmm.multiply_weighted
            multiply(*matrix, *place, self._reached, totals, row)
            return totals
        kept = np.empty(graph.longest + 1 if len(active) else 0, np.int32)
        multiply = spmm.multiply_shorts if self.is_short else spmm.multiply_floats
        matrix = (graph.indptr, graph.ids, graph.twice)
        multiply(*matrix, *place, active, self._reached, totals, row, kept)
        return totals

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


def column_width(classes: int) -> int:
    """Return the columns a block of so many classes takes in memory: whole vectors."""
    return -(-classes // 16) * 16


def spread_bytes(nodes: int, classes: int, *, dtype: str) -> int:
    """Return the memory of a Spread: two copies of L and two flags a node."""
    return nodes * (2 * column_width(classes) * (2 if dtype == "bfloat16" else 4) + 2)


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
