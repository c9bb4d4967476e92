"""Logistic regression over blocks against scikit-learn, autograd and the closed case."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from sklearn.linear_model import LogisticRegression

from selfsup_ray.ops.logistic import fit_logistic, mean_loss


def problem(n: int = 240, d: int = 6, num_classes: int = 4) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(0)
    classes = rng.integers(0, num_classes, n)
    rows = rng.normal(size=(n, d)) + rng.normal(size=(num_classes, d))[classes]
    return rows.astype(np.float32), classes


def in_blocks(rows: np.ndarray, classes: np.ndarray, size: int):
    return lambda: ((rows[a : a + size], classes[a : a + size]) for a in range(0, len(rows), size))


@pytest.mark.parametrize("l2", [1e-1, 1e-3])
@pytest.mark.parametrize("size", [240, 37])
def test_the_fit_is_scikit_learns(l2: float, size: int):
    rows, classes = problem()
    found = fit_logistic(in_blocks(rows, classes, size), dim=6, num_classes=4, l2=l2)
    model = LogisticRegression(C=1 / (l2 * len(rows)), tol=1e-9, max_iter=2000)
    model.fit(rows.astype(np.float64), classes)
    assert found.is_converged
    np.testing.assert_allclose(found.weight, model.coef_, atol=2e-4)
    # The bias is determined up to a common constant.
    ours, theirs = found.bias - found.bias.mean(), model.intercept_ - model.intercept_.mean()
    np.testing.assert_allclose(ours, theirs, atol=2e-4)
    np.testing.assert_array_equal(found.predict(rows), model.predict(rows))


def test_the_gradient_is_autograds():
    rows, classes = problem()
    table = torch.randn(4, 7, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    loss, grad = mean_loss(in_blocks(rows, classes, 50)(), table)
    table.requires_grad_()
    logits = torch.from_numpy(rows).double() @ table[:, :-1].T + table[:, -1]
    wanted = F.cross_entropy(logits, torch.from_numpy(classes))
    wanted.backward()
    assert loss == pytest.approx(wanted.item(), abs=1e-12)
    np.testing.assert_allclose(grad, table.grad, atol=1e-14)


def test_rows_that_say_nothing_give_the_class_frequencies():
    rows, classes = np.zeros((80, 3), np.float32), np.repeat([0, 1, 2], [40, 30, 10])
    found = fit_logistic(in_blocks(rows, classes, 80), dim=3, num_classes=3, l2=1e-3)
    share = np.exp(found.bias) / np.exp(found.bias).sum()
    np.testing.assert_allclose(share, [0.5, 0.375, 0.125], atol=1e-5)
    np.testing.assert_array_equal(found.weight, 0)


def test_a_warm_start_ends_at_the_same_minimum_sooner():
    blocks = in_blocks(*problem(), 240)
    near = fit_logistic(blocks, dim=6, num_classes=4, l2=2e-3)
    cold = fit_logistic(blocks, dim=6, num_classes=4, l2=1e-3)
    warm = fit_logistic(blocks, dim=6, num_classes=4, l2=1e-3, start=near)
    assert warm.iterations < cold.iterations
    np.testing.assert_allclose(warm.weight, cold.weight, atol=1e-3)


def test_the_bound_on_iterations_is_kept_and_said():
    found = fit_logistic(
        in_blocks(*problem(), 240), dim=6, num_classes=4, l2=1e-6, max_iterations=3
    )
    assert (found.iterations, found.is_converged) == (3, False)
