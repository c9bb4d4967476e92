"""The exact graph by rough scores gives the bits of the slow exact search, ties and all."""

import itertools
from pathlib import Path

import numpy as np
import pytest

from selfsup_ray.artifacts import ShardedArray
from selfsup_ray.errors import ArtifactError
from selfsup_ray.ops import all_pairs as all_pairs_module
from selfsup_ray.ops import exact_graph
from selfsup_ray.ops.all_pairs import AllPairs, run_joins, run_settles
from selfsup_ray.ops.exact_graph import Rows, all_pairs_topk, join, pair_similarities, ranked
from selfsup_ray.ops.neighbors import Neighbors, drop_self, exact_topk

N = 700


def unit_rows(n: int = N, d: int = 40, seed: int = 0) -> np.ndarray:
    rows = np.random.default_rng(seed).normal(size=(n, d)).astype(np.float32)
    return rows / np.linalg.norm(rows, axis=1, keepdims=True)


def with_duplicates() -> np.ndarray:
    rows = unit_rows()
    rows[100:400:3] = rows[50]
    rows[600:] = rows[500:600]
    return rows


def sign_rows() -> np.ndarray:
    """Nearly every similarity is shared by many rows."""
    return np.random.default_rng(0).choice([-0.125, 0.125], (N, 64)).astype(np.float32)


def collapsed() -> np.ndarray:
    """Rows so near to each other that neither bfloat16 nor float32 can order them."""
    rows = 1 + np.random.default_rng(0).normal(scale=1e-4, size=(N, 40)).astype(np.float32)
    return rows / np.linalg.norm(rows, axis=1, keepdims=True)


def one_sided() -> np.ndarray:
    """Two opposite clusters, one of 12 rows: most of their neighbors have negative similarity."""
    rows = unit_rows()
    rows[:, 0] += 3
    rows[::60] *= -1
    return rows / np.linalg.norm(rows, axis=1, keepdims=True)


INPUTS = {
    "spread": unit_rows,
    "duplicates": with_duplicates,
    "ties": sign_rows,
    "collapsed": collapsed,
    "one image": lambda: np.repeat(unit_rows(1, 16), N, axis=0),
    "not unit": lambda: unit_rows() * np.linspace(0, 30, N, dtype=np.float32)[:, None],
    "opposite": one_sided,
}


@pytest.fixture(autouse=True)
def small_tiles(monkeypatch: pytest.MonkeyPatch) -> None:
    """Tiles that the rows fill several times, and not evenly."""
    monkeypatch.setattr(exact_graph, "TILE_ROWS", 64)
    monkeypatch.setattr(exact_graph, "TILE_COLUMNS", 128)


def same(found: Neighbors, wanted: Neighbors) -> None:
    np.testing.assert_array_equal(found.ids, wanted.ids)
    np.testing.assert_array_equal(found.similarity, wanted.similarity)


@pytest.mark.parametrize("bfloat16", [False, True])
@pytest.mark.parametrize("name", INPUTS)
def test_all_pairs_equal_the_exact_search(name: str, bfloat16: bool):
    rows = INPUTS[name]()
    same(all_pairs_topk(rows, k=17, bfloat16=bfloat16), exact_topk(rows, rows, k=17))


@pytest.mark.parametrize("n", [1, 2, 17, 63, 64, 65, 129])
def test_any_number_of_rows_and_all_of_them_as_neighbors(n: int):
    rows = unit_rows(n)
    for k in {1, n}:
        same(all_pairs_topk(rows, k=k), exact_topk(rows, rows, k=k))


@pytest.mark.parametrize("name", ["spread", "ties", "opposite", "collapsed"])
def test_one_join_serves_both_groups(name: str):
    rows = INPUTS[name]()
    a, b = Rows(rows[:300].copy()), Rows(rows[300:].copy())
    for found, own, other in zip(join(a, b, 9, bfloat16=True), (a, b), (b, a), strict=True):
        queries = np.repeat(np.arange(len(own)), np.diff(found.starts))
        similarity = pair_similarities(own, other, queries, found.ids)
        assert (found.low <= similarity).all() and (similarity <= found.high).all()
        same(ranked(found.starts, found.ids, similarity, 9), exact_topk(own.rows, other.rows, k=9))


