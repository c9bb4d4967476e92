"""Label diffusion: the published fixtures, and every option against slow loops or scipy."""

from typing import Any

import numpy as np
import pytest

from selfsup_ray.ops.diffusion import DiffusionOptions, diffuse_scores, knn_to_adjacency
from selfsup_ray.ops.neighbors import Neighbors, drop_self, exact_topk

TOY = np.array([[1], [2], [0], [0]], np.int32)  # the node itself is in none of the lists
TOY_STEPS = {
    1: [[0.324324, 0.210526], [0.202703, 0.526316], [0.202703, 0.263158], [0.270270, 0]],
    2: [
        [0.259832, 0.239791],
        [0.228679, 0.377932],
        [0.228679, 0.312772],
        [0.282810, 0.069505],
    ],
}


def unit(rows: np.ndarray) -> np.ndarray:
    return (rows / np.linalg.norm(rows, axis=1, keepdims=True)).astype(np.float32)


def others(rows: np.ndarray, k: int) -> Neighbors:
    """The k nearest other rows of every row, exactly."""
    return drop_self(exact_topk(rows, rows, k=k + 1), np.arange(len(rows)))


class Synthetic:
    """The 20-class mixture whose accuracies the tables below hold: nodes, then test images."""

    def __init__(self, background: int) -> None:
        rs = np.random.RandomState(0)
        centers = rs.randn(20, 32)
        yb = rs.choice(20, background, p=np.full(20, 1 / 20))  # with p: another draw than without
        self.labels = rs.choice(20, 2000)
        xb = centers[yb] + 1.6 * rs.randn(background, 32)
        xt = centers[self.labels] + 1.6 * rs.randn(2000, 32)
        yl = np.repeat(np.arange(20), 2)
        xl = centers[yl] + 1.6 * rs.randn(40, 32)
        nodes = unit(np.concatenate([xl, xb]))
        self.near = others(nodes, 29)
        self.ids = self.near.ids.astype(np.int32)
        self.test_ids = exact_topk(unit(xt), nodes, k=30).ids
        self.seeds = np.concatenate([yl, np.full(background, -1)])

    def steps(self, niter: int = 8, **how: Any) -> list[np.ndarray]:
        return list(
            diffuse_scores(self.ids, self.seeds, self.test_ids, num_classes=20, niter=niter, **how)
        )

    def accuracy(self, scores: np.ndarray, top: int) -> float:
        """Percent of test images whose class is among the `top` best, ties to the lowest class."""
        best = np.argsort(-scores.astype(np.float64), axis=1, kind="stable")[:, :top]
        return float((best == self.labels[:, None]).any(axis=1).mean() * 100)


@pytest.fixture(scope="module")
def synthetic() -> Synthetic:
    return Synthetic(8000)


def test_the_toy_graph_has_the_published_matrix():
    made = knn_to_adjacency(TOY).toarray()
    np.testing.assert_array_equal(made, [[2, 1, 1, 1], [1, 2, 1, 0], [1, 1, 2, 0], [1, 0, 0, 2]])


@pytest.mark.parametrize("order", [None, [2, 0, 3, 1]])
def test_the_toy_graph_gives_the_published_steps(order: list[int] | None):
    place = None if order is None else np.array(order)
    steps = list(
        diffuse_scores(
            TOY,
            np.array([0, 1, -1, -1]),
            np.arange(4)[:, None],
            num_classes=2,
            niter=3,
            order=place,
        )
    )
    np.testing.assert_array_equal(steps[0], [[1, 0], [0, 1], [0, 0], [0, 0]])
    for t, wanted in TOY_STEPS.items():
        np.testing.assert_allclose(steps[t], wanted, atol=6e-7)
    np.testing.assert_allclose(steps[3][:, 0], [0.251953, 0.236455, 0.236455, 0.275137], atol=6e-7)


