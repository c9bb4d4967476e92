"""Drawn patches and exact sums over all of them, against slow loops and numpy."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from selfsup_ray.ops.patch_sampling import (
    Positions,
    drawn_positions,
    norms,
    num_positions,
    patch_moments,
    patch_sums,
    patches_at,
    random_patches,
)


def images_of(*shape: int, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, 256, shape, generator=generator, dtype=torch.uint8)


def all_patches(images: torch.Tensor, s: int) -> np.ndarray:
    """Return every patch (m, C s s), by loops."""
    array = images.numpy()
    count, channels, height, width = array.shape
    rows = [
        array[i, :, y : y + s, x : x + s].reshape(channels * s * s)
        for i in range(count)
        for y in range(height - s + 1)
        for x in range(width - s + 1)
    ]
    return np.array(rows)


@pytest.mark.parametrize(
    ("shape", "s"),
    [
        ((3, 3, 9, 9), 3),
        ((2, 1, 40, 70), 5),  # wider than a tile
        ((2, 2, 35, 33), 4),
        ((2, 3, 5, 5), 5),  # one patch an image
        ((3, 2, 6, 6), 4),  # windows overlap in fewer rows than a patch has
        ((2, 3, 8, 8), 1),
    ],
)
def test_sums_are_those_of_every_patch_exactly(shape, s):
    images = images_of(*shape)
    rows = all_patches(images, s).astype(np.int64) - 128
    sums = patch_sums(images, patch_size=s)
    assert sums.count == len(rows) == shape[0] * num_positions(*shape[2:], patch_size=s)
    np.testing.assert_array_equal(sums.total, rows.sum(axis=0))
    np.testing.assert_array_equal(sums.products, rows.T @ rows)


def test_sums_do_not_depend_on_how_images_are_cut_nor_on_threads():
    images = images_of(9, 3, 8, 8)
    before = torch.get_num_threads()
    whole = patch_sums(images, patch_size=3)
    parts = [patch_sums(part, patch_size=3) for part in torch.split(images, [4, 3, 2])]
    threaded = patch_sums(images, patch_size=3, threads=2)
    for made in (parts[2] + parts[0] + parts[1], threaded):
        assert made.count == whole.count
        np.testing.assert_array_equal(made.products, whole.products)
        np.testing.assert_array_equal(made.total, whole.total)
    assert torch.get_num_threads() == before


def test_no_images_have_no_sums():
    sums = patch_sums(images_of(0, 3, 8, 8), patch_size=3)
    assert (sums.count, sums.total.sum(), sums.products.shape) == (0, 0, (27, 27))


def test_sums_stay_exact_for_the_largest_levels():
    images = torch.zeros(1500, 1, 4, 4, dtype=torch.uint8)  # -128 each: more than one block
    sums = patch_sums(images, patch_size=2)
    assert (sums.products == 1500 * 9 * 128**2).all()
    assert (sums.total == -1500 * 9 * 128).all()


@pytest.mark.parametrize(("scale", "shift"), [(1 / 255, 0.0), (2 / 255, -1.0)])
def test_moments_of_levels_are_numpys_of_scaled_patches(scale, shift):
    images = images_of(4, 3, 9, 9)
    rows = all_patches(images, 3) * scale + shift
    made = patch_sums(images, patch_size=3).moments(scale=scale, shift=shift)
    np.testing.assert_allclose(made.mean, rows.mean(axis=0), rtol=1e-12)
    covariance = np.cov(rows.T, bias=True)
    np.testing.assert_allclose(made.scatter / made.count, covariance, rtol=1e-9, atol=1e-12)


def test_moments_of_feature_maps_are_numpys():
    maps = torch.randn(5, 4, 7, 6, generator=torch.Generator().manual_seed(1)) + 10
    rows = all_patches(maps, 3).astype(np.float64)
    made = patch_moments(maps, patch_size=3)
    assert made.count == len(rows)
    np.testing.assert_allclose(made.mean, rows.mean(axis=0), rtol=1e-12)
    np.testing.assert_allclose(made.scatter / made.count, np.cov(rows.T, bias=True), atol=1e-11)


def test_moments_of_feature_maps_are_the_same_bits_on_any_number_of_threads(monkeypatch):
    monkeypatch.setattr("selfsup_ray.ops.patch_sampling._FLOATS", 3_000)  # blocks of 3 maps
    maps = torch.randn(8, 4, 7, 6, generator=torch.Generator().manual_seed(1))
    one, two = (patch_moments(maps, patch_size=3, threads=n) for n in (1, 2))
    assert one.scatter.tobytes() == two.scatter.tobytes()
    assert one.mean.tobytes() == two.mean.tobytes()


def test_patches_are_cut_in_the_order_of_unfold():
    images = images_of(4, 3, 8, 7)
    unfolded = F.unfold(images.float(), 3).transpose(1, 2).reshape(4, 6, 5, 27)
    at = Positions(np.array([2, 0, 3]), np.array([5, 0, 2]), np.array([4, 1, 3]))
    cut = patches_at(images.numpy(), at, patch_size=3)
    assert cut.dtype == np.uint8
    np.testing.assert_array_equal(cut, unfolded[at.image, at.row, at.column].numpy())


def draws(stop: int, *, start: int = 0, seed: int = 0) -> list[tuple[int, int, int]]:
    at = drawn_positions(start, stop, num_images=5, height=8, width=7, patch_size=3, seed=seed)
    return list(zip(at.image.tolist(), at.row.tolist(), at.column.tolist(), strict=True))


def test_drawing_everything_gives_every_position_once():
    everything = {(i, y, x) for i in range(5) for y in range(6) for x in range(5)}
    assert len(draws(150)) == 150
    assert set(draws(150)) == everything


def test_draws_do_not_depend_on_how_many_are_drawn_but_on_the_seed():
    assert draws(150)[:40] == draws(40)
    assert draws(60, start=25) == draws(60)[25:]
    assert draws(150) != draws(150, seed=1)


def test_draws_are_uniform_over_positions():
    seen = np.zeros(150)
    for seed in range(600):
        for i, y, x in draws(10, seed=seed):
            seen[i * 30 + y * 5 + x] += 1
    chi_square = ((seen - 40) ** 2 / 40).sum()  # 149 degrees of freedom: deviation 17.3
    assert 149 - 5 * 17.3 < chi_square < 149 + 5 * 17.3


def test_norms_are_those_of_numpy():
    rows = np.random.default_rng(0).standard_normal((11, 6)).astype(np.float32)
    np.testing.assert_allclose(norms(rows), np.linalg.norm(rows, axis=1), rtol=1e-6)


def test_noise_has_the_moments_asked_for_and_differs_by_block():
    gaussian = random_patches(40_000, 3, kind="gaussian", seed=1)
    assert gaussian.dtype == np.float32
    np.testing.assert_allclose(gaussian.mean(axis=0), 0, atol=0.03)
    np.testing.assert_allclose(np.cov(gaussian.T), np.eye(3), atol=0.03)
    uniform = random_patches(40_000, 3, kind="uniform", seed=1)
    assert -1 <= uniform.min() and uniform.max() < 1
    np.testing.assert_allclose(uniform.var(axis=0), 1 / 3, atol=0.01)
    np.testing.assert_array_equal(random_patches(7, 3, kind="gaussian", seed=1), gaussian[:7])
    assert not np.array_equal(random_patches(7, 3, kind="gaussian", seed=1, block=1), gaussian[:7])
