"""The sharded search gives the lists of a slow search over all pairs, whoever computes them."""

import itertools
import random
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from selfsup_ray.artifacts import ShardedArray
from selfsup_ray.cluster import pairs
from selfsup_ray.cluster.neighbors import Search
from selfsup_ray.config import Resources
from selfsup_ray.errors import ArtifactError, ResourceError
from selfsup_ray.ops import all_pairs

K = 6


def unit_rows(n: int, d: int = 24, seed: int = 0) -> np.ndarray:
    rows = np.random.default_rng(seed).normal(size=(n, d)).astype(np.float32)
    return rows / np.linalg.norm(rows, axis=1, keepdims=True)


def rows_with_duplicates() -> np.ndarray:
    """300 rows; one image 20 times and some pairs, so that ties cross every border."""
    rows = unit_rows(300)
    rows[np.arange(3, 300, 15)] = rows[7]
    rows[200:220] = rows[100:120]
    return rows


def stored(folder: Path, rows: np.ndarray, shard_rows: list[int]) -> ShardedArray:
    array = ShardedArray.create(
        folder, shard_rows=shard_rows, row_shape=rows.shape[1:], dtype="float32"
    )
    for i, (a, b) in enumerate(itertools.pairwise(array.offsets)):
        array.write_shard(i, rows[a:b])
    return array


def outputs(folder: Path, array: ShardedArray, k: int = K) -> tuple[ShardedArray, ShardedArray]:
    make = {"shard_rows": array.shard_rows, "row_shape": (k,)}
    return (
        ShardedArray.create(folder / "ids", dtype="int32", **make),
        ShardedArray.create(folder / "similarity", dtype="float32", **make),
    )


def slow_lists(rows: np.ndarray, k: int = K) -> np.ndarray:
    """All pairs in float64, one query at a time, sorted by (similarity, id), the image left out."""
    lists = []
    for i, row in enumerate(rows.astype(np.float64)):
        scores = [np.float32((row * other).sum()) for other in rows.astype(np.float64)]
        order = sorted((-score, j) for j, score in enumerate(scores) if j != i)
        lists.append([j for _, j in order[:k]])
    return np.array(lists)


def written(folder: Path, array: ShardedArray, workers: int) -> tuple[np.ndarray, np.ndarray]:
    ids, similarity = outputs(folder, array)
    with Search(array, Resources(workers=workers)) as search:
        assert sorted(search.write_lists(ids, similarity)) == list(range(array.num_shards))
    return np.asarray(ids), np.asarray(similarity)


def test_the_search_in_this_process_equals_the_slow_search(tmp_path: Path):
    rows = rows_with_duplicates()
    array = stored(tmp_path / "rows", rows, [128, 128, 44])
    ids, similarity = written(tmp_path, array, workers=0)
    np.testing.assert_array_equal(ids, slow_lists(rows))
    exact = np.einsum("nd,nkd->nk", rows, rows[ids], dtype=np.float64)
    np.testing.assert_allclose(similarity, exact, atol=6e-8)


@pytest.mark.parametrize("workers", [1, 3])
def test_the_lists_are_the_same_bits_for_any_number_of_actors(
    tmp_path: Path, ray_session: None, workers: int
):
    array = stored(tmp_path / "rows", rows_with_duplicates(), [128, 0, 128, 44])
    ids, similarity = written(tmp_path / "one", array, workers=0)
    ids_n, similarity_n = written(tmp_path / "many", array, workers=workers)
    np.testing.assert_array_equal(ids_n, ids)
    np.testing.assert_array_equal(similarity_n, similarity)


def test_killed_actors_change_nothing_in_the_lists(tmp_path: Path, ray_session: None):
    import ray

    rows = rows_with_duplicates()
    array = stored(tmp_path / "rows", rows, [30] * 10)
    ids, similarity = outputs(tmp_path, array)
    chance = random.Random(0)
    killed = 0
    with Search(array, Resources(workers=2)) as search:
        for _ in search.write_lists(ids, similarity):
            if killed < 3:
                ray.kill(chance.choice(search.actors), no_restart=False)
                killed += 1
    assert killed == 3
    np.testing.assert_array_equal(np.asarray(ids), slow_lists(rows))