ROWS = (0, 1, 2, 3, 4, 5, 8)
TABLE = [
    ({}, 1, [14.05, 66.05, 83.50, 85.75, 85.55, 85.25, 83.40]),
    ({}, 5, [31.35, 86.60, 97.10, 98.00, 98.35, 98.40, 98.40]),
    ({"normalize_columns": False}, 1, [14.05, 65.55, 82.70, 84.10, 83.60, 83.00, 79.70]),
    ({"reset_seeds": True}, 1, [14.05, 65.05, 71.45, 71.60, 71.55, 71.55, 71.55]),
    ({"reciprocal": True}, 1, [14.05, 58.70, 80.70, 84.75, 85.65, 85.40, 84.10]),
]


@pytest.mark.parametrize(("changes", "top", "wanted"), TABLE)
def test_the_synthetic_mixture_has_the_measured_accuracy(
    synthetic: Synthetic, changes: dict[str, Any], top: int, wanted: list[float]
):
    steps = synthetic.steps(options=DiffusionOptions(**changes))
    found = [round(synthetic.accuracy(steps[t], top), 2) for t in ROWS]
    assert found == wanted


def test_a_smaller_background_is_best_earlier():
    small = Synthetic(1000)
    steps = small.steps()
    found = [round(small.accuracy(steps[t], 1), 2) for t in ROWS]
    assert found == [47.70, 75.15, 77.20, 76.00, 73.55, 71.35, 63.50]


def test_the_synthetic_graph_has_the_measured_size(synthetic: Synthetic):
    made = knn_to_adjacency(synthetic.ids)
    assert made.nnz == 318_732
    assert made.sum(axis=1).max() == 187


def hub_lists(n: int = 700, k: int = 6, seed: int = 0) -> np.ndarray:
    """Random lists that all hold node 0, with repeated ids, own ids and missing ones."""
    rng = np.random.default_rng(seed)
    ids = rng.integers(0, n, (n, k)).astype(np.int32)
    ids[:, 0] = 0
    ids[::7, 1] = ids[::7, 2]
    ids[::5, 3] = np.arange(n)[::5]
    ids[rng.random((n, k)) < 0.1] = -1
    ids[17] = -1
    return ids


def slow_matrix(
    ids: np.ndarray, similarity: np.ndarray | None = None, **options: Any
) -> np.ndarray:
    """B by loops over lists, in float64."""
    how = DiffusionOptions(**options)
    n = len(ids)
    a = np.zeros((n, n))
    for i in range(n):
        for j, other in enumerate(ids[i]):
            if other < 0 or other == i or a[i, other]:
                continue
            if how.min_similarity is not None and similarity[i, j] < how.min_similarity:
                continue
            a[i, other] = 1.0
            if how.weights == "gaussian":
                squared_distance = 2 - 2 * float(similarity[i, j])
                a[i, other] = np.exp(-squared_distance / (2 * how.sigma**2))
        a[i, i] = 1.0
    return (a * a.T if how.reciprocal else a + a.T) ** how.tau


def slow_scores(
    b: np.ndarray, seeds: np.ndarray, test_ids: np.ndarray, classes: int, niter: int, **options: Any
) -> list[np.ndarray]:
    """Scores of all steps by dense products, in float64."""
    how = DiffusionOptions(**options)
    w = b / b.sum(axis=1, keepdims=True)
    one_hot = np.zeros((len(b), classes))
    one_hot[seeds >= 0, seeds[seeds >= 0]] = 1
    label, found = one_hot, []
    for t in range(niter + 1):
        if t:
            label = w @ label
            if how.reset_seeds:
                label = np.where((seeds >= 0)[:, None], one_hot, label)
            for _ in range(how.sinkhorn):
                sums = label.sum(axis=1, keepdims=True)
                label = label / np.where(sums > 0, sums, 1)
                sums = label.sum(axis=0)
                label = label / np.where(sums > 0, sums, 1)
        if how.normalize_columns:
            sums = label.sum(axis=0)
            label = label / np.where(sums > 0, sums, 1)
        found.append(
            np.array(
                [sum((label[j] for j in row if j >= 0), np.zeros(classes)) for row in test_ids]
            )
        )
    return found


def some_seeds(n: int, classes: int) -> np.ndarray:
    """Two labels of each class but class 3, which has none."""
    seeds = np.full(n, -1)
    places = np.random.default_rng(5).permutation(n)[: 2 * classes]
    seeds[places] = np.arange(2 * classes) % classes
    seeds[seeds == 3] = -1
    return seeds


