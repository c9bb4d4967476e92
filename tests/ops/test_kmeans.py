from itertools import pairwise

import numpy as np
import pytest
from scipy.spatial.distance import cdist
from sklearn.cluster import KMeans
from threadpoolctl import threadpool_limits

from selfsup_ray.errors import ConfigError, ResourceError
from selfsup_ray.ops import exact_graph, faiss_kmeans, kmeans_kernels
from selfsup_ray.ops import kmeans as module
from selfsup_ray.ops.assignment import BLOCK, TILE
from selfsup_ray.ops.kmeans import farthest_points, first_ids, kmeans, nearest_centroid

rng = np.random.default_rng


def mixture(n: int, *, dim: int = 16, classes: int = 40, seed: int = 0) -> np.ndarray:
    """Points around `classes` centers, float32: clusters overlap."""
    draw = rng(seed)
    centers = draw.normal(size=(classes, dim))
    points = centers[draw.integers(0, classes, n)] + 0.6 * draw.normal(size=(n, dim))
    return points.astype(np.float32)


def slow_lloyd(points: np.ndarray, centroids: np.ndarray, *, iterations: int, unit: bool = False):
    """Lloyd in float64 by the definition; the objective after each iteration, counts of the last"""
    points, centroids, objective = points.astype(np.float64), centroids.astype(np.float64), []
    for _ in range(iterations):
        own = cdist(points, centroids).argmin(axis=1)
        for k in range(len(centroids)):
            centroids[k] = points[own == k].mean(axis=0)
        if unit:
            centroids /= np.linalg.norm(centroids, axis=1, keepdims=True)
        apart = cdist(points, centroids, "sqeuclidean")
        objective.append(apart.min(axis=1).mean())
    return centroids, np.bincount(apart.argmin(axis=1), minlength=len(centroids)), objective


@pytest.mark.parametrize("unit", [False, True])
def test_float32_is_lloyd_by_the_definition(unit: bool):
    points = mixture(900)
    start = points[first_ids(900, 12, seed=3)].astype(np.float64)
    if unit:
        start /= np.linalg.norm(start, axis=1, keepdims=True)
    centroids, counts, objective = slow_lloyd(points, start, iterations=6, unit=unit)
    found = kmeans(points, 12, iterations=6, seed=3, precision="float32", unit_norm=unit)
    np.testing.assert_allclose(found.centroids, centroids, atol=1e-5)
    np.testing.assert_array_equal(found.counts, counts)
    np.testing.assert_allclose(found.objective, objective, rtol=1e-6)


def test_bfloat16_reaches_the_objective_of_faiss_and_sklearn_from_the_same_start():
    points = mixture(20_000, dim=30, classes=300)
    start = points[first_ids(len(points), 64, seed=0)]
    ours = kmeans(points, 64, iterations=10).objective[-1]
    faiss = faiss_kmeans.faiss_kmeans(points, 64, iterations=10)
    with threadpool_limits(limits=1):
        peer = KMeans(64, init=start, n_init=1, max_iter=10, tol=0, algorithm="lloyd").fit(points)
    assert ours == pytest.approx(faiss.objective[-1], rel=1e-3)
    assert ours == pytest.approx(peer.inertia_ / len(points), rel=1e-3)


def test_the_stated_objective_and_counts_are_those_of_the_stated_centroids():
    points = mixture(5000)
    for found in (kmeans(points, 50, iterations=4), faiss_kmeans.faiss_kmeans(points, 50)):
        apart = cdist(points.astype(np.float64), found.centroids, "sqeuclidean")
        assert found.objective[-1] == pytest.approx(apart.min(axis=1).mean(), rel=1e-4)
        own = np.bincount(apart.argmin(axis=1), minlength=50)
        assert np.abs(found.counts - own).sum() <= 0.01 * len(points)
        assert found.counts.sum() == len(points)


def test_the_objective_has_one_value_an_iteration_and_falls():
    objective = kmeans(mixture(4000), 30, iterations=7).objective
    assert len(objective) == 7
    assert all(later <= before * 1.0001 for before, later in pairwise(objective))


