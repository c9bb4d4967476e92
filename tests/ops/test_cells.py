"""Cells are k-means cells numbered by nearness; the join's kernels select what sorting does."""

from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np
import pytest
import torch

from selfsup_ray.ops.celljoin import Cells, join, near_cells
from selfsup_ray.ops.celljoin_blocks import join_blocks
from selfsup_ray.ops.cells import assign_cells, fit_cells, in_near_order, largest_column
from selfsup_ray.ops.equal_rows import Followers, expand, leaders_first
from selfsup_ray.ops.neighbors import Neighbors, exact_topk, pair_similarity
from selfsup_ray.ops.selection import (
    LOWEST,
    empty_candidates,
    keep_largest,
    prune,
    settle,
    sort_places,
)


def unit_rows(n: int, d: int = 16, seed: int = 0, groups: int = 12) -> np.ndarray:
    rng = np.random.default_rng(seed)
    rows = rng.normal(size=(groups, d))[rng.integers(0, groups, n)] + 0.4 * rng.normal(size=(n, d))
    return (rows / np.linalg.norm(rows, axis=1, keepdims=True)).astype(np.float32)


def bits(values: np.ndarray) -> np.ndarray:
    """Return float numbers as the int16 bits of bfloat16."""
    return torch.from_numpy(values).bfloat16().view(torch.int16).numpy()


def test_cells_are_as_tight_as_scikit_learns_k_means():
    from sklearn.cluster import KMeans

    rows = unit_rows(3000)
    tree = fit_cells(rows, num_cells=40, iterations=12)
    own = (rows * tree.centers[assign_cells(rows, tree)]).sum(axis=1).mean()
    theirs = KMeans(40, n_init=3, random_state=0).fit(rows).cluster_centers_
    theirs /= np.linalg.norm(theirs, axis=1, keepdims=True)
    assert own > (rows @ theirs.T).max(axis=1).mean() - 0.01
    np.testing.assert_allclose(np.linalg.norm(tree.centers, axis=1), 1, atol=1e-5)


def test_two_levels_assign_nearly_all_rows_to_the_nearest_center():
    rows = unit_rows(20_000, groups=60)
    tree = fit_cells(rows, num_cells=800)
    assert len(tree.centers) == 800 and len(tree.coarse) == 28 and tree.cuts[-1] == 800
    best = (rows @ tree.centers.T).max(axis=1)
    own = (rows * tree.centers[assign_cells(rows, tree)]).sum(axis=1)
    assert (own > best - 0.01).mean() > 0.97  # bfloat16 and borders of groups cost the rest


def test_the_cell_of_a_row_does_not_depend_on_the_rows_beside_it():
    rows = unit_rows(3000, groups=60)
    tree = fit_cells(rows, num_cells=600)
    whole = assign_cells(rows, tree)
    parts = [assign_cells(rows[a:b], tree) for a, b in ((0, 1), (1, 70), (70, 3000))]
    np.testing.assert_array_equal(np.concatenate(parts), whole)


@pytest.mark.parametrize("n", [1, 2, 5, 64])
def test_as_many_cells_as_rows_are_the_rows(n: int):
    rows = unit_rows(n)
    tree = fit_cells(rows, num_cells=n)
    assert len(tree.centers) == n and np.isfinite(tree.centers).all()


def test_centers_on_a_circle_come_in_the_order_of_the_circle():
    angles = np.random.default_rng(0).permutation(64) * (np.pi / 64)
    centers = np.stack([np.cos(angles), np.sin(angles)], axis=1)
    ordered = in_near_order(centers)
    steps = np.abs(np.diff(np.arctan2(ordered[:, 1], ordered[:, 0])))
    assert np.median(steps) < 3 * np.pi / 64


def test_the_largest_column_is_argmax_for_numbers_of_both_signs():
    scores = torch.randn(200, 37, generator=torch.Generator().manual_seed(0)).bfloat16()
    scores[:50] = -scores[:50].abs()
    np.testing.assert_array_equal(largest_column(scores), scores.float().argmax(dim=1))


def test_prune_keeps_the_largest_and_the_first_of_equals():
    rng = np.random.default_rng(0)
    for _ in range(50):
        keys, ids = rng.integers(-40, 40, 60).astype(np.int16), np.arange(60, dtype=np.int32)
        expected = np.sort(np.lexsort((ids, -keys.astype(int)))[:20])
        least = prune(keys, ids, 60, 20)
        np.testing.assert_array_equal(ids[:20], expected)
        assert least == keys[:20].min()


@pytest.mark.parametrize("shift", [-1.0, 0.0, 1.0], ids=["negative", "mixed", "positive"])
def test_a_running_selection_over_tiles_is_the_selection_of_all(shift: float):
    rng = np.random.default_rng(0)
    scores = (rng.normal(size=(9, 700)) * 0.3 + shift).astype(np.float32)
    candidates = empty_candidates(9, 40)
    for a in range(0, 700, 130):
        tile = bits(np.ascontiguousarray(scores[:, a : a + 130]))
        keep_largest(tile, tile.shape[1], a, np.arange(9), 10_000, 12, *candidates)
    keys, ids, used, _ = candidates
    rounded = torch.from_numpy(scores).bfloat16().float().numpy()
    for i in range(9):
        if used[i] > 12:
            prune(keys[i], ids[i], used[i], 12)
        best = np.sort(rounded[i])[::-1][:12]
        np.testing.assert_array_equal(np.sort(rounded[i][ids[i, :12]])[::-1], best)


