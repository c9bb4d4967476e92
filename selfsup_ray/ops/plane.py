"""Where rows lie in the plane: t-SNE and UMAP, the same on every call."""

from __future__ import annotations

import warnings

import numpy as np

from selfsup_ray.artifacts import Array
from selfsup_ray.ops.neighbors import exact_topk
from selfsup_ray.ops.pca import block_moments, principal_components, projection

UMAP_EPOCHS = 200
"""As umap-learn has it for more images; its 500 for fewer take 4 s longer and place neighbors as
well: trustworthiness 0.981 for both on 10,000 of Fashion-MNIST."""
TSNE_STEPS = 500
"""Place neighbors as well as the usual 1,000 (trustworthiness 0.946 for both on 2,000 CIFAR-10
images)."""


def neighbors_among(rows: Array, k: int) -> tuple[Array, Array]:
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
    far = np.hstack([np.zeros(own.shape, np.float32), cosine_distances(similarity)])
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


def tsne_positions(rows: Array, *, perplexity: float = 30.0) -> Array | None:
    """Return t-SNE positions (n, 2) of unit rows (n, d), or None when the rows show no structure.

    van der Maaten and Hinton 2008, Barnes-Hut, from the first two principal components. One thread:
    the sum over threads would round differently on every run.
    """
    from sklearn.manifold import TSNE
    from threadpoolctl import threadpool_limits

    n, start_xy = len(rows), _principal_plane(rows)
    if start_xy is None:
        return None
    with threadpool_limits(limits=1):
        start_xy *= 1e-4 / max(float(start_xy[:, 0].std()), 1e-12)
        near = min(perplexity, (n - 1) / 3)
        made = TSNE(init=start_xy, perplexity=near, max_iter=TSNE_STEPS, learning_rate="auto")
        return np.asarray(made.fit_transform(rows))


def opentsne_positions(
    rows: Array, ids: Array, similarity: Array, *, perplexity: float = 30.0
) -> Array | None:
    """Return t-SNE positions (n, 2) from neighbors, by openTSNE: for thousands of rows and more.

    ids, similarity: (n, k), itself not listed, k about three times the perplexity. rows: (n, d)
    unit rows, whose principal plane is the start. None when they show no structure.
    """
    from openTSNE import TSNEEmbedding
    from openTSNE.affinity import PerplexityBasedNN
    from openTSNE.nearest_neighbors import PrecomputedNeighbors

    start_xy = _principal_plane(rows)
    if start_xy is None:
        return None
    start_xy *= 1e-4 / max(float(start_xy[:, 0].std()), 1e-12)
    index = PrecomputedNeighbors(np.asarray(ids, np.int64), cosine_distances(similarity))
    near = min(perplexity, ids.shape[1] / 3)
    affinities = PerplexityBasedNN(knn_index=index, perplexity=near, n_jobs=1)
    made = TSNEEmbedding(start_xy, affinities, n_jobs=1, random_state=0)
    made = made.optimize(n_iter=TSNE_STEPS // 4, exaggeration=12, momentum=0.5)
    made = made.optimize(n_iter=TSNE_STEPS - TSNE_STEPS // 4, momentum=0.8)
    return np.asarray(made)


def cosine_distances(similarity: Array) -> Array:
    """Return 1 - similarity of unit rows, float32 and never negative."""
    return np.maximum(1.0 - np.asarray(similarity, np.float64), 0.0).astype(np.float32)
