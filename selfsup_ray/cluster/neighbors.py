"""The sharded search: index actors, query blocks in bounded number, merged lists on disk.

The mathematics is in `ops`; because an actor's answer depends on its rows (exact) or pieces
(approximate) alone, neither the number of actors nor the order in which they answer changes the
result. Rows of a cell are in every piece, so every query goes to all pieces; only its nearest
cells are computed once, by the actor whose turn it is.
"""

from __future__ import annotations

import itertools
import logging
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from selfsup_ray.artifacts import Array, ShardedArray
from selfsup_ray.cluster.failures import end_actors
from selfsup_ray.cluster.methods import ExactConfig, SearchConfig, index_files
from selfsup_ray.cluster.pairs import answers, pays, write_all_pairs
from selfsup_ray.cluster.session import connect, require_resources
from selfsup_ray.config import Resources
from selfsup_ray.errors import ConfigError
from selfsup_ray.ops.index import NO_ID, IndexShard
from selfsup_ray.ops.neighbors import Neighbors, drop_self, merge_neighbors
from selfsup_ray.ops.pieces import ApproximateShard

log = logging.getLogger(__name__)

_QUERY_ROWS = 4096  # of one call: enough for BLAS, and Ray's own 5 to 15 ms do not count
_IN_FLIGHT = 3  # query blocks submitted to each actor at once: it always has a call waiting
_FLIGHT_BYTES = 256 * 2**20  # queries, cells and answers of all calls in flight

Shard = IndexShard | ApproximateShard


