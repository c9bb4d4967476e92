"""Late fusion and the balanced vote against plain loops."""

import numpy as np
import pytest

from selfsup_ray.ops.fusion import balanced_vote, fused_scores, row_probabilities


def both() -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(0)
    diffused = rng.random((6, 4)) * 1e-7
    diffused[2] = 0
    scores = rng.normal(size=(6, 4))
    return diffused, scores - np.log(np.exp(scores).sum(axis=1, keepdims=True))


@pytest.mark.parametrize("form", ["log", "linear"])
def test_fusion_is_the_weighted_mean_of_both_classifiers(form):
    diffused, log_p = both()
    found = fused_scores(diffused, log_p, weight=0.3, form=form, eps=1e-4)
    for i in range(6):
        for c in range(4):
            total = sum(diffused[i])
            p = diffused[i, c] / total if total else 0.25
            if form == "log":
                expected = 0.3 * np.log(p + 1e-4) + 0.7 * log_p[i, c]
            else:
                expected = 0.3 * p + 0.7 * np.exp(log_p[i, c])
            assert found[i, c] == pytest.approx(expected)


@pytest.mark.parametrize("form", ["log", "linear"])
def test_the_ends_of_the_grid_are_the_classifiers_themselves(form):
    diffused, log_p = both()
    linear_only = fused_scores(diffused, log_p, weight=0, form=form)
    np.testing.assert_array_equal(linear_only.argsort(axis=1), log_p.argsort(axis=1))
    diffusion_only = fused_scores(diffused, log_p, weight=1, form=form)
    nonzero = diffused.any(axis=1)
    np.testing.assert_array_equal(
        diffusion_only[nonzero].argsort(axis=1), diffused[nonzero].argsort(axis=1)
    )
    np.testing.assert_allclose(row_probabilities(diffused).sum(axis=1), 1)


def test_a_balanced_vote_counts_a_class_by_the_share_of_its_images():
    similarity = np.array([[0.9, 0.8, 0.7, 0.1]], np.float32)
    classes = np.array([[0, 0, 1, -1]])
    weights = np.exp(similarity[0, :3].astype(float) / 0.5)
    plain = balanced_vote(similarity, classes, np.array([100, 1]), temperature=0.5, balanced=False)
    expected = np.array([weights[:2].sum(), weights[2]]) / weights.sum()
    np.testing.assert_allclose(plain, expected[None])
    even = balanced_vote(similarity, classes, np.array([100, 1]), temperature=0.5, balanced=True)
    np.testing.assert_allclose(even, expected[None] / [100, 1])
