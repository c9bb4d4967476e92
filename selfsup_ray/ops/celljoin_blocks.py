"""The cell join by whole cells: torch alone, on a GPU or a CPU.

Every cell is compared with its nearest cells as one block; a GPU has the products to spare that
single rows choosing their own lists would save, and no kernel beyond matrix product and top-k.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import torch
from torch import Tensor

from selfsup_ray.artifacts import Array
from selfsup_ray.ops.celljoin import Cells, near_cells
from selfsup_ray.ops.neighbors import Neighbors

_SCORES = 1 << 26  # of one product: 256 MB in float32


def join_blocks(
    cells: Cells, start: int, stop: int, *, k: int, probes: int, keep: int, device: str
) -> tuple[Neighbors, Array]:
    """Return what `celljoin.join` does, with the same nearest cells for all rows of a cell.

    Products are bfloat16 with float32 sums; the `keep` best of each row are settled in float64 on
    the device. Memory there: the rows of the cells in question, and about 1 GB.
    """
    k_places = np.zeros((stop - start, k), np.int64)
    values = np.full((stop - start, k), -np.inf, np.float32)
    if start == stop:
        return Neighbors(k_places, values), np.empty(0, np.int64)
    low, high = cells.cell_of(start), cells.cell_of(stop - 1) + 1
    near = near_cells(cells.centers, np.arange(low, high), count=probes)
    block = _Block(cells, np.unique(np.append(near, np.arange(low, high))), device)
    lacking = []
    for some in _batches(cells, near, low):
        queries, candidates = block.indices(cells, near, low, some)
        for i in range(len(some)):
            if candidates[i].numel() - 1 < k:
                own = int(cells.starts[some[i]]) - start
                size = int(cells.starts[some[i] + 1]) - start - own
                lacking.append(np.arange(own, own + size))
        if not queries or max(len(c) for c in candidates) <= k:
            continue
        for query, places, exact in block.best(queries, candidates, keep, k):
            rows = query - start
            by_id = np.lexsort((cells.order[places], -exact), axis=1)[:, :k]
            k_places[rows] = np.take_along_axis(places, by_id, axis=1)
            values[rows] = np.take_along_axis(exact, by_id, axis=1)
    short = np.concatenate([*lacking, np.empty(0, np.int64)]).astype(np.int64)
    unfilled = np.flatnonzero(np.isneginf(values).any(axis=1))
    return Neighbors(k_places, values), np.unique(np.concatenate([short, unfilled]))


def _batches(cells: Cells, near: Array, low: int) -> Iterator[list[int]]:
    """Yield cells with rows, so many at once that their scores fit."""
    sizes = cells.ends - cells.starts[:-1]
    batch: list[int] = []
    rows = columns = 0
    for i, lists in enumerate(near):
        cell = low + i
        own, others = int(cells.starts[cell + 1] - cells.starts[cell]), int(sizes[lists].sum())
        if not own:
            continue
        rows, columns = max(rows, own), max(columns, others)
        if batch and (len(batch) + 1) * rows * columns > _SCORES:
            yield batch
            batch, rows, columns = [], own, others
        batch.append(cell)
    if batch:
        yield batch


class _Block:
    """The rows of some cells on a device."""

    def __init__(self, cells: Cells, used: Array, device: str) -> None:
        spans = [np.arange(cells.starts[c], cells.starts[c + 1]) for c in used]
        self.first = dict(
            zip(used.tolist(), np.cumsum([0, *map(len, spans)]).tolist(), strict=False)
        )
        self.places = np.concatenate(spans)
        rows = np.concatenate([cells.rows[span[0] : span[-1] + 1] for span in spans if len(span)])
        self.rows = torch.from_numpy(rows).to(device)
        self.narrow = self.rows.bfloat16()

    def indices(
        self, cells: Cells, near: Array, low: int, some: list[int]
    ) -> tuple[list[Tensor], list[Tensor]]:
        """Return, for each cell, its rows and the distinct rows of its near cells, as positions."""
        queries, candidates = [], []
        for cell in some:
            size = int(cells.starts[cell + 1] - cells.starts[cell])
            queries.append(torch.arange(self.first[cell], self.first[cell] + size))
            spans = [
                torch.arange(self.first[c], self.first[c] + int(cells.ends[c] - cells.starts[c]))
                for c in near[cell - low].tolist()
            ]
            candidates.append(torch.cat(spans))
        return queries, candidates

    def best(
        self, queries: list[Tensor], candidates: list[Tensor], keep: int, k: int
    ) -> Iterator[tuple[Array, Array, Array]]:
        """Yield per cell: places of its rows, and of their best others with float32 similarity."""
        device = self.rows.device
        q = torch.nn.utils.rnn.pad_sequence(queries, batch_first=True, padding_value=0).to(device)
        c = torch.nn.utils.rnn.pad_sequence(candidates, batch_first=True, padding_value=-1)
        c = c.to(device)
        scores = torch.bmm(self.narrow[q], self.narrow[c.clamp_min(0)].transpose(1, 2)).float()
        scores.masked_fill_((c < 0)[:, None, :], -torch.inf)
        scores.masked_fill_(q[:, :, None] == c[:, None, :], -torch.inf)  # not its own neighbor
        top = scores.topk(min(keep, scores.shape[2]), dim=2)
        chosen = torch.take_along_dim(c[:, None, :], top.indices, dim=2)
        for i, own in enumerate(queries):
            ids, n = chosen[i, : len(own)], len(own)
            rows = self.rows[ids.clamp_min(0)].double()
            exact = torch.einsum("nd,nmd->nm", self.rows[q[i, :n]].double(), rows).float()
            exact.masked_fill_(top.values[i, :n].isneginf(), -torch.inf)
            places = self.places[ids.clamp_min(0).cpu().numpy()]
            yield self.places[own.numpy()], places, exact.cpu().numpy()