class Search:
    """Top-k search over the rows of an (N, d) array, for its own rows and for new ones.

    workers 0: one index in this process, on `cpus` threads. workers >= 1: that many actors, spread
    over the nodes; one that dies is restarted, reads its rows or pieces again and answers the
    calls it missed. Exact: each holds an equal range of rows. Approximate: each holds pieces; with
    more actors than pieces, several hold the same ones and share the queries. Use as a context
    manager: the actors end with the block.
    """

    def __init__(
        self,
        array: ShardedArray,
        resources: Resources,
        *,
        only: Path | None = None,
        stage: str = "graph",
        method: SearchConfig | None = None,
        folder: Path | None = None,
    ) -> None:
        """Start the search over all rows, or over the ascending ids in the .npy file `only`.

        folder: where an approximate index is kept; pieces that an earlier run built are used
        again. Raises ResourceError when the cluster lacks what is asked for, ConfigError or
        ArtifactError when the index cannot be built or the folder holds another.
        """
        self.array, self.resources, self.only = array, resources, only
        self.method = method or ExactConfig()
        self.files = index_files(array, self.method, only=only, folder=folder, gpus=resources.gpus)
        self.local: Shard | None = None
        self.replicas: list[list[Any]] = []
        if resources.workers == 0:
            (self.local,) = self._plan(1)[0]
        else:
            connect()
            require_resources(resources, stage=stage)
            self.replicas = [
                [_start_actor(shard, resources) for shard in replica]
                for replica in self._plan(resources.workers)
            ]
        self.is_built = self.files is None

    @property
    def actors(self) -> list[Any]:
        """All actors."""
        return [actor for replica in self.replicas for actor in replica]

    def _plan(self, workers: int) -> list[list[Shard]]:
        """Return the shards of every replica; those of one replica hold all rows together."""
        threads, gpu = max(1, int(self.resources.cpus)), self.resources.gpus > 0
        if self.files is None:
            only = self.only.resolve() if self.only else None
            n = len(self.array) if only is None else len(np.load(only, mmap_mode="r"))
            cuts = np.linspace(0, n, workers + 1).astype(np.int64)
            path = self.array.path.resolve()
            return [
                [
                    IndexShard(path, start=a, stop=b, only=only, threads=threads, gpu=gpu)
                    for a, b in itertools.pairwise(cuts.tolist())
                    if a < b or workers == 1
                ]
            ]
        parts = min(workers, self.files.num_pieces)
        pieces = np.array_split(np.arange(self.files.num_pieces), parts)
        held = [tuple(int(piece) for piece in part) for part in pieces]
        files = self.files
        return [
            [ApproximateShard(files, part, threads=threads, gpu=gpu) for part in held]
            for _ in range(workers // parts)
        ]

    def __enter__(self) -> Search:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    def close(self) -> None:
        """End the actors."""
        if self.replicas:
            end_actors(self.actors)
        self.replicas = []

    def build(self) -> None:
        """Train and build what is missing of an approximate index; the first search does it."""
        if self.is_built or self.files is None:
            return
        if isinstance(self.local, ApproximateShard):
            self.local.train()
            for piece in self.files.missing:
                self.local.build(piece)
        else:
            answers([self.actors[0].train.remote()])
            turns = itertools.cycle(self.actors)
            answers([next(turns).build.remote(piece) for piece in self.files.missing])
        self.is_built = True

    def search(self, queries: Array, k: int) -> Neighbors:
        """Return the k nearest rows of each query (n, d), float32 unit rows, any n.

        Memory beyond the arguments and the result is bounded. Raises ConfigError for queries of
        another dimension, or with a number that is not finite.
        """
        if queries.shape[1:] != self.array.shape[1:] or not np.isfinite(queries).all():
            raise ConfigError(
                f"Queries must be finite rows of {self.array.shape[1]} numbers, as in "
                f"{self.array.path}; got an array {queries.shape}."
            )
        step = self._block_rows(k)
        blocks = (queries[i : i + step] for i in range(0, len(queries), step))
        found = list(self.stream(blocks if len(queries) else [queries], k))
        return Neighbors(
            np.concatenate([part.ids for part in found]),
            np.concatenate([part.similarity for part in found]),
        )

    def stream(self, blocks: Iterable[Array], k: int) -> Iterator[Neighbors]:
        """Yield `search` of blocks of queries, in their order; a bounded number is in flight."""
        self.build()
        waiting: deque[tuple[Array, list[Any]]] = deque()
        for turn, block in enumerate(blocks):
            waiting.append((block, self._ask(turn, block, k)))
            if len(waiting) >= _IN_FLIGHT * max(1, len(self.replicas)) or self.local is not None:
                yield self._answer(*waiting.popleft(), k)
        while waiting:
            yield self._answer(*waiting.popleft(), k)

    def _ask(self, turn: int, queries: Array, k: int) -> list[Any]:
        """Submit a block of queries to one replica; return the parts of the answer, or refs."""
        queries = np.ascontiguousarray(queries, np.float32)
        match self.local:
            case IndexShard() as shard:
                return [shard.search(queries, k)]
            case ApproximateShard() as shard:
                return [shard.search(queries, k, shard.assign(queries))]
        import ray

        shared = ray.put(queries)  # once, not once per actor
        replica, routing = self._turn(turn)
        if routing is None:
            return [actor.search.remote(shared, k) for actor in replica]
        probes = routing.assign.remote(shared)
        return [actor.search.remote(shared, k, probes) for actor in replica]

    def _turn(self, turn: int) -> tuple[list[Any], Any]:
        """Return the replica that answers a block, and the actor that finds its cells, if any."""
        replica = self.replicas[turn % len(self.replicas)]
        if self.files is None:
            return replica, None
        return replica, replica[turn // len(self.replicas) % len(replica)]

    def _answer(self, queries: Array, parts: list[Any], k: int) -> Neighbors:
        """Return the merged answer to a block; short lists are completed from all rows."""
        found = merge_neighbors(parts if self.local is not None else answers(parts), k=k)
        short = _short(found)
        if len(short):
            full = [
                self._everywhere(queries[short[i : i + 1024]], k)
                for i in range(0, len(short), 1024)
            ]
            _replace(found, short, full)
        return found

    def _everywhere(self, queries: Array, k: int) -> Neighbors:
        if isinstance(self.local, ApproximateShard):
            return self.local.search_everywhere(queries, k)
        return merge_neighbors(answers(_ask_everywhere(self.replicas[0], queries, k)), k=k)

    def write_lists(
        self,
        ids: ShardedArray,
        similarity: ShardedArray,
        *,
        queries: ShardedArray | None = None,
    ) -> Iterator[int]:
        """Write the k nearest other rows of every row; yield the number of each finished shard.

        ids (N, k) and similarity (N, k) are cut at the array's rows; k < N. Shards of both that
        exist are kept, so an interrupted run continues. queries: another stored array whose rows
        ask instead; nothing is dropped from their lists then, and the files are cut at its rows.
        """
        k, own = ids.shape[1], queries is None
        assert not own or k < len(self.array), f"{k} neighbors of {len(self.array)} rows"
        assert not own or self.only is None, "rows that are not searched have no own list"
        asking = self.array if queries is None else queries
        assert ids.shard_rows == asking.shard_rows, "the lists are cut at the rows that ask"
        missing = [
            i for i in range(ids.num_shards) if not (ids.is_written(i) and similarity.is_written(i))
        ]
        on_cpus = self.files is None and not self.resources.gpus
        if own and on_cpus and pays(missing, ids):
            threads = max(1, int(self.resources.cpus))
            yield from write_all_pairs(
                self.array, ids, similarity, missing, actors=self.actors, threads=threads
            )
            return
        if missing:
            self.build()
        write = self._write_here if self.local is not None else self._write_by_tasks
        yield from write(missing, ids, similarity, asking, own)

    def _write_here(
        self,
        missing: Sequence[int],
        ids: ShardedArray,
        similarity: ShardedArray,
        asking: ShardedArray,
        own: bool,
    ) -> Iterator[int]:
        k = ids.shape[1] + own
        for i in missing:
            blocks = []
            for a, b in self._blocks(asking, i, k):
                rows = asking.rows(np.arange(a, b))
                match self.local:
                    case IndexShard() as shard:
                        parts = [shard.search_stored(asking.path, a, b, k)]
                    case _:
                        parts = self._ask(0, rows, k)
                found = self._answer(rows, parts, k)
                blocks.append(drop_self(found, np.arange(a, b)) if own else found)
            write_shard(ids.path, similarity.path, i, *blocks)
            yield i

    def _write_by_tasks(
        self,
        missing: Sequence[int],
        ids: ShardedArray,
        similarity: ShardedArray,
        asking: ShardedArray,
        own: bool,
    ) -> Iterator[int]:
        import ray

        # No CPU of its own: the actors may hold them all, and merging is short.
        merge = ray.remote(num_cpus=0, max_retries=-1)(merge_block)
        write = ray.remote(num_cpus=0, max_retries=-1)(write_shard)
        path, out = asking.path.resolve(), (ids.path.resolve(), similarity.path.resolve())
        k, turns = ids.shape[1] + own, itertools.count()
        blocks = deque((i, self._blocks(asking, i, k)) for i in missing)
        merged: dict[int, list[Any]] = {i: [] for i in missing}
        writing: dict[Any, int] = {}
        merging: set[Any] = set()
        while blocks or writing:
            while blocks and len(merging) < _IN_FLIGHT * len(self.replicas):
                i, left = blocks[0]
                if left:
                    a, b = left.pop(0)
                    turn = next(turns)
                    parts = self._ask_stored(turn, path, a, b, k)
                    replica, _ = self._turn(turn)
                    merged[i].append(merge.remote(path, a, b, k, own, replica, *parts))
                    merging.add(merged[i][-1])
                if not left:
                    blocks.popleft()
                    writing[write.remote(*out, i, *merged.pop(i))] = i
            done, _ = ray.wait([*merging, *writing], num_returns=1, fetch_local=False)
            for ref in done:
                merging.discard(ref)
                if ref in writing:
                    answers([ref])
                    yield writing.pop(ref)

    def _ask_stored(self, turn: int, path: Path, start: int, stop: int, k: int) -> list[Any]:
        replica, routing = self._turn(turn)
        if routing is None:
            return [actor.search_stored.remote(path, start, stop, k) for actor in replica]
        probes = routing.assign_stored.remote(path, start, stop)
        return [actor.search_stored.remote(path, start, stop, k, probes) for actor in replica]

    def _block_rows(self, k: int) -> int:
        """Return how many queries are asked at once, so that all calls in flight stay bounded."""
        return block_rows(
            k,
            dim=self.array.shape[1],
            actors=max(len(part) for part in self.replicas or [[0]]),
            replicas=max(1, len(self.replicas)),
            probes=None if self.files is None else self.files.num_probes,
        )

    def _blocks(self, asking: ShardedArray, i: int, k: int) -> list[tuple[int, int]]:
        """Return the row ranges shard i's queries are asked in."""
        start, stop = int(asking.offsets[i]), int(asking.offsets[i + 1])
        step = self._block_rows(k)
        return [(a, min(a + step, stop)) for a in range(start, stop, step)]


def block_rows(k: int, *, dim: int, actors: int, replicas: int, probes: int | None) -> int:
    """Return how many queries (n, dim) are asked for k neighbors at once.

    actors: of one replica. probes: cells that a query looks into; None for exact search.
    """
    size = 4 * dim + 12 * k * actors + 12 * (probes or 0)
    flight = _FLIGHT_BYTES // (_IN_FLIGHT * replicas)
    return max(32, min(_QUERY_ROWS, flight // size))


def merge_block(
    path: Path, start: int, stop: int, k: int, own: bool, actors: list[Any], *parts: Neighbors
) -> Neighbors:
    """Merge the answers to queries [start, stop) of a stored array; drop each from its own list.

    actors: asked again, for all their rows, about the lists that found too few.
    """
    found = merge_neighbors(parts, k=k)
    short = _short(found)
    for i in range(0, len(short), 1024):
        here = short[i : i + 1024]
        queries = ShardedArray.open(path).rows(here + start)
        full = merge_neighbors(answers(_ask_everywhere(actors, queries, k)), k=k)
        _replace(found, here, [full])
    return drop_self(found, np.arange(start, stop)) if own else found


def write_shard(ids_path: Path, similarity_path: Path, i: int, *blocks: Neighbors) -> None:
    """Write shard i of both arrays from the lists of its blocks of queries."""
    ids, similarity = ShardedArray.open(ids_path), ShardedArray.open(similarity_path)
    k = ids.shape[1]
    empty = Neighbors(np.empty((0, k), np.int64), np.empty((0, k), np.float32))
    similarity.write_shard(i, np.concatenate([m.similarity for m in blocks or [empty]]))
    ids.write_shard(i, np.concatenate([m.ids for m in blocks or [empty]]))


def _short(found: Neighbors) -> Array:
    """Return the queries whose lists hold fewer neighbors than there are places."""
    return np.flatnonzero(found.ids[:, -1] == NO_ID) if found.k else np.empty(0, np.int64)


def _ask_everywhere(actors: list[Any], queries: Array, k: int) -> list[Any]:
    import ray

    shared = ray.put(queries)
    return [actor.search_everywhere.remote(shared, k) for actor in actors]


def _replace(found: Neighbors, places: Array, lists: list[Neighbors]) -> None:
    found.ids[places] = np.concatenate([part.ids for part in lists])
    found.similarity[places] = np.concatenate([part.similarity for part in lists])


def _start_actor(shard: Shard, resources: Resources) -> Any:
    import ray

    # Without end: on a spot machine a restart is nothing unusual, and a call repeats exactly.
    # The shard is paths and numbers: an array would be an object that a lost node takes with it.
    kind = type(shard)
    remote = ray.remote(max_restarts=-1, max_task_retries=-1)(kind)
    options = {"num_cpus": resources.cpus, "num_gpus": resources.gpus}
    actor = remote.options(**options, scheduling_strategy="SPREAD")
    match shard:
        case IndexShard():
            how = {"only": shard.only, "threads": shard.threads, "gpu": shard.gpu}
            return actor.remote(shard.path, start=shard.start, stop=shard.stop, **how)
        case ApproximateShard():
            return actor.remote(shard.files, shard.pieces, threads=shard.threads, gpu=shard.gpu)
