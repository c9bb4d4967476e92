"""Scores of a clustering against scikit-learn, closed forms and slow loops."""

import itertools
import math

import numpy as np
import pytest
from scipy.stats import binomtest
from sklearn import metrics as sk

from selfsup_ray.ops.metrics import (
    ScanScore,
    Tally,
    adjusted_mutual_information,
    adjusted_rand_index,
    cluster_accuracy,
    contingency,
    effective_rank,
    embedding_std,
    entropy,
    mutual_information,
    neighbor_agreement,
    normalized_mutual_information,
    purity,
    scan_score,
    silhouette,
    size_balance,
    top_accuracy,
    uniformity,
    wilson,
)

PARTITIONS = {
    "random": lambda rng: (rng.integers(0, 7, 300), rng.integers(0, 5, 300)),
    "mostly right": lambda rng: _mostly_right(rng),
    "over-clustered": lambda rng: (np.arange(300) % 20, np.arange(300) % 10),
    "one cluster": lambda rng: (np.zeros(300, int), rng.integers(0, 5, 300)),
    "one class": lambda rng: (rng.integers(0, 5, 300), np.zeros(300, int)),
    "both one": lambda rng: (np.zeros(300, int), np.zeros(300, int)),
    "all apart": lambda rng: (np.arange(300), np.arange(300)),
    "singletons": lambda rng: (np.arange(300), rng.integers(0, 5, 300)),
}


def _mostly_right(rng):
    labels = rng.integers(0, 6, 300)
    moved = rng.permutation(6)[labels]
    return np.where(rng.random(300) < 0.2, rng.integers(0, 6, 300), moved), labels


def table(clusters, labels):
    sizes = {"num_clusters": clusters.max() + 1, "num_classes": labels.max() + 1}
    return contingency(clusters, labels, **sizes)


@pytest.fixture(params=PARTITIONS)
def partition(request):
    return PARTITIONS[request.param](np.random.default_rng(0))


def test_counts_equal_scikit_learns_contingency_matrix(partition):
    counts = table(*partition)
    used = counts[counts.sum(axis=1) > 0][:, counts.sum(axis=0) > 0]
    wanted = sk.cluster.contingency_matrix(partition[1], partition[0]).T
    np.testing.assert_array_equal(used, wanted)


def test_counts_of_shards_add_up_to_the_counts_of_all(partition):
    clusters, labels = partition
    sizes = {"num_clusters": clusters.max() + 1, "num_classes": labels.max() + 1}
    parts = [
        contingency(clusters[a : a + 37], labels[a : a + 37], **sizes) for a in range(0, 300, 37)
    ]
    np.testing.assert_array_equal(sum(parts), table(clusters, labels))


def test_unknown_labels_and_unclustered_images_are_not_counted():
    clusters, labels = np.array([0, 1, 1, -1, 2]), np.array([1, -1, 0, 1, 1])
    counts = contingency(clusters, labels, num_clusters=3, num_classes=2)
    np.testing.assert_array_equal(counts, [[0, 1], [1, 0], [0, 1]])


def test_information_scores_equal_scikit_learns(partition):
    clusters, labels = partition
    counts = table(clusters, labels)
    assert mutual_information(counts) == pytest.approx(
        sk.mutual_info_score(labels, clusters), abs=1e-12
    )
    assert normalized_mutual_information(counts) == pytest.approx(
        sk.normalized_mutual_info_score(labels, clusters), abs=1e-12
    )
    assert adjusted_mutual_information(counts) == pytest.approx(
        sk.adjusted_mutual_info_score(labels, clusters), abs=1e-9
    )
    assert adjusted_rand_index(counts) == pytest.approx(
        sk.adjusted_rand_score(labels, clusters), abs=1e-12
    )


