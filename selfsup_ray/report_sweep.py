"""The page of a sweep: its number over the keys that were varied, beside published ones if any."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal

import numpy as np

from selfsup_ray import plots
from selfsup_ray.artifacts import write_text
from selfsup_ray.cluster.tune import Trial
from selfsup_ray.data.published_contrastive import (
    BATCH,
    BATCH_NORMS,
    KNN_C10,
    METHODS,
    TEMPERATURE_C10,
    TEMPERATURE_C100,
)
from selfsup_ray.data.published_patches import BY_K, BY_SIZE, BY_SOURCE, THREE_RUNS
from selfsup_ray.report_html import Section, duration, figures, page, paragraph, plain, table
from selfsup_ray.report_published import Points, beside
from selfsup_ray.report_sweep_space import is_seed, short, space_figures, text

Published = Literal[
    "patches_k",
    "patches_size",
    "patches_noise",
    "patches_seeds",
    "insdis_temperature_c10",
    "insdis_temperature_c100",
    "byol_batch",
    "byol_bn",
    "contrastive_methods",
    "contrastive_knn_c10",
]
PUBLISHED: dict[Published, tuple[str, Points]] = {
    "patches_k": ("classify.model.k", BY_K),
    "patches_size": ("patches.size", BY_SIZE),
    "insdis_temperature_c10": ("pretext.method.temperature", TEMPERATURE_C10),
    "insdis_temperature_c100": ("pretext.method.temperature", TEMPERATURE_C100),
    "byol_batch": ("pretext.batch_size", BATCH),
}
"""Name -> the key that was varied, and the published number by its value."""
PUBLISHED_ROWS: dict[Published, tuple[tuple[str, ...], Mapping[tuple[str, ...], float]]] = {
    "patches_noise": (("whiten.source",), BY_SOURCE),
    "patches_seeds": ((), THREE_RUNS),
    "byol_bn": (
        tuple(f"pretext.method.{part}.batch_norm" for part in ("head", "predictor", "target_head")),
        BATCH_NORMS,
    ),
    "contrastive_methods": (("pretext.method.name",), METHODS),
    "contrastive_knn_c10": (("pretext.method.name",), KNN_C10),
}
"""Name -> the keys that were varied, and the published number by their values as text."""
MOST_BARS = 30
"""Points drawn as bars, the best ones; the table has all."""


@dataclass(frozen=True)
class StageCost:
    """What one stage of a sweep cost: different results, starts, and seconds of all results."""

    stage: str
    results: int
    starts: int
    seconds: float
    alone: float
    """Seconds if every trial had run the stage for itself."""


Point = tuple[tuple[str, Any], ...]
"""The keys and values of a trial, its seeds left out."""


def write_sweep_report(
    out: Path,
    trials: Sequence[Trial],
    *,
    metric: str,
    mode: Literal["min", "max"] = "max",
    published: Published | None = None,
    costs: Sequence[StageCost] = (),
) -> Path:
    """Write `report.html` into a sweep's folder and return its path.

    trials: best first. Trials that differ in keys named seed alone are one point: the mean of
    their numbers, with the deviation and how many there are.
    """
    values: dict[Point, list[float]] = {}
    for trial in trials:
        if trial.is_complete:
            values.setdefault(_point(trial), []).append(trial.metrics[metric])
    body = _drawn(values, metric, published) + _points(values, metric)
    sections = [
        Section("result", metric, body),
        Section("space", "Keys", space_figures(trials, metric, mode)),
        Section("trials", "Trials", _trials(trials, metric)),
        Section("cost", "Cost", _costs(costs)),
    ]
    sections = [section for section in sections if section.body]
    path = out / "report.html"
    failed = sum(trial.error is not None for trial in trials)
    stopped = sum(trial.stopped is not None for trial in trials)
    early = f"{stopped} ended early, " if stopped else ""
    lead = f"{len(trials)} trials, {early}{failed} failed; {metric}, best first."
    write_text(path, page(out.resolve().name, lead=lead, sections=sections))
    return path


def _point(trial: Trial) -> Point:
    kept = [(key, value) for key, value in trial.changes.items() if not is_seed(key)]
    return tuple((k, str(v) if isinstance(v, dict | list | tuple) else v) for k, v in kept)


def _drawn(
    values: Mapping[Point, Sequence[float]], metric: str, published: Published | None
) -> str:
    """Return lines over the key with most numbers, a line for each value of the others; or bars."""
    key = _numeric_key(values)
    if key is None:
        return _bars(values, metric) + _beside_rows(values, metric, published)
    measured: dict[str, dict[float, float]] = {}
    for point, found in values.items():
        others = [f"{short(name)} {text(value)}" for name, value in point if name != key]
        series = measured.setdefault(", ".join(others) or "here", {})
        series[float(dict(point)[key])] = statistics.fmean(found)
    known: dict[str, Points] = {}
    if published is not None and PUBLISHED[published][0] == key:
        known = {next(iter(measured)): PUBLISHED[published][1]}
    return beside(measured, known, xlabel=key, ylabel=metric, title=f"{metric} by {key}", digits=4)


def _numeric_key(values: Mapping[Point, Sequence[float]]) -> str | None:
    """Return the key with the most different values, all of them numbers; None if there is none."""
    counts = {}
    for key in {key for point in values for key, _ in point}:
        found = {dict(point)[key] for point in values}
        if all(isinstance(v, int | float) and not isinstance(v, bool) for v in found):
            counts[key] = len(found)
    best = max(sorted(counts), key=lambda key: counts[key], default=None)
    return best if best is not None and counts[best] > 1 else None


def _bars(values: Mapping[Point, Sequence[float]], metric: str) -> str:
    shown = list(values)[:MOST_BARS]
    if not shown:
        return ""
    names = [", ".join(f"{short(k)} {text(v)}" for k, v in point) or "all" for point in shown]
    means = np.array([statistics.fmean(values[point]) for point in shown])
    draw = partial(plots.plot_values, names, means, xlabel=metric, title=f"{metric}, best first")
    height = 1.2 + 0.28 * len(shown)
    return figures([plots.svg(draw, width=6.0, height=height, label=f"{metric} of each point")])


def _beside_rows(
    values: Mapping[Point, Sequence[float]], metric: str, published: Published | None
) -> str:
    """Return the published table with the means beside it, in its order; "" where there is none."""
    if published not in PUBLISHED_ROWS:
        return ""
    keys, known = PUBLISHED_ROWS[published]
    means: dict[tuple[str, ...], float] = {}
    for point, found in values.items():
        given = dict(point)
        means[tuple(text(given.get(key)) for key in keys)] = statistics.fmean(found)
    rows = [
        (*row, f"{means[row]:.4f}" if row in means else "", f"{number:.4f}")
        for row, number in known.items()
    ]
    head = (*keys, metric, f"{metric}, published")
    return table(head, rows, numeric=range(len(keys), len(head)))


def _points(values: Mapping[Point, Sequence[float]], metric: str) -> str:
    """Return mean and deviation over seeds; "" when no point has more than one trial."""
    if all(len(found) < 2 for found in values.values()):
        return ""
    keys = [key for key, _ in next(iter(values))]
    rows = [
        (
            *(text(value) for _, value in point),
            f"{statistics.fmean(found):.4f}",
            f"{statistics.pstdev(found):.4f}",
            f"{max(found):.4f}",
            str(len(found)),
        )
        for point, found in values.items()
    ]
    head = (*keys, f"{metric}, mean", "deviation", "largest", "seeds")
    note = paragraph("Mean and population deviation over the seeds.", note=True)
    return note + table(head, rows, numeric=range(len(head)))


def _trials(trials: Sequence[Trial], metric: str) -> str:
    keys = list(trials[0].changes) if trials else []
    rows = [
        (
            trial.id,
            *(text(trial.changes.get(key)) for key in keys),
            _result(trial, metric),
            duration(trial.seconds),
        )
        for trial in trials
    ]
    head = ("trial", *keys, metric, "time")
    return table(head, rows, numeric=range(1, len(head)))


def _result(trial: Trial, metric: str) -> str:
    if trial.stopped is not None:
        return f"stopped at epoch {trial.stopped:.3g}"
    return trial.error or plain(trial.metrics[metric])


def _costs(costs: Sequence[StageCost]) -> str:
    """Return what the stages took, and what they would have taken for each trial alone."""
    if not costs:
        return ""
    rows = [
        (one.stage, str(one.results), str(one.starts), duration(one.seconds), duration(one.alone))
        for one in costs
    ]
    spent, alone = sum(one.seconds for one in costs), sum(one.alone for one in costs)
    rows.append(("all", "", "", duration(spent), duration(alone)))
    note = paragraph(
        "A stage runs once for all trials whose keys do not touch it or its inputs; a start more "
        "than results is one that was cut short. Last column: every trial with stages of its own.",
        note=True,
    )
    head = ("stage", "results", "starts", "time", "time without sharing")
    return note + table(head, rows, numeric=range(1, len(head)))
