"""Label diffusion on a kNN graph (Douze et al. 2018): a few labels spread over all nodes.

With A the 0/1 matrix of neighbor lists, self links kept, B = A + A^T and W = diag(1 / B 1) B:

    L_0[i, c] = 1 if node i has label c;   L_t = W L_{t-1};   each column of each L_t sums to 1,

and the score of an image outside the graph is the sum of L_t over its own k neighbors.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from selfsup_ray.ops.adjacency import (
    Adjacency,
    Links,
    build_adjacency,
    has_numba,
    traversal_order,
)
from selfsup_ray.ops.spreading import Spread, Variant

if TYPE_CHECKING:
    from selfsup_ray.artifacts import Array, ShardedArray


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
    def variant(self) -> Variant:
        """What of these a step does."""
        return Variant(self.normalize_columns, self.reset_seeds, self.sinkhorn)

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
    graph = make_adjacency(
        ids, similarity, order=order, threads=threads, device=device, options=options
    )
    yield from spread_scores(
        graph,
        seeds,
        test_ids,
        first=0,
        stop=num_classes,
        niter=niter,
        threads=threads,
        dtype=dtype,
        device=device,
        variant=options.variant,
    )


def spread_scores(
    graph: Adjacency,
    seeds: Array,
    test_ids: Array,
    *,
    first: int,
    stop: int,
    niter: int,
    threads: int = 1,
    dtype: Literal["float32", "bfloat16"] = "float32",
    device: str = "cpu",
    variant: Variant | None = None,
) -> Iterator[Array]:
    """Yield the (n_t, stop - first) scores T L_t of the classes [first, stop) for t = 0..niter.

    seeds, test_ids: as in `diffuse_scores`. Columns do not depend on the others of the range,
    unless the variant normalises rows (`sinkhorn`).
    """
    near, seeds = np.asarray(test_ids), np.asarray(seeds)
    if graph.place is not None:
        near = np.where(near >= 0, graph.place[near], -1)
        seeds = seeds[graph.order]
    state = spread(
        graph,
        seeds,
        first=first,
        stop=stop,
        threads=threads,
        dtype=dtype,
        device=device,
        variant=variant,
    )
    for t in range(niter + 1):
        if t:
            state.step()
        yield state.sums(near)


def make_adjacency(
    ids: Array | ShardedArray,
    similarity: Array | ShardedArray | None,
    *,
    order: Array | None,
    threads: int,
    options: DiffusionOptions,
    device: str = "cpu",
) -> Adjacency:
    """Return the rows of B in memory, with values only where the options ask for weights.

    Without an order, large graphs get one of their own.
    """
    if order is None and isinstance(ids, np.ndarray):
        order = traversal_order(ids)
    if options.is_constant:
        links = Links(ids, similarity, options.min_similarity)
        return build_adjacency(
            links, order=order, reciprocal=options.reciprocal, threads=threads, device=device
        )
    return weighted_adjacency(
        np.asarray(ids),
        None if similarity is None else np.asarray(similarity),
        order=order,
        options=options,
    )


def weighted_adjacency(
    ids: Array, similarity: Array | None, *, order: Array | None, options: DiffusionOptions
) -> Adjacency:
    """Return the rows of B with weights, by scipy: for graphs of some million nodes."""
    weights = None
    if options.weights == "gaussian":
        assert similarity is not None, "gaussian weights need the similarity of every link"
        weights = link_weights(similarity, sigma=options.sigma)
    kept = kept_links(ids, similarity, options)
    made = knn_to_adjacency(kept, weights=weights, reciprocal=options.reciprocal)
    if options.tau != 1.0:
        made.data **= options.tau
    if order is not None:
        made = made[order][:, order]
    made.sort_indices()
    return Adjacency(
        made.indptr.astype(np.int64),
        made.indices.astype(np.int32),
        np.zeros(len(ids), np.int32),
        values=made.data.astype(np.float32),
        order=order,
    )


def spread(
    graph: Adjacency,
    seeds: Array,
    *,
    first: int,
    stop: int,
    threads: int = 1,
    dtype: Literal["float32", "bfloat16"] = "float32",
    device: str = "cpu",
    variant: Variant | None = None,
) -> Spread:
    """Return L_0 of classes [first, stop); numba steps it on a CPU that has it, torch elsewhere.

    seeds: (N,) class of each node or -1, in the graph's numbering of places.
    """
    variant = variant or Variant()
    if device == "cpu" and has_numba():
        from selfsup_ray.ops.cpu_spreading import CpuSpread

        return CpuSpread(graph, seeds, first, stop, threads=threads, dtype=dtype, variant=variant)
    from selfsup_ray.ops.torch_spreading import TorchSpread

    return TorchSpread(graph, seeds, first, stop, dtype=dtype, device=device, variant=variant)
