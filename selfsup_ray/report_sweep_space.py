"""Figures of a sweep over several keys: parallel coordinates, and the response to each key."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any, Literal, NamedTuple

import numpy as np

from selfsup_ray import plots
from selfsup_ray.cluster.tune import Trial
from selfsup_ray.report_html import figures, paragraph, plain

MOST_TICKS = 8
"""Values that are written at an axis of the parallel coordinates; of more, both ends."""


class Axis(NamedTuple):
    """The values of one key over the trials: numbers, or the places of names."""

    key: str
    values: plots.Array
    names: list[str] | None
    """What 0, 1, ... stand for; None when the values are numbers."""

    @property
    def is_log(self) -> bool:
        """Whether numbers are drawn by their logarithm: positive, over a factor of 8 and more."""
        low, high = float(self.values.min()), float(self.values.max())
        return self.names is None and low > 0 and high >= 8 * low


def space_figures(trials: Sequence[Trial], metric: str, mode: Literal["min", "max"]) -> str:
    """Return parallel coordinates and a response curve a key; "" unless two keys and more vary.

    Trials that failed or were ended early have no number and are left out.
    """
    done = [trial for trial in trials if trial.is_complete]
    keys = [key for key in (done[0].changes if done else ()) if not is_seed(key)]
    axes = [axis(key, [trial.changes.get(key) for trial in done]) for key in keys]
    axes = [one for one in axes if len(np.unique(one.values)) > 1]
    if len(axes) < 2:
        return ""
    y = np.array([trial.metrics[metric] for trial in done], float)
    names = [label(one.key, axes) for one in axes]
    columns = [column(one, name) for one, name in zip(axes, names, strict=True)]
    columns.append(column(Axis(metric, y, None), metric))
    quality = _quality(y, mode)
    draw = partial(plots.plot_parallel, columns, quality, title=f"{len(done)} trials")
    width = 1.6 * len(columns) + 1.0
    drawn = [plots.svg(draw, width=width, height=3.4, label=f"{metric}: parallel coordinates")]
    for one, name in zip(axes, names, strict=True):
        response = partial(
            plots.plot_response,
            one.values,
            y,
            mode,
            names=one.names,
            xlabel=name,
            ylabel=metric,
            log_x=one.is_log,
        )
        drawn.append(plots.svg(response, width=4.2, height=3.0, label=f"{metric} by {name}"))
    note = paragraph("A line or a dot is a trial; the best one is the thick line.", note=True)
    return note + figures(drawn)


def axis(key: str, values: Sequence[Any]) -> Axis:
    """Return the values of a key as numbers; anything but numbers by its place among the names."""
    if all(isinstance(v, int | float) and not isinstance(v, bool) for v in values):
        return Axis(key, np.array(values, float), None)
    names = list(dict.fromkeys(text(value) for value in values))
    return Axis(key, np.array([names.index(text(value)) for value in values], float), names)


def column(one: Axis, name: str) -> plots.Column:
    """Return an axis of the parallel coordinates: heights in [0, 1], logarithmic where `is_log`."""
    values = np.log(one.values) if one.is_log else one.values
    low, high = float(values.min()), float(values.max())
    heights = (values - low) / (high - low) if high > low else np.full(len(values), 0.5)
    _, first = np.unique(values, return_index=True)
    shown = first if len(first) <= MOST_TICKS and one.key != name else first[[0, -1]]
    ticks = [(float(heights[i]), _tick(one, int(i))) for i in shown]
    return plots.Column(name, heights, ticks)


def _tick(one: Axis, i: int) -> str:
    return one.names[int(one.values[i])] if one.names else f"{one.values[i]:.4g}"


def _quality(y: plots.Array, mode: Literal["min", "max"]) -> plots.Array:
    """Return 1 for the best and 0 for the worst number, by rank."""
    order = np.argsort(-y if mode == "min" else y, kind="stable")
    quality = np.empty(len(y))
    quality[order] = np.arange(len(y)) / max(1, len(y) - 1)
    return quality


def label(key: str, axes: Sequence[Axis]) -> str:
    """Return the last part of a key, or all of it where two keys end alike."""
    alike = sum(short(one.key) == short(key) for one in axes)
    return short(key) if alike == 1 else key


def is_seed(key: str) -> bool:
    """Return whether a key is a seed: trials that differ in it alone are one point."""
    return key.split(".")[-1] == "seed"


def short(key: str) -> str:
    """Return the last part of a dotted key, in words."""
    return key.split(".")[-1].replace("_", " ")


def text(value: Any) -> str:
    """Return a value of a key as it is shown."""
    return "none" if value is None else plain(value)
