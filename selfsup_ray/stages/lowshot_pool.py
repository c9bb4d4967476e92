"""Nodes that all runs of a set-up share, with complete neighbor lists: computed once, read by all.

A block is an array of rows with their lists among themselves: background of other runs, background
of this corpus, the base images. A pool is one or more blocks joined, background first; its ids
count through its blocks. A run only adds its few novel images (spec 10.3).
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from selfsup_ray.artifacts import (
    Array,
    ShardedArray,
    create_mapped,
    read_claim,
    read_json,
    whole_file,
    write_json,
)
from selfsup_ray.cluster.shards import map_shards
from selfsup_ray.config import Resources
from selfsup_ray.errors import ConfigError
from selfsup_ray.ops.adjacency import traversal_order
from selfsup_ray.ops.completion import empty_lists, with_rows_both
from selfsup_ray.ops.neighbors import Neighbors, merge_neighbors
from selfsup_ray.stages.embed import Embeddings
from selfsup_ray.stages.graph import Graph
from selfsup_ray.stages.lowshot_config import FolderConfig
from selfsup_ray.storage import reached, relative, remove_tree

SHARD_ROWS = 65_536
GROUP_ROWS = 262_144
"""Rows of a pool that one task of a join takes; fixed, so that finished tasks are kept."""
ORDERED_ROWS = 100_000
"""Rows from which on a pool gets an order; below, everything is in the cache."""


def save_array(path: Path, values: Array) -> None:
    """Write an .npy file whole or not at all."""
    with whole_file(path) as temporary, open(temporary, "wb") as file:
        np.save(file, np.ascontiguousarray(values))


@dataclass(frozen=True)
class Block:
    """Rows (n, d), and their lists (n, >= width) with ids that count from 0 in the block.

    images (n,): ids of the corpus, -1 for images of other runs; classes (n,): of base images, -1
    for all others.
    """

    rows: ShardedArray
    ids: ShardedArray
    similarity: ShardedArray
    images: Array
    classes: Array


def write_block(
    folder: Path, source: ShardedArray, images: Array, classes: Array, *, width: int
) -> Block:
    """Return the block of these images, their rows copied in this order."""
    n, cuts = len(images), range(0, len(images), SHARD_ROWS)
    rows = ShardedArray.create(
        folder / "rows",
        shard_rows=[min(SHARD_ROWS, n - start) for start in cuts],
        row_shape=source.shape[1:],
        dtype="float32",
    )
    for i, start in enumerate(cuts):
        if not rows.is_written(i):
            rows.write_shard(i, source.rows(images[start : start + SHARD_ROWS]))
    return Block(rows, *_create_lists(folder, rows.shard_rows, width), images, classes)


def open_folder(folder: Path, given: FolderConfig, *, width: int) -> Block:
    """Return the block of another run's rows, where they are, with its graph's lists if given."""
    rows = Embeddings.open(given.path).array
    unknown = np.full(len(rows), -1, np.int64)
    if given.graph is None:
        return Block(rows, *_create_lists(folder, rows.shard_rows, width), unknown, unknown)
    graph = Graph.open(given.graph)
    return Block(rows, graph.ids, graph.similarity, unknown, unknown)


def require_fitting(given: FolderConfig, *, dim: int, width: int) -> None:
    """Raise ConfigError when another run's rows have another dimension, or its graph others.

    Which rows a graph was made from is known of one that was built, or imported with its features.
    """
    rows = Embeddings.open(given.path).array
    if rows.shape[1] != dim:
        raise ConfigError(
            f"The background {given.path} has rows of {rows.shape[1]} numbers, but this run's "
            f"embeddings have {dim}. Embed both with the same encoder."
        )
    if rows.dtype != np.float32:
        raise ConfigError(
            f"The background {given.path} is stored as {rows.dtype}, but lowshot reads other runs' "
            f"rows as float32. Make it with dtype=float32."
        )
    if given.graph is None:
        return
    graph = Graph.open(given.graph)
    if graph.ids.shard_rows != rows.shard_rows:
        raise ConfigError(
            f"The graph {given.graph} has {len(graph):,} images, but {given.path} has "
            f"{len(rows):,} rows, or they are cut otherwise. Give the graph of exactly these rows."
        )
    made_from = read_claim(graph.path / "config.yaml")["inputs"].get("features")
    has = Embeddings.open(given.path).fingerprint
    if made_from is not None and made_from != has:
        raise ConfigError(
            f"The graph {given.graph} was made from other rows ({made_from[:12]}) than "
            f"{given.path} holds ({has[:12]}). Give the graph of exactly these rows."
        )
    if graph.k < width:
        raise ConfigError(
            f"The graph {given.graph} keeps {graph.k} neighbors, fewer than the {width} that "
            f"lowshot.k={width + 1} needs beside the image itself. Lower lowshot.k to "
            f"{graph.k + 1}, or build a wider graph."
        )


def _create_lists(
    folder: Path, shard_rows: Sequence[int], width: int
) -> tuple[ShardedArray, ShardedArray]:
    """Return the arrays of ids and similarity (n, width), their shards still to be written."""
    rows, shape = shard_rows, (width,)
    return (
        ShardedArray.create(folder / "ids", shard_rows=rows, row_shape=shape, dtype="int32"),
        ShardedArray.create(
            folder / "similarity", shard_rows=rows, row_shape=shape, dtype="float32"
        ),
    )


def on_cpus(resources: Resources) -> Resources:
    """Return the same workers without their GPUs."""
    return Resources(workers=resources.workers, cpus=resources.cpus)


def shard_groups(shard_rows: Sequence[int]) -> list[list[int]]:
    """Return consecutive shards that hold about GROUP_ROWS rows together."""
    groups: list[list[int]] = [[]]
    held = 0
    for i, rows in enumerate(shard_rows):
        if groups[-1] and held + rows > GROUP_ROWS:
            groups.append([])
            held = 0
        groups[-1].append(i)
        held += rows
    return groups


class Pool:
    """Handle on the joined blocks of a set-up: rows, complete lists, lists of the test images."""

    def __init__(self, path: Path) -> None:
        self.path = path
        manifest = read_json(path / "pool.json")
        self.blocks = [ShardedArray.open(reached(path, place)) for place in manifest["rows"]]
        self.ids = ShardedArray.open(reached(path, manifest["ids"]))
        self.similarity = ShardedArray.open(reached(path, manifest["similarity"]))
        self.width: int = manifest["width"]
        self.images: Array = np.load(path / "images.npy", mmap_mode="r")
        self.classes: Array = np.load(path / "classes.npy", mmap_mode="r")
        test = (np.load(path / "test_ids.npy"), np.load(path / "test_similarity.npy"))
        self.test = Neighbors(*test)

    def __len__(self) -> int:
        return len(self.images)

    @property
    def order(self) -> Array | None:
        """(N,) an order of the nodes in which neighbors lie close; None where it would not pay."""
        path = self.path / "order.npy"
        return np.load(path, mmap_mode="r") if path.exists() else None

    def shards(self) -> Iterator[tuple[Neighbors, Array]]:
        """Yield (lists, rows) of every shard, in order, as memory maps."""
        places = [(rows, s) for rows in self.blocks for s in range(rows.num_shards)]
        for i, (rows, s) in enumerate(places):
            ids, similarity = self.ids.shard(i), self.similarity.shard(i)
            yield Neighbors(ids[:, : self.width], similarity[:, : self.width]), rows.shard(s)


def write_pool(
    path: Path,
    blocks: Sequence[Block],
    tests: Sequence[Neighbors],
    *,
    width: int,
    k: int,
    resources: Resources,
) -> Pool:
    """Join blocks into the pool in a folder; return the handle.

    tests: the lists (n_t, >= k) of the test images in each block. The joins run as tasks over
    groups of shards; finished groups of an interrupted run are kept.
    """
    if (path / "pool.json").exists():
        return Pool(path)
    ids, similarity = blocks[0].ids, blocks[0].similarity
    for j in range(1, len(blocks)):
        join = Join(path / f"join{j}", blocks[: j + 1], ids.path, similarity.path, width)
        ids, similarity = join.run(resources)
    first = np.cumsum([0, *(len(block.rows) for block in blocks)])
    shifted = [
        Neighbors(np.where(t.ids >= 0, t.ids + a, -1), t.similarity)
        for t, a in zip(tests, first, strict=False)
    ]
    merged = merge_neighbors(shifted, k=k)
    save_array(path / "test_ids.npy", merged.ids)
    save_array(path / "test_similarity.npy", merged.similarity)
    save_array(path / "images.npy", np.concatenate([block.images for block in blocks]))
    save_array(path / "classes.npy", np.concatenate([block.classes for block in blocks]))
    _write_order(path, ids, width)
    manifest = {
        "rows": [relative(block.rows.path, path) for block in blocks],
        "ids": relative(ids.path, path),
        "similarity": relative(similarity.path, path),
        "width": width,
    }
    write_json(path / "pool.json", manifest)
    return Pool(path)


def _write_order(path: Path, ids: ShardedArray, width: int) -> None:
    """Write the order that all runs on a pool spread in, where one pays: found once, for all."""
    if len(ids) < ORDERED_ROWS:
        return
    with whole_file(path / "lists.npy") as temporary:
        lists = create_mapped(temporary, (len(ids), width), np.int32)
        for i, (a, b) in enumerate(itertools.pairwise(ids.offsets)):
            lists[a:b] = ids.shard(i)[:, :width]
        order = traversal_order(np.asarray(lists), least=ORDERED_ROWS)
        if order is not None:
            save_array(path / "order.npy", order)
    (path / "lists.npy").unlink()


def read_lists(path: Path, rows: slice = slice(None)) -> Neighbors:
    """Return rows of the lists that `save_lists` wrote, mapped."""
    ids, similarity = (np.load(p, mmap_mode="r")[rows] for p in (path, _beside(path)))
    return Neighbors(ids, similarity)


def save_lists(path: Path, lists: Neighbors) -> None:
    """Write lists to a file and one beside it; the first, which comes last, says both are there."""
    save_array(_beside(path), lists.similarity)
    save_array(path, lists.ids.astype(np.int32))


def _beside(path: Path) -> Path:
    """Return the file with the similarities of a file with ids."""
    return path.with_name(f"{path.stem}-similarity.npy")


class Join:
    """Adds the last of some blocks to the others, whose lists are complete among themselves."""

    def __init__(
        self, path: Path, blocks: Sequence[Block], ids: Path, similarity: Path, width: int
    ) -> None:
        self.path, self.width = path.resolve(), width
        self.rows = [block.rows.path.resolve() for block in blocks]
        self.new = (blocks[-1].ids.path.resolve(), blocks[-1].similarity.path.resolve())
        self.old = (ids.resolve(), similarity.resolve())
        self.sizes = [block.rows.shard_rows for block in blocks]
        self.first_new = sum(sum(sizes) for sizes in self.sizes[:-1])

    @property
    def places(self) -> list[tuple[int, int]]:
        """(block, shard) of every old shard, in order."""
        return [(b, s) for b, sizes in enumerate(self.sizes[:-1]) for s in range(len(sizes))]

    @property
    def groups(self) -> list[list[int]]:
        """The old shards of each task."""
        return shard_groups([self.sizes[b][s] for b, s in self.places])

    def partial(self, group: int) -> Path:
        """Return the file with the ids of the new rows' lists among one group's rows."""
        return self.path / "partial" / f"{group:05d}.npy"

    def run(self, resources: Resources) -> tuple[ShardedArray, ShardedArray]:
        """Return the lists of all rows, old and new, written where they are missing."""
        flat = [rows for sizes in self.sizes for rows in sizes]
        ids, similarity = _create_lists(self.path, flat, self.width)
        if ids.unwritten():
            missing = [g for g in range(len(self.groups)) if not self.partial(g).exists()]
            for _ in map_shards(self, missing, on_cpus(resources), label="lowshot: join"):
                pass
            self._write_new(ids, similarity)
        remove_tree(self.path / "partial")
        return ids, similarity

    def __call__(self, group: int) -> None:
        """Write the lists of one group's rows, and the new rows' lists among them."""
        rows = [ShardedArray.open(path) for path in self.rows]
        old = [ShardedArray.open(path) for path in self.old]
        out = [ShardedArray.open(self.path / name) for name in ("ids", "similarity")]
        offsets = out[0].offsets
        new = rows[-1]
        found = [empty_lists(n, self.width) for n in new.shard_rows]
        for i in self.groups[group]:
            b, s = self.places[i]
            lists = Neighbors(*[array.shard(i)[:, : self.width] for array in old])
            for t, first in enumerate(new.offsets[:-1]):
                lists, found[t] = with_rows_both(
                    lists,
                    rows[b].shard(s),
                    found[t],
                    new.shard(t),
                    first_old=int(offsets[i]),
                    first_new=self.first_new + int(first),
                )
            out[1].write_shard(i, lists.similarity)
            out[0].write_shard(i, lists.ids.astype(np.int32))
        stacked = np.concatenate([part.ids for part in found])
        values = np.concatenate([part.similarity for part in found])
        save_lists(self.partial(group), Neighbors(stacked, values))

    def _write_new(self, ids: ShardedArray, similarity: ShardedArray) -> None:
        """Merge the new rows' lists among themselves with those of every group."""
        own = [ShardedArray.open(path) for path in self.new]
        parts = [self.partial(g) for g in range(len(self.groups))]
        num_old = len(self.places)
        for t in range(own[0].num_shards):
            here = slice(int(own[0].offsets[t]), int(own[0].offsets[t + 1]))
            among = own[0].shard(t)[:, : self.width].astype(np.int64)
            among = np.where(among >= 0, among + self.first_new, -1)
            merged = Neighbors(among, own[1].shard(t)[:, : self.width])
            for part in parts:
                merged = merge_neighbors([merged, read_lists(part, here)], k=self.width)
            similarity.write_shard(num_old + t, merged.similarity)
            ids.write_shard(num_old + t, merged.ids.astype(np.int32))