@pytest.mark.parametrize("bfloat16", [False, True])
@pytest.mark.parametrize("name", ["spread", "ties", "opposite", "collapsed", "not unit"])
def test_a_floor_leaves_out_nothing_that_reaches_it(name: str, bfloat16: bool):
    rows = INPUTS[name]()
    a, b = Rows(rows[:300].copy()), Rows(rows[300:].copy())
    wanted = exact_topk(a.rows, b.rows, k=9)
    floor = wanted.similarity[:, 4]  # the five nearest reach it
    found, _ = join(a, b, 9, bfloat16=bfloat16, floors=(floor, None))
    for q, ids in enumerate(wanted.ids):
        listed = found.ids[found.starts[q] : found.starts[q + 1]]
        assert set(ids[:5]) <= set(listed)


def test_few_candidates_are_settled_and_no_row_is_searched_again(monkeypatch: pytest.MonkeyPatch):
    def refuse(*args, **how):
        raise AssertionError("a row was searched in float64")

    monkeypatch.setattr(exact_graph, "exact_topk", refuse)
    centers = unit_rows(20, 64)[np.random.default_rng(1).integers(0, 20, 3000)]
    rows = centers + 0.1 * np.random.default_rng(2).normal(size=centers.shape)
    group = Rows((rows / np.linalg.norm(rows, axis=1, keepdims=True)).astype(np.float32))
    found, _ = join(group, group, 20, bfloat16=True)
    assert 20 <= len(found.ids) / 3000 < 60


def stored(folder: Path, rows: np.ndarray, shard_rows: list[int]) -> ShardedArray:
    array = ShardedArray.create(
        folder, shard_rows=shard_rows, row_shape=rows.shape[1:], dtype="float32"
    )
    for i, (a, b) in enumerate(itertools.pairwise(array.offsets)):
        array.write_shard(i, rows[a:b])
    return array


def outputs(folder: Path, array: ShardedArray, k: int) -> tuple[ShardedArray, ShardedArray]:
    make = {"shard_rows": array.shard_rows, "row_shape": (k,)}
    return (
        ShardedArray.create(folder / "ids", dtype="int32", **make),
        ShardedArray.create(folder / "similarity", dtype="float32", **make),
    )


@pytest.mark.parametrize("k", [5, 150])
@pytest.mark.parametrize("name", ["spread", "duplicates", "ties", "one image"])
@pytest.mark.parametrize("parts", [1, 5])
def test_groups_of_a_stored_array_give_the_lists_of_the_exact_search(
    tmp_path: Path, name: str, parts: int, k: int, monkeypatch: pytest.MonkeyPatch
):
    if parts > 1:
        monkeypatch.setattr(all_pairs_module, "GROUP_BYTES", 150 * (6 * 40 + 8 * (3 * k + 35)))
    rows = INPUTS[name]()
    array = stored(tmp_path / "rows", rows, [300, 0, 333, 67])
    pairs = AllPairs.begin(array, tmp_path / "between", k=k, parts=parts)
    assert name == "one image" or (pairs.num_groups > 2) == (parts > 1)
    run_joins(pairs, pairs.missing_joins, 2)
    run_settles(pairs, pairs.missing_lists, 2)
    ids, similarity = outputs(tmp_path, array, k)
    for i in range(array.num_shards):
        pairs.write(i, ids, similarity)
    wanted = drop_self(exact_topk(rows, rows, k=k + 1), np.arange(N))
    same(Neighbors(np.asarray(ids), np.asarray(similarity)), wanted)
    pairs.remove()
    assert not (tmp_path / "between").exists()


def test_what_was_joined_before_an_interruption_is_not_joined_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(all_pairs_module, "GROUP_BYTES", 250 * (6 * 40 + 8 * 50))
    array = stored(tmp_path / "rows", unit_rows(), [N])
    first = AllPairs.begin(array, tmp_path / "between", k=5, parts=1)
    assert len(first.missing_joins) == 6
    run_joins(first, first.missing_joins[:4], 1)
    again = AllPairs.begin(array, tmp_path / "between", k=5, parts=64)  # other workers, same cuts
    assert again == first and len(again.missing_joins) == 2
    run_joins(again, again.missing_joins, 1)
    again.settle(0)
    assert again.missing_lists == [1, 2] and again.missing_joins == []


def test_a_row_that_is_not_finite_is_named(tmp_path: Path):
    rows = unit_rows()
    rows[333, 3] = np.inf
    array = stored(tmp_path / "rows", rows, [N])
    with pytest.raises(ArtifactError, match="row 333"):
        AllPairs.begin(array, tmp_path / "between", k=5, parts=1)
