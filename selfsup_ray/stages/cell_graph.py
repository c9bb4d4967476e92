"""The kNN graph by the cell join, out of core: four rounds of tasks over files.

Rounds: `sort` assigns the rows of each part of the corpus to cells and sorts them; `gather` puts
the pieces of each range of cells together, in cell order; `join` finds the lists of each range;
`scatter` brings the lists back into the order of the images. A task reads files, writes its own
whole, and is skipped when they exist; its memory depends on the config, not on N.
"""

from __future__ import annotations

from dataclasses import dataclass, fields
from functools import cached_property
from itertools import pairwise
from pathlib import Path
from typing import Literal

import numpy as np

from selfsup_ray.artifacts import (
    Array,
    ShardedArray,
    create_mapped,
    read_json,
    require_disk,
    whole_file,
    write_json,
)
from selfsup_ray.config import NonNegative, Positive, Resources, config
from selfsup_ray.errors import ArtifactError
from selfsup_ray.ops.celljoin import Cells, join, release
from selfsup_ray.ops.celljoin_blocks import join_blocks
from selfsup_ray.ops.cells import CellTree, assign_cells, fit_cells
from selfsup_ray.ops.equal_rows import Followers, expand, leaders_first
from selfsup_ray.ops.neighbors import Neighbors, drop_self, exact_topk, merge_neighbors
from selfsup_ray.ops.rng import permuted
from selfsup_ray.stages.cell_files import BLOCK, gathered, joined, write_into, write_new
from selfsup_ray.stages.rounds import one_round
from selfsup_ray.storage import StoredPath, names_in

MAX_CELLS = 262_144
RANGE_ROWS = 524_288
"""Rows joined at once, at most."""
TASKS, TASK_ROWS = 8, 65_536
"""Tasks of each round at least, so that workers share it, as far as each has that many rows."""
SMALL_BYTES = 2_000_000_000
"""Up to this size rows are read by id, in the page cache; larger corpora are sorted by part first,
since single rows from a disk cost a page each."""


