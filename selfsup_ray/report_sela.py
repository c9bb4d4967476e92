"""SeLa in the report: how the labels changed over the events, and a browser of their clusters."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from typing import Any

import numpy as np

from selfsup_ray import plots
from selfsup_ray.artifacts import read_json
from selfsup_ray.data.corpus import Corpus
from selfsup_ray.ops.rng import permuted
from selfsup_ray.report_clusters import cluster_card
from selfsup_ray.report_html import Section, details, figures, paragraph
from selfsup_ray.report_images import sheet_size
from selfsup_ray.report_run import CHUNK_VALUES, Clusters, Run, StageFolder, chunks

Array = np.ndarray[Any, np.dtype[Any]]

BEST, WORST, RANDOM = 24, 12, 24
"""Clusters shown from the head and the tail of the order, and drawn at random."""
CURVES = {
    "agreement with the classes": ("nmi", "ari", "purity"),
    "images in a cluster": ("smallest", "largest"),
    "mean -log p of the labels, nats": ("cost",),
    "share of the labels that changed": ("changed_share",),
    "iterations": ("iterations",),
}
"""What is drawn over the events, by the label of the axis."""


def sela_section(run: Run) -> Section | str:
    """Curves over the events, the mean of the heads, and clusters by purity or tightness."""
    stage = run.stage("sela")
    if stage is None:
        return "No balanced pseudo-labels: the stage sela has not finished in this run."
    events = read_json(stage.path / "events.json")
    body = paragraph(_in_words(stage, events)) + figures(_drawn(events, stage))
    if run.clustering is not None and run.clustering[0] == "sela" and run.corpus is not None:
        assert run.clusters is not None
        body += _browser(run, run.corpus, run.clusters)
    return Section("sela", "Balanced pseudo-labels", body)


def _in_words(stage: StageFolder, events: Sequence[Mapping[str, float]]) -> str:
    made = stage.config
    text = f"{made['num_heads']} heads of {made['num_clusters']:,} clusters"
    if not events:
        return f"{text}, trained on labels that were given."
    times = {event["event"] for event in events}
    text += f"; labels were optimized {len(times)} times, from {made['label_pass']['name']} views."
    stopped = sum(not event["converged"] for event in events)
    if stopped:
        text += f" {stopped} of {len(events)} assignments stopped at sinkhorn.max_iterations."
    return f"{text} Head {stage.facts['head']}, whose loss was lowest, gives the clusters."


def _drawn(events: Sequence[Mapping[str, float]], stage: StageFolder) -> Iterator[str]:
    seen = np.unique([event["samples_seen"] for event in events])
    for ylabel, names in CURVES.items():
        series = {name: _mean_of_heads(events, seen, name) for name in names}
        series = {name: values for name, values in series.items() if np.isfinite(values).any()}
        if not series:
            continue
        first, last = (next(iter(series.values()))[i] for i in (0, -1))
        title = f"{next(iter(series)).replace('_', ' ')} {first:.3g} to {last:.3g}"
        steps = seen / stage.config["batch_size"]
        draw = partial(plots.plot_series, steps, series, ylabel=ylabel, title=title)
        yield plots.svg(draw, width=3.4, height=2.5, label=f"{ylabel} over events")


def _mean_of_heads(events: Sequence[Mapping[str, float]], seen: Array, name: str) -> Array:
    """Return the mean over heads at each event; of one head where one was renewed."""
    found: dict[float, list[float]] = {}
    for event in events:
        found.setdefault(event["samples_seen"], []).append(event.get(name, math.nan))
    return np.array([np.mean(found[at]) for at in seen.tolist()])


def _browser(run: Run, corpus: Corpus, clusters: Clusters) -> str:
    order, words = ordered(run, clusters)
    best, rest = order[:BEST], order[BEST:]
    worst = rest[::-1][:WORST]
    drawn = permuted(np.arange(min(RANDOM, len(order))), n=len(order), seed=0, epoch=0)
    groups = {
        f"The {len(best)} first by {words}": best,
        f"The {len(worst)} last by {words}": worst,
        f"{len(drawn)} clusters drawn at random": order[drawn],
    }
    per_row, side = sheet_size(BEST + WORST + RANDOM, image_size=corpus.image_size)
    body = ""
    for name, chosen in groups.items():
        cards = "".join(
            cluster_card(run, corpus, clusters, int(c), per_row=per_row, side=side) for c in chosen
        )
        body += details(name, f'<div class="cards">{cards}</div>') if len(chosen) else ""
    return body


def ordered(run: Run, clusters: Clusters) -> tuple[Array, str]:
    """Return the clusters that have images, best first, and by what.

    By purity where images have labels; else by tightness, the length of the mean of a cluster's
    unit rows, or, where nothing is embedded, by the mean probability.
    """
    used = np.flatnonzero(clusters.sizes)
    if clusters.classes is not None and clusters.classes.sum():
        known = clusters.classes.sum(axis=1)
        score, words = clusters.classes.max(axis=1) / np.maximum(known, 1), "purity"
    elif run.embeddings is not None:
        score, words = _tightness(run, clusters), "tightness"
    else:
        score, words = clusters.confidence, "mean probability"
    return used[np.argsort(-score[used], kind="stable")], words


def _tightness(run: Run, clusters: Clusters) -> Array:
    assert run.embeddings is not None and run.clustering is not None
    rows, assigned = run.embeddings.array, run.clustering[1].assignments
    sums = np.zeros((len(clusters), rows.shape[1]))
    for ids in chunks(len(rows), max(CHUNK_VALUES // rows.shape[1], 1)):
        np.add.at(sums, assigned.rows(ids), rows.rows(ids))
    return np.asarray(np.linalg.norm(sums, axis=1) / np.maximum(clusters.sizes, 1))