def test_no_iteration_leaves_the_centroids_where_they_start():
    points = mixture(500)
    found = kmeans(points, 5, iterations=0, seed=2)
    np.testing.assert_array_equal(found.centroids, points[first_ids(500, 5, seed=2)])
    assert found.objective == () and found.counts.sum() == 500


@pytest.mark.parametrize(("num_clusters", "published"), [(8, 0.9710), (32, 0.9424), (128, 0.9116)])
def test_unit_gaussian_points_are_as_far_from_centroids_as_published(num_clusters, published):
    # Published of a million points, the centroids fitted to 256 of them each.
    points = rng(0).normal(size=(256 * num_clusters + 50_000, 75))
    points = (points / np.linalg.norm(points, axis=1, keepdims=True)).astype(np.float32)
    fitted, fresh = points[50_000:], points[:50_000]
    _, apart = nearest_centroid(fresh, kmeans(fitted, num_clusters).centroids)
    assert apart.mean() == pytest.approx(published, abs=0.0015)


def test_two_clusters_of_a_normal_line_halve_it():
    points = rng(0).normal(size=(200_000, 1)).astype(np.float32)
    found = kmeans(points, 2, iterations=30)
    np.testing.assert_allclose(
        np.sort(found.centroids[:, 0]), np.array([-1, 1]) * (2 / np.pi) ** 0.5, atol=0.01
    )
    assert found.objective[-1] == pytest.approx(1 - 2 / np.pi, abs=0.01)


@pytest.mark.parametrize("precision", ["bfloat16", "float32"])
def test_threads_and_order_of_the_points_change_no_bit(precision):
    points = mixture(3 * BLOCK + 700, dim=6)
    start = points[:20]
    alone = kmeans(points, 20, iterations=3, precision=precision, initial=start)
    shared = kmeans(points, 20, iterations=3, precision=precision, initial=start, threads=3)
    turned = points[rng(1).permutation(len(points))]
    mixed = kmeans(turned, 20, iterations=3, precision=precision, initial=start, threads=2)
    for other in (shared, mixed):
        assert other.centroids.tobytes() == alone.centroids.tobytes()
        assert other.counts.tobytes() == alone.counts.tobytes()
        assert other.objective == alone.objective


def test_a_seed_gives_the_same_centroids_and_another_seed_others():
    points = mixture(2000)
    first = kmeans(points, 20, iterations=2, seed=5)
    assert kmeans(points, 20, iterations=2, seed=5).centroids.tobytes() == first.centroids.tobytes()
    assert kmeans(points, 20, iterations=2, seed=6).centroids.tobytes() != first.centroids.tobytes()


def test_empty_clusters_take_halves_of_large_ones():
    points = mixture(3000)
    start = np.full((10, 16), 1e3, np.float32)  # nobody is near any of them but the first
    start[0] = 0
    found = kmeans(points, 10, iterations=8, initial=start)
    assert (found.counts > 30).all()
    fair = kmeans(points, 10, iterations=8).objective[-1]
    assert found.objective[-1] < 1.1 * fair


def test_fewer_distinct_points_than_clusters_are_all_found():
    few = mixture(7)
    points = few[rng(0).integers(0, 7, 2000)]
    found = kmeans(points, 20, iterations=10)
    assert np.isfinite(found.centroids).all() and found.counts.sum() == 2000
    _, apart = nearest_centroid(points, found.centroids, precision="float32")
    assert apart.mean() < 0.01 * points.var(axis=0).sum()


def test_points_that_are_all_zero_are_one_cluster_without_error():
    found = kmeans(np.zeros((100, 3), np.float32), 2, iterations=2)
    assert found.objective == (0.0, 0.0) and found.counts.sum() == 100


def test_points_far_from_the_origin_are_clustered_as_well():
    points = mixture(6000, dim=20)
    near = kmeans(points, 40, iterations=6).objective[-1]
    assert kmeans(points + 300, 40, iterations=6).objective[-1] == pytest.approx(near, rel=0.003)


