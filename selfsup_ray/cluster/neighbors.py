"""The sharded search: IndexShard actors, query blocks in bounded number, merged lists on disk.

The mathematics is in `ops/index.py` and `ops/neighbors.py`; because every actor's answer is exact
for its rows, neither the number of actors nor the order in which they answer changes the result.
"""

from __future__ import annotations

import itertools
import logging
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from selfsup_ray.artifacts import Array, ShardedArray
from selfsup_ray.cluster.session import connect, require_resources
from selfsup_ray.config import Resources
from selfsup_ray.errors import UserError
from selfsup_ray.ops.index import IndexShard
from selfsup_ray.ops.neighbors import Neighbors, drop_self, merge_neighbors

log = logging.getLogger(__name__)

_QUERY_ROWS = 4096  # of one call: enough for BLAS, and Ray's own 5 to 15 ms do not count
_IN_FLIGHT = 3  # query shards submitted at once: every actor always has a call waiting


class Search:
    """Top-k search over the rows of an (N, d) array, for its own rows and for new ones.

    workers 0: one index in this process, on `cpus` threads. workers >= 1: that many actors, each
    with an equal range of rows; one that dies is restarted, reads its rows again and answers the
    calls it missed. Use as a context manager: the actors end with the block.
    """

    def __init__(
        self,
        array: ShardedArray,
        resources: Resources,
        *,
        only: Path | None = None,
        stage: str = "graph",
    ) -> None:
        """Start the search over all rows, or over the ascending ids in the .npy file `only`.

        Raises ResourceError when the cluster lacks what is asked for.
        """
        self.array = array
        n = len(array) if only is None else len(np.load(only, mmap_mode="r"))
        bounds = np.linspace(0, n, max(1, resources.workers) + 1).astype(np.int64)
        threads = max(1, int(resources.cpus))
        self.local: IndexShard | None = None
        self.actors: list[Any] = []
        if resources.workers == 0:
            self.local = IndexShard(array.path, start=0, stop=n, only=only, threads=threads)
            return
        connect()
        require_resources(resources, stage=stage)
        place = only.resolve() if only else None
        self.actors = [
            _start_actor(array.path.resolve(), int(start), int(stop), place, resources)
            for start, stop in itertools.pairwise(bounds)
            if start < stop
        ]

    def __enter__(self) -> Search:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    def close(self) -> None:
        """End the actors."""
        if self.actors:
            import ray

            for actor in self.actors:
                ray.kill(actor)
        self.actors = []

    def search(self, queries: Array, k: int) -> Neighbors:
        """Return the k nearest rows of each query (n, d), float32 unit rows, n up to thousands."""
        if self.local is not None:
            return self.local.search(queries, k)
        import ray

        shared = ray.put(np.ascontiguousarray(queries, np.float32))  # once, not once per actor
        parts = _get([actor.search.remote(shared, k) for actor in self.actors])
        return merge_neighbors(parts, k=k)

    def write_lists(self, ids: ShardedArray, similarity: ShardedArray) -> Iterator[int]:
        """Write the k nearest other rows of every row; yield the number of each finished shard.

        ids (N, k) and similarity (N, k) are cut at the array's rows; k < N. Shards of both that
        exist are kept, so an interrupted run continues.
        """
        k = ids.shape[1]
        assert k < len(self.array), f"{k} neighbors of {len(self.array)} rows"
        missing = [
            i for i in range(ids.num_shards) if not (ids.is_written(i) and similarity.is_written(i))
        ]
        write = self._write_here if self.local is not None else self._write_by_tasks
        yield from write(missing, ids, similarity)

    def _write_here(
        self, missing: Sequence[int], ids: ShardedArray, similarity: ShardedArray
    ) -> Iterator[int]:
        assert self.local is not None
        for i in missing:
            blocks = _blocks(self.array, i)
            lists = [
                self.local.search_stored(self.array.path, a, b, ids.shape[1] + 1) for a, b in blocks
            ]
            merge_and_write(ids.path, similarity.path, i, 1, *lists)
            yield i

    def _write_by_tasks(
        self, missing: Sequence[int], ids: ShardedArray, similarity: ShardedArray
    ) -> Iterator[int]:
        import ray

        # No CPU of its own: the actors may hold them all, and merging is short.
        write = ray.remote(num_cpus=0, max_retries=-1)(merge_and_write)
        path, out = self.array.path.resolve(), (ids.path.resolve(), similarity.path.resolve())
        running: dict[Any, int] = {}
        waiting = list(missing)[::-1]
        while waiting or running:
            while waiting and len(running) < _IN_FLIGHT:
                i = waiting.pop()
                parts = [
                    actor.search_stored.remote(path, a, b, ids.shape[1] + 1)
                    for a, b in _blocks(self.array, i)
                    for actor in self.actors
                ]
                done = write.remote(*out, i, len(self.actors), *parts)
                running[done] = i
            (done,), _ = ray.wait(list(running), num_returns=1)
            _get([done])
            yield running.pop(done)


def merge_and_write(
    ids_path: Path, similarity_path: Path, i: int, num_parts: int, *lists: Neighbors
) -> None:
    """Merge the answers for query shard i, drop each row from its own list, write both arrays.

    lists: for each block of queries in turn, `num_parts` answers of (n, <= k + 1).
    """
    ids, similarity = ShardedArray.open(ids_path), ShardedArray.open(similarity_path)
    k, first = ids.shape[1], int(ids.offsets[i])
    merged: list[Neighbors] = []
    for start in range(0, len(lists), num_parts):
        block = merge_neighbors(lists[start : start + num_parts], k=k + 1)
        merged.append(drop_self(block, np.arange(first, first + len(block))))
        first += len(block)
    empty = Neighbors(np.empty((0, k), np.int64), np.empty((0, k), np.float32))
    similarity.write_shard(i, np.concatenate([m.similarity for m in merged or [empty]]))
    ids.write_shard(i, np.concatenate([m.ids for m in merged or [empty]]))


def _blocks(array: ShardedArray, i: int) -> list[tuple[int, int]]:
    """Return the row ranges shard i's queries are asked in."""
    start, stop = int(array.offsets[i]), int(array.offsets[i + 1])
    return [(a, min(a + _QUERY_ROWS, stop)) for a in range(start, stop, _QUERY_ROWS)]


def _start_actor(path: Path, start: int, stop: int, only: Path | None, resources: Resources) -> Any:
    import ray

    # Without end: on a spot machine a restart is nothing unusual, and a call repeats exactly.
    # Arguments are paths and numbers: an array would be an object that a lost node takes with it.
    remote = ray.remote(max_restarts=-1, max_task_retries=-1)(IndexShard)
    return remote.options(num_cpus=resources.cpus, num_gpus=resources.gpus).remote(
        path, start=start, stop=stop, only=only, threads=max(1, int(resources.cpus))
    )


def _get(refs: list[Any]) -> list[Any]:
    """Return ray.get's values; an error the user can mend comes without Ray's traceback."""
    import ray

    try:
        values: list[Any] = ray.get(refs)
    except ray.exceptions.RayTaskError as error:
        if isinstance(error.cause, UserError):
            raise error.cause from None
        raise
    return values
