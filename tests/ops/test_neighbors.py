"""Top-k lists against slow loops, scikit-learn and faiss, ties and duplicates included."""

import itertools

import faiss
import numpy as np
import pytest
from sklearn.neighbors import NearestNeighbors

from selfsup_ray.ops.metrics import Tally
from selfsup_ray.ops.neighbors import (
    Neighbors,
    best_products,
    drop_self,
    exact_topk,
    knn_vote,
    merge_neighbors,
    pair_similarity,
    recall,
    rounded_products,
    top_columns,
    vote_accuracy,
)


def unit_rows(n: int, d: int, seed: int = 0) -> np.ndarray:
    rows = np.random.default_rng(seed).normal(size=(n, d)).astype(np.float32)
    return rows / np.linalg.norm(rows, axis=1, keepdims=True)


def sign_rows(n: int, d: int = 16) -> np.ndarray:
    """Rows of +-1/4: unit length, and only 17 possible similarities, so nearly everything ties."""
    return np.random.default_rng(0).choice([-0.25, 0.25], (n, d)).astype(np.float32)


def slow_topk(queries: np.ndarray, rows: np.ndarray, k: int) -> list[list[int]]:
    scores = queries.astype(np.float64) @ rows.T.astype(np.float64)
    return [sorted(range(len(rows)), key=lambda j: (-s[j], j))[:k] for s in scores]


def test_exact_topk_equals_faiss_and_scikit_learn_where_nothing_ties():
    queries, rows = unit_rows(50, 32, seed=1), unit_rows(5000, 32)
    found = exact_topk(queries, rows, k=9)
    similarity, ids = faiss.knn(queries, rows, 9, metric=faiss.METRIC_INNER_PRODUCT)
    np.testing.assert_array_equal(found.ids, ids)
    np.testing.assert_allclose(found.similarity, similarity, atol=3e-7)
    brute = NearestNeighbors(n_neighbors=9, algorithm="brute", metric="cosine").fit(rows)
    np.testing.assert_array_equal(found.ids, brute.kneighbors(queries, return_distance=False))


def test_ties_go_to_the_lower_id():
    rows = sign_rows(400)
    found = exact_topk(rows[:60], rows, k=25)
    np.testing.assert_array_equal(found.ids, slow_topk(rows[:60], rows, 25))


def test_exact_topk_is_the_same_for_any_cut_of_the_rows():
    rows = np.concatenate([unit_rows(700, 48), unit_rows(700, 48)])
    queries = rows[:200]
    whole = exact_topk(queries, rows, k=12)
    for cuts in ([0, 1400], [0, 13, 14, 900, 1400]):
        parts = [
            exact_topk(queries, rows[a:b], k=min(12, b - a), first=a)
            for a, b in itertools.pairwise(cuts)
        ]
        merged = merge_neighbors(parts[::-1], k=12)
        np.testing.assert_array_equal(merged.ids, whole.ids)
        np.testing.assert_array_equal(merged.similarity, whole.similarity)


def test_more_than_one_block_of_rows_and_queries_is_searched():
    rows = unit_rows(4200, 8)
    found = exact_topk(rows[:1100], rows, k=3)
    assert (found.ids[:, 0] == np.arange(1100)).all()
    np.testing.assert_array_equal(found.ids[1020:1030], slow_topk(rows[1020:1030], rows, 3))
    assert exact_topk(rows[:0], rows, k=3).ids.shape == (0, 3)


def test_pair_similarity_is_the_same_bits_in_every_batch():
    queries, rows = unit_rows(64, 100), unit_rows(64 * 7, 100, seed=1).reshape(64, 7, 100)
    whole = pair_similarity(queries, rows)
    for i in (0, 5, 63):
        np.testing.assert_array_equal(
            pair_similarity(queries[i : i + 1], rows[i : i + 1]), whole[[i]]
        )
        np.testing.assert_array_equal(
            pair_similarity(queries[[i]], rows[[i], 3:4]), whole[[i], 3:4]
        )
    exact = [
        [np.dot(q.astype(float), x.astype(float)) for x in y]
        for q, y in zip(queries, rows, strict=True)
    ]
    np.testing.assert_allclose(whole, exact, rtol=0, atol=6e-8)


def test_a_matrix_product_gives_the_bits_of_pair_by_pair_sums():
    # Rows whose products fall on the border of two float32 numbers, where rounding may differ.
    rows = unit_rows(600, 64)
    rows[:, 0] += np.float32(2.0**-25)
    wide = rounded_products(rows[:40], rows)
    pairs = pair_similarity(rows[:40], np.broadcast_to(rows, (40, 600, 64)))
    np.testing.assert_array_equal(wide, pairs)
    half_way = np.array([[1, 2.0**-24, 0], [1, 2.0**-24, 2.0**-40]], np.float32)
    one = np.ones((1, 3), np.float32)
    np.testing.assert_array_equal(
        rounded_products(one, half_way), pair_similarity(one, half_way[None])
    )


