"""Intrinsic dimension: the five sets, distances to centroids, Levina and Bickel's estimate."""

import math

import numpy as np
import pytest
from scipy.spatial import cKDTree

from selfsup_ray.ops.intrinsic_dimension import (
    BLOCK,
    SETS,
    centroid_distance,
    distinct,
    levina_bickel,
    neighbor_distances,
    point_set,
    unit_points,
)


def rng(seed: int = 0) -> np.random.Generator:
    return np.random.default_rng(seed)


def test_the_estimate_is_the_papers_formula_in_loops():
    distances = np.sort(rng().random((50, 20)) + 0.01, axis=1)
    by_point = []
    for row in distances:
        by_j = []
        for j in range(10, 21):
            logs = [math.log(row[j - 1] / row[i]) for i in range(j - 1)]
            by_j.append(1 / (sum(logs) / (j - 1)))
        by_point.append(sum(by_j) / len(by_j))
    found = levina_bickel(distances)
    assert found.dimension == pytest.approx(np.mean(by_point), rel=1e-12)
    assert found.standard_error == pytest.approx(np.std(by_point, ddof=1) / np.sqrt(50))
    assert found.points == 50


def test_a_flat_torus_of_dimension_two_is_found_in_eight_dimensions():
    angles = rng().random((20_000, 2)) * 2 * math.pi
    circles = np.concatenate([np.cos(angles), np.sin(angles)], axis=1) / math.sqrt(2)
    turned, _ = np.linalg.qr(rng(1).standard_normal((8, 4)))
    points = (circles @ turned.T).astype(np.float32)
    near = neighbor_distances(points, points[:1000], k=20)
    # The mean of 1 / (a mean of j - 1 logarithms) is (j - 1) / (j - 2) times the dimension.
    bias = np.mean([(j - 1) / (j - 2) for j in range(10, 21)])
    assert levina_bickel(near).dimension == pytest.approx(2 * bias, rel=0.03)


def test_points_without_enough_neighbors_or_all_at_one_distance_are_left_out():
    good = np.linspace(0.1, 0.4, 20)
    bad = [np.full(20, 0.3), np.where(np.arange(20) < 15, good, np.inf)]
    assert levina_bickel(np.array([good, *bad])).points == 1
    nothing = levina_bickel(np.array(bad))
    assert nothing.points == 0 and math.isnan(nothing.dimension)
    with pytest.raises(AssertionError, match=r"j = 10\.\.30 of 20"):
        levina_bickel(good[None], last=30)


def test_neighbor_distances_are_those_of_a_kd_tree():
    points = unit_points(rng().standard_normal((3000, 12)).astype(np.float32), smallest_share=0)
    want, _ = cKDTree(points.astype(np.float64)).query(points[:700].astype(np.float64), k=21)
    found = neighbor_distances(points, points[:700], k=20)
    np.testing.assert_allclose(found, want[:, 1:], rtol=1e-9)
    short = neighbor_distances(points[:5], points[:2], k=20)
    assert np.isfinite(short).sum(axis=1).tolist() == [4, 4]


def test_copies_of_a_point_are_one_and_do_not_count_as_neighbors():
    points = unit_points(rng().standard_normal((200, 6)).astype(np.float32), smallest_share=0)
    gray = np.full((50, 6), 1.0, np.float32) * rng(1).random((50, 1), np.float32)
    copies = np.concatenate([points, unit_points(gray, smallest_share=0), points[:20]])
    kept = distinct(copies)
    assert len(kept) == 201
    np.testing.assert_array_equal(kept[:200], points)
    assert neighbor_distances(copies, copies[:1], k=1)[0, 0] > 1e-3


