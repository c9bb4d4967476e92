"""Sections of the report that show images: clusters, neighbors, the map."""

from __future__ import annotations

from functools import partial
from html import escape
from typing import Any

import numpy as np

from selfsup_ray import plots
from selfsup_ray.data.corpus import Corpus
from selfsup_ray.report_html import Section, figures, paragraph, percent
from selfsup_ray.report_images import Sheet, map_picture, place, sheet_size, thumb, thumbnails
from selfsup_ray.report_map import placement
from selfsup_ray.report_run import Clusters, Run, sample_ids

Array = np.ndarray[Any, np.dtype[Any]]

RANKED = 2_000
"""Images whose neighbors are measured by rank."""
MAP_CELLS = 30
"""Thumbnails along the longer side of the map of images."""
MOST_SHEETS = 1_000
"""Clusters shown with images; the largest come first."""
STRIPS, STRIP_NEIGHBORS = 10, 10
"""Images shown with their neighbors, and neighbors shown of each."""
MOST_NAMED = 30
"""Groups whose names are written on a map; more would cover it."""


def clusters_section(run: Run) -> Section | str:
    """Sizes and confidence of the result's clusters, and a contact sheet of each."""
    if run.clustering is None or run.clusters is None:
        return "No clusters: none of the stages sela, scan, selflabel has finished in this run."
    stage, clusters = run.clustering[0], run.clusters
    if not clusters.sizes.sum():
        return f"No clusters: {stage} assigned no image to any cluster."
    centers = np.linspace(0, 1, 21)
    drawn = [
        plots.svg(draw, width=4.2, height=2.6, label=label)
        for label, draw in (
            ("cluster sizes", partial(plots.plot_cluster_sizes, clusters.sizes)),
            ("confidence", partial(plots.plot_confidence, clusters.histogram, centers)),
        )
    ]
    body = paragraph(_sizes_in_words(stage, clusters)) + figures(drawn)
    if run.corpus is not None:
        body += _sheets(run, run.corpus, clusters)
    return Section("clusters", "Clusters", body)


def _sizes_in_words(stage: str, clusters: Clusters) -> str:
    sizes = clusters.sizes
    text = (
        f"Assignments of {stage}: {len(sizes):,} clusters, from {sizes.min():,} to "
        f"{sizes.max():,} images, median {np.median(sizes):,.0f}."
    )
    empty = int((sizes == 0).sum())
    return text + (f" {empty:,} of them are empty." if empty else "")


def _sheets(run: Run, corpus: Corpus, clusters: Clusters) -> str:
    shown = [int(c) for c in clusters.by_size if clusters.sizes[c]][:MOST_SHEETS]
    text = (
        "Of every cluster, largest first: the images it is most sure of, and those it is least "
        "sure of. Point at an image for its id, probability and source."
    )
    if len(shown) < int((clusters.sizes > 0).sum()):
        text = text.replace("every cluster", f"the {MOST_SHEETS:,} largest clusters")
    if clusters.classes is not None:
        text += " Purity: share of the cluster's most frequent class; a cross: another class."
    per_row, side = sheet_size(len(shown), image_size=corpus.image_size)
    cards = (cluster_card(run, corpus, clusters, c, per_row=per_row, side=side) for c in shown)
    return paragraph(text, note=True) + f'<div class="cards">{"".join(cards)}</div>'


def cluster_card(
    run: Run, corpus: Corpus, clusters: Clusters, cluster: int, *, per_row: int, side: int
) -> str:
    """Return a cluster's facts, with the images it is most and least sure of."""
    most = clusters.most[cluster]
    most = most[most >= 0][:per_row]
    least = clusters.least[cluster]
    least = least[(least >= 0) & ~np.isin(least, most)][:per_row]
    ids = np.concatenate([most, least])
    sheet = Sheet.of(thumbnails(corpus, ids, side=side), columns=per_row)
    p = np.concatenate(
        [
            clusters.most_probability[cluster][: len(most)],
            _probability_of(least, clusters.least[cluster], clusters.least_probability[cluster]),
        ]
    )
    tiles = _tiles(run, corpus, sheet, ids, p, majority=clusters.majority(cluster))
    share = clusters.sizes[cluster] / clusters.sizes.sum()
    facts = f"{clusters.sizes[cluster]:,} images ({percent(share)}), mean probability "
    facts += f"{clusters.confidence[cluster]:.2f}"
    name = ""
    if (majority := clusters.majority(cluster)) is not None:
        name = f" · {plots.shortened(run.class_of(majority[0]), 32)}"
        facts += f", purity {majority[1]:.2f}"
    rows = [_row("most sure", sheet, tiles[: len(most)], p[: len(most)])]
    if len(least):
        rows.append(_row("least sure", sheet, tiles[len(most) :], p[len(most) :]))
    head = f"<h3>Cluster {cluster}{escape(name)}</h3><p>{escape(facts)}</p>"
    return f'<div class="card {sheet.css_class}" style="{sheet.style}">{head}{"".join(rows)}</div>'