def test_clusters_much_narrower_than_the_data_are_told_apart():
    # The distance between clusters is 0.2 % of the spread: less than bfloat16 resolves.
    centers = rng(0).normal(size=(8, 10)) * 10
    points = np.repeat(np.concatenate([centers, centers + 0.05]), 100, axis=0)
    points = (points + 0.001 * rng(1).normal(size=points.shape)).astype(np.float32)
    found = kmeans(points, 16, iterations=8, initial=points[::100])
    assert found.objective[-1] == pytest.approx(10 * 1e-6, rel=0.1)
    assert (found.counts == 100).all()


def test_float32_names_the_nearest_centroid_and_its_distance():
    points, centroids = mixture(1000, dim=9), mixture(1500, dim=9, seed=1)  # two tiles of columns
    ids, apart = nearest_centroid(points, centroids, precision="float32")
    wanted = cdist(points.astype(np.float64), centroids, "sqeuclidean")
    assert ids.dtype == np.int32 and apart.dtype == np.float32
    np.testing.assert_array_equal(ids, wanted.argmin(axis=1))
    np.testing.assert_allclose(apart, wanted.min(axis=1), rtol=1e-6)


def test_bfloat16_names_a_centroid_that_is_hardly_farther():
    points, centroids = mixture(3000, dim=75), mixture(1500, dim=75, seed=1)
    ids, apart = nearest_centroid(points, centroids)
    wanted = cdist(points.astype(np.float64), centroids, "sqeuclidean")
    np.testing.assert_allclose(apart, wanted[np.arange(3000), ids], rtol=1e-6)
    assert apart.mean() < 1.0005 * wanted.min(axis=1).mean()
    assert (ids == wanted.argmin(axis=1)).mean() > 0.97


def test_of_equal_centroids_the_first_is_nearest():
    points = mixture(600)
    centroids = np.concatenate([mixture(700, seed=1)] * 2)
    for precision in ("bfloat16", "float32"):
        ids, _ = nearest_centroid(points, centroids, precision=precision)
        assert ids.max() < 700


def test_a_tile_of_negative_scores_gives_the_largest_of_them():
    scores = -np.abs(rng(0).normal(size=(50, 96))).astype(np.float32)
    scores[7, 11], scores[8, 3] = -0.0, 2.0
    for bits in (scores.view(np.int32), (scores.view(np.int32) >> 16).astype(np.int16)):
        best, ids = np.empty(50, bits.dtype), np.full(50, -1, np.int32)
        kmeans_kernels.take_best(bits[:, :48].copy(), 0, best, ids)
        kmeans_kernels.take_best(bits[:, 48:].copy(), 48, best, ids)
        rounded = (bits.astype(np.int32) << (0 if bits.dtype == np.int32 else 16)).view(np.float32)
        np.testing.assert_array_equal(ids, rounded.argmax(axis=1))


def test_narrowing_rounds_as_torch_does():
    import torch

    rows, shift = mixture(TILE, dim=5), rng(0).normal(size=5).astype(np.float32)
    out = np.zeros((TILE, 7), np.uint16)
    kmeans_kernels.narrow(rows, shift, out)
    wanted = torch.from_numpy(rows - shift).bfloat16().view(torch.uint16).numpy()
    np.testing.assert_array_equal(out[:, :5], wanted)
    assert not out[:, 5:].any()


def test_without_numba_torch_gives_the_same_clusters(monkeypatch):
    points = mixture(5000)
    exact = kmeans(points, 30, iterations=4, precision="float32")
    rough = kmeans(points, 30, iterations=4)
    ids, apart = nearest_centroid(points, exact.centroids, precision="float32")
    chosen = farthest_points(points, 20)
    monkeypatch.setattr(module, "has_kernels", lambda: False)
    plain = kmeans(points, 30, iterations=4, precision="float32")
    np.testing.assert_allclose(plain.centroids, exact.centroids, atol=1e-5)
    np.testing.assert_allclose(plain.objective, exact.objective, rtol=1e-6)
    assert kmeans(points, 30, iterations=4).objective[-1] == pytest.approx(
        rough.objective[-1], rel=1e-3
    )
    plain_ids, plain_apart = nearest_centroid(points, exact.centroids, precision="float32")
    np.testing.assert_array_equal(plain_ids, ids)
    np.testing.assert_allclose(plain_apart, apart, rtol=1e-6)
    np.testing.assert_array_equal(farthest_points(points, 20), chosen)


