"""How many dimensions patches fill: distances to k-means centroids, and neighbor distances.

Two views of Brutzkus et al. 2022 (appendix on the intrinsic dimension of patches): the mean squared
distance of unit vectors to the nearest of k centroids falls the faster with k the fewer dimensions
they fill; and the maximum-likelihood estimate of Levina and Bickel 2004.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, get_args

import numpy as np

from selfsup_ray.artifacts import Array
from selfsup_ray.ops.kmeans import kmeans, nearest_centroid

PointSet = Literal["original", "whitened", "whitened_shuffled", "shuffled", "gaussian"]
SETS: tuple[PointSet, ...] = get_args(PointSet)
"""The five sets that are compared, in the order of the published figure."""

BLOCK = 65_536
"""Rows that are made at a time; fixed, since the random numbers follow the blocks."""
SAME = 1e-5
"""Unit vectors closer than this are one point: two 8-bit patches of one direction differ by less,
by rounding, and patches of other directions by more."""
_MARGIN = 12
"""Candidates looked at beyond the neighbors asked for, since float32 products rank them roughly."""
_QUERIES, _FEW, _ROWS = 512, 4096, 16_384


def point_set(name: PointSet, patches: Array, matrix: Array, *, seed: int) -> Array:
    """Return one of the five sets made from patches (n, d): (n, d) float32.

    original: the patches; whitened: patches @ matrix, matrix (d, d), the mean not taken away;
    shuffled, whitened_shuffled: the values of every row in an order of its own; gaussian: N(0, I).
    """
    out = np.empty(patches.shape, np.float32)
    for block, start in enumerate(range(0, len(patches), BLOCK)):
        rows = slice(start, start + BLOCK)
        shape = out[rows].shape
        rng = np.random.Generator(np.random.Philox([seed, SETS.index(name), block]))
        if name == "gaussian":
            out[rows] = rng.standard_normal(shape, dtype=np.float32)
            continue
        values = np.asarray(patches[rows], np.float32)
        if name.startswith("whitened"):
            values = values @ matrix
        out[rows] = rng.permuted(values, axis=1) if name.endswith("shuffled") else values
    return out


def unit_points(points: Array, *, smallest_share: float = 0.01) -> Array:
    """Return unit rows of points (n, d) without the given share of smallest norms: (m, d) float32.

    The order stays. Rows of zeros go in any case: they have no direction.
    """
    norms = np.sqrt(np.einsum("nd,nd->n", points, points, dtype=np.float64))
    least = np.percentile(norms, 100 * smallest_share) if len(norms) else 0.0
    kept = (norms >= least) & (norms > 0)
    return np.asarray(points[kept] / norms[kept, None], np.float32)


@dataclass(frozen=True)
class CentroidDistance:
    """Distance of points to the nearest of k centroids; the published figure has mean_squared."""

    k: int
    mean_squared: float
    median_squared: float
    mean: float
    """Of the distance itself, not squared."""


def centroid_distance(
    points: Array,
    k: int,
    *,
    points_per_centroid: int | None = 256,
    iterations: int = 25,
    seed: int = 0,
    threads: int = 1,
    precision: Literal["bfloat16", "float32"] = "bfloat16",
    device: str = "cpu",
) -> CentroidDistance:
    """Return how far points (n, d) are from the nearest of k centroids that k-means finds.

    points_per_centroid: k-means sees only the first that many times k points, as faiss does by
    default and the published numbers did; the rows must be in random order. Every point is then
    measured. Squared distances are those of float32 differences.
    """
    seen = len(points) if points_per_centroid is None else min(len(points), points_per_centroid * k)
    # Distances do not change with the origin, and around zero 16-bit products lose the least.
    center = points[:BLOCK].mean(axis=0, dtype=np.float64).astype(np.float32)
    points = np.asarray(points - center)
    found = kmeans(
        points[:seen],
        k,
        iterations=iterations,
        seed=seed,
        threads=threads,
        precision=precision,
        device=device,
    )
    _, squared = nearest_centroid(
        points, found.centroids, threads=threads, precision=precision, device=device
    )
    squared = np.maximum(squared.astype(np.float64), 0)
    return CentroidDistance(
        k, float(squared.mean()), float(np.median(squared)), float(np.sqrt(squared).mean())
    )


def distinct(points: Array) -> Array:
    """Return unit rows (n, d) without copies of one point, the first of each in its old order."""
    grid = np.ascontiguousarray(np.round(points / SAME).astype(np.int32))
    rows = grid.view(np.dtype((np.void, grid.dtype.itemsize * grid.shape[1])))[:, 0]
    _, first = np.unique(rows, return_index=True)
    return np.asarray(points[np.sort(first)])


def neighbor_distances(points: Array, queries: Array, *, k: int) -> Array:
    """Return (q, k) float64 ascending distances from queries (q, d) to their k nearest points.

    points: (n, d) distinct unit rows; a point closer than SAME, such as the query itself, is not
    counted. Entries that do not exist are infinite. Memory beside the arguments: about 100 MB.
    """
    out = np.full((len(queries), k), np.inf)
    wanted = min(k + 1 + _MARGIN, len(points))
    for start in range(0, len(queries), _QUERIES):
        block = queries[start : start + _QUERIES]
        ids = _candidates(points, block, wanted)
        gaps = points[ids].astype(np.float64) - block[:, None].astype(np.float64)
        exact = np.sqrt(np.einsum("qkd,qkd->qk", gaps, gaps))
        exact = np.sort(np.where(exact < SAME, np.inf, exact), axis=1)[:, :k]
        out[start : start + len(block), : exact.shape[1]] = exact
    return out


def _candidates(points: Array, queries: Array, wanted: int) -> Array:
    """Return the (q, wanted) ids of the points with the largest products, in any order."""
    first = max(wanted, _FEW)
    scores = queries @ points[:first].T
    ids = np.argpartition(-scores, wanted - 1, axis=1)[:, :wanted]
    scores = np.take_along_axis(scores, ids, axis=1)
    for start in range(first, len(points), _ROWS):
        products = queries @ points[start : start + _ROWS].T
        # Only what beats the worst candidate so far: soon a handful of a row's many products.
        row, column = np.nonzero(products > scores.min(axis=1, keepdims=True))
        if not len(row):
            continue
        place = np.arange(len(row)) - np.searchsorted(row, row)
        more = np.full((len(queries), int(place.max()) + 1), -np.inf, np.float32)
        more_ids = np.zeros(more.shape, np.int64)
        more[row, place], more_ids[row, place] = products[row, column], column + start
        scores = np.concatenate([scores, more], axis=1)
        best = np.argpartition(-scores, wanted - 1, axis=1)[:, :wanted]
        scores = np.take_along_axis(scores, best, axis=1)
        ids = np.take_along_axis(np.concatenate([ids, more_ids], axis=1), best, axis=1)
    return np.asarray(ids)


@dataclass(frozen=True)
class Estimate:
    """Levina and Bickel's estimate: dimension, its standard error, and the points it rests on."""

    dimension: float
    standard_error: float
    points: int


def levina_bickel(distances: Array, *, first: int = 10, last: int = 20) -> Estimate:
    """Return the maximum-likelihood intrinsic dimension (Levina and Bickel 2004, eq. 8 and 9).

    distances: (q, >= last) ascending distances T_1, T_2, … of points to their neighbors, all
    positive. m_j(x) = 1 / (log T_j - mean of log T_i over i < j), the mean over the points and
    over j = first..last. A point that has fewer neighbors, or all at one distance, is left out.
    """
    assert 2 <= first <= last <= distances.shape[1], f"j = {first}..{last} of {distances.shape[1]}"
    near = distances[:, :last]
    near = near[np.isfinite(near).all(axis=1) & (near[:, 0] < near[:, first - 1])]
    log = np.log(near)
    before = np.cumsum(log, axis=1) / np.arange(1, last + 1)  # column j - 2: mean over i < j
    inverse = log[:, first - 1 :] - before[:, first - 2 : last - 1]
    by_point = (1 / inverse).mean(axis=1)
    n = len(by_point)
    if not n:
        return Estimate(float("nan"), float("nan"), 0)
    error = float(by_point.std(ddof=1) / np.sqrt(n)) if n > 1 else float("nan")
    return Estimate(float(by_point.mean()), error, n)
