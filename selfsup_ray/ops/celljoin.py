"""The cell join: the fast way to the nearest neighbors of every row among all rows.

Rows lie in cell order. Every row looks into the lists of its own few nearest cells; list by list,
one bfloat16 product compares all rows of a block that look there with the list's members, a
running selection keeps each row's best, and those are settled in float64 at the end.
"""

from __future__ import annotations

import mmap
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from selfsup_ray.artifacts import Array
from selfsup_ray.ops.cells import few_heights
from selfsup_ray.ops.neighbors import Neighbors
from selfsup_ray.ops.selection import empty_candidates, keep_largest, prune_all, settle, sort_places

_TILE_ROWS = (64, 128, 256, 512, 1024)  # few shapes: each costs oneDNN a kernel
_TILE_COLUMNS = (64, 96, 128, 160, 192, 224, 256, 320, 384, 448, 512, 640, 768, 1024)
_BLOCK = 8192  # rows made narrow at once
_MAPPED_BYTES = 2**28  # of rows that a process keeps mapped
_PROBE_CELLS = 384  # nearest cells of a cell among which its rows choose their own


def release(rows: Array) -> None:
    """Let go of the pages of a memory map: they stay in the page cache, not in this process."""
    mapped = getattr(rows, "_mmap", None)
    if mapped is not None:
        mapped.madvise(mmap.MADV_DONTNEED)


@dataclass(frozen=True)
class Cells:
    """Rows in cell order: the distinct rows of cell c are at the places [starts[c], ends[c]).

    centers: (K, d) float32; starts: (K + 1,) and ends: (K,) int64; rows: (N, d) float32,
    memory-mapped; order: (N,) the id of the image at each place. Between ends[c] and
    starts[c + 1] are the places of images whose rows equal an earlier one's: nobody looks there.
    """

    centers: Array
    starts: Array
    ends: Array
    rows: Array
    order: Array

    def release(self) -> None:
        """Let go of the pages of the rows."""
        release(self.rows)

    def cell_of(self, place: int) -> int:
        """Return the cell that a place belongs to."""
        return int(np.searchsorted(self.starts, place, side="right")) - 1


def near_cells(centers: Array, cells: Array, *, count: int) -> Array:
    """Return (len(cells), count) int32: the cells nearest to each of these, nearest first."""
    every, count = torch.from_numpy(np.ascontiguousarray(centers)), min(count, len(centers))
    out = np.empty((len(cells), count), np.int32)
    for i in range(0, len(cells), 128):
        some = torch.from_numpy(np.asarray(cells[i : i + 128], np.int64))
        nearest = (every[some] @ every.T).topk(count, dim=1).indices
        out[i : i + 128] = nearest.to(torch.int32).numpy()
    return out


def probe(cells: Cells, rows: Tensor, start: int, *, probes: int) -> Array:
    """Return (n, p) int32: the cells that each row looks into, its own first; p <= probes.

    rows: (n, d) bfloat16, at the places start, start + 1, .... A row chooses among the cells near
    its own, so that the cost does not grow with their number.
    """
    stop = start + len(rows)
    first, last = cells.cell_of(start), cells.cell_of(stop - 1)
    near = near_cells(cells.centers, np.arange(first, last + 1), count=_PROBE_CELLS)
    out = np.empty((len(rows), min(probes, near.shape[1])), np.int32)
    centers = torch.from_numpy(np.ascontiguousarray(cells.centers)).bfloat16()
    for cell in range(first, last + 1):
        a, b = int(cells.starts[cell]), int(cells.starts[cell + 1])
        if a == b:
            continue
        others = near[cell - first]
        others = others[others != cell]
        chosen = centers[torch.from_numpy(others.astype(np.int64))]
        scores = (rows[a - start : few_heights(a, b, stop) - start] @ chosen.T)[: b - a]
        out[a - start : b - start, 0] = cell
        out[a - start : b - start, 1:] = others[best_columns(scores, out.shape[1] - 1)]
    return out


def best_columns(scores: Tensor, count: int) -> Array:
    """Return (n, count) int32 columns of the largest of (n, m) bfloat16 scores, in no order."""
    n, m = scores.shape
    candidates = empty_candidates(n, count + min(m, 2 * count + 16))
    if count:
        bits = scores.contiguous().view(torch.int16).numpy()
        keep_largest(bits, m, 0, np.arange(n), m, count, *candidates)
    keys, ids, used, _ = candidates
    prune_all(keys, ids, used, count)
    return np.asarray(ids[:, :count])


