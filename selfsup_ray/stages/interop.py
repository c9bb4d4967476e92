"""A graph in the forms other libraries take: scipy, scikit-learn, umap-learn, openTSNE, files.

These hold the whole graph in memory, as the libraries do: N k times 8 bytes, or 16 with the image
itself put back in. `export_graph` to the published files streams shard by shard, and so does
`export_features`.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal

import numpy as np

from selfsup_ray.artifacts import Array, ShardedArray, whole_file
from selfsup_ray.data.published import write_feature_blocks, write_rows
from selfsup_ray.data.published_graph import with_column, write_graph
from selfsup_ray.errors import ConfigError
from selfsup_ray.ops.faiss_files import write_flat_index
from selfsup_ray.stages.embed import Embeddings
from selfsup_ray.stages.graph import Graph
from selfsup_ray.storage import located

Values = Literal["connectivity", "similarity", "distance"]
Metric = Literal["cosine", "euclidean"]
GraphFormat = Literal["csr", "distances", "int32"]
FeatureFormat = Literal["float32", "hdf5", "index"]


def distances(similarity: Array, metric: Metric) -> Array:
    """Return the float32 distances of unit rows with these inner products: 1 - s, or |x - y|.

    Never negative: rounding can put the similarity of two equal rows above 1.
    """
    cosine = np.maximum(1.0 - np.asarray(similarity, np.float64), 0.0)
    return np.asarray(np.sqrt(2 * cosine) if metric == "euclidean" else cosine, np.float32)


def to_csr(graph: Graph, *, values: Values = "similarity", metric: Metric = "cosine") -> Any:
    """Return the graph as a scipy.sparse.csr_array (N, N): row i holds the neighbors of image i.

    values: `connectivity` is 1 for each neighbor; `distance` follows `metric`. The image itself is
    in no row, an entry of -1 (no neighbor) is left out, and columns ascend.
    """
    ids, similarity = _whole(graph)
    match values:
        case "connectivity":
            data = np.ones(similarity.shape, np.float32)
        case "similarity":
            data = similarity
        case "distance":
            data = distances(similarity, metric)
    made = _csr(ids, data)
    made.sort_indices()
    return made


def to_scikit_learn(graph: Graph, *, metric: Metric = "cosine") -> Any:
    """Return the CSR matrix that scikit-learn takes for metric="precomputed".

    As its KNeighborsTransformer(mode="distance") makes it: each row starts with the image itself
    at distance 0, stored, and goes on by ascending distance. It serves KNeighborsClassifier,
    DBSCAN, TSNE, SpectralClustering(affinity="precomputed_nearest_neighbors") and others.
    """
    ids, distance = _with_self(graph, metric)
    # float64, as there: scikit-learn's own conversion would put the columns in order.
    return _csr(ids, distance.astype(np.float64), matrix=True)


def to_umap(
    graph: Graph, *, n_neighbors: int | None = None, metric: Metric = "cosine"
) -> tuple[Array, Array]:
    """Return umap-learn's `precomputed_knn`: ids and distances (N, n_neighbors), itself first.

    umap.UMAP(precomputed_knn=to_umap(graph, n_neighbors=15), n_neighbors=15).fit(rows) searches no
    neighbors. n_neighbors counts the image itself, k + 1 by default; give UMAP the same number, as
    it does not always cut longer lists. -1: no neighbor. Raises ConfigError for more than k + 1.
    """
    if n_neighbors is not None and not 1 < n_neighbors <= graph.k + 1:
        raise ConfigError(
            f"n_neighbors={n_neighbors}, but {graph.path} has {graph.k} neighbors and the image "
            f"itself. Choose from 2 to {graph.k + 1}, or build the graph with a larger graph.k."
        )
    ids, distance = _with_self(graph, metric)
    return ids[:, :n_neighbors].copy(), distance[:, :n_neighbors].copy()


def to_opentsne(graph: Graph, *, metric: Metric = "cosine") -> tuple[Array, Array]:
    """Return ids and distances (N, k) for openTSNE's PrecomputedNeighbors(ids, distances).

    Its affinities want 3 times the perplexity in neighbors. Raises ConfigError when an image has
    fewer than k neighbors, which openTSNE cannot say.
    """
    ids, similarity = _whole(graph)
    if (ids < 0).any():
        raise ConfigError(
            f"{graph.path}: {int((ids < 0).any(axis=1).sum()):,} images have fewer than {graph.k} "
            f"neighbors, which openTSNE cannot take. Build the graph with another method."
        )
    return ids.astype(np.int64), distances(similarity, metric)


def _whole(graph: Graph) -> tuple[Array, Array]:
    return np.asarray(graph.ids), np.asarray(graph.similarity)


def _with_self(graph: Graph, metric: Metric) -> tuple[Array, Array]:
    ids, similarity = _whole(graph)
    n, first = len(ids), np.zeros(len(ids), np.int64)
    distance = np.where(ids < 0, np.float32(np.inf), distances(similarity, metric))
    own = np.arange(n, dtype=ids.dtype)
    return with_column(ids, first, own), with_column(distance, first, np.zeros(n, np.float32))


def _csr(ids: Array, data: Array, *, matrix: bool = False) -> Any:
    """Return (N, k) lists as CSR in the order they have; scikit-learn wants a csr_matrix."""
    from scipy.sparse import csr_array, csr_matrix

    valid = ids >= 0
    offsets = np.concatenate([[0], np.cumsum(valid.sum(axis=1))])
    all_valid = int(offsets[-1]) == ids.size
    # scipy gives both index arrays the wider of their types.
    offsets = offsets.astype(np.int32) if offsets[-1] < 2**31 else offsets
    parts = (data.ravel(), ids.ravel()) if all_valid else (data[valid], ids[valid])
    make = csr_matrix if matrix else csr_array
    return make((*parts, offsets), shape=(len(ids), len(ids)))


def find_graph(path: Path | str) -> Graph:
    """Return the graph of a run folder, or in a graph folder itself.

    Raises ArtifactError when there is no finished one.
    """
    below = located(path) / "graph"
    return Graph.open(below if below.is_dir() else path)


def export_graph(graph: Graph, out: Path | str, *, format: GraphFormat) -> list[Path]:
    """Write the graph as files other programs read and return their paths.

    `int32`: into the folder `out`, ids and similarities under the published names, the image itself
    put back, as the file it was imported from had it, else first with similarity 1. `csr`: one .npz
    for scipy.sparse.load_npz with similarities; `distances`: the same as scikit-learn wants it.
    """
    out = located(out)
    if format == "int32":
        return list(write_graph(out, _published_rows(graph), n=len(graph), k=graph.k + 1))
    from scipy.sparse import save_npz

    made = to_csr(graph) if format == "csr" else to_scikit_learn(graph)
    path = out if out.suffix == ".npz" else out / f"graph-{format}.npz"
    with whole_file(path) as temporary, open(temporary, "wb") as file:
        save_npz(file, made)
    return [path]


def export_features(features: Embeddings, out: Path | str, *, format: FeatureFormat) -> list[Path]:
    """Write embeddings, or reduced ones, as published files into a folder; return their paths.

    `float32`: one raw matrix, features.float32; `hdf5`: blocks of a million rows with the labels
    that were imported, else those of the corpus, else -1; `index`: a flat index of faiss for inner
    products, features.index. A shard is in memory at a time. `import_features` reads them all.
    """
    out, array = located(out), features.array
    match format:
        case "float32":
            write_rows(out / "features.float32", array)
            return [out / "features.float32"]
        case "index":
            write_flat_index(out / "features.index", array)
            return [out / "features.index"]
        case "hdf5":
            return write_feature_blocks(out, array, _labels(features))


def _labels(features: Embeddings) -> Array:
    """Return the (N,) labels of the rows, -1 where none is known."""
    if (features.path / "labels" / ShardedArray.MANIFEST).exists():
        return np.asarray(ShardedArray.open(features.path / "labels"))
    if "corpus" in features.facts and features.corpus.has_labels:
        return features.corpus.labels()
    return np.full(len(features), -1, np.int64)


def _published_rows(graph: Graph) -> Iterator[tuple[Array, Array]]:
    """Yield ids and similarity (n, k + 1) of each shard."""
    imported = (graph.path / "dropped" / ShardedArray.MANIFEST).exists()
    for i, n in enumerate(graph.ids.shard_rows):
        first = int(graph.ids.offsets[i])
        column, own = np.zeros(n, np.int64), np.arange(first, first + n, dtype=np.int32)
        similarity = np.ones(n, np.float32)
        if imported:
            dropped = ShardedArray.open(graph.path / "dropped").shard(i)
            own, column = dropped[:, 0], dropped[:, 1]
            similarity = ShardedArray.open(graph.path / "dropped_similarity").shard(i)
        ids = with_column(np.asarray(graph.ids.shard(i), np.int32), column, own)
        yield ids, with_column(graph.similarity.shard(i), column, similarity)
