"""Where the report's map puts images: t-SNE of a small corpus, UMAP of a larger one's graph."""

from __future__ import annotations

import warnings
from dataclasses import dataclass
from typing import Any

import numpy as np

from selfsup_ray.ops.neighbors import exact_topk
from selfsup_ray.ops.pca import block_moments, principal_components, projection
from selfsup_ray.report_run import Run, sample_ids
from selfsup_ray.stages.interop import distances

Array = np.ndarray[Any, np.dtype[Any]]

TSNE_IMAGES = 2_000
"""Images that t-SNE places: these take about 4 s of CPU, and twice as many twice as long."""
UMAP_IMAGES = 10_000
"""Images that UMAP places: about 4 s, after 8 s to load and compile it, whatever the number."""
UMAP_NEIGHBORS = 15
"""Neighbors of an image, itself counted, that shape the map: umap-learn's default."""
UMAP_EPOCHS = 200
"""As umap-learn has it for more images; its 500 for fewer take 4 s longer and place neighbors as
well: trustworthiness 0.981 for both on 10,000 of Fashion-MNIST."""


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
        listed, similarity = _among(rows, k)
        what = "from their neighbors among each other"
    xy = umap_positions(rows, listed, similarity)
    return None if xy is None else Placement(ids, xy, f"placed by UMAP {what}")


def _by_tsne(rows: Array, n: int) -> Placement | None:
    xy = tsne_positions(np.asarray(rows, np.float32))
    if xy is None:
        return None
    return Placement(sample_ids(n, TSNE_IMAGES), xy, "placed by t-SNE of their embeddings")


def _among(rows: Array, k: int) -> tuple[Array, Array]:
    """Return the k nearest other rows of each of rows (n, d), with their similarity."""
    found = exact_topk(rows, rows, k=k + 1)
    is_self = found.ids == np.arange(len(rows))[:, None]
    is_self[~is_self.any(axis=1), -1] = True
    shape = (len(rows), k)
    return found.ids[~is_self].reshape(shape), found.similarity[~is_self].reshape(shape)


def umap_positions(rows: Array, ids: Array, similarity: Array) -> Array | None:
    """Return UMAP positions (n, 2) from neighbors: ids and similarity (n, k), itself not listed.

    McInnes, Healy and Melville 2018, from the first two principal components of the unit rows
    (n, d), which are used for nothing else. One thread and a fixed seed: the same on every call.
    None when the rows show no structure.
    """
    start_xy = _principal_plane(rows)
    if start_xy is None:
        return None
    own = np.arange(len(rows))[:, None]
    near = np.hstack([own, ids]).astype(np.int32)
    far = np.hstack([np.zeros(own.shape, np.float32), distances(similarity, "cosine")])
    far[near < 0] = np.inf
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Tensorflow not installed", ImportWarning)
        # New images are not placed on this map.
        warnings.filterwarnings("ignore", r"precomputed_knn\[2\]", UserWarning)
        # Exact copies may be connected to nothing but each other.
        warnings.filterwarnings("ignore", ".*vertices were disconnected", UserWarning)
        from umap import UMAP

        made = UMAP(
            n_neighbors=near.shape[1],
            precomputed_knn=(near, far),
            init=start_xy,
            n_epochs=UMAP_EPOCHS,
            random_state=0,
            n_jobs=1,
        )
        return np.asarray(made.fit_transform(rows))


def _principal_plane(rows: Array) -> Array | None:
    """Return (n, 2) the first two principal components, None when there is no plane to see."""
    from threadpoolctl import threadpool_limits

    if len(rows) < 4 or rows.shape[1] < 2 or np.ptp(rows, axis=0).max() < 1e-5:
        return None
    with threadpool_limits(limits=1):
        return projection(principal_components(block_moments(rows), dim=2))(rows)


def tsne_positions(rows: Array) -> Array | None:
    """Return t-SNE positions (n, 2) of unit rows (n, d), or None when the rows show no structure.

    van der Maaten and Hinton 2008, Barnes-Hut, from the first two principal components. One thread:
    the sum over threads would round differently on every run. 500 steps place neighbors as well as
    the usual 1,000 (trustworthiness 0.946 for both on 2,000 CIFAR-10 images).
    """
    from sklearn.manifold import TSNE
    from threadpoolctl import threadpool_limits

    n, start_xy = len(rows), _principal_plane(rows)
    if start_xy is None:
        return None
    with threadpool_limits(limits=1):
        start_xy *= 1e-4 / max(float(start_xy[:, 0].std()), 1e-12)
        perplexity = min(30.0, (n - 1) / 3)
        made = TSNE(init=start_xy, perplexity=perplexity, max_iter=500, learning_rate="auto")
        return np.asarray(made.fit_transform(rows))
