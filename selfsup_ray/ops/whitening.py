"""Whitening of patches, and a dictionary of whitened patches as the kernel of a convolution.

Rows are whitened as x W, and the mean is not subtracted: it moves both sides of every distance.
PCA and ZCA differ by a rotation, so all distances, hence all codes, are the same.
"""

from __future__ import annotations

from typing import Literal

import numpy as np

from selfsup_ray.artifacts import Array

Whitening = Literal["pca", "zca", "none"]


def whitening_matrix(
    covariance: Array, *, regularization: float = 1e-3, kind: Whitening = "pca"
) -> Array:
    """Return W (d, d) float32, so that rows x W have uncorrelated entries.

    With covariance = U diag(sigma) U^T, directions of largest variance first: W_pca is
    U diag(1 / (sqrt(sigma) + regularization)), W_zca is W_pca U^T, and `none` the identity. The
    variance of x W is sigma / (sqrt(sigma) + regularization)^2, at most 1.
    (Thiry et al. 2021 use (regularization + sigma)^(-1/2) instead.) The sign of a direction is that
    of its largest entry, made positive, so the same covariance always gives the same W.
    covariance: (d, d), symmetric. regularization may be 0 when no direction is without variance.
    """
    d = len(covariance)
    if kind == "none":
        return np.eye(d, dtype=np.float32)
    values, vectors = np.linalg.eigh(np.asarray(covariance, np.float64))
    sigma, u = (
        np.maximum(values[::-1], 0.0),
        vectors[:, ::-1],
    )  # rounding leaves small negative ones
    largest = np.take_along_axis(u, np.abs(u).argmax(axis=0)[None], axis=0)
    u = u * np.where(largest < 0, -1.0, 1.0)
    scale = np.sqrt(sigma) + regularization
    assert (scale > 0).all(), "a direction without variance needs a regularization above 0"
    w = u / scale
    return np.asarray(w @ u.T if kind == "zca" else w, np.float32)


def whitened_covariance(covariance: Array, matrix: Array) -> Array:
    """Return the covariance (d, d) float64 of rows x W, W (d, d), of rows x with this one."""
    w = np.asarray(matrix, np.float64)
    return np.asarray(w.T @ np.asarray(covariance, np.float64) @ w)


def off_diagonal_share(covariance: Array) -> float:
    """Return the share of a covariance's absolute values that is off its diagonal, in [0, 1]."""
    sizes = np.abs(np.asarray(covariance, np.float64))
    total = float(sizes.sum())
    return 0.0 if total == 0 else 1.0 - float(np.trace(sizes)) / total


def whitened(rows: Array, matrix: Array) -> Array:
    """Return rows x W (n, d) float32 of rows x (n, d), W (d, d)."""
    return np.asarray(np.asarray(rows, np.float32) @ np.asarray(matrix, np.float32))


def unwhitened(rows: Array, matrix: Array) -> Array:
    """Return rows y W^-1 (n, d) float32: whitened rows y (n, d) as patches again, W (d, d)."""
    wide = np.asarray(matrix, np.float64)
    return np.asarray(np.linalg.solve(wide.T, np.asarray(rows, np.float64).T).T, np.float32)


def code_kernel(centroids: Array, matrix: Array) -> tuple[Array, Array]:
    """Return kernel (N, d) and bias (N,), float32, whose convolution ranks as distance does.

    kernel = -c W^T and bias = |c|^2 / 2, so on a raw patch x the output is
    |x W - c|^2 / 2 - |x W|^2 / 2, whose last term all entries share.
    centroids: (N, d), whitened; matrix: W (d, d).
    """
    c, w = np.asarray(centroids, np.float64), np.asarray(matrix, np.float64)
    kernel = -(c @ w.T)
    bias = 0.5 * np.einsum("nd,nd->n", c, c)
    return np.asarray(kernel, np.float32), np.asarray(bias, np.float32)