def _probability_of(ids: Array, among: Array, probabilities: Array) -> Array:
    return probabilities[[int(np.flatnonzero(among == id)[0]) for id in ids]]


def _row(name: str, sheet: Sheet, tiles: list[str], p: Array) -> str:
    low, high = f"{p.min():.2f}", f"{p.max():.2f}"
    between = low if low == high else f"{low} to {high}"
    return f"<p>{name}, {between}</p><div class='row'>{''.join(tiles)}</div>"


def _tiles(
    run: Run,
    corpus: Corpus,
    sheet: Sheet,
    ids: Array,
    p: Array,
    *,
    majority: tuple[int, float] | None,
) -> list[str]:
    labels, sources = corpus.labels(ids), corpus.sources(ids)
    made = []
    for i, (id, label) in enumerate(zip(ids.tolist(), labels.tolist(), strict=True)):
        title = f"image {id}, p = {p[i]:.3f}" + (f", {run.class_of(label)}" if label >= 0 else "")
        is_off = majority is not None and label >= 0 and label != majority[0]
        made.append(thumb(sheet, i, title=f"{title}\n{sources[i]}", is_off=is_off))
    return made


def neighbors_section(run: Run) -> Section | str:
    """Similarity and label agreement by rank, and strips of images with their neighbors."""
    graph, corpus = run.graph, run.corpus
    if graph is None:
        return "No neighbors: the stage graph has not finished in this run."
    if not len(graph) or not graph.k:
        return "No neighbors: the graph is empty."
    ids = sample_ids(len(graph), RANKED)
    similarity = graph.similarity.rows(ids)
    quantiles = np.quantile(similarity, [0.1, 0.5, 0.9], axis=0).T
    agreement = None if corpus is None else _agreement(corpus, ids, graph.ids.rows(ids))
    draw = partial(plots.plot_neighbor_ranks, quantiles, agreement, num_images=len(ids))
    body = paragraph(_graph_in_words(run))
    body += figures([plots.svg(draw, width=5.2, height=2.8, label="neighbor similarity")])
    if corpus is not None:
        body += _strips(run, corpus, _spread(run, len(graph)))
    return Section("neighbors", "Nearest neighbors", body)


def _agreement(corpus: Corpus, ids: Array, neighbors: Array) -> Array | None:
    """Return the (k,) share of neighbors with the image's label, or None where none is known."""
    if not corpus.has_labels:
        return None
    own = corpus.labels(ids)[:, None]
    theirs = corpus.labels(neighbors.ravel()).reshape(neighbors.shape)
    known = (own >= 0) & (theirs >= 0)
    if not known.any(axis=0).all():
        return None
    return np.asarray(((own == theirs) & known).sum(axis=0) / known.sum(axis=0))


def _graph_in_words(run: Run) -> str:
    graph = run.graph
    assert graph is not None
    parts = [f"{len(graph):,} images with {graph.k} neighbors each, by cosine similarity."]
    if graph.recall is not None:
        sample = graph.facts.get("recall_sample")
        checked = f" ({sample:,} images checked exactly)" if sample else ""
        parts.append(f"Recall {graph.recall:.4f}{checked}.")
    if graph.neighbor_accuracy is not None:
        parts.append(
            f"{percent(graph.neighbor_accuracy)} of the neighbors share their image's label."
        )
    return " ".join(parts)


def _spread(run: Run, n: int) -> Array:
    """Return STRIPS sample ids, from as many clusters as there are: ascending rank, then id."""
    ids = sample_ids(n, 50 * STRIPS)
    if run.clustering is None:
        return sample_ids(n, STRIPS)
    cluster = run.clustering[1].assignments.rows(ids)
    order = np.lexsort((ids, cluster))
    rank = np.empty(len(ids), np.int64)
    rank[order] = np.arange(len(ids)) - np.searchsorted(cluster[order], cluster[order])
    return ids[np.lexsort((cluster, rank))][:STRIPS]


def _strips(run: Run, corpus: Corpus, queries: Array) -> str:
    assert run.graph is not None
    k = min(STRIP_NEIGHBORS, run.graph.k)
    neighbors = run.graph.ids.rows(queries)[:, :k]
    similarity = run.graph.similarity.rows(queries)[:, :k]
    text = "First the image, then its neighbors with their cosine similarity, best first."
    if corpus.has_labels:
        text += " ✓ same label, ✗ another label."
    strips = "".join(
        _strip(run, corpus, int(query), neighbors[i], similarity[i])
        for i, query in enumerate(queries)
    )
    return paragraph(text, note=True) + f'<div class="strips">{strips}</div>'


