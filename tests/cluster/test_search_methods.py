"""Approximate search: faiss's recall, exact similarities, the same lists on any actors."""

import itertools
import random
from pathlib import Path

import faiss
import numpy as np
import pytest

from selfsup_ray.artifacts import ShardedArray
from selfsup_ray.cluster import neighbors as module
from selfsup_ray.cluster.methods import ExactConfig, HNSWConfig, IVFConfig, SearchConfig
from selfsup_ray.cluster.neighbors import Search
from selfsup_ray.config import Resources
from selfsup_ray.errors import ArtifactError, ConfigError
from selfsup_ray.ops.neighbors import Neighbors, exact_topk, pair_similarity

N, D, K = 3000, 32, 8
METHODS: dict[str, SearchConfig] = {
    "flat": IVFConfig(num_lists=40, num_probes=6, piece_rows=1100),
    "sq8": IVFConfig(num_lists=40, num_probes=6, piece_rows=1100, storage="sq8"),
    "fp16": IVFConfig(num_lists=40, num_probes=6, piece_rows=1100, storage="fp16"),
    "pq": IVFConfig(
        num_lists=40,
        num_probes=6,
        piece_rows=1500,
        storage="pq",
        pq_bytes=4,
        rerank=12,
        iterations=3,
    ),
    "hnsw": HNSWConfig(piece_rows=1100),
}


def clustered(n: int = N, d: int = D, seed: int = 0) -> np.ndarray:
    """Unit rows around 30 centers, sorted by center as many corpora are."""
    rng = np.random.default_rng(seed)
    centers = np.random.default_rng(99).normal(size=(30, d))
    rows = centers[np.sort(rng.integers(0, 30, n))] + 0.6 * rng.normal(size=(n, d))
    return (rows / np.linalg.norm(rows, axis=1, keepdims=True)).astype(np.float32)


def stored(folder: Path, rows: np.ndarray, shard_rows: list[int]) -> ShardedArray:
    array = ShardedArray.create(
        folder, shard_rows=shard_rows, row_shape=rows.shape[1:], dtype="float32"
    )
    for i, (a, b) in enumerate(itertools.pairwise(array.offsets)):
        array.write_shard(i, rows[a:b])
    return array


def written(
    folder: Path, search: Search, array: ShardedArray, k: int = K
) -> tuple[np.ndarray, np.ndarray]:
    make = {"shard_rows": array.shard_rows, "row_shape": (k,)}
    ids = ShardedArray.create(folder / "ids", dtype="int32", **make)
    similarity = ShardedArray.create(folder / "similarity", dtype="float32", **make)
    for _ in search.write_lists(ids, similarity):
        pass
    return np.asarray(ids), np.asarray(similarity)


def recall(found: Neighbors, rows: np.ndarray, queries: np.ndarray) -> float:
    best = exact_topk(queries, rows, k=found.k)
    return float((found.similarity >= best.similarity[:, -1:]).mean())


def by_faiss(name: str, rows: np.ndarray, queries: np.ndarray) -> np.ndarray:
    """The ids of one faiss index of the same kind, without pieces or exact comparison."""
    kinds = {"flat": "IVF40,Flat", "sq8": "IVF40,SQ8", "fp16": "IVF40,SQfp16", "pq": "IVF40,PQ4"}
    index = faiss.index_factory(D, kinds.get(name, "HNSW16"), faiss.METRIC_INNER_PRODUCT)
    if name == "pq":
        index.do_polysemous_training = False  # an annealing of seconds that this search ignores
    index.train(rows)
    index.add(rows)
    if name in kinds:
        index.nprobe = 6
    return index.search(queries, K)[1]


@pytest.mark.parametrize("name", METHODS)
def test_lists_are_as_good_as_those_of_faiss_and_their_similarities_exact(
    tmp_path: Path, name: str
):
    rows, queries = clustered(), clustered(200, seed=1)
    array = stored(tmp_path / "rows", rows, [1000, 2000])
    with Search(array, Resources(workers=0), method=METHODS[name], folder=tmp_path / "i") as search:
        found = search.search(queries, K)
    exact = pair_similarity(queries, rows[found.ids])
    np.testing.assert_array_equal(found.similarity, exact)
    assert all(len(set(row)) == K for row in found.ids)
    order = np.lexsort((found.ids, -found.similarity), axis=1)
    np.testing.assert_array_equal(order, np.broadcast_to(np.arange(K), order.shape))
    peer = pair_similarity(queries, rows[by_faiss(name, rows, queries)])
    assert recall(found, rows, queries) >= recall(Neighbors(found.ids, peer), rows, queries) - 0.02
    assert recall(found, rows, queries) > 0.9


