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
