"""Multinomial logistic regression on stored rows: one convex problem, summed over blocks."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from selfsup_ray.artifacts import Array

Blocks = Callable[[], Iterable[tuple[Array, Array]]]
"""Gives the rows (n, d) and their classes (n,) in blocks, in the same order at every call."""


@dataclass(frozen=True)
class LinearClassifier:
    """Scores x @ weight.T + bias; weight (C, d) and bias (C,) float64."""

    weight: Array
    bias: Array
    loss: float
    """Value of the objective that was minimised, in nats."""
    iterations: int
    is_converged: bool
    """Whether the gradient fell below the tolerance within the bound on iterations."""

    def predict(self, rows: Array) -> Array:
        """Return the class with the highest score of each of rows (n, d): (n,) int64."""
        return np.asarray((rows @ self.weight.T + self.bias).argmax(axis=1), np.int64)


def fit_logistic(
    blocks: Blocks,
    *,
    dim: int,
    num_classes: int,
    l2: float,
    max_iterations: int = 200,
    tolerance: float = 1e-6,
    start: LinearClassifier | None = None,
    device: str = "cpu",
) -> LinearClassifier:
    """Return the minimum of mean cross-entropy + l2 / 2 |weight|^2; the bias is not penalised.

    L-BFGS with sums over blocks in float64, so that N rows are never in memory together. It is
    scikit-learn's LogisticRegression with C = 1 / (l2 N). `start` warm-starts from a neighbouring
    l2. Stops when no entry of the gradient is above the tolerance, or at max_iterations.
    """
    from scipy.optimize import minimize

    x0 = np.zeros((num_classes, dim + 1))
    if start is not None:
        x0 = np.concatenate([start.weight, start.bias[:, None]], axis=1)

    def objective(flat: Array) -> tuple[float, Array]:
        parameters = torch.from_numpy(flat.reshape(num_classes, dim + 1)).to(device)
        loss, grad = mean_loss(blocks(), parameters)
        weight = flat.reshape(num_classes, dim + 1)[:, :-1]
        grad[:, :-1] += l2 * weight
        return loss + l2 / 2 * float((weight**2).sum()), grad.ravel()

    options = {"maxiter": max_iterations, "gtol": tolerance, "ftol": 0.0, "maxcor": 20}
    found = minimize(objective, x0.ravel(), jac=True, method="L-BFGS-B", options=options)
    table = found.x.reshape(num_classes, dim + 1)
    converged = float(np.abs(found.jac).max()) <= tolerance * 1.001
    return LinearClassifier(
        table[:, :-1].copy(), table[:, -1].copy(), float(found.fun), int(found.nit), converged
    )


def mean_loss(blocks: Iterable[tuple[Array, Array]], parameters: Tensor) -> tuple[float, Array]:
    """Return the mean cross-entropy in nats and its gradient, (C, d + 1) as the parameters.

    parameters: (C, d + 1) float64, the bias in the last column.
    """
    weight, bias = parameters[:, :-1], parameters[:, -1]
    grad, loss, count = torch.zeros_like(parameters), 0.0, 0
    for rows, classes in blocks:
        x = torch.from_numpy(np.array(rows)).to(parameters)
        y = torch.from_numpy(np.array(classes, np.int64)).to(parameters.device)[:, None]
        log_p = torch.addmm(bias, x, weight.T).log_softmax(dim=1)
        loss -= float(log_p.gather(1, y).sum())
        error = log_p.exp_().scatter_add_(1, y, -torch.ones_like(y, dtype=log_p.dtype))
        grad[:, :-1] += error.T @ x
        grad[:, -1] += error.sum(dim=0)
        count += len(x)
    assert count, "a classifier needs at least one row"
    return loss / count, np.asarray(grad.cpu().numpy()) / count
