"""Diffusion by ranges of rows: for a graph, or labels, that no node can hold.

In every step each worker reads the rows of L_{t-1} that its own rows and their neighbors need from
the files of the step before, and writes its rows of L_t. Column sums are kept per block of rows, in
float64, and added in the order of the blocks: the bits are those of the other mode.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from selfsup_ray.artifacts import Array
from selfsup_ray.cluster.shards import map_shards
from selfsup_ray.errors import ResourceError
from selfsup_ray.ops.adjacency import Adjacency, has_numba
from selfsup_ray.ops.spreading import Seeds, column_width, scales, widened
from selfsup_ray.stages.diffuse_blocks import save_named
from selfsup_ray.stages.diffuse_results import Job, Results, entropy_sums, prepare, save
from selfsup_ray.storage import remove_tree

COPIES = 6
"""Rows of L in a worker's memory for each of its own: with those of neighbors, and the result."""


def row_results(job: Job) -> Results:
    """Make every step's rows that are not there yet; return what they hold, put together."""
    if not has_numba():
        raise ResourceError("diffuse: mode=rows needs numba. Install it, or use mode=classes.")
    prepare(job)
    rows = ByRows(job, row_ranges(job.adjacency(), job))
    for t in range(job.niter + 1):
        _each(rows.make, rows.missing(t, "sums.npy"), t, job)
        _each(rows.read, rows.missing(t, "facts.npz"), t, job)
        scores = _together(rows, t).stop_scores(job) if job.stop else []
        needed = {t, *job.keep, *([job.stop.best(scores)] if job.stop else [])}
        for before in set(range(t)) - needed:
            remove_tree(rows.folder(before) / "labels")
        if job.stop and job.stop.has_ended(scores):
            return _together(rows, t)
    return _together(rows, job.niter)


def renumbered(ids: Array) -> tuple[Array, Array]:
    """Return the distinct ids, ascending, and the int32 place of each id among them."""
    low = int(ids.min(initial=0))
    is_there = np.zeros(int(ids.max(initial=-1)) + 1 - low, bool)
    is_there[ids - low] = True
    number = np.cumsum(is_there, dtype=np.int32) - np.int32(1)
    return np.flatnonzero(is_there) + low, number[ids - low]


def _each(call: Callable[[int, int], None], missing: list[int], t: int, job: Job) -> None:
    for _ in map_shards(_Call(call, t), missing, job.resources, label="diffuse"):
        pass


@dataclass(frozen=True)
class _Call:
    call: Callable[[int, int], None]
    t: int

    def __call__(self, shard: int) -> None:
        self.call(self.t, shard)


