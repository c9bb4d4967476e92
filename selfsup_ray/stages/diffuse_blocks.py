"""Diffusion by blocks of classes: each worker spreads some classes over the whole graph.

The product and the normalisation of columns treat each class alone, so workers exchange nothing;
they share the memory-mapped graph of their node.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np

from selfsup_ray.artifacts import Array, whole_file
from selfsup_ray.cluster.shards import map_shards
from selfsup_ray.errors import ResourceError
from selfsup_ray.ops.adjacency import Adjacency
from selfsup_ray.ops.diffusion import spread
from selfsup_ray.ops.spreading import Spread, class_ranges, spread_bytes
from selfsup_ray.stages.diffuse_results import Job, Results, entropy_sums, prepare, save

WIDEST = {"float32": 128, "bfloat16": 256}
"""Classes of a block at most: rows of 512 bytes; wider ones leave the cache sooner."""
_ROWS = 65536


def class_blocks(job: Job, nodes: int) -> list[tuple[int, int]]:
    """Return class ranges that fit a worker's memory, of about equal width.

    Raises ResourceError when not even 16 classes fit.
    """
    together = job.options.sinkhorn > 0
    ranges = class_ranges(
        job.num_classes,
        nodes,
        dtype=job.dtype,
        memory_bytes=job.memory_bytes,
        widest=WIDEST[job.dtype],
        together=together,
    )
    if ranges:
        return ranges
    least = job.num_classes if together else 16
    needed = spread_bytes(nodes, least, dtype=job.dtype) / 1e9
    raise ResourceError(
        f"diffuse: {least} classes on {nodes:,} images take {needed:.1f} GB, but "
        f"diffuse.memory_gb is {job.memory_bytes / 1e9:g}. Raise it, or set diffuse.mode=rows."
    )


def block_results(job: Job) -> Results:
    """Spread every block that is not there yet; return what they found, put together."""
    prepare(job)
    nodes = len(job.adjacency())
    blocks = class_blocks(job, nodes)
    folders = [job.parts / f"{first:06d}-{stop:06d}" for first, stop in blocks]
    missing = [i for i, folder in enumerate(folders) if not (folder / "facts.npz").exists()]
    for _ in map_shards(_Block(job, blocks), missing, job.resources, label="diffuse"):
        pass
    return _together(folders, job)


@dataclass(frozen=True)
class _Block:
    job: Job
    blocks: list[tuple[int, int]]

    def __call__(self, i: int) -> None:
        """Spread the classes of block i; facts.npz comes last."""
        first, stop = self.blocks[i]
        job, graph = self.job, self.job.adjacency()
        folder = job.parts / f"{first:06d}-{stop:06d}"
        seeds = np.asarray(job.seeds)
        state = spread(
            graph,
            seeds if graph.order is None else seeds[graph.order],
            first=first,
            stop=stop,
            threads=job.threads,
            dtype=job.dtype,
            device=job.device,
            variant=job.options.variant,
        )
        watch = _Watch(graph, job)
        for t in range(job.niter + 1):
            if t:
                state.step()
            watch.note(state)
            if job.needs(t):
                self._keep(state, graph, kept_folder(folder, t), min(job.top, stop - first))
            if len(self.blocks) == 1 and watch.has_ended(job):
                break
        watch.save(folder / "facts.npz")

    def _keep(self, state: Spread, graph: Adjacency, folder: Path, top: int) -> None:
        """Write the scores of the state's step, by image."""
        # In the order of places, where rows lie; then only the few best are moved.
        best = state.top(np.arange(len(graph)), top)
        at = _places(graph, np.arange(len(graph)))
        for name, values in zip(("classes", "scores"), best, strict=True):
            save(folder / f"{name}.npy", values[at])
        if self.job.full:
            rows = [state.sums(at[a : a + _ROWS, None]) for a in range(0, len(at), _ROWS)]
            save(folder / "all_scores.npy", np.concatenate(rows))


def kept_folder(folder: Path, t: int) -> Path:
    """Return where a block keeps the scores of a step."""
    return folder / f"{t:03d}"


