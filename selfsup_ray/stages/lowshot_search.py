"""Searches of the low-shot protocol: shared nodes among themselves, and test images among them."""

from __future__ import annotations

import itertools
from pathlib import Path

import numpy as np

from selfsup_ray.artifacts import Array, ShardedArray
from selfsup_ray.cluster.neighbors import Search
from selfsup_ray.cluster.shards import map_shards
from selfsup_ray.config import Resources
from selfsup_ray.errors import ResourceError
from selfsup_ray.ops.completion import empty_lists, own_lists, with_rows
from selfsup_ray.ops.neighbors import Neighbors, merge_neighbors
from selfsup_ray.stages.cell_files import remove_work
from selfsup_ray.stages.cell_graph import CellsConfig, cell_graph
from selfsup_ray.stages.graph import GraphMethod
from selfsup_ray.stages.lowshot_pool import (
    Block,
    on_cpus,
    read_lists,
    save_array,
    save_lists,
    shard_groups,
)
from selfsup_ray.storage import remove_tree


def require_search_memory(
    n: int, dim: int, method: GraphMethod, resources: Resources, *, memory_bytes: int
) -> None:
    """Raise ResourceError when an exact search of n rows holds more of them than a worker may."""
    held = n * dim * 4 // max(1, resources.workers)
    if method.name == "exact" and held > memory_bytes:
        raise ResourceError(
            f"lowshot: {n:,} shared images of {dim} numbers take {held / 1e9:.1f} GB of a worker "
            f"in an exact search, but lowshot.memory_gb is {memory_bytes / 1e9:g}. Set "
            f"lowshot.search.name=cells, or give background folders with their `graph`."
        )


def write_lists(block: Block, method: GraphMethod, resources: Resources) -> None:
    """Write the lists of a block's rows among themselves, where they are missing."""
    width = block.ids.shape[1]
    if not block.ids.unwritten():
        return
    if len(block.rows) <= width:
        lists = own_lists(np.asarray(block.rows), k=width)  # too few rows for full lists
        for i, (a, b) in enumerate(itertools.pairwise(block.rows.offsets)):
            block.similarity.write_shard(i, lists.similarity[a:b])
            block.ids.write_shard(i, lists.ids[a:b])
        return
    ask, folder = on_cpus(resources), block.ids.path.parent
    if isinstance(method, CellsConfig):
        cell_graph(block.rows, folder, width, method, ask)
        remove_work(folder)
        return
    with Search(block.rows, ask, stage="lowshot", method=method, folder=folder) as search:
        for _ in search.write_lists(block.ids, block.similarity):
            pass


class Nearest:
    """The k nearest rows of a block to each query, exactly; tasks read its shards from files.

    The queries wait in a file below `path`, which is gone when the lists are returned.
    """

    def __init__(self, path: Path, block: Block, k: int) -> None:
        self.path, self.rows, self.k = path.resolve(), block.rows.path.resolve(), k
        self.groups = shard_groups(block.rows.shard_rows)

    def run(self, queries: Array, resources: Resources) -> Neighbors:
        """Return the lists (n, k) of queries (n, d); few rows leave the last places empty."""
        save_array(self.path / "queries.npy", queries)
        parts = [self._partial(g) for g in range(len(self.groups))]
        missing = [g for g, part in enumerate(parts) if not part.exists()]
        for _ in map_shards(self, missing, on_cpus(resources), label="lowshot: search"):
            pass
        found = empty_lists(len(queries), self.k)
        for part in parts:
            found = merge_neighbors([found, read_lists(part)], k=self.k)
        remove_tree(self.path)
        return found

    def _partial(self, group: int) -> Path:
        return self.path / f"{group:05d}.npy"

    def __call__(self, group: int) -> None:
        """Write the lists of all queries among one group's rows."""
        rows, queries = ShardedArray.open(self.rows), np.load(self.path / "queries.npy")
        found = empty_lists(len(queries), self.k)
        for i in self.groups[group]:
            found = with_rows(found, queries, rows.shard(i), first=int(rows.offsets[i]))
        save_lists(self._partial(group), found)
