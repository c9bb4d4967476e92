"""IndexShard: a faiss index over some rows of an embedding array, answering with global image ids.

A plain class without any cluster: `cluster/neighbors.py` makes actors of it, and a restarted one
reads its rows from disk again.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from selfsup_ray.artifacts import Array, ShardedArray
from selfsup_ray.errors import ArtifactError, ConfigError
from selfsup_ray.ops.neighbors import Neighbors, exact_topk, merge_neighbors, pair_similarity

log = logging.getLogger(__name__)

_EXTRA = 5  # fetched beyond k, so that float32 errors around the k-th place can be settled
_ROWS_READ = 65536
NO_ID = int(np.iinfo(np.int64).max)
"""In a list that found too few: no neighbor. It sorts behind every id."""


class IndexShard:
    """faiss flat index over some rows of an (N, d) array of unit float32 rows.

    Its answers are exact in the sense of `ops.neighbors`, so they do not depend on how rows are
    cut into shards. The rows are read at the first question: an actor whose constructor fails
    can only die, while a method can say what is wrong.
    """

    def __init__(
        self,
        path: Path,
        *,
        start: int,
        stop: int,
        only: Path | None = None,
        threads: int | None = None,
        gpu: bool = False,
    ) -> None:
        """Stand for rows [start, stop) of the ShardedArray in a folder.

        only: a .npy file with ascending ids; [start, stop) then counts in this list.
        threads: OpenMP threads of faiss in this process; None leaves them as they are.
        gpu: hold the rows on the first GPU too.
        """
        self.path, self.start, self.stop = path, start, stop
        self.only, self.threads, self.gpu = only, threads, gpu

    @cached_property
    def flat(self) -> FlatIndex:
        """The index itself. Raises ArtifactError when rows are missing or not finite."""
        ids = np.arange(self.start, self.stop)
        if self.only is not None:
            ids = np.load(self.only)[self.start : self.stop]
        array = ShardedArray.open(self.path)
        return FlatIndex(array, ids, threads=self.threads, gpu=self.gpu)

    def search(self, queries: Array, k: int) -> Neighbors:
        """Return the min(k, number of rows) nearest rows of each query, by global id.

        queries: (n, d) float32 unit rows; n of a few hundred to a few thousand keeps BLAS busy.
        """
        return self.flat.search(queries, k)

    def search_stored(self, path: Path, start: int, stop: int, k: int) -> Neighbors:
        """Return `search` of rows [start, stop) of a stored array: a path travels, not the rows.

        Raises ArtifactError when a row is not finite.
        """
        ids = np.arange(start, stop)
        queries = ShardedArray.open(path).rows(ids)
        finite_norms(queries, path, ids)
        return self.flat.search(queries, k)


class FlatIndex:
    """Exact search in memory: float32 candidates from faiss, then settled in float64.

    The similarities of candidates are summed again as `ops.neighbors` defines them, and the few
    queries whose k-th place the error of float32 leaves open are searched in float64.
    """

    def __init__(
        self, array: ShardedArray, ids: Array, *, threads: int | None = None, gpu: bool = False
    ) -> None:
        """Read the rows of these ascending ids. Raises ArtifactError when one is not finite."""
        assert array.read_dtype == np.float32, f"{array.path}: {array.dtype} rows, want float32"
        self.dim = int(array.shape[1])
        self.index, self.rows = _flat_index(len(ids), self.dim, threads)
        self.max_norm = _read(array, ids, into=self.rows)
        order, starts = group_equal_rows(self.rows)
        self.equal = EqualRows(ids[order], starts)
        self._keep_first(order[starts[:-1]])
        if gpu:
            self.index = on_gpu(self.index)

    def _keep_first(self, first: Array) -> None:
        """Index equal rows once.

        first: the position of each group's first row, ascending: rows only move to the front.
        """
        if len(first) == len(self.rows):
            return
        for i in range(0, len(first), _ROWS_READ):
            piece = first[i : i + _ROWS_READ]
            self.rows[i : i + len(piece)] = self.rows[piece]
        self.rows = self.rows[: len(first)]
        if self.index is not None:
            self.index.ntotal = len(first)

    def search(self, queries: Array, k: int) -> Neighbors:
        """Return the min(k, number of rows) nearest rows of each query (n, d), by id."""
        queries = np.ascontiguousarray(queries, np.float32)
        assert np.isfinite(queries).all(), "queries must be finite"
        k = min(k, len(self.equal.members))
        if not k or not len(queries):
            shape = (len(queries), k)
            return Neighbors(np.empty(shape, np.int64), np.empty(shape, np.float32))
        return self.equal.expand(self._distinct(queries, min(k, len(self.rows))), k)

    def _distinct(self, queries: Array, k: int) -> Neighbors:
        """Return the k nearest distinct rows, by position in `self.rows`."""
        if self.index is None:
            return exact_topk(queries, self.rows, k=k)
        wide = min(k + _EXTRA, len(self.rows))
        rough, positions = self.index.search(queries, wide)
        exact = np.concatenate(
            [
                pair_similarity(queries[i : i + 64], self.rows[positions[i : i + 64]])
                for i in range(0, len(queries), 64)  # what is gathered at once stays in the cache
            ]
        )
        found = merge_neighbors([Neighbors(positions, exact)], k=k)
        if wide == len(self.rows):
            return found
        # What faiss left out is at most its last entry plus the error of a float32 sum of d
        # products in any order (Higham 2002, sec. 3.1) and that of rounding the exact value.
        unit = self.dim * 2.0**-24
        norms = np.linalg.norm(queries.astype(np.float64), axis=1) * self.max_norm
        error = (unit / (1 - unit) + 2.0**-23) * norms
        open_ = np.flatnonzero(found.similarity[:, -1] <= rough[:, -1] + error)
        if len(open_):
            settled = exact_topk(queries[open_], self.rows, k=k)
            found.ids[open_], found.similarity[open_] = settled.ids, settled.similarity
        return found


class EqualRows:
    """Groups of equal rows, each held once: thousands of blank images would tie with each other.

    members: (n,) the ids, group by group, ascending within a group; starts: (groups + 1,) int64.
    """

    def __init__(self, members: Array, starts: Array) -> None:
        self.members, self.starts = members, starts

    def __len__(self) -> int:
        return len(self.starts) - 1

    def expand(self, found: Neighbors, k: int) -> Neighbors:
        """Return lists of k ids from lists of groups: each stands for all its equals.

        NO_ID in place of a group is passed on, with its similarity.
        """
        is_group = found.ids != NO_ID
        groups = np.where(is_group, found.ids, 0)
        first = self.starts[groups]
        ids, similarity = np.where(is_group, self.members[first], NO_ID), found.similarity
        if len(self) == len(self.members):
            return Neighbors(ids, similarity)
        counts = np.where(is_group, self.starts[groups + 1] - first, 1)
        out = Neighbors(np.empty((len(ids), k), np.int64), np.empty((len(ids), k), np.float32))
        step = 512
        for i in range(0, len(ids), step):
            here = slice(i, i + step)
            parts = [Neighbors(ids[here], similarity[here])]
            for j in range(1, min(k, int(counts[here].max(initial=1)))):
                has = counts[here] > j
                member = self.members[np.where(has, first[here] + j, 0)]
                parts.append(
                    Neighbors(
                        np.where(has, member, NO_ID),
                        np.where(has, similarity[here], np.float32(-np.inf)),
                    )
                )
            merged = padded(merge_neighbors(parts, k=k), k)
            out.ids[here], out.similarity[here] = merged.ids, merged.similarity
        return out


def padded(found: Neighbors, k: int) -> Neighbors:
    """Return lists of k entries, NO_ID with similarity -inf where there are no more."""
    missing = k - found.k
    if missing <= 0:
        return found
    return Neighbors(
        np.pad(found.ids, ((0, 0), (0, missing)), constant_values=NO_ID),
        np.pad(found.similarity, ((0, 0), (0, missing)), constant_values=-np.inf),
    )


def _flat_index(n: int, dim: int, threads: int | None) -> tuple[Any, Array]:
    """Return a faiss index for n rows and a view of its memory, still to be filled.

    `add` would hold every row twice while it copies. Without faiss: None and plain memory.
    """
    try:
        import faiss
    except ImportError:
        log.warning("faiss is not installed: the search uses numpy, same result, 4 times slower")
        return None, np.empty((n, dim), np.float32)
    # Below this many numbers faiss leaves BLAS, and a flat search is 4 to 17 times slower; its
    # default of 128,000 assumes many queries or a large d. One query stays on the scalar path.
    faiss.cvar.distance_compute_blas_threshold = 16 * dim
    if threads is not None:
        faiss.omp_set_num_threads(threads)
    index = faiss.IndexFlatIP(dim)
    index.codes.resize(n * dim * 4)
    index.ntotal = n
    if n == 0:
        return index, np.empty((0, dim), np.float32)
    return index, faiss.rev_swig_ptr(index.get_xb(), n * dim).reshape(n, dim)


def on_gpu(index: Any) -> Any:
    """Return a faiss index on the first GPU. Raises ConfigError when there is none."""
    import faiss

    if not faiss.get_num_gpus():
        raise ConfigError(
            "resources.gpus asks for a GPU index, but faiss sees no GPU here. Check the driver, "
            "or set resources.gpus to 0."
        )
    return faiss.index_cpu_to_gpu(faiss.StandardGpuResources(), 0, index)


def require_gpu_faiss(method: str) -> None:
    """Raise ConfigError unless faiss here can make a GPU index of this method.

    Whether a GPU is there is for the actor that gets it to say.
    """
    if method == "hnsw":
        raise ConfigError(
            "method=hnsw searches on CPUs only. Set resources.gpus to 0, or choose exact or ivf."
        )
    try:
        import faiss
    except ImportError:
        raise ConfigError(
            "resources.gpus asks for a GPU index, but faiss is not installed. "
            "Install faiss-gpu, or set resources.gpus to 0."
        ) from None
    if not hasattr(faiss, "StandardGpuResources"):
        raise ConfigError(
            f"resources.gpus asks for a GPU index, but faiss {faiss.__version__} was built without "
            f"GPU code. Install faiss-gpu, or set resources.gpus to 0."
        )


def group_equal_rows(rows: Array) -> tuple[Array, Array]:
    """Return (order, starts): order[starts[g]:starts[g + 1]] are the positions of group g's rows.

    rows: (n, d) float32. Rows of a group are equal, positions ascend within a group, and groups
    are in the order of their first rows. Groups come from a hash; should two different rows share
    one, equal rows may be left in two groups, never different ones put together.
    """
    return group_by_hash(row_hashes(rows), rows.__getitem__)


def group_by_hash(hashes: Array, rows_at: Callable[[Array], Array]) -> tuple[Array, Array]:
    """Return `group_equal_rows` of rows that are hashed already; rows_at reads some of them."""
    n = len(hashes)
    by_hash = np.argsort(hashes, kind="stable")
    is_start = np.ones(n, bool)
    pairs = np.flatnonzero(hashes[by_hash][1:] == hashes[by_hash][:-1]) + 1
    for i in range(0, len(pairs), 4096):
        at = pairs[i : i + 4096]
        is_start[at] = (rows_at(by_hash[at]) != rows_at(by_hash[at - 1])).any(axis=1)
    group = np.cumsum(is_start) - 1
    first = by_hash[is_start]  # the lowest position of each group: the sort is stable
    rank = np.empty(len(first), np.int64)
    rank[np.argsort(first)] = np.arange(len(first))
    order = by_hash[np.argsort(rank[group], kind="stable")]
    sizes = np.diff(np.append(np.flatnonzero(is_start), n))[np.argsort(first)]
    return order, np.concatenate([[0], np.cumsum(sizes)]).astype(np.int64)


def row_hashes(rows: Array) -> Array:
    """Return a 64-bit hash of the bits of each of rows (n, d) float32: equal rows, equal hashes."""
    n, d = rows.shape
    weights = np.arange(1, d + 1, dtype=np.uint64) * np.uint64(0x9E3779B97F4A7C15) | np.uint64(1)
    hashes = np.empty(n, np.uint64)
    for i in range(0, n, 4096):
        bits = rows[i : i + 4096].view(np.uint32).astype(np.uint64)
        hashes[i : i + 4096] = (bits * weights).sum(axis=1)
    return hashes


def _read(array: ShardedArray, ids: Array, *, into: Array) -> float:
    """Fill `into` with the rows of ids; return the largest norm."""
    largest = 0.0
    for i in range(0, len(ids), _ROWS_READ):
        part = ids[i : i + _ROWS_READ]
        rows = into[i : i + len(part)]
        rows[:] = array.rows(part)
        norms = finite_norms(rows, array.path, part)
        largest = max(largest, float(norms.max()))
    return largest


def finite_norms(rows: Array, path: Path, ids: Array) -> Array:
    """Return the lengths (n,) of rows. Raises ArtifactError naming the first that is not finite."""
    norms: Array = np.sqrt(np.einsum("nd,nd->n", rows, rows, dtype=np.float64))
    if not np.isfinite(norms).all():
        raise ArtifactError(
            f"{path} holds a number that is not finite in row {ids[~np.isfinite(norms)][0]}. "
            f"Look at the encoder's training for divergence, then embed again."
        )
    return norms
