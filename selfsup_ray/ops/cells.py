"""Cells: a spherical k-means that cuts unit rows into small neighborhoods, numbered by nearness.

A cell's number means something: near numbers are near cells. Rows sorted by cell are then in an
order in which neighbors lie close in memory, which graph building and diffusion both live on.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise

import numpy as np
import torch
from torch import Tensor

from selfsup_ray.artifacts import Array

_ROWS = 8192  # of one product
_FLAT = 512  # up to this many centers a row is compared with all of them
_ROUNDS = 1  # over all cells at once, after those inside groups; a second one gains no recall
_ROWS_PER_GROUP = 256  # of the sample, to fit the groups
_GROUPS = 12  # groups of centers that a row looks into when there are more


def unit(rows: Tensor) -> Tensor:
    """Return rows scaled to length 1; a row of zeros stays."""
    return rows.div(rows.norm(dim=1, keepdim=True).clamp_min(1e-30))


@dataclass(frozen=True)
class CellTree:
    """Centers of cells in groups, near ones adjacent.

    centers: (K, d) float32 unit rows; group g holds the cells [cuts[g], cuts[g + 1]); coarse:
    (G, d) float32 unit rows, the centers of the groups.
    """

    centers: Array
    coarse: Array
    cuts: Array


def fit_cells(sample: Array, *, num_cells: int, iterations: int = 6, seed: int = 0) -> CellTree:
    """Return num_cells cells by spherical k-means, in about sqrt(num_cells) groups.

    sample: (n, d) float32 unit rows, n >= num_cells. Two levels: a k-means of groups on part of
    the sample, one of cells inside each group, then one round over all cells at once, which
    mends the borders of the groups. Assignments multiply in bfloat16: the cells are as good, the
    products two to eight times as fast. An empty cell restarts at a row of the sample.
    """
    assert len(sample) >= num_cells > 0, f"{num_cells} cells of {len(sample)} rows"
    rows = _tensor(sample)
    groups = 1 if num_cells <= _FLAT else round(np.sqrt(num_cells))
    some = rows[:: max(1, len(rows) // (_ROWS_PER_GROUP * groups))]
    coarse = torch.from_numpy(in_near_order(_lloyd(some, groups, iterations, seed).numpy()))
    owner = nearest_center(rows, coarse)
    shares = _shares(torch.bincount(owner, minlength=groups).numpy(), num_cells)
    parts = [
        in_near_order(_lloyd(rows[owner == g], int(share), iterations, seed + 1 + g).numpy())
        for g, share in enumerate(shares)
        if share
    ]
    full = np.flatnonzero(shares)
    cuts = np.concatenate([[0], np.cumsum(shares[full])]).astype(np.int64)
    tree = CellTree(np.concatenate(parts), np.ascontiguousarray(coarse.numpy()[full]), cuts)
    for _ in range(0 if groups == 1 else _ROUNDS):
        cells = torch.from_numpy(assign_cells(sample, tree).astype(np.int64))
        sums = torch.zeros(tree.centers.shape).index_add_(0, cells, rows)
        full_cells = torch.bincount(cells, minlength=num_cells)[:, None] > 0
        centers = torch.where(full_cells, unit(sums), torch.from_numpy(tree.centers))
        tree = CellTree(np.asarray(centers.numpy()), tree.coarse, cuts)
    return tree


def _shares(sizes: Array, total: int) -> Array:
    """Return how many of `total` cells each group gets: by its size, at most one a row."""
    exact = sizes * (total / sizes.sum())
    shares = np.minimum(np.floor(exact).astype(np.int64), sizes)
    for g in np.argsort(shares - exact, kind="stable"):
        if shares.sum() == total:
            break
        shares[g] += shares[g] < sizes[g]
    while shares.sum() < total:  # groups smaller than their share leave some over
        shares[int(np.argmax(sizes - shares))] += 1
    return np.asarray(shares)


def _lloyd(rows: Tensor, k: int, iterations: int, seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    centers = rows[torch.randperm(len(rows), generator=generator)[:k]].clone()
    for _ in range(iterations):
        owner = nearest_center(rows, centers)
        sums = torch.zeros_like(centers).index_add_(0, owner, rows)
        empty = torch.bincount(owner, minlength=k) == 0
        centers = unit(sums)
        if empty.any():
            again = torch.randint(len(rows), (int(empty.sum()),), generator=generator)
            centers[empty] = rows[again]
    return centers


def nearest_center(rows: Tensor, centers: Tensor) -> Tensor:
    """Return (n,) int64: the center with the largest inner product, in bfloat16, ties by lower."""
    transposed = centers.bfloat16().T
    found = torch.empty(len(rows), dtype=torch.int64)
    for i in range(0, len(rows), _ROWS):
        scores = rows[i : i + _ROWS].bfloat16() @ transposed
        found[i : i + _ROWS] = largest_column(scores)
    return found


def assign_cells(rows: Array, tree: CellTree) -> Array:
    """Return (n,) int32: the cell of each row, the nearest center or one nearly as near.

    A row is compared with the centers of the groups, then with the cells of its twelve nearest
    groups: its cost grows with the square root of the number of cells.
    """
    narrow = torch.from_numpy(tree.centers).bfloat16()
    coarse = torch.from_numpy(tree.coarse).bfloat16().T
    count = min(_GROUPS, len(tree.coarse))
    out = np.empty(len(rows), np.int32)
    for i in range(0, len(rows), 2 * _ROWS):  # what groups gather from stays in the cache
        some = _tensor(rows[i : i + 2 * _ROWS]).bfloat16()
        near = (some @ coarse).float().topk(count, dim=1, sorted=False).indices
        out[i : i + len(some)] = _best_in_groups(some, near, narrow, tree.cuts)
    return out


def _best_in_groups(rows: Tensor, near: Tensor, centers: Tensor, cuts: Array) -> Array:
    """Return (n,) the best center in the groups near[i], by score and then by lower number."""
    from selfsup_ray.ops.selection import LOWEST, raise_best

    best, cell = np.full(len(rows), LOWEST, np.int16), np.zeros(len(rows), np.int32)
    flat = near.flatten()
    order = torch.argsort(flat, stable=True) // near.shape[1]
    ends = torch.bincount(flat, minlength=len(cuts) - 1).cumsum(0).tolist()
    for group, (a, b) in enumerate(pairwise([0, *ends])):  # ascending: the lower of equals stays
        if a == b:
            continue
        who = order[a:b]
        some = rows.index_select(0, order[a : few_heights(a, b, len(order))])
        scores = some @ centers[cuts[group] : cuts[group + 1]].T
        bits = scores[: len(who)].view(torch.int16).numpy()
        raise_best(bits, who.numpy(), int(cuts[group]), best, cell)
    return cell


def few_heights(start: int, stop: int, end: int) -> int:
    """Return where rows [start, stop) may be extended to, up to `end`, for a product.

    Every new height costs oneDNN a kernel, far more than some rows whose products nobody reads.
    """
    step = 32 if stop - start <= 256 else 256
    return min(start + -(-(stop - start) // step) * step, end)


def _tensor(rows: Array) -> Tensor:
    return torch.from_numpy(np.ascontiguousarray(rows, np.float32))


def largest_column(scores: Tensor) -> Tensor:
    """Return (n,) int64 columns of the largest of (n, m) bfloat16 scores, ties by lower column."""
    from selfsup_ray.ops.selection import largest_columns

    return torch.from_numpy(largest_columns(scores.contiguous().view(torch.int16).numpy()))


def in_near_order(centers: Array) -> Array:
    """Return the centers (K, d) in an order in which near ones are adjacent.

    The order of the leaves of a tree that halves each group along its direction of largest spread
    (found by power iteration), each half turned so that it begins near where the last one ended.
    """
    order = _halved(centers, np.arange(len(centers)))
    return np.ascontiguousarray(centers[order], np.float32)


def _halved(centers: Array, members: Array) -> Array:
    if len(members) <= 2:
        return members
    points = centers[members] - centers[members].mean(axis=0)
    direction = points[np.argmax(np.einsum("nd,nd->n", points, points))]
    for _ in range(8):
        direction = points.T @ (points @ direction)
        direction = direction / max(float(np.linalg.norm(direction)), 1e-30)
    ranked = members[np.argsort(points @ direction, kind="stable")]
    half = len(ranked) // 2
    return np.concatenate([_halved(centers, ranked[:half]), _halved(centers, ranked[half:])])