def join(
    cells: Cells, start: int, stop: int, *, k: int, probes: int, keep: int
) -> tuple[Neighbors, Array]:
    """Return the k nearest other distinct rows of each row in [start, stop), by place.

    start and stop are borders of cells. probes: lists that a row looks into; keep >= k: candidates
    that are settled exactly; equal similarities by lower image id. The second result holds the
    rows, counted from `start`, whose lists have fewer than k others; theirs are not filled. One
    thread; it runs beside others, since neither torch nor numba holds the interpreter.
    """
    if start == stop:
        return Neighbors(np.empty((0, k), np.int64), np.empty((0, k), np.float32)), np.empty(0, int)
    candidates = empty_candidates(stop - start, keep + 40)
    narrow = _narrow(cells.rows, start, stop)
    wanted = probe(cells, narrow, start, probes=probes)
    # A row's own list first: what is found there leaves little to keep of the others.
    for lists in (wanted[:, :1], wanted[:, 1:]):
        _compare(cells, narrow, start, lists, keep, candidates)
    del narrow, wanted
    found = _settled(cells, start, stop, k=k, keep=keep, candidates=candidates)
    return found, np.flatnonzero(candidates[2] < k)


def _narrow(rows: Array, start: int, stop: int) -> Tensor:
    """Return rows [start, stop) in bfloat16."""
    narrow = torch.empty(stop - start, rows.shape[1], dtype=torch.bfloat16)
    for i in range(start, stop, _BLOCK):
        block = np.array(rows[i : min(i + _BLOCK, stop)])
        narrow[i - start : i - start + len(block)] = torch.from_numpy(block)
    return narrow


def _compare(
    cells: Cells,
    narrow: Tensor,
    start: int,
    lists: Array,
    keep: int,
    candidates: tuple[Array, Array, Array, Array],
) -> None:
    """Compare each row with the members of the cells it looks into: lists, (n, p)."""
    tiles, loaded = _Tiles(narrow.shape[1]), 0
    for cell, asking in _by_cell(lists, len(cells.centers)):
        first, last = int(cells.starts[cell]), int(cells.ends[cell])
        for a in range(first, last, _TILE_COLUMNS[-1]):
            b = min(a + _TILE_COLUMNS[-1], last)
            tiles.load(cells.rows[a:b])
            for i in range(0, len(asking), _TILE_ROWS[-1]):
                some = asking[i : i + _TILE_ROWS[-1]]
                scores = tiles.scores(narrow, some)
                keep_largest(scores, b - a, a, some, start, keep, *candidates)
        loaded += (last - first) * cells.rows.itemsize * narrow.shape[1]
        if loaded > _MAPPED_BYTES:
            cells.release()
            loaded = 0


def _settled(
    cells: Cells,
    start: int,
    stop: int,
    *,
    k: int,
    keep: int,
    candidates: tuple[Array, Array, Array, Array],
) -> Neighbors:
    """Return the k best candidates of each row in [start, stop) by exact product."""
    n, (keys, ids, used, _) = stop - start, candidates
    places, values = np.zeros((n, k), np.int32), np.zeros((n, k), np.float32)
    done, queries = np.zeros(n, np.int32), cells.rows[start:stop]
    prune_all(keys, ids, used, keep)
    total, at_once = len(cells.rows), max(1, _MAPPED_BYTES // cells.rows[:1].nbytes)
    if total > at_once:  # a few pages at a time, wherever the candidates lie
        sort_places(ids, used)
    for last in range(at_once, total + at_once, at_once):
        settle(queries, cells.rows, cells.order, min(last, total), ids, used, done, places, values)
        cells.release()
    return Neighbors(places, values)


def _by_cell(wanted: Array, num_cells: int) -> Iterator[tuple[int, Array]]:
    """Yield (cell, the rows that look into it), for (n, p) cells wanted by each row."""
    order = np.argsort(wanted.ravel(), kind="stable") // max(1, wanted.shape[1])
    ends = np.cumsum(np.bincount(wanted.ravel(), minlength=num_cells))
    for cell in np.flatnonzero(np.diff(ends, prepend=0)):
        yield int(cell), order[ends[cell - 1] if cell else 0 : ends[cell]]


class _Tiles:
    """Buffers of one product: few shapes, allocated once, so that they stay in the cache."""

    def __init__(self, dim: int) -> None:
        self.members = torch.zeros(_TILE_COLUMNS[-1], dim, dtype=torch.bfloat16)
        self.queries = torch.zeros(_TILE_ROWS[-1], dim, dtype=torch.bfloat16)
        self.out = torch.empty(_TILE_ROWS[-1] * _TILE_COLUMNS[-1], dtype=torch.bfloat16)
        self.width = 0

    def load(self, rows: Array) -> None:
        """Take the members of a list, (<= 1024, d) float32."""
        self.width = next(size for size in _TILE_COLUMNS if size >= len(rows))
        self.members[: len(rows)] = torch.from_numpy(np.array(rows))

    def scores(self, rows: Tensor, some: Array) -> Array:
        """Return the products of these rows with the members, as int16 bits of bfloat16."""
        height = next(size for size in _TILE_ROWS if size >= len(some))
        torch.index_select(rows, 0, torch.from_numpy(some), out=self.queries[: len(some)])
        out = self.out[: height * self.width].view(height, self.width)
        torch.mm(self.queries[:height], self.members[: self.width].T, out=out)
        return np.asarray(out.view(torch.int16).numpy())
