"""Label diffusion in the report: what every step reached, and what was known to begin with."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from typing import Any

import numpy as np

from selfsup_ray import plots
from selfsup_ray.report_html import Section, figures, paragraph, table
from selfsup_ray.report_run import Run

SHOWN = {
    "accuracy": ("right of the hidden labels, %", 100.0),
    "coverage": ("images that a label has reached, %", 100.0),
    "entropy": ("entropy of an image's classes, nats", 1.0),
}
"""Facts of a step that are drawn: label of the axis, scale."""


def diffuse_section(run: Run) -> Section | str:
    """How far the labels spread, step by step, and how often they are right where it is known."""
    stage = run.stage("diffuse")
    if stage is None:
        return "No label diffusion: the stage diffuse has not finished in this run."
    facts, steps = stage.facts, stage.facts["steps"]
    body = paragraph(_setting(facts)) + figures(_drawn(steps, facts["niter"]))
    names = [name for name in steps[0] if isinstance(steps[0][name], int | float)]
    rows = [(str(t), *(_number(step.get(name)) for name in names)) for t, step in enumerate(steps)]
    head = ("step", *(name.replace("_", " ") for name in names))
    body += table(head, rows, numeric=range(len(head)))
    return Section("diffuse", "Label diffusion", body)


def _setting(facts: Mapping[str, Any]) -> str:
    text = (
        f"{facts['seeds']:,} of {facts['images']:,} images had a label of {facts['classes']:,} "
        f"classes; {facts['niter']} steps spread them over the kNN graph."
    )
    if facts.get("accuracy") is None:
        return text
    return f"{text} The last is right for {100 * facts['accuracy']:.2f} % of the hidden labels."


def _drawn(steps: Sequence[Mapping[str, Any]], niter: int) -> Iterator[str]:
    for name, (ylabel, scale) in SHOWN.items():
        values = [step.get(name) for step in steps]
        if any(value is None for value in values):
            continue
        series = {name: scale * np.array(values, float)}
        draw = partial(plots.plot_steps, series, {name: niter}, ylabel=ylabel, title=name)
        yield plots.svg(draw, width=3.4, height=2.5, label=f"{name} by steps")


def _number(value: Any) -> str:
    return "" if value is None else f"{value:,.4g}"