def test_a_row_is_no_candidate_of_its_own():
    candidates = empty_candidates(3, 16)
    tile = bits(np.full((3, 5), 0.5, np.float32))
    keep_largest(tile, 5, 100, np.arange(3), 101, 8, *candidates)  # row i lies at place 101 + i
    _, ids, used, bound = candidates
    assert [sorted(ids[i, : used[i]]) for i in range(3)] == [
        [100, 102, 103, 104],
        [100, 101, 103, 104],
        [100, 101, 102, 104],
    ]
    assert (bound == LOWEST).all()


@pytest.mark.parametrize("parts", [[50], [3, 22, 22, 47, 50]])
def test_settled_lists_are_sorted_by_the_similarity_the_project_defines(parts: list[int]):
    rows, order = unit_rows(50), np.random.default_rng(0).permutation(50)
    rows[20:26] = rows[7]
    _, ids, used, _ = empty_candidates(4, 50)
    ids[:] = np.random.default_rng(1).permuted(np.tile(np.arange(50), (4, 1)), axis=1)
    used[:] = 50
    if len(parts) > 1:
        sort_places(ids, used)
    places, values = np.zeros((4, 9), np.int64), np.zeros((4, 9))
    done = np.zeros(4, np.int64)
    for last in parts:
        settle(rows[:4], rows, order, last, ids, used, done, places, values)
    assert (done == 50).all()
    exact = pair_similarity(rows[:4], np.broadcast_to(rows, (4, 50, 16)))
    for i in range(4):
        best = np.lexsort((order, -exact[i]))[:9]
        np.testing.assert_array_equal(places[i], best)
        np.testing.assert_array_equal(values[i].astype(np.float32), exact[i][best])


NO_GPU = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")


@pytest.mark.parametrize(
    "joined",
    [
        join,
        partial(join_blocks, device="cpu"),
        pytest.param(
            partial(join_blocks, device="cuda"), marks=[pytest.mark.gpu, NO_GPU], id="cuda"
        ),
    ],
)
def test_the_join_of_all_cells_is_exact_search(joined: Callable[..., Any]):
    rows = unit_rows(400)
    tree = fit_cells(rows, num_cells=10)
    own = assign_cells(rows, tree)
    order = np.argsort(own, kind="stable")
    starts = np.concatenate([[0], np.cumsum(np.bincount(own, minlength=10))])
    cells = Cells(tree.centers, starts, starts[1:], rows[order], order)
    found, lacking = joined(cells, 0, 400, k=5, probes=10, keep=40)
    assert not len(lacking)
    best = exact_topk(rows[order], rows, k=6)
    np.testing.assert_array_equal(order[found.ids], best.ids[:, 1:])


def test_near_cells_are_sorted_by_the_product_of_centers():
    centers = unit_rows(300)
    found = near_cells(centers, np.arange(5, 200), count=7)
    expected = np.argsort(-(centers[5:200] @ centers.T), axis=1)[:, :7]
    np.testing.assert_array_equal(found, expected)


def test_leaders_come_first_in_their_cell_and_followers_know_them():
    rows, ids = unit_rows(40), np.random.default_rng(0).permutation(40)
    cells = np.arange(40) % 3
    rows[[3, 6, 30, 4]] = rows[0]  # 4 is in another cell
    rows[[11, 20]] = rows[2]
    order, leader = leaders_first(rows.__getitem__, ids, cells)
    assert (np.diff(cells[order]) >= 0).all()
    for position, who in enumerate(leader):
        a, b = order[position], order[who]
        assert np.array_equal(rows[a], rows[b]) and cells[a] == cells[b] and ids[b] <= ids[a]
    follows = leader != np.arange(40)
    assert follows.sum() == 5
    for cell in range(3):
        here = follows[cells[order] == cell]
        assert (np.diff(here.astype(int)) >= 0).all()


def test_lists_of_distinct_rows_expand_to_the_lists_of_all_rows():
    rows = unit_rows(60)
    rows[10:22] = rows[5]
    rows[[30, 45]] = rows[29]
    cells = np.zeros(60, int)
    order, leader = leaders_first(rows.__getitem__, np.arange(60), cells)
    place = np.arange(60)
    follows = np.flatnonzero(leader != place)
    table = np.stack([leader[follows], order[follows], follows], axis=1)
    distinct = np.flatnonzero(leader == place)
    ordered = rows[order]
    lists = []
    for i in place:  # every place searches the distinct rows, itself left out
        others = distinct[distinct != i]
        exact = pair_similarity(ordered[i : i + 1], ordered[None, others])[0]
        best = np.lexsort((order[others], -exact))[:6]
        lists.append((others[best], exact[best]))
    found = Neighbors(np.stack([a for a, _ in lists]), np.stack([b for _, b in lists]))
    lengths = pair_similarity(ordered, ordered[:, None])[:, 0]
    wide = expand(found, place, lengths, order, Followers.of(table))
    best = exact_topk(ordered, rows, k=60)
    for i in place:
        keep = best.ids[i] != order[i]
        np.testing.assert_array_equal(wide.ids[i], best.ids[i][keep][:6])