@config
class CellsConfig:
    """Cell join: k-means cells, products of near cells, exact settling of the best candidates."""

    name: Literal["cells"] = "cells"
    cell_size: Positive = 128
    """Images per cell on average; above 34 million images cells grow instead of their number."""
    probes: Positive = 24
    """Cells an image looks into, its own included. More: recall, time."""
    by: Literal["row", "cell"] = "row"
    """Who chooses the cells: every image its own, in the CPU kernels; or every cell for all its
    images, in torch alone, which a GPU needs (with probes of 48 and more: products are cheap)."""
    extra: NonNegative = 16
    """Candidates beyond k that are settled exactly; they cover the rounding of bfloat16."""
    sample_per_cell: Positive = 36
    """Images per cell that the k-means is trained on, as far as `memory_mb` allows."""
    memory_mb: Positive = 1000
    """What one worker's arrays may take, about; a process has 0.5 GB besides."""
    seed: NonNegative = 0
    """Chooses the training sample and the first centers."""

    def cells(self, n: int) -> int:
        """Return the number of cells for n images."""
        return max(1, min(n // self.cell_size, MAX_CELLS))

    def part_rows(self, n: int, *, dim: int) -> int:
        """Return how many of n rows (n, dim) are sorted at once, about."""
        return min(max(TASK_ROWS, n // TASKS), self.memory_mb * 1_000_000 // (dim * 12 + 64))

    def range_rows(self, n: int, *, dim: int, k: int) -> int:
        """Return how many of n rows (n, dim) are joined at once, about, for k neighbors each."""
        # Each costs its row, and its candidates: 6 bytes each, twice k + extra of them.
        row_bytes = dim * 6 + (k + self.extra) * 12 + k * 16
        most = min(RANGE_ROWS, max(4096, self.memory_mb * 1_000_000 // row_bytes))
        return min(most, max(TASK_ROWS, n // TASKS))


@dataclass(frozen=True)
class CellJoin:
    """The tasks of one graph; picklable, since it holds paths and numbers only."""

    features: Path
    folder: Path
    k: int
    method: CellsConfig
    device: str = "cpu"

    def __getstate__(self) -> dict[str, object]:
        """Leave what was opened behind: every process opens its own."""
        return {field.name: getattr(self, field.name) for field in fields(self)}

    @cached_property
    def array(self) -> ShardedArray:
        """The rows to join."""
        return ShardedArray.open(self.features)

    @property
    def is_stored(self) -> bool:
        """Whether the folder is on an object store: no two nodes can then write into one file."""
        return isinstance(self.folder, StoredPath)

    @property
    def work(self) -> Path:
        """Folder of files that are removed when the graph is finished."""
        return self.folder / "cells"

    @cached_property
    def part_shards(self) -> list[tuple[int, int]]:
        """Ranges of the corpus' shards that one task sorts: parts of about equal size."""
        budget = self.method.part_rows(len(self.array), dim=self.array.shape[1])
        cuts = [0]
        for i, end in enumerate(self.array.offsets[1:]):
            if end - self.array.offsets[cuts[-1]] > budget and i > cuts[-1]:
                cuts.append(i)
        return list(pairwise([*cuts, self.array.num_shards]))

    # -- sort

    def fit(self) -> None:
        """Fit the cells on a random sample and write `tree.npz`."""
        n, dim = self.array.shape
        cells = self.method.cells(n)
        most = max(cells, self.method.memory_mb * 1_000_000 // (dim * 4 * 3))
        size = min(n, cells * self.method.sample_per_cell, most)
        chosen = np.sort(permuted(np.arange(size), n=n, seed=self.method.seed, epoch=0))
        tree = fit_cells(self.array.rows(chosen), num_cells=cells, seed=self.method.seed)
        with whole_file(self.work / "tree.npz") as path, open(path, "wb") as file:
            np.savez(file, centers=tree.centers, coarse=tree.coarse, cuts=tree.cuts)

    @cached_property
    def tree(self) -> CellTree:
        """The cells."""
        stored = np.load(self.work / "tree.npz")
        return CellTree(stored["centers"], stored["coarse"], stored["cuts"])

    def sort(self, part: int) -> None:
        """Write the rows of a part in the order of their cells: runs of rows, ids and borders."""
        a, b = self.part_shards[part]
        first = int(self.array.offsets[a])
        cells = np.concatenate([self._cells_of(i) for i in range(a, b)])
        order = np.argsort(cells, kind="stable")
        counts = np.bincount(cells, minlength=len(self.tree.centers))
        if not self.is_small:
            path = self._path("run_rows", part)
            write_new(path, self._corpus_rows, first + order, like=self._corpus_rows(order[:0]))
            for shard in self._shards[a:b]:  # nobody reads them again
                release(shard)
        self._write("run_ids", part, first + order)
        self._write("run_borders", part, np.concatenate([[0], np.cumsum(counts)]))

    @property
    def is_small(self) -> bool:
        """Whether rows are gathered from the corpus itself, not from sorted copies of its parts."""
        return len(self.array) * self.array.shape[1] * 4 <= SMALL_BYTES

    @cached_property
    def _shards(self) -> list[Array]:
        """The corpus' shards, memory-mapped once: a page costs when a map touches it first."""
        return [self.array.shard(i) for i in range(self.array.num_shards)]

    def _corpus_rows(self, ids: Array) -> Array:
        return np.asarray(gathered(self._shards, ids), np.float32)

    def _cells_of(self, shard: int) -> Array:
        """Return the cell of every row of a shard of the corpus."""
        stored, cells = self._shards[shard], []
        for i in range(0, len(stored), BLOCK):
            rows = np.array(stored[i : i + BLOCK], np.float32)
            finite = np.isfinite(rows).all(axis=1)
            if not finite.all():
                row = int(self.array.offsets[shard]) + i + int(np.argmin(finite))
                raise ArtifactError(
                    f"{self.features} holds a number that is not finite in row {row}. Look at the "
                    f"encoder's training for divergence, then embed again."
                )
            cells.append(assign_cells(rows, self.tree))
        return np.concatenate([np.empty(0, np.int32), *cells])

    # -- gather

    def plan(self) -> None:
        """Cut the cells into ranges of about equal size and write `borders.npy` and `ranges`."""
        borders = sum(self._read("run_borders", part) for part in range(len(self.part_shards)))
        assert isinstance(borders, np.ndarray)
        n, dim = self.array.shape
        most = self.method.range_rows(n, dim=dim, k=self.k)
        cuts = [0]
        for cell in range(1, len(borders)):
            if borders[cell] - borders[cuts[-1]] > most and cell - 1 > cuts[-1]:
                cuts.append(cell - 1)
        cuts.append(len(borders) - 1)
        rows = np.diff(borders[cuts])
        cut = rows.astype(int).tolist()
        ShardedArray.create(self.folder / "order", shard_rows=cut, row_shape=(), dtype="int64")
        with whole_file(self.work / "borders.npy") as path, open(path, "wb") as file:
            np.save(file, borders)
        if not self.is_stored:
            for name, shape, kind in (("rows", (n, dim), np.float32), ("order", (n,), np.int64)):
                create_mapped(self.work / f"{name}.npy", shape, kind).flush()
        write_json(self.work / "ranges.json", [int(cut) for cut in cuts])

    @cached_property
    def ranges(self) -> list[tuple[int, int]]:
        """Ranges of cells that are gathered and joined at once."""
        return list(pairwise(read_json(self.work / "ranges.json")))

    @cached_property
    def borders(self) -> Array:
        """(K + 1,) the first place of each cell."""
        return np.asarray(np.load(self.work / "borders.npy"))

    @cached_property
    def order(self) -> ShardedArray:
        """(N,) the id of the image at each place."""
        return ShardedArray.open(self.folder / "order")

    def gather(self, i: int) -> None:
        """Put the pieces of range i together: its rows in cell order, distinct ones first."""
        low, high = self.ranges[i]
        pieces: list[tuple[Array, Array]] = []
        runs: list[Array] = []
        for part in range(len(self.part_shards)):
            cuts = self._read("run_borders", part)
            here = slice(int(cuts[low]), int(cuts[high]))
            cells = np.repeat(np.arange(low, high), np.diff(cuts[low : high + 1]))
            pieces.append((self._read("run_ids", part)[here], cells))
            if not self.is_small:
                runs.append(self._read("run_rows", part)[here])
        ids, cells = (np.concatenate(each) for each in zip(*pieces, strict=True))

        def rows(positions: Array) -> Array:
            return gathered(runs, positions) if runs else self._corpus_rows(ids[positions])

        order, leader = leaders_first(rows, ids, cells)
        start, follows = int(self.borders[low]), np.flatnonzero(leader != np.arange(len(leader)))
        if self.is_stored:
            write_new(self._path("placed_rows", i), rows, order, like=self._corpus_rows(ids[:0]))
            write_new(self._path("placed_order", i), ids.__getitem__, order, like=ids)
        else:
            write_into(self.work / "rows.npy", start, rows, order)
            write_into(self.work / "order.npy", start, ids.__getitem__, order)
        table = np.stack([leader[follows] + start, ids[order][follows], follows + start], axis=1)
        self._write("followers", i, table.astype(np.int64))
        self.order.write_shard(i, ids[order])

    # -- join

    @cached_property
    def followers(self) -> Followers:
        """Images whose rows equal another's: few, or the corpus is mostly duplicates."""
        tables = [self._read("followers", i) for i in range(len(self.ranges))]
        return Followers.of(np.concatenate(tables))

    @cached_property
    def cells(self) -> Cells:
        """The rows in cell order, memory-mapped."""
        owner = np.searchsorted(self.borders, self.followers.place, side="right") - 1
        followers = np.bincount(owner, minlength=len(self.borders) - 1)
        rows, order = (np.load(self._whole(x), mmap_mode="r") for x in ("rows", "order"))
        return Cells(self.tree.centers, self.borders, self.borders[1:] - followers, rows, order)

    def _whole(self, name: str) -> Path:
        """Return the local file of `rows` or `order` at all places."""
        path = self.work / f"{name}.npy"
        if not isinstance(path, StoredPath):
            return path
        pieces = [path.with_name(f"placed_{name}-{i:05d}.npy") for i in range(len(self.ranges))]
        return joined(path, pieces)

    def join(self, i: int) -> None:
        """Find the lists of range i and write them as a run sorted by image id."""
        low, high = self.ranges[i]
        start, stop = int(self.borders[low]), int(self.borders[high])
        cells, method = self.cells, self.method
        keep = self.k + method.extra
        how = {"k": self.k, "probes": method.probes, "keep": keep}
        if method.by == "row":
            found, lacking = join(cells, start, stop, **how)
        else:
            found, lacking = join_blocks(cells, start, stop, device=self.device, **how)
        if len(lacking):
            rest = self._search_all(start + lacking)
            found.ids[lacking], found.similarity[lacking] = rest.ids, rest.similarity
        by_id = np.argsort(cells.order[start:stop])
        neighbors = self._named(found, start)
        for name, values in (("similarity", found.similarity), ("neighbors", neighbors)):
            path = self._path(f"list_{name}", i)
            write_new(path, values.__getitem__, by_id, like=values)
        self._write("list_ids", i, np.asarray(cells.order[start:stop][by_id]))

    def _named(self, found: Neighbors, start: int) -> Array:
        """Return the lists (n, k) of places as lists of ids; similarities follow in place.

        Followers of a listed row come in, and the last ones go.
        """
        named = np.empty(found.ids.shape, self.id_type)
        for a in range(0, len(found), BLOCK):
            some = slice(a, min(a + BLOCK, len(found)))
            own = np.arange(start + some.start, start + some.stop)
            rows = self.cells.rows[own[0] : own[-1] + 1]
            lengths = np.einsum("nd,nd->n", rows, rows, dtype=np.float64).astype(np.float32)
            part = Neighbors(found.ids[some], found.similarity[some])
            lists = expand(part, own, lengths, self.cells.order, self.followers)
            named[some], found.similarity[some] = lists.ids, lists.similarity
        return named

    def _search_all(self, places: Array) -> Neighbors:
        """Return the lists of rows whose cells held too few others, by exact search, -1 padded."""
        cells, queries = self.cells, self.cells.rows[places]
        best: list[Neighbors] = []
        for low, high in self.ranges:
            spans = zip(cells.starts[low:high], cells.ends[low:high], strict=True)
            here = np.concatenate([np.arange(a, b) for a, b in spans])
            if not len(here):
                continue
            found = exact_topk(queries, cells.rows[here], k=min(self.k + 1, len(here)))
            best = [
                merge_neighbors([*best, Neighbors(here[found.ids], found.similarity)], k=self.k + 1)
            ]
        # Lists that lack the row itself (a follower's do) give up their last entry instead.
        missing = self.k + 1 - best[0].k
        ids = np.pad(best[0].ids, ((0, 0), (0, missing)), constant_values=-1)
        similarity = np.pad(best[0].similarity, ((0, 0), (0, missing)))
        return drop_self(Neighbors(ids, similarity), places)

    # -- scatter

    @property
    def id_type(self) -> np.dtype[np.signedinteger]:
        """Type of the ids in lists."""
        return np.dtype(np.int32 if len(self.array) < 2**31 else np.int64)

    def scatter(self, part: int) -> None:
        """Write the shards of a part of the corpus from all runs of lists."""
        a, b = self.part_shards[part]
        first, last = int(self.array.offsets[a]), int(self.array.offsets[b])
        ids = np.empty((last - first, self.k), self.id_type)
        similarity = np.empty((last - first, self.k), np.float32)
        for i in range(len(self.ranges)):
            owners = self._read("list_ids", i)
            low, high = np.searchsorted(owners, [first, last])
            rows = owners[low:high] - first
            ids[rows] = self._read("list_neighbors", i)[low:high]
            similarity[rows] = self._read("list_similarity", i)[low:high]
        out = ShardedArray.open(self.folder / "ids"), ShardedArray.open(self.folder / "similarity")
        for shard in range(a, b):
            here = slice(*(int(x) - first for x in self.array.offsets[shard : shard + 2]))
            out[1].write_shard(shard, similarity[here])
            out[0].write_shard(shard, ids[here])

    def _path(self, kind: str, i: int) -> Path:
        return self.work / f"{kind}-{i:05d}.npy"

    def _write(self, kind: str, i: int, values: Array) -> None:
        with whole_file(self._path(kind, i)) as path, open(path, "wb") as file:
            np.save(file, values)

    def _read(self, kind: str, i: int) -> Array:
        stored: Array = np.load(self._path(kind, i), mmap_mode="r")
        return stored

    def unwritten(self, kind: str, tasks: range) -> list[int]:
        """Return the tasks whose last file is missing: the others have written all of theirs."""
        there = names_in(self.work)
        return [i for i in tasks if self._path(kind, i).name not in there]


def cell_graph(
    array: ShardedArray, folder: Path, k: int, method: CellsConfig, ask: Resources
) -> None:
    """Write `ids`, `similarity` and `order` of the kNN graph into a folder that has the first two.

    What an interrupted run finished is kept. The files depend on the rows, k and the method, never
    on the workers.
    """
    device = "cuda" if ask.gpus else "cpu"
    task = CellJoin(array.path.resolve(), folder.resolve(), k, method, device)
    n, dim = array.shape
    if not (task.work / "tree.npz").exists():
        require_disk(folder, size_bytes=n * (2 * dim * 4 + k * 8 + 24))
        task.fit()
    parts = range(len(task.part_shards))
    one_round(task.sort, "graph: sort", task.unwritten("run_borders", parts), ask)
    if not (task.work / "ranges.json").exists():
        task.plan()
    ranges = range(len(task.ranges))
    one_round(task.gather, "graph: gather", task.order.unwritten(), ask)
    one_round(task.join, "graph: join", task.unwritten("list_ids", ranges), ask)
    lack = set(ShardedArray.open(folder / "ids").unwritten())
    left = [i for i in parts if not lack.isdisjoint(range(*task.part_shards[i]))]
    one_round(task.scatter, "graph: scatter", left, ask)