@pytest.mark.parametrize("workers", [0, 2])
def test_all_pairs_at_once_give_the_same_lists(
    tmp_path: Path, ray_session: None, workers: int, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(pairs, "FROM_ROWS", 100)
    monkeypatch.setattr(all_pairs, "GROUP_BYTES", 90 * (6 * 24 + 8 * (3 * K + 35)))
    array = stored(tmp_path / "rows", rows_with_duplicates(), [30] * 10)
    ids, similarity = outputs(tmp_path, array)
    steps, share = [], pairs._share

    def watched(step, *args, actors, threads):
        steps.append(step)
        for i, part in enumerate(share(step, *args, actors=actors, threads=threads)):
            if i == 0:
                ray_kill(actors)  # while the next part runs
            yield part

    monkeypatch.setattr(pairs, "_share", watched)
    with Search(array, Resources(workers=workers)) as search:
        assert sorted(search.write_lists(ids, similarity)) == list(range(10))
    assert len(steps) == 3  # joins, lists, shards
    np.testing.assert_array_equal(np.asarray(ids), slow_lists(rows_with_duplicates()))
    assert not (tmp_path / "pairs").exists()


def ray_kill(actors: list[object]) -> None:
    import ray

    for actor in actors:
        ray.kill(actor, no_restart=False)


def test_an_interrupted_search_writes_only_what_is_missing(tmp_path: Path):
    array = stored(tmp_path / "rows", unit_rows(90), [30, 30, 30])
    ids, similarity = outputs(tmp_path, array)
    with Search(array, Resources(workers=0)) as search:
        unfinished = search.write_lists(ids, similarity)
        next(unfinished)
        unfinished.close()
        before = ids.shard_path(0).stat().st_mtime_ns
        similarity.write_shard(1, np.zeros((30, K)))  # killed between the two files of a shard
        assert list(search.write_lists(ids, similarity)) == [1, 2]
    assert ids.shard_path(0).stat().st_mtime_ns == before
    np.testing.assert_array_equal(np.asarray(ids), slow_lists(unit_rows(90)))
    assert similarity.shard(1).min() > 0


def test_new_queries_are_answered_by_all_actors_together(tmp_path: Path, ray_session: None):
    rows, queries = rows_with_duplicates(), unit_rows(11, seed=1)
    array = stored(tmp_path / "rows", rows, [100, 200])
    with Search(array, Resources(workers=2)) as search:
        found = search.search(queries, K)
    scores = queries.astype(np.float64) @ rows.T.astype(np.float64)
    np.testing.assert_allclose(found.similarity, -np.sort(-scores)[:, :K], atol=6e-8)
    listed = np.take_along_axis(scores, found.ids, axis=1)
    np.testing.assert_allclose(found.similarity, listed, atol=6e-8)


def test_a_search_over_some_ids_never_answers_with_others(tmp_path: Path, ray_session: None):
    rows = rows_with_duplicates()
    array = stored(tmp_path / "rows", rows, [100, 200])
    chosen = np.arange(1, 300, 3)
    np.save(tmp_path / "chosen.npy", chosen)
    slow = chosen[slow_lists(rows[chosen])]
    for workers in (0, 2):
        with Search(array, Resources(workers=workers), only=tmp_path / "chosen.npy") as search:
            found = search.search(rows[chosen], K + 1)
        others = [list(row[row != own][:K]) for row, own in zip(found.ids, chosen, strict=True)]
        np.testing.assert_array_equal(others, slow)


def test_rows_that_are_not_finite_are_named_by_an_actor(tmp_path: Path, ray_session: None):
    rows = unit_rows(40)
    rows[33, 2] = np.nan
    array = stored(tmp_path / "rows", rows, [20, 20])
    ids, similarity = outputs(tmp_path, array)
    with (
        Search(array, Resources(workers=2)) as search,
        pytest.raises(ArtifactError, match="row 33"),
    ):
        list(search.write_lists(ids, similarity))


def test_the_actors_end_with_the_search(tmp_path: Path, ray_session: None):
    import ray

    array = stored(tmp_path / "rows", unit_rows(40), [40])
    with Search(array, Resources(workers=1)) as search:
        (actor,) = search.actors
        search.search(unit_rows(2), K)
    deadline = time.monotonic() + 60  # Ray ends an actor beside us: a call may come before it
    with pytest.raises(ray.exceptions.RayActorError):
        while time.monotonic() < deadline:
            ray.get(actor.search.remote(unit_rows(2), K), timeout=60)


def test_more_actors_than_the_cluster_has_cpus_are_refused_at_once(
    tmp_path: Path, ray_session: None
):
    array = stored(tmp_path / "rows", unit_rows(40), [40])
    with pytest.raises(ResourceError, match="graph asks for 64 workers"):
        Search(array, Resources(workers=64))


def test_without_faiss_the_lists_are_the_same(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    rows = rows_with_duplicates()
    array = stored(tmp_path / "rows", rows, [300])
    monkeypatch.setitem(sys.modules, "faiss", None)
    ids, _ = written(tmp_path, array, workers=0)
    np.testing.assert_array_equal(ids, slow_lists(rows))