def test_all_cells_and_full_precision_give_the_exact_lists(tmp_path: Path):
    rows = clustered()
    rows[50:250] = rows[3]  # equal images: more than any list holds
    array = stored(tmp_path / "rows", rows, [N])
    method = IVFConfig(num_lists=4, num_probes=4, piece_rows=1100)
    assert method.probes(N) == 3  # the cap of 3/4
    with Search(array, Resources(workers=0), method=method, folder=tmp_path / "i") as search:
        search.files = search.local.files = replace_probes(search.local.files, 4)
        found = search.search(rows[::10], 20)
    wanted = exact_topk(rows[::10], rows, k=20)
    np.testing.assert_array_equal(found.ids, wanted.ids)
    np.testing.assert_array_equal(found.similarity, wanted.similarity)


def replace_probes(files, probes):
    from dataclasses import replace

    return replace(files, recipe=replace(files.recipe, num_probes=probes))


@pytest.mark.parametrize(("name", "counts"), [("sq8", (1, 3)), ("hnsw", (2,))])
def test_lists_are_the_same_for_any_number_of_actors(
    tmp_path: Path,
    ray_session: None,
    name: str,
    counts: tuple[int, ...],
    monkeypatch: pytest.MonkeyPatch,
):
    monkeypatch.setattr(module, "_QUERY_ROWS", 500)
    rows = clustered()
    rows[50:90] = rows[3]
    array = stored(tmp_path / "rows", rows, [1300, 0, 1700])
    lists = []
    for workers in (0, *counts):
        folder = tmp_path / str(workers)
        resources = Resources(workers=workers)
        with Search(array, resources, method=METHODS[name], folder=folder / "i") as search:
            lists.append(written(folder, search, array))
    for ids, similarity in lists[1:]:
        np.testing.assert_array_equal(ids, lists[0][0])
        np.testing.assert_array_equal(similarity, lists[0][1])


def test_more_actors_than_pieces_share_the_queries(tmp_path: Path, ray_session: None):
    rows = clustered()
    array = stored(tmp_path / "rows", rows, [N])
    method = IVFConfig(num_lists=20, num_probes=4, piece_rows=N)
    queries = clustered(300, seed=1)
    answers = []
    for workers in (0, 2):
        resources = Resources(workers=workers)
        with Search(array, resources, method=method, folder=tmp_path / "i") as search:
            assert len(search.replicas) == workers
            answers.append(list(search.stream([queries[:100], queries[100:101], queries[101:]], K)))
    assert [len(part) for part in answers[0]] == [100, 1, 199]
    for one, other in zip(*answers, strict=True):
        np.testing.assert_array_equal(one.ids, other.ids)
        np.testing.assert_array_equal(one.similarity, other.similarity)


def test_killed_actors_change_nothing_and_the_index_is_not_built_again(
    tmp_path: Path, ray_session: None, monkeypatch: pytest.MonkeyPatch
):
    import ray

    monkeypatch.setattr(module, "_QUERY_ROWS", 100)
    array = stored(tmp_path / "rows", clustered(), [300] * 10)
    index = tmp_path / "index"
    with Search(array, Resources(workers=0), method=METHODS["flat"], folder=index) as search:
        ids, _ = written(tmp_path / "here", search, array)
    files = {path: path.stat().st_mtime_ns for path in sorted(index.iterdir())}
    assert len(files) == 2 + 2 * 3  # the manifest, the centers, two files of each piece
    chance, killed = random.Random(0), 0
    out = tmp_path / "actors"
    make = {"shard_rows": array.shard_rows, "row_shape": (K,)}
    by_actors = ShardedArray.create(out / "ids", dtype="int32", **make)
    similarity = ShardedArray.create(out / "similarity", dtype="float32", **make)
    resources = Resources(workers=2)
    with Search(array, resources, method=METHODS["flat"], folder=index) as search:
        for _ in search.write_lists(by_actors, similarity):
            if killed < 3:
                ray.kill(chance.choice(search.actors), no_restart=False)
                killed += 1
    np.testing.assert_array_equal(np.asarray(by_actors), ids)
    assert {path: path.stat().st_mtime_ns for path in sorted(index.iterdir())} == files


def test_only_the_piece_that_is_missing_is_built(tmp_path: Path):
    array = stored(tmp_path / "rows", clustered(), [N])
    index = tmp_path / "index"
    for _ in range(2):
        with Search(array, Resources(workers=0), method=METHODS["sq8"], folder=index) as search:
            search.build()
        (index / "00001.index").unlink(missing_ok=True)
        if _ == 0:
            before = {p: p.stat().st_mtime_ns for p in index.iterdir() if "00001" not in p.name}
    after = {p: p.stat().st_mtime_ns for p in index.iterdir() if "00001" not in p.name}
    assert before == after


@pytest.mark.parametrize("name", ["flat", "hnsw"])
@pytest.mark.parametrize("n", [1, 2, 30])
def test_few_rows_give_all_of_them(tmp_path: Path, name: str, n: int):
    method = IVFConfig(piece_rows=11) if name == "flat" else HNSWConfig(piece_rows=11)
    rows = clustered(n)
    array = stored(tmp_path / "rows", rows, [n])
    with Search(array, Resources(workers=0), method=method, folder=tmp_path / "i") as search:
        found = search.search(rows, 50)
        assert search.search(rows[:0], 5).ids.shape[0] == 0
    wanted = exact_topk(rows, rows, k=n)
    np.testing.assert_array_equal(found.ids, wanted.ids)


