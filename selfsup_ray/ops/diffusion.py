"""Label diffusion on a kNN graph (Douze et al. 2018): a few labels spread over all nodes.

With A the 0/1 matrix of neighbor lists, self links kept, B = A + A^T and W = diag(1 / B 1) B:

    L_0[i, c] = 1 if node i has label c;   L_t = W L_{t-1};   each column of each L_t sums to 1,

and the score of an image outside the graph is the sum of L_t over its own k neighbors.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np

from selfsup_ray.artifacts import Array


@dataclass(frozen=True)
class DiffusionOptions:
    """Variants of the operator; the defaults are the published method.

    weights, sigma: a link weighs 1, or exp(-|x - y|^2 / (2 sigma^2)) for unit rows x and y.
    reciprocal: keep only links that both images list (B = A o A^T). tau: power of the entries of
    B. sinkhorn: times that rows and columns of L_t are normalised in turn after a step, rows
    first; 0 is columns only. reset_seeds: labelled rows become one-hot again after each product.
    normalize_columns: whether columns sum to 1. min_similarity: links below it are left out.
    """

    weights: Literal["constant", "gaussian"] = "constant"
    sigma: float = 0.5
    reciprocal: bool = False
    tau: float = 1.0
    sinkhorn: int = 0
    reset_seeds: bool = False
    normalize_columns: bool = True
    min_similarity: float | None = None

    @property
    def is_constant(self) -> bool:
        """Whether the entries of B are the small integers of the published method."""
        return self.weights == "constant" and self.tau == 1.0


def link_weights(similarity: Array, *, sigma: float) -> Array:
    """Return exp(-|x - y|^2 / (2 sigma^2)) of unit rows from their inner products, float32."""
    return np.exp((np.asarray(similarity, np.float64) - 1) / sigma**2).astype(np.float32)


def kept_links(ids: Array, similarity: Array | None, options: DiffusionOptions) -> Array:
    """Return (N, k) ids with -1 in place of the links that are less similar than wanted."""
    if options.min_similarity is None:
        return ids
    assert similarity is not None, "min_similarity needs the similarity of every link"
    return np.where(np.asarray(similarity) >= options.min_similarity, ids, -1)


def knn_to_adjacency(
    ids: Array,
    *,
    weights: Array | None = None,
    self_link: bool = True,
    reciprocal: bool = False,
) -> Any:
    """Return B = A + A^T (or A o A^T) as a float32 (N, N) scipy.sparse.csr_array.

    ids: (N, k) neighbors of each node, -1 = none; an id that a list holds twice counts once, and
    the node itself counts as `self_link` says. weights: (N, k) of the links; 1 without, and 1 for
    the self link. Held in memory whole, about 30 bytes a link while it is made.
    """
    import scipy.sparse as sparse

    n, k = ids.shape
    flat = np.asarray(ids).ravel()
    rows = np.repeat(np.arange(n, dtype=flat.dtype), k)
    keep = np.flatnonzero((flat >= 0) & (flat != rows))
    values = np.ones(len(keep), np.float32)
    if weights is not None:
        values = np.asarray(weights, np.float32).ravel()[keep]
    rows, columns = rows[keep], flat[keep]
    keys = rows.astype(np.int64) * n + columns
    keys, first = np.unique(keys, return_index=True)  # the first entry of an id: the most similar
    rows, columns, values = rows[first], columns[first], values[first]
    if self_link:
        own = np.arange(n, dtype=rows.dtype)
        rows, columns = np.concatenate([rows, own]), np.concatenate([columns, own])
        values = np.concatenate([values, np.ones(n, np.float32)])
    a = sparse.csr_array((values, (rows, columns)), shape=(n, n))
    made = (a * a.T if reciprocal else a + a.T).tocsr()
    made.sort_indices()
    return made


def diffuse_scores(
    ids: Array,
    seeds: Array,
    test_ids: Array,
    *,
    num_classes: int,
    niter: int,
    similarity: Array | None = None,
    order: Array | None = None,
    threads: int = 1,
    dtype: Literal["float32", "bfloat16"] = "float32",
    device: str = "cpu",
    options: DiffusionOptions | None = None,
) -> Iterator[Array]:
    """Yield the (n_t, C) float32 scores T L_t of the test images for t = 0..niter.

    ids: (N, k) neighbors among the N nodes, the node itself not included, -1 = none; similarity
    (N, k) of the links is needed for gaussian weights and min_similarity. seeds: (N,) class or -1.
    test_ids: (n_t, k) nodes near each test image, -1 = none; links to test images do not exist, so
    they only receive. order: (N,) node at each place of an order in which neighbors are close.
    """
    options = options or DiffusionOptions()
    matrix = _adjacency(ids, similarity, options)
    degrees = np.asarray(matrix.sum(axis=1, dtype=np.float64)).ravel()
    scale = np.divide(1.0, degrees, out=np.zeros_like(degrees), where=degrees > 0)[:, None]
    seeds = np.asarray(seeds)
    labelled = np.flatnonzero(seeds >= 0)
    label = np.zeros((len(seeds), num_classes))
    label[labelled, seeds[labelled]] = 1.0
    for t in range(niter + 1):
        if t:
            label = (matrix @ label) * scale
            if options.reset_seeds:
                label[labelled] = 0.0
                label[labelled, seeds[labelled]] = 1.0
        for _ in range(options.sinkhorn if t else 0):
            label = _normalized(_normalized(label, axis=1), axis=0)
        if options.normalize_columns:
            label = _normalized(label, axis=0)
        yield outside_scores(label, test_ids)


def _adjacency(ids: Array, similarity: Array | None, options: DiffusionOptions) -> Any:
    weights = None
    if options.weights == "gaussian":
        assert similarity is not None, "gaussian weights need the similarity of every link"
        weights = link_weights(similarity, sigma=options.sigma)
    kept = kept_links(ids, similarity, options)
    made = knn_to_adjacency(kept, weights=weights, reciprocal=options.reciprocal)
    if options.tau != 1.0:
        made.data **= options.tau
    return made


def _normalized(values: Array, *, axis: int) -> Array:
    sums = values.sum(axis=axis, keepdims=True)
    made: Array = np.divide(values, sums, out=np.zeros_like(values), where=sums > 0)
    return made


def outside_scores(label: Array, test_ids: Array) -> Array:
    """Return T L: the (n_t, C) float32 sums of L over each test image's neighbors."""
    out = np.zeros((len(test_ids), label.shape[1]), np.float32)
    for start in range(0, len(test_ids), 256):
        part = np.asarray(test_ids[start : start + 256])
        rows = label[np.maximum(part, 0)] * (part >= 0)[..., None]
        out[start : start + 256] = rows.sum(axis=1)
    return out
