"""Where the report's map puts images: t-SNE of a small corpus, UMAP of a larger one's graph."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from selfsup_ray.ops.plane import neighbors_among, tsne_positions, umap_positions
from selfsup_ray.report_run import Run, sample_ids

Array = np.ndarray[Any, np.dtype[Any]]

TSNE_IMAGES = 2_000
"""Images that t-SNE places: these take about 4 s of CPU, and twice as many twice as long."""
UMAP_IMAGES = 10_000
"""Images that UMAP places: about 4 s, after 8 s to load and compile it, whatever the number."""
UMAP_NEIGHBORS = 15
"""Neighbors of an image, itself counted, that shape the map: umap-learn's default."""


@dataclass(frozen=True)
class Placement:
    """Positions (n, 2) of images (n,) on the map, and a sentence that says how they came about."""

    ids: Array
    xy: Array
    words: str


def placement(run: Run) -> Placement | None:
    """Return the map of a run, None when there is nothing to see; the same on every call.

    A corpus beyond TSNE_IMAGES with a graph is placed by it: the whole corpus as far as UMAP_IMAGES
    go, else that many at random with the neighbors they have among themselves, since of the stored
    neighbors hardly any would be in a small sample.
    """
    searched, graph = run.searched, run.graph
    if run.embeddings is None or searched is None:
        return None
    n = len(searched)
    if graph is None or n <= TSNE_IMAGES:
        return _by_tsne(run.embeddings.array.rows(sample_ids(n, TSNE_IMAGES)), n)
    ids = sample_ids(n, UMAP_IMAGES)
    rows = np.asarray(searched.array.rows(ids), np.float32)
    k = min(UMAP_NEIGHBORS - 1, graph.k)
    if len(ids) == n:
        listed, similarity = graph.ids.rows(ids)[:, :k], graph.similarity.rows(ids)[:, :k]
        what = "from the stored neighbors"
    else:
        listed, similarity = neighbors_among(rows, k)
        what = "from their neighbors among each other"
    xy = umap_positions(rows, listed, similarity)
    return None if xy is None else Placement(ids, xy, f"placed by UMAP {what}")


def _by_tsne(rows: Array, n: int) -> Placement | None:
    xy = tsne_positions(np.asarray(rows, np.float32))
    if xy is None:
        return None
    return Placement(sample_ids(n, TSNE_IMAGES), xy, "placed by t-SNE of their embeddings")