def test_a_cpu_without_bfloat16_products_uses_float32_and_says_so(monkeypatch, caplog):
    points = mixture(2000)
    monkeypatch.setattr(exact_graph, "multiplies_bfloat16", lambda: False)
    found = kmeans(points, 10, iterations=2)
    exact = kmeans(points, 10, iterations=2, precision="float32")
    assert found.centroids.tobytes() == exact.centroids.tobytes()
    assert "float32 is used" in caplog.text


def test_points_of_a_read_only_file_are_accepted(tmp_path):
    np.save(tmp_path / "points.npy", mixture(1000))
    points = np.load(tmp_path / "points.npy", mmap_mode="r")
    assert kmeans(points, 5, iterations=2).counts.sum() == 1000


@pytest.mark.parametrize("count", [1, 25])
def test_farthest_points_are_those_of_the_slow_loop(count):
    points = mixture(400).astype(np.float32)
    chosen = [7]
    while len(chosen) < count:
        apart = cdist(points.astype(np.float64), points[chosen], "sqeuclidean").min(axis=1)
        chosen.append(int(apart.argmax()))
    np.testing.assert_array_equal(farthest_points(points, count, first=7), chosen)


def test_bad_input_is_refused_in_a_sentence(monkeypatch):
    points = mixture(20)
    with pytest.raises(ConfigError, match=r"20 points cannot give 21 clusters. Ask for 1 to 20"):
        kmeans(points, 21)
    with pytest.raises(ConfigError, match="finite"):
        kmeans(np.full((5, 2), np.nan, np.float32), 2)
    with pytest.raises(ConfigError, match="cannot be chosen among 20"):
        farthest_points(points, 21)
    monkeypatch.setitem(__import__("sys").modules, "faiss", None)
    with pytest.raises(ResourceError, match=r"Install faiss-gpu .* or leave out backend=faiss"):
        faiss_kmeans.faiss_kmeans(points, 2)


def test_faiss_leaves_a_gpu_alone_that_it_was_not_given(monkeypatch):
    import faiss

    points = mixture(60)
    alone = faiss_kmeans.faiss_kmeans(points, 5)
    monkeypatch.setattr(faiss, "get_num_gpus", lambda: 2, raising=False)

    def on_gpus(*_, **__):
        raise AssertionError("a GPU was taken")

    monkeypatch.setattr(faiss, "index_cpu_to_all_gpus", on_gpus, raising=False)
    again = faiss_kmeans.faiss_kmeans(points, 5)
    np.testing.assert_array_equal(again.centroids, alone.centroids)
    with pytest.raises(AssertionError, match="was taken"):
        faiss_kmeans.faiss_kmeans(points, 5, gpus=1)


def test_faiss_says_how_many_gpus_it_lacks(monkeypatch):
    import faiss

    monkeypatch.setattr(faiss, "get_num_gpus", lambda: 1, raising=False)
    with pytest.raises(ResourceError, match=r"use 2 GPUs, but faiss sees 1 here. Set resources"):
        faiss_kmeans.faiss_kmeans(mixture(20), 2, gpus=2)


@pytest.mark.gpu
def test_a_gpu_gives_the_centroids_of_the_cpu():
    import torch

    if not torch.cuda.is_available():
        pytest.skip("no CUDA device")
    points = mixture(30_000)
    exact = kmeans(points, 40, iterations=5, precision="float32")
    found = kmeans(points, 40, iterations=5, precision="float32", device="cuda")
    assert found.objective[-1] == pytest.approx(exact.objective[-1], rel=1e-4)
    rough = kmeans(points, 40, iterations=5, device="cuda")
    assert rough.objective[-1] == pytest.approx(exact.objective[-1], rel=2e-3)
