"""k-means over stored points gives the centroids of one process, whoever computes them."""

import itertools
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from selfsup_ray.artifacts import ShardedArray
from selfsup_ray.cluster import kmeans as module
from selfsup_ray.cluster.kmeans import kmeans_sharded, point_shards
from selfsup_ray.config import Resources
from selfsup_ray.errors import ArtifactError, ConfigError, ResourceError
from selfsup_ray.ops.assignment import BLOCK
from selfsup_ray.ops.kmeans import Clustering, kmeans

HERE = Resources(workers=0)
MATRIX = np.random.default_rng(1).normal(size=(6, 4)).astype(np.float32)


def mixture(n: int, *, dim: int = 6, seed: int = 0) -> np.ndarray:
    draw = np.random.default_rng(seed)
    centers = draw.normal(size=(30, dim))
    points = centers[draw.integers(0, 30, n)] + 0.5 * draw.normal(size=(n, dim))
    return points.astype(np.float32)


def stored(folder: Path, rows: np.ndarray, *, shard_rows: int = 10_000) -> ShardedArray:
    sizes = [len(rows[a : a + shard_rows]) for a in range(0, len(rows), shard_rows)]
    array = ShardedArray.create(folder, shard_rows=sizes, row_shape=rows.shape[1:], dtype="float32")
    for i, (a, b) in enumerate(itertools.pairwise(array.offsets)):
        array.write_shard(i, rows[a:b])
    return array


def assert_same_bits(found: Clustering, wanted: Clustering) -> None:
    assert found.centroids.tobytes() == wanted.centroids.tobytes()
    assert found.counts.tobytes() == wanted.counts.tobytes()
    assert found.objective == wanted.objective


def test_stored_points_give_the_bits_of_points_in_memory(tmp_path: Path):
    points = mixture(3 * BLOCK + 900)
    array = stored(tmp_path / "points", points)
    ask = Resources(workers=0, cpus=2)
    found = kmeans_sharded(array, 25, iterations=4, seed=3, resources=ask, out=tmp_path)
    assert_same_bits(found, kmeans(points, 25, iterations=4, seed=3))


def test_a_transform_of_the_first_rows_is_what_is_clustered(tmp_path: Path):
    array = stored(tmp_path / "points", mixture(3000))
    wanted = kmeans(np.asarray(array)[:2000] @ MATRIX, 10, iterations=3, unit_norm=True)
    how: dict[str, Any] = {"rows": 2000, "transform": MATRIX, "iterations": 3, "unit_norm": True}
    found = kmeans_sharded(array, 10, **how, resources=HERE, out=tmp_path)
    np.testing.assert_allclose(found.centroids, wanted.centroids, atol=1e-3)
    np.testing.assert_allclose(found.objective, wanted.objective, rtol=1e-4)


def test_actors_give_the_same_bits_though_one_is_killed_in_the_middle(
    tmp_path: Path, ray_session: None, monkeypatch: pytest.MonkeyPatch
):
    array = stored(tmp_path / "points", mixture(3 * BLOCK + 900))
    how: dict[str, Any] = {"rows": 2 * BLOCK + 77, "transform": MATRIX, "iterations": 5}
    alone = kmeans_sharded(array, 10, **how, resources=HERE, out=tmp_path / "alone")
    plain, calls, pids = module._Shards.sums, [], []

    def sums(self: Any, *arguments: Any) -> Any:
        calls.append(1)
        if len(calls) == 3:
            pids.append(ray.get(self.actors[1].__ray_call__.remote(lambda _: os.getpid())))
            os.kill(pids[0], signal.SIGKILL)
        return plain(self, *arguments)

    import ray

    monkeypatch.setattr(module._Shards, "sums", sums)
    ask = Resources(workers=3)
    assert_same_bits(kmeans_sharded(array, 10, **how, resources=ask, out=tmp_path / "ray"), alone)
    assert pids


