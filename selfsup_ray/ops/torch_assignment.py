"""Points assigned to their nearest centroids in plain torch: on a GPU, or without numba."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import torch
from torch import Tensor

from selfsup_ray.artifacts import Array
from selfsup_ray.ops.assignment import Centroids, Precision, Sums, blocks, max_magnitude

_SCORE_BYTES = 2**28  # float32 scores held at once


class TorchPoints:
    """Points (n, d) float32, kept on a device; the same methods as `assignment.TilePoints`.

    Scores are not rounded to bfloat16, so of nearly equal distances another may be the smaller
    here. Sums are exact integers all the same.
    """

    def __init__(self, rows: Array, *, device: str) -> None:
        rows = np.ascontiguousarray(rows, np.float32)
        # A copy where torch would warn: it knows no tensors that must not be written.
        known = rows if rows.flags.writeable else rows.copy()
        self.rows, self.device = torch.from_numpy(known).to(device), device

    def __len__(self) -> int:
        return len(self.rows)

    def largest(self) -> float:
        """Return the largest magnitude among all numbers; not finite where one of them is not."""
        return max_magnitude([float(self.rows[a:b].abs().max()) for a, b in blocks(len(self))])

    def totals(self, exponent: int) -> tuple[Array, int]:
        """Return the sum (d,) int64 of x 2^exponent, rounded, and that of its squares."""
        total = torch.zeros(self.rows.shape[1], dtype=torch.int64, device=self.device)
        all_squares = 0
        for a, b in blocks(len(self)):
            fixed = _fixed(self.rows[a:b], exponent)
            total += fixed.sum(dim=0)
            squares = fixed * fixed  # below 2^60: added up in two parts
            all_squares += int((squares >> 30).sum()) << 30
            all_squares += int((squares & 0x3FFFFFFF).sum())
        return total.cpu().numpy(), all_squares

    def sums(self, values: Array, exponent: int, precision: Precision) -> Sums:
        """Return the sums of x 2^exponent, rounded, over the points nearest to each centroid."""
        centroids = Centroids.prepare(values, precision)
        sums = torch.zeros(values.shape, dtype=torch.int64, device=self.device)
        counts = torch.zeros(len(values), dtype=torch.int64, device=self.device)
        for a, ids in self._nearest(centroids):
            sums.index_add_(0, ids, _fixed(self.rows[a : a + len(ids)], exponent))
            counts += torch.bincount(ids, minlength=len(values))
        return Sums(sums.cpu().numpy(), counts.cpu().numpy())

    def nearest(self, values: Array, precision: Precision) -> tuple[Array, Array]:
        """Return ids (n,) int32 of the nearest centroids and squared distances (n,) float32."""
        ids, apart = np.empty(len(self), np.int32), np.empty(len(self), np.float32)
        centroids = Centroids.prepare(values, precision)
        known = torch.from_numpy(centroids.values.copy()).to(self.device)
        for a, found in self._nearest(centroids):
            here = slice(a, a + len(found))
            steps = (self.rows[here] - known[found]).double()
            ids[here] = found.cpu().numpy()
            apart[here] = steps.square().sum(dim=1).float().cpu().numpy()
        return ids, apart

    def _nearest(self, centroids: Centroids) -> Iterator[tuple[int, Tensor]]:
        """Yield (first row, nearest centroid of it and of those after it)."""
        columns = centroids.moved.to(self.device).T
        bias = torch.from_numpy(centroids.bias).float().to(self.device)
        shift = torch.from_numpy(centroids.shift).to(self.device)
        step = max(1, _SCORE_BYTES // (4 * len(centroids)))
        for a in range(0, len(self), step):
            rows = (self.rows[a : a + step] - shift).to(columns.dtype)
            yield a, (_product(rows, columns) + bias).argmax(dim=1)


def _fixed(rows: Tensor, exponent: int) -> Tensor:
    """Return rows x 2^exponent, rounded to int64."""
    return (rows * 2.0**exponent).round().long()


def _product(rows: Tensor, columns: Tensor) -> Tensor:
    """Return the product, in float32, of factors that may be bfloat16."""
    if rows.is_cuda and rows.dtype == torch.bfloat16:
        return torch.mm(rows, columns, out_dtype=torch.float32)
    return rows.float() @ columns.float()
