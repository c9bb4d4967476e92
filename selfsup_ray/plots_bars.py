"""Bars of several series side by side, measured ones beside published ones."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import numpy as np

from selfsup_ray.plots import SERIES

if TYPE_CHECKING:
    from matplotlib.axes import Axes


def plot_layers(
    names: Sequence[str], bars: Mapping[str, Mapping[str, float]], ax: Axes, *, title: str
) -> None:
    """Groups of bars, one group a layer; the first series is filled, published ones are hollow."""
    width = 0.8 / len(bars)
    for i, (series, values) in enumerate(bars.items()):
        known = [j for j, name in enumerate(names) if name in values]
        color = SERIES[i % len(SERIES)]
        ax.bar(
            np.array(known) + (i - (len(bars) - 1) / 2) * width,
            [values[names[j]] for j in known],
            width=0.9 * width,
            color=color if i == 0 else "none",
            edgecolor=color,
            label=series if i == 0 else f"published, {series}",
        )
    ax.set_xticks(range(len(names)), list(names))
    ax.set(ylabel="test accuracy, %", title=title)
    if len(bars) > 1:
        ax.legend()
