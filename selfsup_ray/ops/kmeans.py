"""k-means of Lloyd (1982), and greedy farthest-point selection, over points in memory.

Everything that depends on the points is an exact integer sum, so that a result does not depend on
how points are shared between threads, processes or machines. `cluster.kmeans` runs the same steps
over actors.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np

from selfsup_ray.artifacts import Array
from selfsup_ray.errors import ConfigError
from selfsup_ray.ops.assignment import Precision, Sums, TilePoints
from selfsup_ray.ops.rng import permuted
from selfsup_ray.ops.torch_assignment import TorchPoints

_FIXED_BITS = 30  # of the largest number in fixed point: sums of 2^33 of them fit an int64
_SPLIT = 2.0**-10  # how far the halves of a split cluster are moved, in standard deviations
_COARSE = (
    16  # from this ratio of variance to objective, bfloat16 can no longer tell centroids apart
)


@dataclass(frozen=True)
class Clustering:
    """The result of k-means.

    centroids: (K, d) float32. counts: (K,) int64 points nearest to each. objective: the mean
    squared distance of a point to its nearest centroid after each iteration; the last value
    belongs to these centroids and counts.
    """

    centroids: Array
    counts: Array
    objective: tuple[float, ...]


Points = TilePoints | TorchPoints


def hold(rows: Array, *, threads: int = 1, device: str = "cpu") -> Points:
    """Return points (n, d) ready to be assigned: by kernels on a CPU, by torch elsewhere.

    Without numba torch does it on a CPU too, more slowly.
    """
    if device == "cpu" and has_kernels():
        return TilePoints(rows, threads=threads)
    return TorchPoints(rows, device=device)


def has_kernels() -> bool:
    """Return whether numba is installed."""
    return importlib.util.find_spec("numba") is not None


@dataclass(frozen=True)
class Totals:
    """Of all points, in fixed point with 2^exponent to the unit: how many, their sum, squares.

    total: (d,) int64; squares: the sum of all squared numbers, times 4^exponent.
    """

    count: int
    exponent: int
    total: Array
    squares: int

    @property
    def variance(self) -> float:
        """Mean squared distance of a point to the mean."""
        mean = self.total.astype(np.float64) * 2.0**-self.exponent / self.count
        return max(0.0, self.mean_square - float(mean @ mean))

    @property
    def mean_square(self) -> float:
        """Mean squared length of a point."""
        return self.squares / self.count * 4.0**-self.exponent


def exponent_for(largest: float) -> int:
    """Return the exponent of the fixed point of numbers up to this magnitude.

    Raises ConfigError when it is not finite.
    """
    if not np.isfinite(largest):
        raise ConfigError("k-means wants finite points, but one holds nan or inf. Leave it out.")
    return min(100, _FIXED_BITS - int(np.frexp(largest)[1]))  # 2^100 is still a float32


def first_ids(n: int, num_clusters: int, *, seed: int) -> Array:
    """Return (K,) int64 ids of the points that the centroids start at: distinct, at random.

    Raises ConfigError when there are fewer points than clusters.
    """
    if not 0 < num_clusters <= n:
        raise ConfigError(
            f"k-means of {n:,} points cannot give {num_clusters:,} clusters. Ask for 1 to {n:,}, "
            f"or give it more points."
        )
    return permuted(np.arange(num_clusters), n=n, seed=seed, epoch=0)


@dataclass(frozen=True)
class State:
    """Where k-means stands: centroids (K, d) float32, and the objective of all before them."""

    centroids: Array
    objective: tuple[float, ...] = ()


@dataclass(frozen=True)
class Step:
    """One assignment: counts (K,) and objective of it, and the state after the update.

    following: where the next iteration starts; None once all are done.
    """

    centroids: Array
    counts: Array
    objective: tuple[float, ...]
    following: State | None

    @property
    def clustering(self) -> Clustering:
        """The result, of the last step; the objective of the initial centroids is left out."""
        return Clustering(self.centroids, self.counts, self.objective[1:])


Assign = Callable[[Array, Precision], Sums]
"""Centroids (K, d) in, sums over the points nearest to each out."""


def lloyd(
    assign: Assign,
    totals: Totals,
    start: State,
    *,
    iterations: int,
    seed: int,
    precision: Precision,
    unit_norm: bool,
) -> Iterator[Step]:
    """Yield the steps from `start` to the last of `iterations`.

    One assignment more than there are updates: that of the final centroids, for their objective.
    """
    state: State | None = start
    while state is not None:
        now = state.centroids
        sums = assign(now, working_precision(precision, totals, state.objective))
        values = (*state.objective, objective(now, sums, totals))
        state = None
        if len(values) <= iterations:
            draws = np.random.Generator(np.random.PCG64([seed, len(values)]))
            state = State(updated(sums, totals, draws, unit_norm=unit_norm), values)
        yield Step(now, sums.counts, values, state)


def working_precision(
    precision: Precision, totals: Totals, objective: tuple[float, ...]
) -> Precision:
    """Return bfloat16 only while clusters are wide against its rounding."""
    fine = bool(objective) and objective[-1] * _COARSE < totals.variance
    return "float32" if fine else precision


def objective(centroids: Array, sums: Sums, totals: Totals) -> float:
    """Return the mean squared distance from the points to the centroids they are assigned to.

    sum |x - c|^2 = sum |x|^2 - 2 <c, sum x> + n |c|^2, the sums being exact.
    """
    wide = centroids.astype(np.float64)
    added = sums.sums.astype(np.float64) * 2.0**-totals.exponent
    inner = np.einsum("kd,kd->k", wide, added)
    squares = np.einsum("kd,kd->k", wide, wide) * sums.counts
    rest = float((squares - 2 * inner).sum()) / totals.count
    return max(0.0, totals.mean_square + rest)


def updated(sums: Sums, totals: Totals, draws: np.random.Generator, *, unit_norm: bool) -> Array:
    """Return the means (K, d) float32 of the assigned points; empty clusters split large ones.

    unit_norm: means are scaled to length 1, as in spherical k-means.
    """
    counts = sums.counts.copy()
    means = sums.sums * 2.0**-totals.exponent / np.maximum(counts, 1)[:, None]
    step = _SPLIT * np.sqrt(totals.variance / means.shape[1])
    for empty in np.flatnonzero(counts == 0):
        large = int(counts.argmax())
        move = step * draws.choice([-1.0, 1.0], means.shape[1])
        means[empty], means[large] = means[large] + move, means[large] - move
        counts[empty] = counts[large] // 2
        counts[large] -= counts[empty]
    return unit(means) if unit_norm else np.asarray(means, np.float32)


def unit(rows: Array) -> Array:
    """Return rows (n, d) scaled to length 1, float32; a row of zeros stays one."""
    wide = np.asarray(rows, np.float64)
    length = np.sqrt(np.einsum("nd,nd->n", wide, wide))
    return np.asarray(wide / np.where(length == 0, 1, length)[:, None], np.float32)


def kmeans(
    points: Array,
    num_clusters: int,
    *,
    iterations: int = 25,
    seed: int = 0,
    threads: int = 1,
    precision: Precision = "bfloat16",
    device: str = "cpu",
    unit_norm: bool = False,
    initial: Array | None = None,
) -> Clustering:
    """Return K centroids of points (n, d) float32 by `iterations` rounds of Lloyd (1982).

    Starts at K random points, or at `initial` (K, d). An empty cluster takes half of the largest.
    Distances are compared in bfloat16, which costs the objective less than 0.05 %, as long as the
    variance of the points is below 16 times the objective, and in float32 otherwise; everything
    else is exact to float32. unit_norm: centroids have length 1 (spherical k-means). The result
    does not depend on threads. Raises ConfigError when there are fewer points than clusters.
    """
    held = hold(points, threads=threads, device=device)
    ids = first_ids(len(held), num_clusters, seed=seed)
    centroids = np.array(points[ids] if initial is None else initial, np.float32)
    assert centroids.shape == (num_clusters, points.shape[1]), f"initial: {centroids.shape}"
    exponent = exponent_for(held.largest())
    totals = Totals(len(held), exponent, *held.totals(exponent))

    def assign(values: Array, precision: Precision) -> Sums:
        return held.sums(values, exponent, precision)

    start = State(unit(centroids) if unit_norm else centroids)
    *_, last = lloyd(
        assign,
        totals,
        start,
        iterations=iterations,
        seed=seed,
        precision=precision,
        unit_norm=unit_norm,
    )
    return last.clustering


def nearest_centroid(
    points: Array,
    centroids: Array,
    *,
    threads: int = 1,
    precision: Precision = "bfloat16",
    device: str = "cpu",
) -> tuple[Array, Array]:
    """Return the nearest of centroids (K, d) of each of points (n, d), and how far it is.

    The first array is (n,) int32 ids, the second (n,) float32 squared distances, exact for the
    centroid named. bfloat16 may name one that is farther by its rounding: the mean of the
    distances is too large by less than 0.05 % where clusters are wide.
    """
    return hold(points, threads=threads, device=device).nearest(centroids, precision)


def farthest_points(points: Array, count: int, *, first: int = 0) -> Array:
    """Return (count,) int64 ids by greedy farthest-point selection (Gonzalez 1985).

    The first is given; each next one is the point of (n, d) float32 farthest from those chosen,
    ties by lower id, distances in float64. Raises ConfigError unless 0 < count <= n.
    """
    n = len(points)
    if not (0 < count <= n and 0 <= first < n):
        raise ConfigError(
            f"{count:,} points from number {first:,} on cannot be chosen among {n:,}. Ask for 1 to "
            f"{n:,} of them."
        )
    chosen, nearest = np.full(count, first, np.int64), np.full(n, np.inf)
    rows = np.ascontiguousarray(points, np.float32)
    if not has_kernels():
        for i in range(1, count):
            chosen[i] = _farthest(rows, int(chosen[i - 1]), nearest)
        return chosen
    from selfsup_ray.ops.kmeans_kernels import farthest

    owners = np.zeros(n, np.int32)
    for i in range(1, count):
        chosen[i] = farthest(rows, chosen, i, owners, nearest)
    return chosen


def _farthest(rows: Array, chosen: int, nearest: Array) -> int:
    """Lower nearest (n,) to the squared distances from one row; return where it is largest."""
    for a in range(0, len(rows), 65536):
        steps = rows[a : a + 65536].astype(np.float64) - rows[chosen]
        apart = np.einsum("nd,nd->n", steps, steps)
        np.minimum(nearest[a : a + 65536], apart, out=nearest[a : a + 65536])
    return int(nearest.argmax())
