"""The faiss shard gives the bits of the exact search, whatever ties, collapses or repeats."""

import itertools
from pathlib import Path

import faiss
import numpy as np
import pytest

from selfsup_ray.artifacts import ShardedArray
from selfsup_ray.errors import ArtifactError
from selfsup_ray.ops import index as index_module
from selfsup_ray.ops.index import IndexShard, group_equal_rows
from selfsup_ray.ops.neighbors import Neighbors, exact_topk, merge_neighbors

NO_GPU = pytest.mark.skipif(
    not getattr(faiss, "get_num_gpus", int)(), reason="needs a CUDA device and faiss for it"
)


def unit_rows(n: int, d: int, seed: int = 0) -> np.ndarray:
    rows = np.random.default_rng(seed).normal(size=(n, d)).astype(np.float32)
    return rows / np.linalg.norm(rows, axis=1, keepdims=True)


def with_duplicates() -> np.ndarray:
    rows = unit_rows(900, 40)
    rows[100:400:3] = rows[50]  # 100 equal images: more than k
    rows[700:800] = rows[600:700]
    return rows


def sign_rows() -> np.ndarray:
    """Rows of +-1/8: nearly every similarity is shared by many rows."""
    return np.random.default_rng(0).choice([-0.125, 0.125], (900, 64)).astype(np.float32)


def collapsed() -> np.ndarray:
    """Rows so near to each other that float32 sums cannot order them."""
    rows = 1 + np.random.default_rng(0).normal(scale=1e-4, size=(900, 40)).astype(np.float32)
    return rows / np.linalg.norm(rows, axis=1, keepdims=True)


INPUTS = {
    "spread": lambda: unit_rows(900, 40),
    "duplicates": with_duplicates,
    "ties": sign_rows,
    "collapsed": collapsed,
    "one image": lambda: np.repeat(unit_rows(1, 16), 900, axis=0),
    "not unit": lambda: unit_rows(900, 40) * np.linspace(0, 30, 900, dtype=np.float32)[:, None],
}


