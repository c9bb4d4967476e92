"""Approximate faiss indices over a piece of the rows: training, building, files, candidates.

Only candidates come from here, by position in the piece; `ops/pieces.py` compares them exactly.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from selfsup_ray.artifacts import Array, whole_file
from selfsup_ray.errors import ConfigError
from selfsup_ray.ops.index import on_gpu
from selfsup_ray.ops.neighbors import Neighbors, merge_neighbors, pair_similarity

_EXTRA = 5  # cells fetched beyond those wanted, so that float32 errors at the border can be settled
_ADD_ROWS = 65536
_PQ_CODES = 256  # a byte of a product code names one of these


@dataclass(frozen=True)
class IVF:
    """k-means cells over unit rows; inner product. storage: flat | fp16 | sq8 | pq."""

    num_lists: int
    num_probes: int
    storage: str = "flat"
    pq_bytes: int = 64
    rotate: bool = False
    iterations: int = 10
    seed: int = 0


@dataclass(frozen=True)
class HNSW:
    """A navigable small-world graph; inner product."""

    links: int = 16
    ef_construction: int = 40
    ef_search: int = 64


Recipe = IVF | HNSW


def require_trainable(ivf: IVF, *, dim: int, rows: int) -> None:
    """Raise ConfigError when product codes cannot be fitted to rows of this dimension."""
    if ivf.storage != "pq":
        return
    if dim % ivf.pq_bytes:
        raise ConfigError(
            f"`pq_bytes` is {ivf.pq_bytes}, which does not divide the {dim} dimensions of a row. "
            f"Choose a divisor, such as {_divisor(dim, ivf.pq_bytes)}."
        )
    if rows < _PQ_CODES:
        raise ConfigError(
            f"storage=pq fits {_PQ_CODES} codes, but only {rows} rows are there to train on. "
            f"Set storage to flat, or raise train_sample."
        )


def _divisor(dim: int, wanted: int) -> int:
    return max(i for i in range(1, min(dim, wanted) + 1) if dim % i == 0)


class Trained:
    """The centers and codes that all pieces share, and the rotation of product codes if any."""

    def __init__(self, index: Any, rotation: Array | None) -> None:
        import faiss

        self.index, self.rotation = index, rotation
        self.flat = faiss.downcast_index(index.quantizer)
        self.centers = self.flat.reconstruct_n(0, self.flat.ntotal)

    @classmethod
    def fit(cls, sample: Array, ivf: IVF) -> Trained:
        """Fit centers to unit rows (n, d), n >= num_lists, by spherical k-means; then the codes."""
        import faiss

        require_trainable(ivf, dim=sample.shape[1], rows=len(sample))
        rotation = None
        if ivf.rotate:
            rotation = _fit_rotation(sample, ivf)
            sample = np.ascontiguousarray(sample @ rotation.T)
        kmeans = faiss.Kmeans(
            sample.shape[1],
            ivf.num_lists,
            niter=ivf.iterations,
            seed=ivf.seed,
            spherical=True,
            min_points_per_centroid=1,
            max_points_per_centroid=len(sample),
        )
        kmeans.train(sample)
        flat = faiss.IndexFlatIP(sample.shape[1])
        flat.add(np.asarray(kmeans.centroids))
        index = _empty_ivf(flat, ivf)
        index.train(sample)
        return cls(index, rotation)

    def write(self, folder: Path) -> None:
        """Write the trained index; the file that says it is complete comes last."""
        import faiss

        if self.rotation is not None:
            _save(folder / "rotation.npy", self.rotation)
        with whole_file(folder / "trained.index") as temporary:
            faiss.write_index(self.index, str(temporary))

    @classmethod
    def read(cls, folder: Path) -> Trained:
        """Return what `write` wrote."""
        import faiss

        rotation = folder / "rotation.npy"
        index = faiss.read_index(os.fspath(folder / "trained.index"))
        return cls(index, np.load(rotation) if rotation.exists() else None)

    def rotated(self, rows: Array) -> Array:
        """Return rows (n, d) as the index holds them."""
        return rows if self.rotation is None else np.ascontiguousarray(rows @ self.rotation.T)

    def nearest(self, rows: Array, count: int) -> Neighbors:
        """Return the `count` nearest centers of each of (rotated) rows (n, d), by number.

        Settled as `ops.neighbors` defines similarity, so that neither the threads nor the other
        rows of a block decide which cell a row on a border belongs to.
        """
        rows = np.ascontiguousarray(rows, np.float32)
        wide = min(count + _EXTRA, len(self.centers))
        found = []
        for i in range(0, len(rows), _ADD_ROWS):
            _, lists = self.flat.search(rows[i : i + _ADD_ROWS], wide)
            for j in range(0, len(lists), 64):  # what is gathered at once stays in the cache
                part = lists[j : j + 64]
                exact = pair_similarity(rows[i + j : i + j + len(part)], self.centers[part])
                found.append(merge_neighbors([Neighbors(part, exact)], k=count))
        empty = Neighbors(np.empty((0, count), np.int64), np.empty((0, count), np.float32))
        return Neighbors(
            np.concatenate([part.ids for part in found or [empty]]),
            np.concatenate([part.similarity for part in found or [empty]]),
        )


def _empty_ivf(flat: Any, ivf: IVF) -> Any:
    import faiss

    index: Any
    dim, metric = flat.d, faiss.METRIC_INNER_PRODUCT
    match ivf.storage:
        case "flat":
            index = faiss.IndexIVFFlat(flat, dim, ivf.num_lists, metric)
        case "fp16":
            kind = faiss.ScalarQuantizer.QT_fp16
            index = faiss.IndexIVFScalarQuantizer(flat, dim, ivf.num_lists, kind, metric, False)
        case "sq8":
            kind = faiss.ScalarQuantizer.QT_8bit
            index = faiss.IndexIVFScalarQuantizer(flat, dim, ivf.num_lists, kind, metric, True)
        case "pq":
            index = faiss.IndexIVFPQ(flat, dim, ivf.num_lists, ivf.pq_bytes, 8, metric)
            _set_training(index.pq, ivf)
        case _:
            raise AssertionError(f"storage {ivf.storage!r} is not known")
    return index


def _fit_rotation(sample: Array, ivf: IVF) -> Array:
    """Return the (d, d) rotation under which product codes fit the rows best (Ge et al. 2013)."""
    import faiss

    dim = sample.shape[1]
    codes = faiss.ProductQuantizer(dim, ivf.pq_bytes, 8)
    _set_training(codes, ivf)
    matrix = faiss.OPQMatrix(dim, ivf.pq_bytes)
    matrix.pq, matrix.niter, matrix.niter_pq_0 = codes, ivf.iterations, ivf.iterations
    matrix.train(sample)
    return np.asarray(faiss.vector_to_array(matrix.A).reshape(dim, dim))


def _set_training(codes: Any, ivf: IVF) -> None:
    codes.cp.niter, codes.cp.seed = ivf.iterations, ivf.seed
    codes.cp.min_points_per_centroid = 1  # else faiss warns on standard error


def build_ivf(trained: Trained, rows: Array, path: Path) -> None:
    """Write the index of rows (n, d), by position; a row's cell does not depend on the others.

    trained: as read from its file, still empty; it is not to be used again.
    """
    import faiss

    for i in range(0, len(rows), _ADD_ROWS):
        part = trained.rotated(np.ascontiguousarray(rows[i : i + _ADD_ROWS]))
        lists = np.ascontiguousarray(trained.nearest(part, 1).ids[:, 0])
        pointer = faiss.swig_ptr
        trained.index.add_core(len(part), pointer(part), None, pointer(lists))
    with whole_file(path) as temporary:
        faiss.write_index(trained.index, str(temporary))


def build_hnsw(rows: Array, hnsw: HNSW, path: Path) -> None:
    """Write the graph index of rows (n, d); one thread, since links depend on the order."""
    import faiss

    index = faiss.IndexHNSWFlat(rows.shape[1], hnsw.links, faiss.METRIC_INNER_PRODUCT)
    index.hnsw.efConstruction = hnsw.ef_construction
    threads = faiss.omp_get_max_threads()
    faiss.omp_set_num_threads(1)
    try:
        index.add(np.ascontiguousarray(rows))
    finally:
        faiss.omp_set_num_threads(threads)
    with whole_file(path) as temporary:
        faiss.write_index(index, str(temporary))


def set_threads(threads: int | None) -> None:
    """Set faiss's OpenMP threads in this process; None leaves them as they are."""
    import faiss

    if threads is not None:
        faiss.omp_set_num_threads(threads)