def test_the_sets_are_patches_whitened_and_shuffled_row_by_row():
    patches = rng().random((300, 12), np.float32)
    matrix = rng(1).standard_normal((12, 12)).astype(np.float32)
    made = {name: point_set(name, patches, matrix, seed=3) for name in SETS}
    np.testing.assert_array_equal(made["original"], patches)
    np.testing.assert_allclose(made["whitened"], patches @ matrix, rtol=1e-5, atol=1e-5)
    for name, of in (("shuffled", "original"), ("whitened_shuffled", "whitened")):
        assert not np.array_equal(made[name], made[of])
        np.testing.assert_array_equal(np.sort(made[name], axis=1), np.sort(made[of], axis=1))
    orders = np.argsort(made["shuffled"], axis=1) - np.argsort(patches, axis=1)
    assert len(np.unique(orders, axis=0)) > 290, "every row has an order of its own"
    assert abs(made["gaussian"].mean()) < 0.1 and made["gaussian"].std() == pytest.approx(
        1, abs=0.1
    )


def test_random_sets_depend_on_the_seed_and_not_on_how_many_rows_follow():
    patches = np.zeros((BLOCK + 10, 2), np.float32)
    patches[:] = np.arange(2)
    few = point_set("shuffled", patches[: BLOCK + 1], np.eye(2, dtype=np.float32), seed=0)
    many = point_set("shuffled", patches, np.eye(2, dtype=np.float32), seed=0)
    other = point_set("shuffled", patches, np.eye(2, dtype=np.float32), seed=1)
    np.testing.assert_array_equal(many[:BLOCK], few[:BLOCK])
    assert not np.array_equal(many, other)
    assert not np.array_equal(many[:10], many[BLOCK:]), "blocks have numbers of their own"


def test_unit_points_drop_the_smallest_norms_and_rows_of_zeros():
    points = rng().standard_normal((1000, 5)).astype(np.float32) + 1
    points[7] = 0
    found = unit_points(points, smallest_share=0.01)
    norms = np.linalg.norm(points.astype(np.float64), axis=1)
    kept = norms >= np.percentile(norms, 1)
    assert len(found) == kept.sum() == 990
    np.testing.assert_allclose(found, points[kept] / norms[kept, None], rtol=1e-5)
    black = np.zeros((100, 5), np.float32)
    black[50:] = 1
    assert len(unit_points(black)) == 50


def test_two_centroids_on_a_sphere_take_away_the_squared_mean_of_a_half():
    points = unit_points(rng().standard_normal((20_000, 3)).astype(np.float32), smallest_share=0)
    # In d = 3 the height on a hemisphere has mean 1/2, so the rest of 1 is 3/4.
    found = centroid_distance(points, 2, points_per_centroid=None, seed=1)
    assert found.mean_squared == pytest.approx(0.75, abs=0.005)
    assert found.median_squared > 0 and found.mean == pytest.approx(0.85, abs=0.03)


def test_one_centroid_leaves_the_variance():
    points = unit_points(rng().standard_normal((500, 4)).astype(np.float32) + 2, smallest_share=0)
    wide = points.astype(np.float64)
    squared = ((wide - wide.mean(axis=0)) ** 2).sum(axis=1)
    found = centroid_distance(points, 1, points_per_centroid=None, precision="float32")
    assert found.mean_squared == pytest.approx(squared.mean(), rel=1e-5)
    assert found.median_squared == pytest.approx(np.median(squared), rel=1e-4)
    assert found.mean == pytest.approx(np.sqrt(squared).mean(), rel=1e-5)


@pytest.mark.parametrize(("k", "published"), [(2, 0.9949), (8, 0.9710), (32, 0.9424)])
def test_gaussian_distances_in_75_dimensions_are_the_published_ones(k: int, published: float):
    # 256 points a centroid are seen and all measured, so seen points must be few among them.
    points = unit_points(rng(k).standard_normal((60_000, 75)).astype(np.float32))
    found = centroid_distance(points, k, points_per_centroid=256)
    assert found.mean_squared == pytest.approx(published, abs=0.004)


def test_distances_do_not_change_with_the_origin_and_sixteen_bits_are_enough():
    base = rng().standard_normal((4000, 20)).astype(np.float32)
    shifted = unit_points(0.05 * base + 1, smallest_share=0)
    exact = centroid_distance(shifted, 16, points_per_centroid=None, precision="float32")
    fast = centroid_distance(shifted, 16, points_per_centroid=None, precision="bfloat16")
    assert fast.mean_squared == pytest.approx(exact.mean_squared, rel=0.01)
