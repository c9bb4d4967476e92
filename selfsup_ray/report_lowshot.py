"""The low-shot protocol in the report: the table over n and methods, curves, what was chosen."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from functools import partial
from typing import Any

import numpy as np

from selfsup_ray import plots
from selfsup_ray.artifacts import read_json
from selfsup_ray.report_html import (
    Markup,
    Section,
    counted,
    details,
    figures,
    paragraph,
    plain,
    table,
)
from selfsup_ray.report_run import Run

METHODS = {
    "diffusion": "diffusion",
    "diffusion_background": "diffusion, background",
    "logistic": "linear classifier",
    "knn": "kNN vote",
    "fused": "diffusion + linear",
    "fused_background": "diffusion, background + linear",
}
COLUMNS = {
    "top1_all": "top-1, all",
    "top1_novel": "top-1, novel",
    "top5_all": "top-5, all",
    "top5_novel": "top-5, novel",
}
CURVE = "top5_novel"
"""What the figures show."""


def lowshot_section(run: Run) -> Section | str:
    """Accuracy of every method for each number of labelled images, on the test set-up."""
    stage = run.stage("lowshot")
    if stage is None:
        return "No low-shot protocol: the stage lowshot has not finished in this run."
    made, curves = read_json(stage.path / "table.json"), read_json(stage.path / "curves.json")
    body = paragraph(_setting(stage.facts, made)) + _table(made)
    body += "<h3>Steps of the diffusion</h3>" + paragraph(_explained(made), note=True)
    body += figures(_drawn(made, curves))
    body += details("Chosen on the validation classes", _chosen(made))
    return Section("lowshot", "Low-shot classification", body)


def _setting(facts: Mapping[str, Any], made: Mapping[str, Any]) -> str:
    novel = facts["num_novel"]
    base = facts["num_classes"] - novel
    labelled = "class has all its labels" if base == 1 else "classes have all their labels"
    few = "novel class" if novel == 1 else "novel classes"
    return (
        f"{base} base {labelled}, {novel} {few} n of them: {facts['base_images']:,} images and n a "
        f"novel class learn, {facts['test_images']:,} images of all test. Mean and deviation in "
        f"percent over {len(made['seeds'])} choices of the n; the best of each n is bold."
    )


def _table(made: Mapping[str, Any]) -> str:
    rows = []
    for n, methods in made["test"].items():
        best = {key: max(m[key]["mean"] for m in methods.values()) for key in COLUMNS}
        for i, (method, found) in enumerate(methods.items()):
            cells = [_cell(found[key], is_best=found[key]["mean"] == best[key]) for key in COLUMNS]
            rows.append((n if i == 0 else "", METHODS.get(method, method), *cells))
    head = ("n", "method", *COLUMNS.values())
    return table(head, rows, numeric=(0, *range(2, 2 + len(COLUMNS))))


def _cell(value: Mapping[str, float], *, is_best: bool) -> str:
    text = f"{100 * value['mean']:.2f} ± {100 * value['std']:.2f}"
    return Markup(f"<b>{text}</b>") if is_best else text


def _explained(made: Mapping[str, Any]) -> str:
    return (
        f"Accuracy after each number of steps, mean over the seeds. A dot marks the number that "
        f"the validation classes chose by {COLUMNS[made['criterion']].replace(',', ' of')} classes."
    )


def _drawn(made: Mapping[str, Any], curves: Mapping[str, Any]) -> Iterator[str]:
    for method, by_n in curves["test"].items():
        series = {f"n = {n}": 100 * np.array(c[CURVE]["mean"]) for n, c in by_n.items()}
        chosen = {f"n = {n}": made["chosen"][n]["niter"][method] for n in by_n}
        yield plots.svg(
            partial(
                plots.plot_steps,
                series,
                chosen,
                ylabel="top-5 of novel classes, %",
                title=METHODS[method],
            ),
            width=3.8,
            height=2.7,
            label=f"accuracy by steps, {METHODS[method]}",
        )


def _chosen(made: Mapping[str, Any]) -> str:
    rows = []
    for n, one in made["chosen"].items():
        for method, value in one["validation"].items():
            rows.append((n, METHODS.get(method, method), _hyper(method, one), f"{100 * value:.2f}"))
    head = ("n", "method", "chosen", "validation, %")
    return table(head, rows, numeric=(0, 3))


def _hyper(method: str, one: Mapping[str, Any]) -> str:
    """Return what was chosen for a method in one line."""
    if method in one["niter"]:
        return counted(one["niter"][method], "step")
    found = {"logistic": one["linear"], "knn": one["vote"]}.get(method) or one["fusion"][method]
    return ", ".join(f"{key.replace('_', ' ')} {plain(value)}" for key, value in found.items())