def stored(folder: Path, rows: np.ndarray) -> ShardedArray:
    cuts = [0, len(rows) // 3, len(rows)]
    array = ShardedArray.create(
        folder, shard_rows=np.diff(cuts).tolist(), row_shape=rows.shape[1:], dtype="float32"
    )
    for i in range(2):
        array.write_shard(i, rows[cuts[i] : cuts[i + 1]])
    return array


def same(found: Neighbors, wanted: Neighbors) -> None:
    np.testing.assert_array_equal(found.ids, wanted.ids)
    np.testing.assert_array_equal(found.similarity, wanted.similarity)


@pytest.mark.parametrize("name", INPUTS)
@pytest.mark.parametrize("gpu", [False, pytest.param(True, marks=[pytest.mark.gpu, NO_GPU])])
def test_a_shard_answers_with_the_bits_of_the_exact_search(tmp_path: Path, name: str, gpu: bool):
    rows = INPUTS[name]()
    array = stored(tmp_path, rows)
    queries = np.concatenate([rows[::9], unit_rows(30, rows.shape[1], seed=1)])
    found = IndexShard(array.path, start=0, stop=len(rows), gpu=gpu).search(queries, 17)
    same(found, exact_topk(queries, rows, k=17))


@pytest.mark.parametrize("name", INPUTS)
def test_the_answers_of_shards_merge_to_the_answer_of_one(tmp_path: Path, name: str):
    rows = INPUTS[name]()
    array = stored(tmp_path, rows)
    cuts = [(0, 5), (5, 450), (450, 450), (450, 900)]
    parts = [IndexShard(array.path, start=a, stop=b).search(rows[:50], 17) for a, b in cuts]
    assert [part.k for part in parts] == [5, 17, 0, 17]
    same(merge_neighbors(parts, k=17), exact_topk(rows[:50], rows, k=17))


def test_few_queries_on_faiss_scalar_path_get_the_same_bits(tmp_path: Path):
    rows = unit_rows(900, 40)
    shard = IndexShard(stored(tmp_path, rows).path, start=0, stop=900)
    together = shard.search(rows[:64], 8)
    alone = [shard.search(rows[i : i + 1], 8) for i in range(64)]
    same(together, Neighbors(*(np.concatenate([getattr(a, f) for a in alone]) for f in FIELDS)))


FIELDS = ("ids", "similarity")


def test_float32_error_is_settled_without_searching_every_query_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    again = []

    def counted(queries, rows, *, k):
        again.append(len(queries))
        return exact_topk(queries, rows, k=k)

    monkeypatch.setattr(index_module, "exact_topk", counted)
    rows = unit_rows(5000, 64)
    IndexShard(stored(tmp_path / "a", rows).path, start=0, stop=5000).search(rows[:500], 20)
    assert sum(again) <= 5
    again.clear()
    rows = sign_rows()
    IndexShard(stored(tmp_path / "b", rows).path, start=0, stop=900).search(rows, 20)
    assert sum(again) > 0


def test_only_the_listed_ids_are_searched(tmp_path: Path):
    rows = with_duplicates()
    array = stored(tmp_path, rows)
    ids = np.arange(0, 900, 7)
    np.save(tmp_path / "ids.npy", ids)
    found = IndexShard(array.path, start=0, stop=len(ids), only=tmp_path / "ids.npy").search(
        rows[:40], 9
    )
    wanted = exact_topk(rows[:40], rows[ids], k=9)
    same(found, Neighbors(ids[wanted.ids], wanted.similarity))


def test_stored_queries_are_read_by_range(tmp_path: Path):
    rows = unit_rows(90, 8)
    array = stored(tmp_path, rows)
    shard = IndexShard(array.path, start=0, stop=90)
    same(shard.search_stored(array.path, 20, 50, 4), shard.search(rows[20:50], 4))


def test_more_neighbors_than_rows_gives_all_rows(tmp_path: Path):
    rows = with_duplicates()[:200]
    shard = IndexShard(stored(tmp_path, rows).path, start=0, stop=200)
    same(shard.search(rows[:9], 500), exact_topk(rows[:9], rows, k=200))
    assert shard.search(rows[:0], 4).ids.shape == (0, 4)


def test_batches_of_twenty_queries_go_through_blas(tmp_path: Path):
    rows = unit_rows(60, 24)
    assert IndexShard(stored(tmp_path, rows).path, start=0, stop=60).search(rows, 3)
    assert faiss.cvar.distance_compute_blas_threshold == 16 * 24


def test_equal_rows_are_held_once(tmp_path: Path):
    rows = np.repeat(unit_rows(10, 8), 20, axis=0)
    flat = IndexShard(stored(tmp_path, rows).path, start=0, stop=200).flat
    assert flat.index.ntotal == len(flat.rows) == 10


def test_groups_are_the_equal_rows_in_the_order_of_their_first():
    rng = np.random.default_rng(0)
    rows = unit_rows(30, 5)[rng.integers(0, 30, 400)]
    order, starts = group_equal_rows(rows)
    groups: dict[bytes, list[int]] = {}
    for i, row in enumerate(rows):
        groups.setdefault(row.tobytes(), []).append(i)
    found = [order[a:b].tolist() for a, b in itertools.pairwise(starts)]
    assert found == list(groups.values())


def test_rows_with_the_same_hash_are_not_taken_for_equal(monkeypatch: pytest.MonkeyPatch):
    rows = unit_rows(50, 3)
    rows[:, 0], rows[10:] = 0, np.abs(rows[10:])
    zero = np.zeros(50, np.uint64)
    monkeypatch.setattr(index_module, "row_hashes", lambda rows: zero)
    order, starts = group_equal_rows(rows)
    np.testing.assert_array_equal(order, np.arange(50))
    np.testing.assert_array_equal(starts, np.arange(51))


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_a_row_that_is_not_finite_is_named(tmp_path: Path, bad: float):
    rows = unit_rows(90, 8)
    rows[71, 3] = bad
    shard = IndexShard(stored(tmp_path, rows).path, start=0, stop=90)
    with pytest.raises(ArtifactError, match=r"not finite in row 71.*embed again"):
        shard.search(rows[:2], 3)