def test_pair_counts_of_a_hundred_million_images_do_not_overflow():
    half = 50_000_000
    assert adjusted_rand_index(np.array([[half, 0], [0, half]])) == 1.0
    mixed = adjusted_rand_index(np.array([[half, 0], [half // 2, half // 2]]))
    small = adjusted_rand_index(np.array([[5000, 0], [2500, 2500]]))
    assert mixed == pytest.approx(small, abs=1e-3)


@pytest.mark.parametrize("shape", [(4, 4), (3, 5), (6, 4)])
def test_one_to_one_accuracy_is_the_best_of_all_matchings(shape):
    counts = np.random.default_rng(1).integers(0, 50, shape)
    num_clusters, num_classes = shape
    if num_clusters <= num_classes:
        best = max(
            sum(counts[i, c] for i, c in enumerate(chosen))
            for chosen in itertools.permutations(range(num_classes), num_clusters)
        )
    else:
        best = max(
            sum(counts[k, i] for i, k in enumerate(chosen))
            for chosen in itertools.permutations(range(num_clusters), num_classes)
        )
    score = cluster_accuracy(counts)
    assert score.one_to_one == best / counts.sum()
    matched = score.class_of >= 0
    assert matched.sum() == min(shape) == len(set(score.class_of[matched]))
    assert counts[matched, score.class_of[matched]].sum() == best


def test_over_clustering_is_perfect_many_to_one_and_half_right_one_to_one():
    labels = np.repeat(np.arange(5), 20)
    clusters = labels * 2 + np.tile([0, 1], 50)
    score = cluster_accuracy(table(clusters, labels))
    assert (score.one_to_one, score.many_to_one) == (0.5, 1.0)
    np.testing.assert_array_equal(score.majority_of, np.arange(10) // 2)


def test_cluster_ids_beyond_the_number_of_classes_are_not_read_as_class_zero():
    labels = np.zeros(10, int)
    clusters = np.array([0] * 4 + [5] * 6)
    assert cluster_accuracy(table(clusters, labels)).one_to_one == 0.6


def test_accuracy_does_not_change_when_clusters_are_renamed(partition):
    clusters, labels = partition
    renamed = np.random.default_rng(3).permutation(clusters.max() + 1)[clusters]
    one, other = cluster_accuracy(table(clusters, labels)), cluster_accuracy(table(renamed, labels))
    assert (one.one_to_one, one.many_to_one) == (other.one_to_one, other.many_to_one)


def test_purity_is_the_mean_share_of_the_majority_class(partition):
    clusters, labels = partition
    right = sum(np.bincount(labels[clusters == c]).max() for c in np.unique(clusters))
    assert purity(table(clusters, labels)) == right / 300


def test_an_empty_cluster_has_no_majority():
    score = cluster_accuracy(np.array([[3, 1], [0, 0], [0, 2]]))
    np.testing.assert_array_equal(score.majority_of, [0, -1, 1])
    assert cluster_accuracy(np.zeros((3, 2), int)).one_to_one == 0


def test_top_accuracy_equals_a_loop_over_images():
    rng = np.random.default_rng(0)
    probabilities, labels = rng.dirichlet(np.ones(8), 200), rng.integers(-1, 6, 200)
    class_of = np.array([3, 1, -1, 0, 5, 2, 4, -1])
    hits = of = 0
    for p, label in zip(probabilities, labels, strict=True):
        if label >= 0:
            best = sorted(range(8), key=lambda c: (-p[c], c))[:3]
            hits, of = hits + (label in [class_of[c] for c in best]), of + 1
    assert top_accuracy(probabilities, labels, class_of, top=3) == Tally(hits, of)


def test_top_five_of_two_clusters_counts_both():
    p, labels = np.array([[0.9, 0.1], [0.2, 0.8]]), np.array([1, 1])
    assert top_accuracy(p, labels, np.array([0, 1]), top=5) == Tally(2, 2)


def test_neighbor_agreement_equals_a_loop_over_known_pairs():
    rng = np.random.default_rng(0)
    own, neighbors = rng.integers(-1, 3, 50), rng.integers(-1, 3, (50, 4))
    pairs = [(a, b) for a, row in zip(own, neighbors, strict=True) for b in row if min(a, b) >= 0]
    assert neighbor_agreement(own, neighbors) == Tally(sum(a == b for a, b in pairs), len(pairs))


@pytest.mark.parametrize(("hits", "of"), [(0, 7), (3, 7), (7, 7), (950, 1000)])
def test_the_interval_of_a_share_is_wilsons(hits: int, of: int):
    wanted = binomtest(hits, of).proportion_ci(method="wilson")
    np.testing.assert_allclose(
        Tally(hits, of).interval(z=1.959963985), (wanted.low, wanted.high), atol=1e-9
    )
    assert wilson(hits / of, of)[0] <= hits / of + 1e-12


def test_tallies_of_shards_add_up_and_nothing_counted_has_no_share():
    assert Tally(1, 2) + Tally(3, 5) == Tally(4, 7)
    assert Tally().share is None
    assert Tally().interval() == (0.0, 1.0)


def test_entropy_of_masses_is_that_of_their_shares():
    assert entropy(np.array([2.0, 2.0, 0.0, 4.0])) == pytest.approx(1.5 * math.log(2))
    assert entropy(np.zeros(3)) == 0


def softmax_rows(rng, *shape):
    return rng.dirichlet(np.ones(shape[-1]), shape[:-1])


def test_scan_score_equals_a_loop_over_pairs_however_it_is_cut():
    rng = np.random.default_rng(0)
    p, q = softmax_rows(rng, 40, 5), softmax_rows(rng, 40, 3, 5)
    pairs = [-math.log(sum(p[i] * q[i, j])) for i in range(40) for j in range(3)]
    mean = p.mean(axis=0)
    wanted = np.mean(pairs) + sum(m * math.log(m) for m in mean)
    for size in (1, 7, 40):
        score = scan_score((p[a : a + size], q[a : a + size]) for a in range(0, 40, size))
        assert score.total == pytest.approx(wanted, abs=1e-12)


def test_scan_score_has_the_published_extremes():
    classes = 10
    uniform = np.full((20, classes), 1 / classes)
    sure = np.eye(classes)[np.arange(20) % classes]
    collapsed = np.eye(classes)[np.zeros(20, int)]
    for p, wanted in ((uniform, 0.0), (sure, -math.log(classes)), (collapsed, 0.0)):
        score = scan_score([(p, p[:, None].repeat(5, axis=1))])
        assert score.total == pytest.approx(wanted, abs=1e-12)


def test_certain_disagreement_costs_the_clamped_hundred():
    p, q = np.eye(2)[[0, 0]], np.eye(2)[[[1], [1]]]
    assert scan_score([(p, q)]) == ScanScore(100.0, 0.0)


def test_effective_rank_counts_the_directions_that_are_used():
    for rank in (1, 3, 16):
        rows = np.eye(16)[np.arange(480) % rank]
        assert effective_rank(rows) == pytest.approx(rank, rel=1e-4)
    rows = np.random.default_rng(0).normal(size=(50, 8)) * np.arange(1, 9)
    values = np.sqrt(np.linalg.eigvalsh(rows.T @ rows))
    share = values / values.sum()
    assert effective_rank(rows) == pytest.approx(math.exp(-(share * np.log(share)).sum()), rel=1e-5)


def unit_rows(n: int, d: int) -> np.ndarray:
    rows = np.random.default_rng(0).normal(size=(n, d))
    return rows / np.linalg.norm(rows, axis=1, keepdims=True)


def test_embedding_std_is_one_on_the_whole_sphere_and_zero_on_one_point():
    assert embedding_std(unit_rows(20_000, 32)) == pytest.approx(1, abs=5e-3)
    assert embedding_std(np.repeat(unit_rows(1, 32), 50, axis=0)) == pytest.approx(0, abs=1e-12)


def test_uniformity_equals_a_loop_over_pairs():
    rows = unit_rows(30, 6)
    pairs = [math.exp(-2 * ((a - b) ** 2).sum()) for a, b in itertools.combinations(rows, 2)]
    assert uniformity(rows) == pytest.approx(math.log(np.mean(pairs)), abs=1e-12)
    assert uniformity(rows[:1]) == 0


def test_size_balance_is_one_for_equal_clusters_and_zero_for_one():
    assert size_balance(np.full(7, 3)) == pytest.approx(1)
    assert size_balance(np.array([9, 0, 0])) == 0
    assert size_balance(np.array([4])) == 1


def test_silhouette_equals_its_definition_under_cosine_distance():
    rows, clusters = unit_rows(40, 5), np.arange(40) % 3
    distance = 1 - rows @ rows.T
    values = []
    for i in range(40):
        same = np.flatnonzero((clusters == clusters[i]) & (np.arange(40) != i))
        others = [distance[i, clusters == c].mean() for c in set(clusters) - {clusters[i]}]
        a, b = distance[i, same].mean(), min(others)
        values.append((b - a) / max(a, b))
    assert silhouette(rows, clusters) == pytest.approx(np.mean(values), abs=1e-12)


def test_silhouette_of_one_cluster_or_of_singletons_is_undefined():
    assert silhouette(unit_rows(5, 3), np.zeros(5, int)) is None
    assert silhouette(unit_rows(5, 3), np.arange(5)) is None
