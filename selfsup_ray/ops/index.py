"""IndexShard: a faiss index over some rows of an embedding array, answering with global image ids.

A plain class without any cluster: `cluster/neighbors.py` makes actors of it, and a restarted one
reads its rows from disk again.
"""

from __future__ import annotations

import logging
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from selfsup_ray.artifacts import Array, ShardedArray
from selfsup_ray.errors import ArtifactError
from selfsup_ray.ops.neighbors import Neighbors, exact_topk, merge_neighbors, pair_similarity

log = logging.getLogger(__name__)

_EXTRA = 5  # fetched beyond k, so that float32 errors around the k-th place can be settled
_ROWS_READ = 65536
_NONE = np.iinfo(np.int64).max


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
    ) -> None:
        """Stand for rows [start, stop) of the ShardedArray in a folder.

        only: a .npy file with ascending ids; [start, stop) then counts in this list.
        threads: OpenMP threads of faiss in this process; None leaves them as they are.
        """
        self.path, self.start, self.stop = path, start, stop
        self.only, self.threads = only, threads

    @cached_property
    def flat(self) -> FlatIndex:
        """The index itself. Raises ArtifactError when rows are missing or not finite."""
        ids = np.arange(self.start, self.stop)
        if self.only is not None:
            ids = np.load(self.only)[self.start : self.stop]
        return FlatIndex(ShardedArray.open(self.path), ids, threads=self.threads)

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
        _finite_norms(queries, path, ids)
        return self.flat.search(queries, k)


class FlatIndex:
    """Exact search in memory: float32 candidates from faiss, then settled in float64.

    The similarities of candidates are summed again as `ops.neighbors` defines them, and the few
    queries whose k-th place the error of float32 leaves open are searched in float64.
    """

    def __init__(self, array: ShardedArray, ids: Array, *, threads: int | None = None) -> None:
        """Read the rows of these ascending ids. Raises ArtifactError when one is not finite."""
        assert array.dtype == np.float32, f"{array.path}: {array.dtype} rows, want float32"
        self.dim = int(array.shape[1])
        self.index, self.rows = _flat_index(len(ids), self.dim, threads)
        self.max_norm = _read(array, ids, into=self.rows)
        order, self.group_starts = group_equal_rows(self.rows)
        self.members = ids[order]  # group by group, ascending within a group
        self._keep_first(order[self.group_starts[:-1]])

    def _keep_first(self, first: Array) -> None:
        """Index equal rows once: thousands of blank images would tie with each other otherwise.

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
        k = min(k, len(self.members))
        if not k or not len(queries):
            shape = (len(queries), k)
            return Neighbors(np.empty(shape, np.int64), np.empty(shape, np.float32))
        return self._expand(self._distinct(queries, min(k, len(self.rows))), k)

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

    def _expand(self, found: Neighbors, k: int) -> Neighbors:
        """Return lists of ids from lists of distinct rows: each stands for all its equals."""
        first, counts = self.group_starts[found.ids], np.diff(self.group_starts)[found.ids]
        ids, similarity = self.members[first], found.similarity
        if len(self.rows) == len(self.members):
            return Neighbors(ids, similarity)
        out = Neighbors(np.empty((len(ids), k), np.int64), np.empty((len(ids), k), np.float32))
        step = 512
        for i in range(0, len(ids), step):
            here = slice(i, i + step)
            parts = [Neighbors(ids[here], similarity[here])]
            for j in range(1, min(k, int(counts[here].max()))):
                has = counts[here] > j
                member = self.members[np.where(has, first[here] + j, 0)]
                parts.append(
                    Neighbors(
                        np.where(has, member, _NONE),
                        np.where(has, similarity[here], np.float32(-np.inf)),
                    )
                )
            merged = merge_neighbors(parts, k=k)
            out.ids[here], out.similarity[here] = merged.ids, merged.similarity
        return out


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


def group_equal_rows(rows: Array) -> tuple[Array, Array]:
    """Return (order, starts): order[starts[g]:starts[g + 1]] are the positions of group g's rows.

    rows: (n, d) float32. Rows of a group are equal, positions ascend within a group, and groups
    are in the order of their first rows. Groups come from a hash; should two different rows share
    one, equal rows may be left in two groups, never different ones put together.
    """
    n, hashes = len(rows), row_hashes(rows)
    by_hash = np.argsort(hashes, kind="stable")
    is_start = np.ones(n, bool)
    pairs = np.flatnonzero(hashes[by_hash][1:] == hashes[by_hash][:-1]) + 1
    for i in range(0, len(pairs), 4096):
        at = pairs[i : i + 4096]
        is_start[at] = (rows[by_hash[at]] != rows[by_hash[at - 1]]).any(axis=1)
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
        norms = _finite_norms(rows, array.path, part)
        largest = max(largest, float(norms.max()))
    return largest


def _finite_norms(rows: Array, path: Path, ids: Array) -> Array:
    """Return the lengths (n,) of rows. Raises ArtifactError naming the first that is not finite."""
    norms: Array = np.sqrt(np.einsum("nd,nd->n", rows, rows, dtype=np.float64))
    if not np.isfinite(norms).all():
        raise ArtifactError(
            f"{path} holds a number that is not finite in row {ids[~np.isfinite(norms)][0]}. "
            f"Look at the encoder's training for divergence, then embed again."
        )
    return norms