def _strip(run: Run, corpus: Corpus, query: int, neighbors: Array, similarity: Array) -> str:
    ids = np.concatenate([[query], neighbors]).astype(np.int64)
    sheet = Sheet.of(thumbnails(corpus, ids, side=64), columns=len(ids))
    labels, sources = corpus.labels(ids).tolist(), corpus.sources(ids)
    own = run.class_of(labels[0]) if labels[0] >= 0 else f"id {query}"
    tiles = []
    for i, label in enumerate(labels):
        name = run.class_of(label) if label >= 0 else ""
        title = f"image {ids[i]} {name}\n{sources[i]}"
        caption, style = (own, "") if i == 0 else _caption(similarity[i - 1], labels[0], label)
        image = thumb(sheet, i, title=title)
        kind = ' class="query"' if i == 0 else ""
        tiles.append(f"<div{kind}>{image}<span{style}>{escape(caption)}</span></div>")
    tiles.insert(1, "<b></b>")  # the line between the image and its neighbors
    style = f"{sheet.style};--k:{len(neighbors)}"
    return f'<div class="strip {sheet.css_class}" style="{style}">{"".join(tiles)}</div>'


def _caption(similarity: float, own: int, label: int) -> tuple[str, str]:
    if own < 0 or label < 0:
        return f"{similarity:.2f}", ""
    return (f"{similarity:.2f} ✓", "") if own == label else (f"{similarity:.2f} ✗", ' class="x"')


def map_section(run: Run) -> Section | str:
    """A 2-D map of a sample of the embeddings: by cluster, by label where known, and as images."""
    if run.embeddings is None:
        return "No map: the stage embed has not finished in this run."
    placed = placement(run)
    if placed is None:
        return "No map: fewer than 4 images, or all embeddings are equal (a collapsed encoder)."
    ids, xy = placed.ids, placed.xy
    text = (
        f"{len(ids):,} of {len(run.embeddings):,} images, {placed.words} (cosine, fixed seed): "
        f"images that look alike to the encoder are close; distances between far groups and the "
        f"axes have no meaning."
    )
    clusters, hues = _cluster_hues(run, ids)
    panels = []
    if clusters is not None:
        names = {c: str(c) for c in _to_name(clusters)}
        draw = partial(
            plots.plot_map, xy, clusters, names=names, title="by cluster", hues=hues[clusters]
        )
        panels.append(plots.svg(draw, width=5.4, height=5.2, label="map by cluster"))
    labels = run.corpus.labels(ids) if run.corpus is not None and run.corpus.has_labels else None
    if labels is not None and (labels >= 0).any():
        names = {c: run.class_of(c) for c in _to_name(labels)}
        draw = partial(plots.plot_map, xy, labels, names=names, title="by label", hues=labels)
        panels.append(plots.svg(draw, width=5.4, height=5.2, label="map by label"))
        text += " A cluster has the colour of its class." if len(panels) == 2 else ""
    body = paragraph(text) + figures(panels)
    if run.corpus is not None:
        groups = hues[clusters] if clusters is not None else np.full(len(ids), -1)
        body += _image_map(run.corpus, ids, xy, groups)
    return Section("map", "Map of the embeddings", body)


def _cluster_hues(run: Run, ids: Array) -> tuple[Array | None, Array]:
    """Return the (n,) clusters of these ids, and the (K,) colour of each cluster: its class's."""
    if run.clustering is None or run.clusters is None:
        return None, np.empty(0, np.int64)
    clusters = run.clustering[1].assignments.rows(ids).astype(np.int64)
    hues = np.arange(len(run.clusters))
    if (named := run.clusters.named) is not None:
        class_of = named.class_of
        spare = len(run.class_names) + np.arange(len(hues))
        hues = np.where(class_of >= 0, class_of, spare)
    return clusters, hues


def _to_name(groups: Array) -> list[int]:
    """Return the groups to name on the map: all, or none when there are too many."""
    values = np.unique(groups[groups >= 0])
    return [int(value) for value in values] if len(values) <= MOST_NAMED else []


def _image_map(corpus: Corpus, ids: Array, xy: Array, groups: Array) -> str:
    placed = place(xy, cells=MAP_CELLS)
    tiles = thumbnails(corpus, ids[placed.rows], side=40)
    source = map_picture(tiles, placed, groups[placed.rows])
    text = (
        f"The same map with images: of each of its small squares the image nearest to the center "
        f"({len(placed.rows):,} images), framed in the colour of its cluster."
    )
    picture = f'<img class="map" alt="map of the embeddings, made of images" src="{source}">'
    return paragraph(text, note=True) + f"<figure>{picture}</figure>"
