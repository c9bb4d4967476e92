"""Scores of two classifiers made one (spec 2.8), and a vote of neighbors of unequal classes."""

from __future__ import annotations

from typing import Literal

import numpy as np

from selfsup_ray.artifacts import Array
from selfsup_ray.ops.neighbors import knn_vote

FusionForm = Literal["log", "linear"]


def row_probabilities(scores: Array) -> Array:
    """Return scores (n, C) >= 0 with rows that sum to 1, float64; a row of zeros is uniform."""
    scores = np.asarray(scores, np.float64)
    total = scores.sum(axis=1, keepdims=True)
    uniform = np.full_like(scores, 1 / scores.shape[1])
    return np.asarray(np.divide(scores, total, out=uniform, where=total > 0))


def fused_scores(
    diffused: Array, log_p: Array, *, weight: float, form: FusionForm, eps: float = 1e-6
) -> Array:
    """Return the (n, C) float64 scores of both classifiers together.

    diffused: (n, C) scores of the diffusion, made to sum to 1 by row; log_p: (n, C)
    log-probabilities of the linear classifier. weight a in [0, 1] is the diffusion's share:
    `log`: a log(p + eps) + (1 - a) log_p; `linear`: a p + (1 - a) exp(log_p).
    """
    p, log_p = row_probabilities(diffused), np.asarray(log_p, np.float64)
    if form == "log":
        return np.asarray(weight * np.log(p + eps) + (1 - weight) * log_p)
    return np.asarray(weight * p + (1 - weight) * np.exp(log_p))


def balanced_vote(
    similarity: Array,
    neighbor_classes: Array,
    class_counts: Array,
    *,
    temperature: float,
    balanced: bool,
) -> Array:
    """Return the (n, C) vote of each image's neighbors; balanced: each vote over its class's size.

    similarity, neighbor_classes: (n, k); class_counts: (C,) labelled images of each class. Without
    balance a class with n images can hardly outvote one with hundreds.
    """
    votes = knn_vote(
        similarity, neighbor_classes, num_classes=len(class_counts), temperature=temperature
    )
    return votes / np.maximum(class_counts, 1) if balanced else votes