def test_lists_that_a_cell_cannot_fill_are_completed_from_all_rows(
    tmp_path: Path, ray_session: None
):
    rows = clustered(400)
    array = stored(tmp_path / "rows", rows, [400])
    method = IVFConfig(num_lists=100, num_probes=1, piece_rows=150)
    lists = []
    for workers in (0, 2):
        folder = tmp_path / str(workers)
        resources = Resources(workers=workers)
        with Search(array, resources, method=method, folder=tmp_path / "i") as search:
            lists.append(written(folder, search, array, k=30))
    assert lists[0][0].min() >= 0 and lists[0][0].max() < 400
    assert all(i not in row and len(set(row)) == 30 for i, row in enumerate(lists[0][0]))
    np.testing.assert_array_equal(lists[0][0], lists[1][0])


def test_other_stored_rows_may_ask(tmp_path: Path, ray_session: None):
    rows, others = clustered(), clustered(250, seed=1)
    array = stored(tmp_path / "rows", rows, [N])
    asking = stored(tmp_path / "others", others, [100, 150])
    wanted = exact_topk(others, rows, k=K)
    for workers in (0, 2):
        make = {"shard_rows": asking.shard_rows, "row_shape": (K,)}
        out = tmp_path / str(workers)
        ids = ShardedArray.create(out / "ids", dtype="int64", **make)
        similarity = ShardedArray.create(out / "similarity", dtype="float32", **make)
        with Search(array, Resources(workers=workers), method=ExactConfig()) as search:
            assert sorted(search.write_lists(ids, similarity, queries=asking)) == [0, 1]
        np.testing.assert_array_equal(np.asarray(ids), wanted.ids)
        np.testing.assert_array_equal(np.asarray(similarity), wanted.similarity)


def test_only_some_rows_can_be_searched(tmp_path: Path):
    rows = clustered()
    array = stored(tmp_path / "rows", rows, [1000, 2000])
    np.save(tmp_path / "some.npy", np.arange(5, N, 3))
    method = IVFConfig(num_lists=12, num_probes=9, piece_rows=400)
    folder = tmp_path / "i"
    with Search(
        array, Resources(workers=0), only=tmp_path / "some.npy", method=method, folder=folder
    ) as search:
        found = search.search(rows[:100], K)
    assert (found.ids % 3 == 2).all()
    wanted = exact_topk(rows[:100], rows[5::3], k=K)
    assert (5 + 3 * wanted.ids == found.ids).mean() > 0.99


def test_a_folder_with_another_index_is_refused(tmp_path: Path):
    array = stored(tmp_path / "rows", clustered(300), [300])
    Search(array, Resources(workers=0), method=IVFConfig(), folder=tmp_path / "i")
    with pytest.raises(ArtifactError, match="holds an index built with"):
        Search(array, Resources(workers=0), method=IVFConfig(seed=1), folder=tmp_path / "i")


def test_a_gpu_that_is_not_there_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    array = stored(tmp_path / "rows", clustered(300), [300])
    wanted = Resources(workers=0, gpus=1)
    with pytest.raises(ConfigError, match="hnsw searches on CPUs only"):
        Search(array, wanted, method=HNSWConfig(), folder=tmp_path / "i")
    if faiss.get_num_gpus() == 0 and hasattr(faiss, "StandardGpuResources"):
        for method in (ExactConfig(), IVFConfig()):
            folder = tmp_path / method.name
            with (
                Search(array, wanted, method=method, folder=folder) as search,
                pytest.raises(ConfigError, match="faiss sees no GPU"),
            ):
                search.search(clustered(3), 2)
    monkeypatch.delattr(faiss, "StandardGpuResources", raising=False)
    with pytest.raises(ConfigError, match="without GPU code"):
        Search(array, wanted, method=IVFConfig(), folder=tmp_path / "i")


def test_codes_that_do_not_fit_the_rows_are_refused(tmp_path: Path):
    array = stored(tmp_path / "rows", clustered(300), [300])
    for method, message in [
        (IVFConfig(storage="pq", pq_bytes=7), "does not divide the 32 dimensions"),
        (IVFConfig(storage="pq", pq_bytes=8, num_lists=2, train_sample=9), "only 18 rows"),
    ]:
        with pytest.raises(ConfigError, match=message):
            Search(array, Resources(workers=0), method=method, folder=tmp_path / "i")
    with pytest.raises(ConfigError, match="`rotate` is true"):
        IVFConfig(rotate=True)


def test_the_published_rule_gives_the_published_cells():
    assert [IVFConfig().lists(n) for n in (10**6, 10**7, 10**8)] == [4000, 12648, 40000]
    assert IVFConfig(num_probes=256).probes(1000) == int(0.75 * 4 * 31)
    assert IVFConfig().lists(3) == 3