def load_index(path: Path, *, gpu: bool) -> Any:
    """Return the index in a file: memory-mapped where faiss can, or on the first GPU."""
    import faiss

    if gpu:
        return on_gpu(faiss.read_index(os.fspath(path)))
    return faiss.read_index(os.fspath(path), faiss.IO_FLAG_MMAP | faiss.IO_FLAG_READ_ONLY)


def candidates(index: Any, queries: Array, count: int, probes: Neighbors | None) -> Array:
    """Return (n, count) int64 positions of rows that may be nearest, -1 where there are no more.

    queries: (n, d) float32, rotated. probes: the cells to look at; None leaves them to the index
    (a GPU index, which chooses its own, or HNSW).
    """
    if probes is None:
        return np.asarray(index.search(queries, count)[1])
    index.nprobe = probes.k
    return np.asarray(index.search_preassigned(queries, count, probes.ids, probes.similarity)[1])


def set_search(index: Any, recipe: Recipe, *, count: int) -> None:
    """Set how widely an index looks that chooses for itself."""
    match recipe:
        case IVF():
            index.nprobe = recipe.num_probes
        case HNSW():
            index.hnsw.efSearch = max(recipe.ef_search, count)


def _save(path: Path, rows: Array) -> None:
    with whole_file(path) as temporary, open(temporary, "wb") as file:
        np.save(file, rows)
