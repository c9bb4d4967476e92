"""Principal components from sums over blocks of rows, and the linear map they give.

Sums are float64 and merged in a fixed order, so a result depends on the rows and on how they are
cut into blocks, not on who adds them up.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np

from selfsup_ray.artifacts import Array

BLOCK = 4096
"""Rows multiplied at a time: 67 MB in float64 at d = 2048."""


@dataclass(frozen=True)
class Moments:
    """Of `count` rows: mean (d,) and scatter (d, d), the sum of (x - mean)(x - mean)^T; float64."""

    count: int
    mean: Array
    scatter: Array


def moments(rows: Array) -> Moments:
    """Return the moments of rows (n, d), n > 0."""
    x = np.asarray(rows, np.float64)
    mean = x.mean(axis=0)
    centered = x - mean
    return Moments(len(x), mean, centered.T @ centered)


def merged_moments(parts: Iterable[Moments]) -> Moments:
    """Return the moments of all rows together (Chan, Golub, LeVeque 1979, eq. 2.1), in order.

    Adding up x x^T and taking n mean mean^T away at the end would lose the digits that a mean far
    from zero shares with every row.
    """
    parts = iter(parts)
    whole = next(parts)
    for part in parts:
        n = whole.count + part.count
        step = part.mean - whole.mean
        scatter = whole.scatter + part.scatter
        scatter += np.outer(step, step) * (whole.count * part.count / n)
        whole = Moments(n, whole.mean + step * (part.count / n), scatter)
    return whole


def block_moments(rows: Array) -> Moments:
    """Return the moments of rows (n, d), n > 0, from BLOCK rows at a time."""
    return merged_moments(moments(rows[i : i + BLOCK]) for i in range(0, len(rows), BLOCK))


@dataclass(frozen=True)
class Pca:
    """Principal components: mean (d,), components (dim, d) with orthonormal rows, variance (dim,).

    Variances descend and are those of n - 1, as in scikit-learn; total_variance is that of all d.
    """

    mean: Array
    components: Array
    variance: Array
    total_variance: float

    @property
    def explained(self) -> Array:
        """Share of the variance that lies on each component: (dim,), zeros without any variance."""
        return np.asarray(self.variance / (self.total_variance or 1.0))


def principal_components(whole: Moments, *, dim: int) -> Pca:
    """Return the `dim` directions of largest variance, dim <= d.

    The sign of a component is that of its entry of largest magnitude, which is made positive (ties:
    the first), so the same rows always give the same components.
    """
    d = len(whole.mean)
    assert 0 < dim <= d and whole.count > 1, f"dim={dim} of {d}, {whole.count} rows"
    values, vectors = np.linalg.eigh(whole.scatter / (whole.count - 1))
    components = vectors[:, ::-1][:, :dim].T
    largest = np.take_along_axis(components, np.abs(components).argmax(axis=1)[:, None], axis=1)
    components = components * np.where(largest < 0, -1.0, 1.0)
    variance = np.maximum(values[::-1], 0.0)  # rounding leaves small negative ones
    return Pca(whole.mean, components, variance[:dim], float(variance.sum()))


def random_rotation(dim: int, *, seed: int) -> Array:
    """Return a (dim, dim) float64 orthogonal matrix, uniform over all of them, for this seed.

    Mezzadri 2007: the Q of a normal matrix is uniform once R's diagonal is made positive.
    """
    normal = np.random.Generator(np.random.PCG64(seed)).standard_normal((dim, dim))
    q, r = np.linalg.qr(normal)
    return np.asarray(q * np.where(np.diag(r) < 0, -1.0, 1.0))


@dataclass(frozen=True)
class LinearMap:
    """The map x -> matrix (x - mean): matrix (dim, d) and mean (d,), float32."""

    matrix: Array
    mean: Array

    @property
    def bias(self) -> Array:
        """The (dim,) float32 b of the same map written as matrix x + b."""
        return np.asarray(-(self.matrix.astype(np.float64) @ self.mean), np.float32)

    def __call__(self, rows: Array) -> Array:
        """Return the (n, dim) float32 images of rows (n, d), BLOCK rows at a time."""
        out = np.empty((len(rows), len(self.matrix)), np.float32)
        for i in range(0, len(rows), BLOCK):
            centered = np.asarray(rows[i : i + BLOCK], np.float32) - self.mean
            np.matmul(centered, self.matrix.T, out=out[i : i + BLOCK])
        return out


def map_of_bias(matrix: Array, bias: Array) -> LinearMap:
    """Return the map x -> matrix x + bias, matrix (dim, d) with independent rows.

    Any mean with -matrix mean = bias will do; the one of least length is taken.
    """
    wide = matrix.astype(np.float64)
    mean = np.linalg.lstsq(wide, -bias.astype(np.float64), rcond=None)[0]
    assert np.allclose(wide @ mean, -bias, atol=1e-4 * (1 + np.abs(bias).max())), "dependent rows"
    return LinearMap(matrix.astype(np.float32), mean.astype(np.float32))


def projection(pca: Pca, *, whiten_power: float = 0.0, rotation: Array | None = None) -> LinearMap:
    """Return the map onto the components, each over variance^whiten_power, rotated at the end.

    whiten_power: 0 keeps the variances, 0.5 makes them all 1 and then wants none of them to be 0.
    """
    scale = pca.variance**-whiten_power if whiten_power else np.ones(len(pca.variance))
    assert np.isfinite(scale).all(), "a component without variance cannot be whitened"
    matrix = pca.components * scale[:, None]
    matrix = matrix if rotation is None else rotation @ matrix
    return LinearMap(matrix.astype(np.float32), pca.mean.astype(np.float32))


def unit_rows(rows: Array) -> Array:
    """Return rows (n, d) divided by their lengths, float32; a row of zeros stays one."""
    rows = np.asarray(rows, np.float32)
    length = np.sqrt(np.einsum("nd,nd->n", rows, rows, dtype=np.float64))
    length[length == 0] = 1.0
    return np.asarray(rows / length[:, None], np.float32)
