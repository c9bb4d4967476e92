"""TorchSpread: the labels L_t on a GPU, or on a CPU without numba; torch and numpy are enough."""

from __future__ import annotations

import itertools
from typing import TYPE_CHECKING, Literal

import numpy as np
import torch
from torch import Tensor

from selfsup_ray.ops.adjacency import Adjacency
from selfsup_ray.ops.spreading import Seeds, Variant

if TYPE_CHECKING:
    from selfsup_ray.artifacts import Array

GATHERED_BYTES = 2**28
"""Of neighbor rows that are read at once."""


class TorchSpread:
    """L_t of the classes [first, stop) in a tensor; see `spreading.Spread`.

    The rows of neighbors are gathered in pieces and summed row by row in a fixed order, so that
    the result is the same in every run.
    """

    def __init__(
        self,
        graph: Adjacency,
        seeds: Array,
        first: int,
        stop: int,
        *,
        dtype: Literal["float32", "bfloat16"],
        device: str,
        variant: Variant,
    ) -> None:
        self.graph, self.variant, self.device = graph, variant, torch.device(device)
        self.first = first
        self.seeds = Seeds.of(seeds, first, stop)
        self.labelled = torch.from_numpy(np.flatnonzero(seeds >= 0)).to(self.device)
        self.ids = torch.from_numpy(np.asarray(graph.ids)).to(self.device)
        self._at = tuple(
            torch.from_numpy(values).to(self.device)
            for values in (self.seeds.places, self.seeds.columns)
        )
        kind = torch.bfloat16 if dtype == "bfloat16" else torch.float32
        self._x = torch.zeros((len(graph), self.seeds.num), dtype=kind, device=self.device)
        self._y = torch.zeros_like(self._x)
        self._x[self._at] = 1
        self._note(torch.from_numpy(self.seeds.counts(self.seeds.num)).to(self.device))

    def _note(self, totals: Tensor) -> None:
        self._totals = totals
        self.mass: Array = totals.cpu().numpy()
        self._scale = self._scales(totals)

    def _scales(self, totals: Tensor) -> Tensor:
        if not self.variant.normalizes:
            return torch.ones_like(totals, dtype=torch.float32)
        return (1 / totals.where(totals > 0, 1)).float()

    def step(self) -> None:
        """Go from L_t to L_{t + 1}."""
        totals = torch.zeros_like(self._totals)
        for start, stop in self._pieces():
            totals += self._multiply(start, stop)
        self._x, self._y = self._y, self._x
        variant = self.variant
        if variant.reset_seeds:
            self._x[self.labelled] = 0
            self._x[self._at] = 1
            totals = self._column_sums()
        scale = torch.ones_like(self._scale)
        for _ in range(variant.sinkhorn):
            self._normalize_rows(scale)
            totals = self._column_sums()
            scale = self._scales(totals)
        self._note(totals)

    def _pieces(self) -> list[tuple[int, int]]:
        """Return row ranges whose neighbors' rows are small enough to gather at once."""
        links = max(1, GATHERED_BYTES // (4 * max(self.seeds.num, 1)))
        cuts = np.arange(0, int(self.graph.indptr[-1]), links)
        borders = np.searchsorted(self.graph.indptr, cuts, side="left")
        borders = np.unique(np.append(borders, len(self.graph))).tolist()
        return list(itertools.pairwise(borders))

    def _multiply(self, start: int, stop: int) -> Tensor:
        """Write rows [start, stop) of the product; return their column sums."""
        graph = self.graph
        indptr = torch.from_numpy(np.asarray(graph.indptr[start : stop + 1])).to(self.device)
        first, last = int(graph.indptr[start]), int(graph.indptr[stop])
        lengths = indptr.diff()
        weights = self._weights(start, stop, indptr, lengths)
        rows = self._x.index_select(0, self.ids[first:last]).float() * weights[:, None]
        sums = torch.segment_reduce(rows, "sum", lengths=lengths, axis=0, initial=0)
        made = (sums * self._scale).to(self._x.dtype)
        self._y[start:stop] = made
        return made.sum(dim=0, dtype=torch.float64)

    def _weights(self, start: int, stop: int, indptr: Tensor, lengths: Tensor) -> Tensor:
        """Return the (links,) float32 entries of W in these rows."""
        graph, num = self.graph, int(indptr[-1] - indptr[0])
        row = torch.repeat_interleave(lengths, output_size=num)
        if graph.values is not None:
            first = int(graph.indptr[start])
            values = torch.from_numpy(np.asarray(graph.values[first : first + num]))
            values = values.to(self.device)
        else:
            twice = torch.from_numpy(np.asarray(graph.twice[start:stop])).to(self.device)
            inside = torch.arange(num, device=self.device) - (indptr[:-1] - indptr[0])[row]
            values = 1 + (inside < twice[row]).float()
        totals = torch.segment_reduce(values.double(), "sum", lengths=lengths, axis=0, initial=0)
        return (values / totals.where(totals > 0, 1)[row]).float()

    def _column_sums(self) -> Tensor:
        parts = [self._x[a:b].sum(dim=0, dtype=torch.float64) for a, b in self._pieces()]
        return torch.stack(parts).sum(dim=0)

    def _normalize_rows(self, scale: Tensor) -> None:
        for start, stop in self._pieces():
            values = self._x[start:stop].float() * scale
            totals = values.sum(dim=1, keepdim=True)
            self._x[start:stop] = (values / totals.where(totals > 0, 1)).to(self._x.dtype)

    def sums(self, lists: Array) -> Array:
        """Return (n, C) float32: L_t summed over the places of each list (n, k), -1 = none."""
        wanted = torch.from_numpy(np.asarray(lists, np.int64)).to(self.device)
        out = torch.empty((len(wanted), self.seeds.num), dtype=torch.float32)
        step = max(1, GATHERED_BYTES // (4 * max(self.seeds.num, 1) * max(wanted.shape[1], 1)))
        for start in range(0, len(wanted), step):
            part = wanted[start : start + step]
            rows = self._x[part.clamp(min=0)].float() * (part >= 0)[..., None]
            out[start : start + step] = (rows.sum(dim=1) * self._scale).cpu()
        return out.numpy()

    def top(self, places: Array, num: int) -> tuple[Array, Array]:
        """Return the `num` best classes of L_t at these places and their values, both (n, num)."""
        wanted = torch.from_numpy(np.asarray(places, np.int64)).to(self.device)
        columns, values = [], []
        step = max(1, GATHERED_BYTES // (8 * max(self.seeds.num, 1)))
        for start in range(0, len(wanted), step):
            rows = self._x[wanted[start : start + step]].float() * self._scale
            found = torch.sort(rows, dim=1, descending=True, stable=True)  # ties by lower class
            columns.append(found.indices[:, :num].int().cpu().numpy() + np.int32(self.first))
            values.append(found.values[:, :num].cpu().numpy())
        empty = (0, num)
        return (
            np.concatenate([np.empty(empty, np.int32), *columns]),
            np.concatenate([np.empty(empty, np.float32), *values]),
        )
