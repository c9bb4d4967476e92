"""Completed neighbor lists against one sort of the whole similarity matrix."""

import itertools

import numpy as np
import pytest

from selfsup_ray.ops import completion
from selfsup_ray.ops.completion import (
    completed,
    empty_lists,
    own_lists,
    with_rows,
    with_rows_both,
)
from selfsup_ray.ops.diffusion import diffuse_scores
from selfsup_ray.ops.lowshot import hit_rates, label_ranks
from selfsup_ray.ops.neighbors import Neighbors


def unit_rows(n: int, dim: int = 6, *, seed: int = 0, copies: int = 0) -> np.ndarray:
    rows = np.random.default_rng(seed).normal(size=(n, dim)).astype(np.float32)
    rows[n - copies :] = rows[:copies]
    return rows / np.linalg.norm(rows, axis=1, keepdims=True)


def whole(queries: np.ndarray, rows: np.ndarray, k: int, *, own: bool) -> Neighbors:
    """Sort every similarity, summed in float64 and rounded; ties by lower id."""
    ids, values = [], []
    for i, q in enumerate(queries):
        similarity = np.array([(q.astype(float) * r.astype(float)).sum() for r in rows])
        similarity = similarity.astype(np.float32)
        order = sorted(range(len(rows)), key=lambda j: (-similarity[j], j))
        order = [j for j in order if not (own and j == i)][:k]
        ids.append(order)
        values.append(similarity[order])
    return Neighbors(np.array(ids), np.array(values))


def same(found: Neighbors, expected: Neighbors) -> None:
    np.testing.assert_array_equal(found.ids, expected.ids)
    np.testing.assert_array_equal(found.similarity, expected.similarity)


@pytest.mark.parametrize("tile", [7, 4096])
def test_one_product_completes_both_directions(tile: int, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(completion, "TILE", tile)
    rows = unit_rows(90, copies=20)  # a fifth are exact copies: every tie counts
    old, new = rows[:60], rows[60:]
    expected = whole(rows, rows, 8, own=True)
    both = with_rows_both(
        own_lists(old, k=8), old, own_lists(new, k=8, first=60), new, first_old=0, first_new=60
    )
    same(both[0], Neighbors(expected.ids[:60], expected.similarity[:60]))
    same(both[1], Neighbors(expected.ids[60:], expected.similarity[60:]))


def test_lists_of_shards_do_not_depend_on_the_cut():
    rows = unit_rows(80, copies=10)
    old, new = rows[:65], rows[65:]
    expected = whole(rows, rows, 5, own=True)
    lists = own_lists(old, k=5)
    for cuts in ([0, 65], [0, 1, 20, 40, 65]):
        shards = [
            (Neighbors(lists.ids[a:b], lists.similarity[a:b]), old[a:b])
            for a, b in itertools.pairwise(cuts)
        ]
        parts = list(completed(shards, new, k=5, num_old=65))
        assert len(parts) == len(cuts)
        found = Neighbors(
            np.concatenate([part.ids for part in parts]),
            np.concatenate([part.similarity for part in parts]),
        )
        same(found, expected)


def test_sharing_the_base_equals_completing_from_nothing():
    rows, test = unit_rows(70, seed=1), unit_rows(25, seed=2)
    background, base, novel = rows[:30], rows[30:60], rows[60:]
    a, b = with_rows_both(
        own_lists(background, k=6),
        background,
        own_lists(base, k=6, first=30),
        base,
        first_old=0,
        first_new=30,
    )
    shared = completed([(a, background), (b, base)], novel, k=6, num_old=60)
    at_once = own_lists(rows, k=6)
    found = np.concatenate([part.ids for part in shared])
    np.testing.assert_array_equal(found, at_once.ids)
    lists = empty_lists(25, 6)
    for first, part in ((0, background), (30, base), (60, novel)):
        lists = with_rows(lists, test, part, first=first)
    same(lists, whole(test, rows, 6, own=False))


def test_completing_a_mixture_gives_the_accuracies_of_the_known_recipe():
    """1,000 background rows, two labelled ones of each of 20 classes; k = 30 with self."""
    state = np.random.RandomState(0)
    mu = state.randn(20, 32)
    of_background = state.choice(20, 1000, p=np.full(20, 0.05))
    of_test = state.choice(20, 2000)
    background = mu[of_background] + 1.6 * state.randn(1000, 32)
    test = mu[of_test] + 1.6 * state.randn(2000, 32)
    labelled = mu[np.repeat(np.arange(20), 2)] + 1.6 * state.randn(40, 32)
    background, test, labelled = (
        (rows / np.linalg.norm(rows, axis=1, keepdims=True)).astype(np.float32)
        for rows in (background, test, labelled)
    )
    shards = [(own_lists(background, k=29), background)]
    parts = completed(shards, labelled, k=29, num_old=1000)
    ids = np.concatenate([part.ids for part in parts])
    lists = with_rows(empty_lists(2000, 30), test, background, first=0)
    lists = with_rows(lists, test, labelled, first=1000)
    seeds = np.concatenate([np.full(1000, -1), np.repeat(np.arange(20), 2)])
    scores = diffuse_scores(ids.astype(np.int32), seeds, lists.ids, num_classes=20, niter=8)
    top1 = [
        100 * hit_rates(label_ranks(s, of_test), of_test, np.ones(20, bool))["top1_all"]
        for s in scores
    ]
    known = {0: 47.70, 1: 75.15, 2: 77.20, 3: 76.00, 4: 73.55, 5: 71.35, 8: 63.50}
    for t, accuracy in known.items():
        assert top1[t] == pytest.approx(accuracy, abs=0.1)


def test_a_tie_keeps_the_entry_that_was_there_first():
    background = unit_rows(4)
    labelled = np.repeat(background[:1], 3, axis=0)  # as near as background node 0 itself
    lists = with_rows(own_lists(background, k=2), background, labelled, first=4)
    np.testing.assert_array_equal(lists.ids[0], [4, 5])
    far = np.concatenate([background[1:2], background[1:2]])
    lists = with_rows(empty_lists(1, 1), background[1:2], background, first=0)
    lists = with_rows(lists, background[1:2], far, first=4)
    np.testing.assert_array_equal(lists.ids, [[1]])


def test_negative_similarities_are_neighbors_like_others():
    old, new = np.eye(3, dtype=np.float32), -np.eye(3, dtype=np.float32)
    lists = with_rows(own_lists(old, k=5), old, new, first=3)
    np.testing.assert_array_equal(lists.ids[0], [1, 2, 4, 5, 3])
    np.testing.assert_array_equal(lists.similarity[0], [0, 0, 0, 0, -1])


def test_places_without_neighbor_are_minus_one_and_are_filled_later():
    rows = unit_rows(5)
    lists = own_lists(rows[:1], k=3)
    np.testing.assert_array_equal(lists.ids, [[-1, -1, -1]])
    lists = own_lists(rows[:2], k=3)
    np.testing.assert_array_equal(lists.ids, [[1, -1, -1], [0, -1, -1]])
    filled = with_rows(lists, rows[:2], rows[2:], first=2)
    same(filled, Neighbors(*[part[:2] for part in vars(whole(rows, rows, 3, own=True)).values()]))
