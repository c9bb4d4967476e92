"""Whitening and the kernel of a code, against closed forms, scipy and slow loops."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from scipy.linalg import sqrtm

from selfsup_ray.ops.whitening import (
    code_kernel,
    off_diagonal_share,
    unwhitened,
    whitened,
    whitened_covariance,
    whitening_matrix,
)


def covariance_of(d: int, seed: int = 0) -> np.ndarray:
    """Return a covariance with standard deviations from 0.1 to 2."""
    generator = np.random.default_rng(seed)
    u, _ = np.linalg.qr(generator.standard_normal((d, d)))
    return u @ np.diag(np.linspace(0.1, 2, d) ** 2) @ u.T


@pytest.mark.parametrize("kind", ["pca", "zca"])
def test_without_regularization_whitened_rows_have_the_identity_as_covariance(kind):
    covariance = covariance_of(12)
    w = whitening_matrix(covariance, regularization=0, kind=kind)
    assert w.dtype == np.float32
    np.testing.assert_allclose(whitened_covariance(covariance, w), np.eye(12), atol=1e-5)


def test_zca_is_the_inverse_root_of_the_covariance():
    covariance = covariance_of(9)
    w = whitening_matrix(covariance, regularization=0, kind="zca")
    np.testing.assert_allclose(w, np.linalg.inv(sqrtm(covariance).real), rtol=1e-4, atol=1e-5)


def test_the_variance_left_is_that_of_the_formula_largest_first():
    covariance, reg = covariance_of(8), 0.3
    w = whitening_matrix(covariance, regularization=reg, kind="pca")
    sigma = np.sort(np.linalg.eigvalsh(covariance))[::-1]
    left = whitened_covariance(covariance, w)
    np.testing.assert_allclose(np.diag(left), sigma / (np.sqrt(sigma) + reg) ** 2, rtol=1e-5)
    np.testing.assert_allclose(left - np.diag(np.diag(left)), 0, atol=1e-6)
    assert np.diag(left).max() <= 1


def test_pca_and_zca_give_the_same_distances():
    covariance, rows = covariance_of(10), np.random.default_rng(1).standard_normal((20, 10))
    made = []
    for kind in ("pca", "zca"):
        x = whitened(rows, whitening_matrix(covariance, kind=kind))
        made.append(((x[:, None] - x[None]) ** 2).sum(axis=2))
    np.testing.assert_allclose(made[0], made[1], rtol=1e-4, atol=1e-4)


def test_no_whitening_is_the_identity():
    w = whitening_matrix(covariance_of(5), kind="none")
    np.testing.assert_array_equal(w, np.eye(5, dtype=np.float32))


def test_a_direction_without_variance_is_only_scaled_by_the_regularization():
    covariance = np.diag([4.0, 1.0, 0.0])
    w = whitening_matrix(covariance, regularization=0.5, kind="pca")
    np.testing.assert_allclose(w, np.diag([1 / 2.5, 1 / 1.5, 1 / 0.5]), rtol=1e-6)


def test_the_sign_of_a_direction_does_not_follow_the_solver():
    w = whitening_matrix(covariance_of(7), kind="pca")
    largest = np.take_along_axis(w, np.abs(w).argmax(axis=0)[None], axis=0)
    assert (largest > 0).all()


def test_unwhitening_gives_the_patches_back():
    covariance, rows = covariance_of(6), np.random.default_rng(2).standard_normal((15, 6))
    for kind in ("pca", "zca", "none"):
        w = whitening_matrix(covariance, kind=kind)
        np.testing.assert_allclose(unwhitened(whitened(rows, w), w), rows, atol=1e-5)


def test_the_share_off_the_diagonal_counts_absolute_values():
    assert off_diagonal_share(np.array([[2.0, -1.0], [-1.0, 4.0]])) == pytest.approx(2 / 8)
    assert off_diagonal_share(np.eye(3)) == 0
    assert off_diagonal_share(np.zeros((2, 2))) == 0


def test_the_convolution_is_half_the_squared_distance_less_a_number_common_to_all_entries():
    generator, s = np.random.default_rng(3), 3
    w = whitening_matrix(covariance_of(2 * s * s), regularization=0.1, kind="pca")
    centroids = generator.standard_normal((7, 2 * s * s)).astype(np.float32)
    image = generator.standard_normal((2, 6, 5)).astype(np.float32)
    kernel, bias = code_kernel(centroids, w)
    filters = torch.from_numpy(kernel).view(7, 2, s, s)
    out = F.conv2d(torch.from_numpy(image)[None], filters, torch.from_numpy(bias))[0].numpy()
    for row in range(4):
        for column in range(3):
            x = image[:, row : row + s, column : column + s].reshape(-1) @ w
            half = [0.5 * ((x - c) ** 2).sum() - 0.5 * (x**2).sum() for c in centroids]
            np.testing.assert_allclose(out[:, row, column], half, rtol=1e-3, atol=1e-3)
