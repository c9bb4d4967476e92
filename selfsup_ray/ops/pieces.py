"""ApproximateShard: faiss indices over pieces of an embedding array, candidates compared exactly.

An index is cut into pieces by its number of rows, never by who searches it. All pieces share one
set of centers, each holds its own rows of every cell, and each answers by itself; so any split of
the pieces among any number of workers gives the same lists. A plain class without any cluster.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from selfsup_ray.artifacts import Array, ShardedArray, whole_file
from selfsup_ray.ops.approximate import (
    HNSW,
    IVF,
    Recipe,
    Trained,
    build_hnsw,
    build_ivf,
    candidates,
    load_index,
    set_search,
    set_threads,
)
from selfsup_ray.ops.exact_graph import rounded
from selfsup_ray.ops.index import NO_ID, EqualRows, finite_norms, group_equal_rows, padded
from selfsup_ray.ops.neighbors import Neighbors, exact_topk, merge_neighbors, pair_similarity

_READ_ROWS = 65536


@dataclass(frozen=True)
class PieceFiles:
    """The files of an index over n rows of the array at `path`, and how it is built.

    only: a .npy file with ascending ids; the n rows are those. train_rows: size of the random
    sample the centers are trained on. rerank: candidates per wanted neighbor.
    """

    path: Path
    folder: Path
    recipe: Recipe
    n: int
    piece_rows: int
    rerank: int = 2
    train_rows: int = 0
    only: Path | None = None

    @property
    def num_pieces(self) -> int:
        """Pieces the rows are cut into, of equal size."""
        return -(-self.n // self.piece_rows)

    def bounds(self, piece: int) -> tuple[int, int]:
        """Return the range of rows (places in `only`, if given) of a piece."""
        cuts = [i * self.n // self.num_pieces for i in (piece, piece + 1)]
        return cuts[0], cuts[1]

    def index_file(self, piece: int) -> Path:
        """Return the file that is written last for a piece."""
        return self.folder / f"{piece:05d}.index"

    @property
    def num_probes(self) -> int:
        """Cells a query looks at; HNSW has none."""
        return self.recipe.num_probes if isinstance(self.recipe, IVF) else 0

    @property
    def is_trained(self) -> bool:
        """Whether the centers are there; HNSW has none."""
        return isinstance(self.recipe, HNSW) or (self.folder / "trained.index").exists()

    @property
    def missing(self) -> list[int]:
        """Pieces that are still to be built."""
        return [i for i in range(self.num_pieces) if not self.index_file(i).exists()]


class ApproximateShard:
    """Some pieces of an approximate index: builds them, loads them from disk, answers by id.

    Files are read at the first question, so that a method can say what is wrong.
    """

    def __init__(
        self,
        files: PieceFiles,
        pieces: tuple[int, ...],
        *,
        threads: int | None = None,
        gpu: bool = False,
    ) -> None:
        """Stand for these pieces. threads: of faiss here; gpu: search on the first GPU."""
        self.files, self.pieces, self.threads, self.gpu = files, pieces, threads, gpu

    @cached_property
    def rows(self) -> StoredRows:
        """The rows the index is over."""
        only = self.files.only
        ids = None if only is None else np.load(only, mmap_mode="r")
        return StoredRows(ShardedArray.open(self.files.path), ids)

    @cached_property
    def trained(self) -> Trained | None:
        """What the pieces share; None for HNSW."""
        set_threads(self.threads)
        match self.files.recipe:
            case IVF():
                return Trained.read(self.files.folder)
            case HNSW():
                return None

    @cached_property
    def loaded(self) -> list[Piece]:
        """The indices, memory-mapped where faiss can."""
        set_threads(self.threads)
        return [Piece(self.files, piece, gpu=self.gpu) for piece in self.pieces]

    def train(self) -> None:
        """Train the centers on a seeded random sample of rows, normalised, and write them.

        Not on the first rows: a corpus is often sorted.
        """
        recipe = self.files.recipe
        if self.files.is_trained or not isinstance(recipe, IVF):
            return
        set_threads(self.threads)
        rng = np.random.Generator(np.random.PCG64(recipe.seed))
        size = min(self.files.n, max(self.files.train_rows, recipe.num_lists))
        chosen = np.sort(rng.choice(self.files.n, size, replace=False))
        sample = self.rows.read(chosen)
        sample /= np.maximum(np.linalg.norm(sample, axis=1, keepdims=True), 1e-30)
        Trained.fit(sample, recipe).write(self.files.folder)

    def build(self, piece: int) -> None:
        """Build one piece and write it, unless it is there."""
        files, path = self.files, self.files.index_file(piece)
        if path.exists():
            return
        set_threads(self.threads)
        start, stop = files.bounds(piece)
        rows = self.rows.read(np.arange(start, stop))
        order, starts = group_equal_rows(rows)
        norm = np.linalg.norm(rows.astype(np.float64), axis=1).max(initial=0)
        with whole_file(path.with_suffix(".npz")) as temporary, open(temporary, "wb") as file:
            np.savez(file, members=self.rows.ids(order + start), starts=starts, norm=norm)
        if len(starts) - 1 < len(rows):  # equal rows are held once
            rows = rows[order[starts[:-1]]]
        match files.recipe:
            case IVF():
                build_ivf(Trained.read(files.folder), rows, path)
            case HNSW() as hnsw:
                build_hnsw(rows, hnsw, path)

    def assign(self, queries: Array) -> Neighbors | None:
        """Return the cells each query (n, d) looks at, nearest first; None where the index chooses.

        The same in every piece, so it is computed once for all of them.
        """
        recipe = self.files.recipe
        if self.gpu or not isinstance(recipe, IVF):
            return None
        assert self.trained is not None
        return self.trained.nearest(self.trained.rotated(queries), recipe.num_probes)

    def assign_stored(self, path: Path, start: int, stop: int) -> Neighbors | None:
        """Return `assign` of rows [start, stop) of a stored array."""
        return self.assign(_queries(path, start, stop))

    def search(self, queries: Array, k: int, probes: Neighbors | None = None) -> Neighbors:
        """Return the min(k, number of rows) nearest rows found for each query, by global id.

        queries: (n, d) float32. probes: from `assign`. Similarities are exact; a list that found
        too few ends in NO_ID with similarity -inf.
        """
        queries = np.ascontiguousarray(queries, np.float32)
        assert np.isfinite(queries).all(), "queries must be finite"
        parts = [self._search(piece, queries, k, probes) for piece in self.loaded]
        return merge_neighbors(parts, k=k)

    def search_stored(
        self, path: Path, start: int, stop: int, k: int, probes: Neighbors | None = None
    ) -> Neighbors:
        """Return `search` of rows [start, stop) of a stored array: a path travels, not the rows."""
        return self.search(_queries(path, start, stop), k, probes)

    def search_everywhere(self, queries: Array, k: int) -> Neighbors:
        """Return the min(k, number of rows) nearest of all rows here: exact, for few queries."""
        best: list[Neighbors] = []
        for piece in self.pieces:
            start, stop = self.files.bounds(piece)
            for a in range(start, stop, _READ_ROWS):
                places = np.arange(a, min(a + _READ_ROWS, stop))
                rows = self.rows.read(places)
                found = exact_topk(queries, rows, k=min(k, len(rows)))
                best = [
                    merge_neighbors(
                        [*best, Neighbors(self.rows.ids(found.ids + a), found.similarity)], k=k
                    )
                ]
        return best[0]

    def _search(self, piece: Piece, queries: Array, k: int, probes: Neighbors | None) -> Neighbors:
        """Return the lists of one piece: its candidates, compared exactly."""
        count = min(k * self.files.rerank, len(piece.equal))
        set_search(piece.index, self.files.recipe, count=count)
        rotated = queries if self.trained is None else self.trained.rotated(queries)
        found = candidates(piece.index, rotated, count, probes)
        lists = min(k, len(piece.equal))
        is_row = found >= 0
        ids = piece.first_ids[np.where(is_row, found, 0)]
        similarity = self.rows.similarity(queries, ids, norm=piece.norm)
        similarity[~is_row] = -np.inf
        rows = Neighbors(np.where(is_row, found, NO_ID), similarity)
        groups = merge_neighbors([rows], k=lists)
        size = min(k, len(piece.equal.members))
        return padded(piece.equal.expand(groups, size), size)


class Piece:
    """One index file with the ids its entries stand for."""

    def __init__(self, files: PieceFiles, piece: int, *, gpu: bool) -> None:
        path = files.index_file(piece)
        self.index: Any = load_index(path, gpu=gpu)
        with np.load(path.with_suffix(".npz")) as stored:
            self.equal = EqualRows(stored["members"], stored["starts"])
            self.norm = float(stored["norm"])  # of the longest row
        self.first_ids: Array = self.equal.members[self.equal.starts[:-1]]


class StoredRows:
    """Rows of an array on disk, all of them or those of some ids; its shards stay mapped."""

    def __init__(self, array: ShardedArray, only: Array | None) -> None:
        self.array, self.only = array, only
        self.maps: dict[int, Array] = {}

    def ids(self, places: Array) -> Array:
        """Return the ids at places of `only`; without it they are the same."""
        return places if self.only is None else np.asarray(self.only[places])

    def read(self, places: Array) -> Array:
        """Return the rows at these places. Raises ArtifactError when one is not finite."""
        ids = self.ids(places)
        rows = self.by_id(ids)
        finite_norms(rows, self.array.path, ids)
        return rows

    def similarity(self, queries: Array, ids: Array, *, norm: float) -> Array:
        """Return the (n, m) similarity of queries (n, d) to rows ids (n, m), as it is defined.

        norm: no row is longer. Rows are read where they are mapped, not gathered first.
        """
        from selfsup_ray.ops.pair_kernels import pair_products

        rows, wide = ids.ravel(), np.empty(ids.size)
        asking = np.repeat(np.arange(len(ids)), ids.shape[1])
        owner = np.searchsorted(self.array.offsets, rows, side="right") - 1
        for i in np.unique(owner):
            here, part = np.flatnonzero(owner == i), self._map(int(i))
            products = np.empty(len(here))
            local = rows[here] - self.array.offsets[i]
            if part.dtype == np.float16:  # the kernel reads float32
                used, local = np.unique(local, return_inverse=True)
                part = np.asarray(part[used], np.float32)
            pair_products(queries, part, asking[here], local, products)
            wide[here] = products

        def exact(at: Array) -> Array:
            return pair_similarity(queries[asking[at]], self.by_id(rows[at])[:, None])[:, 0]

        longest = float(np.linalg.norm(queries.astype(np.float64), axis=1).max(initial=0))
        how = {"dim": queries.shape[1], "norms": longest * norm}
        return rounded(wide, **how, exact=exact).reshape(ids.shape)

    def by_id(self, ids: Array) -> Array:
        """Return the rows (n, d) of ids (n,)."""
        if self.array.num_shards == 1:
            return np.asarray(self._map(0)[ids], np.float32)
        out = np.empty((len(ids), *self.array.shape[1:]), np.float32)
        owner = np.searchsorted(self.array.offsets, ids, side="right") - 1
        for i in np.unique(owner):
            here = np.flatnonzero(owner == i)
            out[here] = self._map(int(i))[ids[here] - self.array.offsets[i]]
        return out

    def _map(self, i: int) -> Array:
        if i not in self.maps:
            self.maps[i] = np.asarray(self.array.shard(i))
        return self.maps[i]


def _queries(path: Path, start: int, stop: int) -> Array:
    """Return rows [start, stop) of a stored array. Raises ArtifactError for one not finite."""
    ids = np.arange(start, stop)
    queries = ShardedArray.open(path).rows(ids)
    finite_norms(queries, path, ids)
    return queries
