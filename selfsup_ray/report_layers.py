"""Linear probes of several layers in the report: bars beside published ones, and a table."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import Any

from selfsup_ray import plots
from selfsup_ray.plots_bars import plot_layers
from selfsup_ray.report_classify import percent_or_nothing
from selfsup_ray.report_html import figures, paragraph, table

PUBLISHED = {
    "1 head of 3,000": {"conv3": 43.0, "conv4": 44.7, "conv5": 40.9},
    "10 heads of 3,000": {"conv3": 44.7, "conv4": 47.1, "conv5": 44.1},
}
"""Top-1 accuracies in percent of AlexNet's layers after SeLa on ImageNet (Asano et al. 2020)."""


def layers_part(made: Mapping[str, Any]) -> str:
    """Return bars and a table of the layers of one training; made: its metrics."""
    layers = made["layers"]
    published = PUBLISHED if "conv1" in layers else {}
    best = max(layers, key=lambda name: layers[name]["last_accuracy"])
    title = f"{best} is best: {100 * layers[best]['last_accuracy']:.2f} %"
    bars = {"measured": {name: 100 * one["last_accuracy"] for name, one in layers.items()}}
    drawn = plots.svg(
        partial(plot_layers, list(layers), bars | published, title=title),
        width=5.4,
        height=3.0,
        label="accuracy of a linear classifier on each layer",
    )
    rows = []
    for name, one in layers.items():
        low, high = (f"{100 * end:.2f}" for end in one["interval"])
        numbers = [percent_or_nothing(one.get(key)) for key in COLUMNS]
        others = [f"{values[name]:.1f}" if name in values else "" for values in published.values()]
        rows.append((name, *numbers[:1], f"{low} to {high}", *numbers[1:], *others))
    own = ("layer", "last, %", "95 % interval", "max, %", "chosen, %", "train, %")
    head = (*own, *(f"{name}, ImageNet, %" for name in published))
    text = "Each classifier sees the whole pooled map of its layer; all are trained side by side."
    if published:
        text += " Published are SeLa's on ImageNet, which compare with runs on ImageNet alone."
    return paragraph(text) + figures([drawn]) + table(head, rows, numeric=range(1, len(head)))


COLUMNS = ("last_accuracy", "max_accuracy", "chosen_accuracy", "train_accuracy")