def row_ranges(graph: Adjacency, job: Job) -> list[tuple[int, int]]:
    """Return the row ranges of the workers, cut between blocks of the graph, by memory."""
    most = max(1, job.memory_bytes // (COPIES * width_of(job) * (2 if is_short(job) else 4)))
    ranges: list[tuple[int, int]] = []
    for start, stop in graph.blocks():
        if ranges and stop - ranges[-1][0] <= most:
            ranges[-1] = (ranges[-1][0], stop)
        else:
            ranges.append((start, stop))
    return ranges


def width_of(job: Job) -> int:
    """Return the columns of a stored row: the classes, filled up to whole vectors."""
    return column_width(job.num_classes)


def is_short(job: Job) -> bool:
    """Return whether labels are stored as bfloat16."""
    return bool(job.dtype == "bfloat16")


@dataclass(frozen=True)
class ByRows:
    """The steps of a diffusion in files: step t, shard s has labels, sums and facts."""

    job: Job
    ranges: list[tuple[int, int]]

    def __reduce__(self) -> tuple[Any, ...]:
        return ByRows, (self.job, self.ranges)  # without the graph: a worker maps it itself

    def folder(self, t: int) -> Path:
        """Return the folder of a step."""
        return self.job.parts / f"step-{t:04d}"

    def file(self, t: int, shard: int, name: str) -> Path:
        """Return the file of a shard of a step."""
        return self.folder(t) / name.split(".")[0] / f"{shard:05d}.{name.split('.')[1]}"

    def missing(self, t: int, name: str) -> list[int]:
        """Return the shards that still lack a file."""
        return [s for s in range(len(self.ranges)) if not self.file(t, s, name).exists()]

    @cached_property
    def graph(self) -> Adjacency:
        """The memory-mapped graph."""
        return self.job.adjacency()

    def seeds(self, start: int, stop: int) -> Array:
        """Return the seeds at these places."""
        order, seeds = self.graph.order, self.job.seeds
        return np.asarray(seeds[start:stop] if order is None else seeds[order[start:stop]])

    def totals(self, t: int) -> Array:
        """Return the (width,) float64 column sums of a finished step, added block by block."""
        totals = np.zeros(width_of(self.job))
        for shard in range(len(self.ranges)):
            for part in np.load(self.file(t, shard, "sums.npy")):
                totals += part
        return totals

    def scale(self, t: int) -> Array:
        """Return the factors that normalise the stored labels of a finished step."""
        return scales(self.totals(t))

    def make(self, t: int, shard: int) -> None:
        """Write the rows of L_t of one shard, then their column sums per block."""
        start, stop = self.ranges[shard]
        labels, sums = self._first(start, stop) if t == 0 else self._next(t, start, stop)
        save(self.file(t, shard, "labels.npy"), labels)
        save(self.file(t, shard, "sums.npy"), sums)

    def _first(self, start: int, stop: int) -> tuple[Array, Array]:
        job, width = self.job, width_of(self.job)
        seeds = Seeds.of(self.seeds(start, stop), 0, job.num_classes)
        labels = np.zeros((stop - start, width), np.uint16 if is_short(job) else np.float32)
        labels[seeds.places, seeds.columns] = 0x3F80 if is_short(job) else 1.0
        return labels, seeds.counts(width)[None]

    def _next(self, t: int, start: int, stop: int) -> tuple[Array, Array]:
        from selfsup_ray.ops.cpu_spreading import multiply_rows

        graph = self.graph
        first, last = int(graph.indptr[start]), int(graph.indptr[stop])
        needed, ids = renumbered(np.asarray(graph.ids[first:last]))
        indptr = np.asarray(graph.indptr[start : stop + 1]) - first
        local = Adjacency(indptr, ids, np.asarray(graph.twice[start:stop]))
        labels = self.rows(t - 1, needed)
        made = np.zeros((stop - start, labels.shape[1]), labels.dtype)
        blocks = [(a - start, b - start) for a, b in graph.blocks(start, stop)]
        scale = self.scale(t - 1)
        sums = multiply_rows(local, labels, made, scale, blocks, threads=self.job.threads)
        return made, np.stack(sums)

    def rows(self, t: int, places: Array) -> Array:
        """Return the stored labels at ascending places."""
        bounds = np.searchsorted(places, [start for start, _ in self.ranges] + [len(self.graph)])
        dtype = np.uint16 if is_short(self.job) else np.float32
        out = np.empty((len(places), width_of(self.job)), dtype)
        for shard, (start, _) in enumerate(self.ranges):
            here = slice(bounds[shard], bounds[shard + 1])
            if here.start < here.stop:
                stored = np.load(self.file(t, shard, "labels.npy"), mmap_mode="r")
                out[here] = stored[places[here] - start]
        return out

    def values(self, t: int, places: Array, scale: Array) -> Array:
        """Return the (n, C) float32 normalised labels at ascending places."""
        stored = self.rows(t, places)
        values = widened(stored) if is_short(self.job) else stored
        made: Array = values[:, : self.job.num_classes] * scale[: self.job.num_classes]
        return made

    def read(self, t: int, shard: int) -> None:
        """Note what a shard of a finished step says of sampled and watched images."""
        start, stop = self.ranges[shard]
        scale, job = self.scale(t), self.job
        sampled, sampled_at = self._inside(job.sampled(), start, stop)
        watched, watched_at = self._inside(job.watched, start, stop)
        totals, logs = entropy_sums(self.values(t, sampled_at, scale))
        classes, scores = self.best(t, watched_at, scale, 1)
        found: dict[str, Array] = {"sampled": sampled, "totals": totals, "logs": logs}
        found |= {"watched": watched, "classes": np.where(scores > 0, classes, -1)[:, 0]}
        save_named(self.file(t, shard, "facts.npz"), found)

    def _inside(self, images: Array, start: int, stop: int) -> tuple[Array, Array]:
        """Return the numbers of the images in a range of places, and their ascending places."""
        at = images if self.graph.place is None else self.graph.place[images]
        numbers = np.flatnonzero((at >= start) & (at < stop))
        numbers = numbers[np.argsort(at[numbers], kind="stable")]
        return numbers, at[numbers]

    def best(self, t: int, places: Array, scale: Array, num: int) -> tuple[Array, Array]:
        """Return the `num` best classes and their scores at ascending places, both (n, num)."""
        from selfsup_ray.ops.cpu_spreading import top_of

        parts = [
            top_of(self.rows(t, places[a : a + 65536]), scale, num, self.job.num_classes)
            for a in range(0, len(places), 65536)
        ]
        classes = [np.empty((0, num), np.int32), *(part[0] for part in parts)]
        scores = [np.empty((0, num), np.float32), *(part[1] for part in parts)]
        return np.concatenate(classes), np.concatenate(scores)


def _together(rows: ByRows, last: int) -> Results:
    job, steps = rows.job, range(last + 1)
    sampled, watched = len(job.sampled()), len(job.watched)
    totals, logs = (np.zeros((len(steps), sampled)) for _ in range(2))
    classes = np.full((len(steps), watched), -1, np.int32)
    for t in steps:
        for shard in range(len(rows.ranges)):
            with np.load(rows.file(t, shard, "facts.npz")) as found:
                totals[t, found["sampled"]] = found["totals"]
                logs[t, found["sampled"]] = found["logs"]
                classes[t, found["watched"]] = found["classes"]
    return Results(
        mass=np.stack([rows.totals(t)[: job.num_classes] for t in steps]),
        totals=totals,
        logs=logs,
        watched_classes=classes,
        best=_Best(rows),
        rows=_AllScores(rows) if job.full else None,
    )


def _in_order(rows: ByRows, images: Array) -> tuple[Array, Array]:
    """Return the ascending places of images, and where each image is among them."""
    at = images if rows.graph.place is None else rows.graph.place[images]
    order = np.argsort(at, kind="stable")
    back = np.empty_like(order)
    back[order] = np.arange(len(order))
    return at[order], back


@dataclass(frozen=True)
class _Best:
    rows: ByRows

    def __call__(self, t: int, images: Array) -> tuple[Array, Array]:
        rows = self.rows
        places, back = _in_order(rows, images)
        classes, scores = rows.best(t, places, rows.scale(t), rows.job.top)
        return classes[back], scores[back]


@dataclass(frozen=True)
class _AllScores:
    rows: ByRows

    def __call__(self, t: int, images: Array) -> Any:
        rows = self.rows
        places, back = _in_order(rows, images)
        return rows.values(t, places, rows.scale(t))[back]