def test_shards_are_cut_at_whole_blocks_and_hold_every_row_once(tmp_path: Path):
    array = stored(tmp_path / "points", np.zeros((5 * BLOCK + 3, 1), np.float32))
    for workers in (0, 1, 2, 6, 50):
        parts = point_shards(
            array, len(array), transform=None, resources=Resources(workers=workers)
        )
        assert len(parts) == min(max(1, workers), 6)
        assert parts[0].start == 0 and parts[-1].stop == len(array)
        for before, after in itertools.pairwise(parts):
            assert before.stop == after.start and after.start % BLOCK == 0


RUN = """
import sys, time
from pathlib import Path
from selfsup_ray.artifacts import ShardedArray
from selfsup_ray.cluster import kmeans
from selfsup_ray.config import Resources

def slow_write(*arguments):
    plain_write(*arguments)
    time.sleep(0.5)

plain_write, kmeans._write = kmeans._write, slow_write
folder = Path(sys.argv[1])
points = ShardedArray.open(folder / "points")
kmeans.kmeans_sharded(
    points, 40, iterations=25, resources=Resources(workers=0), out=folder / "out"
)
"""


def test_a_run_killed_in_the_middle_continues_to_the_same_bits(tmp_path: Path):
    points = mixture(BLOCK + 500)
    array = stored(tmp_path / "points", points)
    process = subprocess.Popen([sys.executable, "-c", RUN, str(tmp_path)])
    state = tmp_path / "out" / module.STATE
    deadline = time.monotonic() + 60
    while not state.exists() and time.monotonic() < deadline:
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    process.wait()
    request = module._request(len(points), 40, 25, 0, "bfloat16", False, None)
    stopped = module._read(state, request)
    assert isinstance(stopped, module.State) and len(stopped.objective) < 25
    found = kmeans_sharded(array, 40, iterations=25, resources=HERE, out=tmp_path / "out")
    assert_same_bits(found, kmeans(points, 40, iterations=25))


def test_a_finished_run_is_read_back_without_its_points(tmp_path: Path):
    array = stored(tmp_path / "points", mixture(500))
    first = kmeans_sharded(array, 5, iterations=3, resources=HERE, out=tmp_path)
    array.shard_path(0).unlink()
    again = kmeans_sharded(array, 5, iterations=3, resources=HERE, out=tmp_path)
    assert_same_bits(again, first)


def test_a_folder_of_another_kmeans_is_refused(tmp_path: Path):
    array = stored(tmp_path / "points", mixture(500))
    kmeans_sharded(array, 5, iterations=3, resources=HERE, out=tmp_path)
    with pytest.raises(ArtifactError, match=r"num_clusters=5, but this run asks for 6.*delete"):
        kmeans_sharded(array, 6, iterations=3, resources=HERE, out=tmp_path)


def test_bad_requests_are_refused_in_a_sentence(tmp_path: Path, ray_session: None):
    array = stored(tmp_path / "points", mixture(500))
    with pytest.raises(ConfigError, match=r"asks for 501 points, but .* holds 500"):
        kmeans_sharded(array, 5, rows=501, resources=HERE, out=tmp_path)
    with pytest.raises(ConfigError, match="10 points cannot give 11 clusters"):
        kmeans_sharded(array, 11, rows=10, resources=HERE, out=tmp_path)
    with pytest.raises(ResourceError, match=r"patches asks for 1 workers with 99 CPUs"):
        kmeans_sharded(array, 5, resources=Resources(workers=1, cpus=99), out=tmp_path)
    missing = stored(tmp_path / "missing", mixture(500))
    missing.shard_path(0).unlink()
    with pytest.raises(ArtifactError, match=r"00000.npy is missing"):
        kmeans_sharded(missing, 5, resources=HERE, out=tmp_path)
    infinite = stored(tmp_path / "infinite", np.full((500, 2), np.inf, np.float32))
    with pytest.raises(ArtifactError, match=r"infinite holds a point that is not finite"):
        kmeans_sharded(infinite, 5, resources=HERE, out=tmp_path)
