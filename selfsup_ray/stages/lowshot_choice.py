"""Hyper-parameters of the low-shot protocol, chosen for each n by the validation classes alone."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from selfsup_ray.artifacts import Array
from selfsup_ray.ops.balanced_sgd import evaluated_at
from selfsup_ray.ops.lowshot import best_of
from selfsup_ray.stages.lowshot_config import FUSED, LowShotConfig


@dataclass(frozen=True)
class Linear:
    """Setting of the linear classifier."""

    lr: float
    weight_decay: float
    batch_size: int
    iterations: int


@dataclass(frozen=True)
class Vote:
    """Setting of the kNN vote."""

    k: int
    balanced: bool


@dataclass(frozen=True)
class Fusion:
    """Setting of a late fusion; weight is the diffusion's share."""

    form: str
    weight: float


@dataclass(frozen=True)
class Chosen:
    """What validation chose for one n; None or absent where a method is not run.

    validation: by method, the mean over the seeds that the choice was made by.
    """

    niter: dict[str, int] = field(default_factory=dict)
    linear: Linear | None = None
    vote: Vote | None = None
    fusion: dict[str, Fusion] = field(default_factory=dict)
    validation: dict[str, float] = field(default_factory=dict)


def choose(config: LowShotConfig, explored: Sequence[dict[str, Any]]) -> Chosen:
    """Return the best hyper-parameters by the mean over seeds; equals go to the first of the grid.

    explored: what `Explore` found for one n, one entry for each seed. For the diffusion the first
    is the smallest number of steps.
    """
    niter: dict[str, int] = {}
    validation: dict[str, float] = {}
    for method in ("diffusion", "diffusion_background"):
        if method in config.methods:
            curve = _mean([one[method][config.criterion] for one in explored])
            niter[method] = best_of(curve)
            validation[method] = float(curve[niter[method]])
    linear, vote = None, None
    if "logistic" in config.methods:
        table = _mean([one["logistic"] for one in explored])  # (batch sizes, evaluations, rates)
        linear = _linear(config, table)
        validation["logistic"] = float(np.nanmax(table))
    if "knn" in config.methods:
        table = _mean([one["knn"] for one in explored])  # (k, balanced)
        i, j = np.unravel_index(best_of(table.ravel()), table.shape)
        vote = Vote(config.knn.k[i], config.knn.balanced[j])
        validation["knn"] = float(table[i, j])
    return Chosen(niter, linear, vote, {}, validation)


def _mean(values: Sequence[Any]) -> Array:
    return np.asarray(np.mean(np.array(values, np.float64), axis=0))


def _linear(config: LowShotConfig, table: Array) -> Linear:
    b, e, g = np.unravel_index(best_of(table.ravel()), table.shape)
    made = config.logistic
    lr, decay = divmod(int(g), len(made.weight_decay))
    steps = evaluated_at(made.iterations, made.eval_every)
    return Linear(made.lr[lr], made.weight_decay[decay], made.batch_size[b], steps[e])


def choose_fusion(
    config: LowShotConfig, final: Sequence[dict[str, Any]]
) -> tuple[dict[str, Fusion], dict[str, float]]:
    """Return form and weight of each fusion by the mean over seeds, and that mean.

    final: what `Final` found on the validation set-up for one n, one entry for each seed.
    """
    chosen: dict[str, Fusion] = {}
    validation: dict[str, float] = {}
    for method in FUSED:
        if method not in config.methods:
            continue
        grids = [
            [[rates[config.criterion] for rates in form] for form in one["fusion"][method]]
            for one in final
        ]
        table = _mean(grids)
        i, j = np.unravel_index(best_of(table.ravel()), table.shape)
        chosen[method] = Fusion(config.fusion.forms[i], config.fusion.weights[j])
        validation[method] = float(table[i, j])
    return chosen, validation


def rates_of(config: LowShotConfig, chosen: Chosen, final: dict[str, Any]) -> dict[str, Any]:
    """Return method -> hit rates of one unit, the fusions at their chosen form and weight."""
    rates = dict(final["rates"])
    for method, fusion in chosen.fusion.items():
        form = config.fusion.forms.index(fusion.form)
        weight = config.fusion.weights.index(fusion.weight)
        rates[method] = final["fusion"][method][form][weight]
    return {method: rates[method] for method in config.methods}
