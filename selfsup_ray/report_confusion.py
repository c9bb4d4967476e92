"""The section of the report that sets classes against clusters."""

from __future__ import annotations

from functools import partial
from typing import Any

import numpy as np

from selfsup_ray import plots
from selfsup_ray.report_html import Section, paragraph, percent, table
from selfsup_ray.report_run import Named, Run

Array = np.ndarray[Any, np.dtype[Any]]

MOST_CELLS = 1_000
"""Classes and clusters of a drawn confusion matrix; more would be finer than a screen."""


def confusion_section(run: Run) -> Section | str:
    """Classes against clusters, the clusters in the order of the classes that name them."""
    if run.clusters is None:
        return "No confusion matrix: there are no clusters."
    if run.clusters.classes is None or (named := run.clusters.named) is None:
        return (
            "No confusion matrix: no clustered image has a label. Labels are never needed; "
            "given to ingest, they are used for evaluation only."
        )
    counts = run.clusters.classes
    body = paragraph(_in_words(counts, named))
    if max(counts.shape) <= MOST_CELLS:
        body += _drawn(counts, named, run.class_names)
    else:
        body += paragraph("Too many classes or clusters to draw; the largest confusions follow.")
    body += _largest(counts, named, run.class_names)
    return Section("confusion", "Classes and clusters", body)


def _in_words(counts: Array, named: Named) -> str:
    text = (
        f"{counts.sum():,} labelled images. Rows are classes; columns are clusters, in the order "
    )
    if named.is_many_to_one:
        return (
            f"{text}of their most frequent classes, since there are more clusters than classes "
            f"(many to one; accuracy {named.accuracy:.3f}). Shade: share of the cluster."
        )
    return (
        f"{text}of the classes they are matched to, one to one (Hungarian method; accuracy "
        f"{named.accuracy:.3f}). Shade: share of the class."
    )


def _drawn(counts: Array, named: Named, names: list[str]) -> str:
    num_clusters, num_classes = counts.shape
    width = float(np.clip(2.0 + 0.52 * num_clusters, 4.5, 11))
    height = float(np.clip(1.0 + 0.34 * num_classes, 2.2, 9))
    order = _order(counts, named.class_of)
    draw = partial(
        plots.plot_confusion,
        counts[order].T,
        rows=names,
        columns=[str(cluster) for cluster in order],
        share_of="cluster" if named.is_many_to_one else "class",
    )
    drawn = plots.svg(draw, width=width, height=height, label="confusion matrix")
    return f'<figure class="scroll">{drawn}</figure>'


def _order(counts: Array, class_of: Array) -> Array:
    """Return the clusters by class, purest first; those without a class last."""
    purity = counts.max(axis=1) / np.maximum(counts.sum(axis=1), 1)
    return np.lexsort((-purity, np.where(class_of >= 0, class_of, counts.shape[1])))


def _largest(counts: Array, named: Named, names: list[str], *, most: int = 10) -> str:
    """Return the cells that cost the most accuracy, as a table."""
    wrong, class_of = counts.copy(), named.class_of
    right = np.flatnonzero(class_of >= 0)
    wrong[right, class_of[right]] = 0
    cells = np.argsort(-wrong, axis=None, kind="stable")[:most]
    per_class = counts.sum(axis=0)
    rows = []
    for cluster, label in zip(*np.unravel_index(cells, counts.shape), strict=True):
        if not (n := int(wrong[cluster, label])):
            break
        own = names[class_of[cluster]] if class_of[cluster] >= 0 else "no class"
        rows.append((names[label], f"{cluster} ({own})", f"{n:,}", percent(n / per_class[label])))
    if not rows:
        return paragraph("Every labelled image is in a cluster of its class.")
    head = ("class", "in cluster (of class)", "images", "of the class")
    return "<h3>Largest confusions</h3>" + table(head, rows, numeric=(2, 3))