def test_top_columns_sorts_negative_values_zeros_and_infinities_like_floats():
    rng = np.random.default_rng(0)
    special = np.array([0.0, -0.0, np.inf, -np.inf, 1.0, -1.0, 1e-42, -1e-42], np.float32)
    values = rng.choice(special, (200, 30))
    for k in (1, 7, 30):
        wanted = np.argsort(-values, axis=1, kind="stable")[:, :k]
        np.testing.assert_array_equal(top_columns(values, k), wanted)


def test_merging_does_not_depend_on_the_order_of_the_parts():
    rng = np.random.default_rng(0)
    ids = np.stack([rng.permutation(60) for _ in range(30)])
    similarity = rng.integers(0, 5, (30, 60)).astype(np.float32)
    parts = [Neighbors(ids[:, a:b], similarity[:, a:b]) for a, b in ((0, 5), (5, 6), (6, 60))]
    merged = merge_neighbors(parts, k=10)
    again = merge_neighbors(parts[::-1], k=10)
    np.testing.assert_array_equal(merged.ids, again.ids)
    for i in range(30):
        wanted = sorted(zip(-similarity[i], ids[i], strict=True))[:10]
        assert [(-s, j) for s, j in zip(merged.similarity[i], merged.ids[i], strict=True)] == wanted


def test_an_image_is_dropped_by_value_when_a_duplicate_comes_first():
    rows = unit_rows(6, 4)
    rows[4] = rows[1]
    found = drop_self(exact_topk(rows, rows, k=3), np.arange(6))
    assert found.ids[4, 0] == 1
    assert found.ids[1, 0] == 4
    assert not (found.ids == np.arange(6)[:, None]).any()


def test_with_more_duplicates_than_entries_the_last_entry_goes():
    rows = np.repeat(unit_rows(1, 4), 7, axis=0)
    found = drop_self(exact_topk(rows, rows, k=4), np.arange(7))
    wanted = [[j for j in range(7) if j != i][:3] for i in range(7)]
    np.testing.assert_array_equal(found.ids, wanted)


def test_the_vote_equals_a_loop_over_labelled_neighbors():
    rng = np.random.default_rng(0)
    similarity = -np.sort(-rng.uniform(-1, 1, (40, 6)).astype(np.float32), axis=1)
    labels = rng.integers(-1, 4, (40, 6))
    votes = knn_vote(similarity, labels, num_classes=4, temperature=0.1)
    for i in range(40):
        by_class = np.zeros(4)
        for s, label in zip(similarity[i], labels[i], strict=True):
            if label >= 0:
                by_class[label] += np.exp(float(s) / 0.1)
        wanted = by_class / by_class.sum() if by_class.sum() else by_class
        np.testing.assert_allclose(votes[i], wanted, atol=1e-12)


def test_a_tiny_temperature_lets_only_the_nearest_labelled_neighbor_vote():
    similarity = np.array([[1.0, 0.2, 0.1]], np.float32)
    votes = knn_vote(similarity, np.array([[-1, 2, 0]]), num_classes=3, temperature=1e-4)
    np.testing.assert_array_equal(votes, [[0, 0, 1]])


def test_an_image_without_labelled_neighbors_counts_as_wrong():
    votes = knn_vote(
        np.ones((2, 1), np.float32), np.array([[-1], [0]]), num_classes=2, temperature=1
    )
    assert vote_accuracy(votes, np.array([0, 0])) == Tally(1, 2)
    assert vote_accuracy(votes, np.array([0, -1])) == Tally(0, 1)


def test_recall_counts_any_row_at_the_distance_of_the_true_kth():
    best = np.array([[0.9, 0.8], [0.9, 0.8]])
    found = np.array([[0.9, 0.8], [0.9, 0.5]])
    np.testing.assert_array_equal(recall(found, best), [1.0, 0.5])


@pytest.mark.parametrize("size", [1, 7, 100])
def test_best_products_leaves_out_the_image_and_equals_sorting(size: int):
    rows = unit_rows(100, 8)
    own = np.array([3, 50, 99])
    blocks = [(a, rows[a : a + size]) for a in range(0, 100, size)]
    scores = rows[own].astype(np.float64) @ rows.T.astype(np.float64)
    scores[np.arange(3), own] = -np.inf
    wanted = -np.sort(-scores, axis=1)[:, :5]
    np.testing.assert_allclose(best_products(rows[own], blocks, k=5, own=own), wanted, atol=1e-14)