OPTIONS: list[dict[str, Any]] = [
    {},
    {"weights": "gaussian", "sigma": 0.4},
    {"weights": "gaussian", "reciprocal": True},
    {"tau": 0.5},
    {"reciprocal": True},
    {"sinkhorn": 4},
    {"reset_seeds": True},
    {"normalize_columns": False},
    {"min_similarity": 0.5},
]


@pytest.mark.parametrize("ordered", [False, True])
@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_every_option_equals_slow_loops(options: dict[str, Any], ordered: bool):
    ids, rng = hub_lists(), np.random.default_rng(1)
    similarity = -np.sort(-rng.random(ids.shape), axis=1).astype(np.float32)
    seeds, test_ids = some_seeds(700, 21), hub_lists(50, seed=2)
    wanted = slow_scores(slow_matrix(ids, similarity, **options), seeds, test_ids, 21, 4, **options)
    steps = diffuse_scores(
        ids,
        seeds,
        test_ids,
        num_classes=21,
        niter=4,
        similarity=similarity,
        order=rng.permutation(700) if ordered else None,
        options=DiffusionOptions(**options),
    )
    for found, want in zip(steps, wanted, strict=True):
        np.testing.assert_allclose(found, want, atol=2e-6 * max(1e-9, want.max()))


def test_bfloat16_labels_are_off_by_at_most_half_a_hundredth_of_the_largest(synthetic: Synthetic):
    short = synthetic.steps(5, dtype="bfloat16")
    for found, want in zip(short, synthetic.steps(5), strict=True):
        assert (np.abs(found - want) / want.max(axis=0)).max() < 0.005
        assert abs(synthetic.accuracy(found, 1) - synthetic.accuracy(want, 1)) < 0.5


def test_float32_agrees_with_float64_to_a_millionth_of_the_largest(synthetic: Synthetic):
    b = knn_to_adjacency(synthetic.ids).astype(np.float64)
    w = b / np.asarray(b.sum(axis=1))[:, None]
    label = np.zeros((len(synthetic.ids), 20))
    label[:40] = np.repeat(np.eye(20), 2, axis=0)
    for t, found in enumerate(synthetic.steps(6)):
        label = w @ label if t else label
        label = label / label.sum(axis=0)
        want = label[synthetic.test_ids].sum(axis=1)
        assert (np.abs(found - want) / want.max(axis=0)).max() < 1e-6


def test_threads_and_blocks_of_classes_change_no_bit(synthetic: Synthetic):
    from selfsup_ray.ops.adjacency import Links, build_adjacency
    from selfsup_ray.ops.diffusion import spread

    graph = build_adjacency(Links(synthetic.ids))
    whole = [spread(graph, synthetic.seeds, first=0, stop=20, threads=n) for n in (1, 2, 3)]
    parts = [spread(graph, synthetic.seeds, first=a, stop=b) for a, b in ((0, 5), (5, 6), (6, 20))]
    for _ in range(5):
        one, *others_ = [state.sums(synthetic.test_ids) for state in whole]
        cut = np.concatenate([state.sums(synthetic.test_ids) for state in parts], axis=1)
        for other in (*others_, cut):
            np.testing.assert_array_equal(one, other)
        for state in (*whole, *parts):
            state.step()


def test_a_single_node_keeps_its_label():
    steps = list(
        diffuse_scores(
            np.full((1, 3), -1, np.int32),
            np.array([1]),
            np.zeros((2, 1), int),
            num_classes=2,
            niter=2,
        )
    )
    for step in steps:
        np.testing.assert_array_equal(step, [[0, 1], [0, 1]])


def test_a_graph_without_seeds_or_test_images_gives_zeros_or_nothing():
    ids = hub_lists()
    none = np.full(700, -1)
    for step in diffuse_scores(ids, none, ids[:4], num_classes=3, niter=2):
        np.testing.assert_array_equal(step, np.zeros((4, 3)))
    empty = np.empty((0, 6), np.int32)
    for step in diffuse_scores(ids, some_seeds(700, 5), empty, num_classes=5, niter=2):
        assert step.shape == (0, 5)