def _places(graph: Adjacency, images: Array) -> Array:
    return images if graph.place is None else graph.place[images]


class _Watch:
    """Notes the mass, the sampled rows and the best class of watched images, step by step."""

    def __init__(self, graph: Adjacency, job: Job) -> None:
        self.sampled = _places(graph, job.sampled())
        watched = _places(graph, job.watched)
        self.watched, self.back = np.unique(watched, return_inverse=True)  # rows as they lie
        self.steps: list[tuple[Array, ...]] = []

    def note(self, state: Spread) -> None:
        sums = [
            entropy_sums(state.sums(self.sampled[a : a + _ROWS, None]))
            for a in range(0, len(self.sampled), _ROWS)
        ]
        totals, logs = (np.concatenate(part) for part in zip(*sums, strict=True))
        classes, scores = state.top(self.watched, 1)
        best = (classes[self.back, 0], scores[self.back, 0])
        self.steps.append((state.mass, totals, logs, *best))

    def _columns(self) -> dict[str, Array]:
        names = ("mass", "totals", "logs", "classes", "scores")
        columns = zip(names, zip(*self.steps, strict=True), strict=True)
        return {name: np.stack(values) for name, values in columns}

    def has_ended(self, job: Job) -> bool:
        """Return whether a block of all classes may stop here."""
        if job.stop is None:
            return False
        return job.stop.has_ended(_results([self._columns()], [], job).stop_scores(job))

    def save(self, path: Path) -> None:
        save_named(path, self._columns())


def save_named(path: Path, arrays: dict[str, Array]) -> None:
    """Write several arrays to one .npz file, whole or not at all."""
    with whole_file(path) as temporary, open(temporary, "wb") as file:
        np.savez(file, allow_pickle=False, **arrays)


def _together(folders: list[Path], job: Job) -> Results:
    """Return the facts of all blocks as those of all classes."""
    parts = []
    for folder in folders:
        with np.load(folder / "facts.npz") as stored:
            parts.append({name: stored[name] for name in stored.files})
    return _results(parts, folders, job)


def _results(parts: list[dict[str, Array]], folders: list[Path], job: Job) -> Results:
    scores = np.stack([part["scores"] for part in parts])  # (blocks, steps, n_w)
    best = scores.argmax(axis=0)[None]  # the first of equals: the lower class
    classes = np.take_along_axis(np.stack([part["classes"] for part in parts]), best, axis=0)[0]
    reached = np.take_along_axis(scores, best, axis=0)[0] > 0
    return Results(
        mass=np.concatenate([part["mass"] for part in parts], axis=1),
        totals=np.sum([part["totals"] for part in parts], axis=0),
        logs=np.sum([part["logs"] for part in parts], axis=0),
        watched_classes=np.where(reached, classes, -1).astype(np.int32),
        best=_Best(folders, job.top),
        rows=_AllScores(folders) if job.full else None,
    )


@dataclass(frozen=True)
class _Best:
    """Merges the best classes of all blocks."""

    folders: list[Path]
    top: int

    def __call__(self, t: int, images: Array) -> tuple[Array, Array]:
        stored = [_stored(self.folders, t, name, images) for name in ("classes", "scores")]
        classes, scores = (np.concatenate(values, axis=1) for values in stored)
        # Stable, and lower classes come first: ties go to them.
        order = np.argsort(-scores, axis=1, kind="stable")[:, : self.top]
        return np.take_along_axis(classes, order, 1), np.take_along_axis(scores, order, 1)


@dataclass(frozen=True)
class _AllScores:
    folders: list[Path]

    def __call__(self, t: int, images: Array) -> Array:
        return np.concatenate(_stored(self.folders, t, "all_scores", images), axis=1)


def _stored(folders: list[Path], t: int, name: str, images: Array) -> list[Array]:
    """Return the rows of consecutive images that each block kept of a step."""
    part = slice(int(images[0]), int(images[-1]) + 1) if len(images) else slice(0, 0)
    paths = [kept_folder(folder, t) / f"{name}.npy" for folder in folders]
    return [np.load(path, mmap_mode="r")[part] for path in paths]
