"""What a diffusion leaves: facts of every step, and scores in the order of images."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np

from selfsup_ray.artifacts import Array, ShardedArray, whole_file
from selfsup_ray.cluster.shards import map_shards
from selfsup_ray.config import Resources
from selfsup_ray.ops.adjacency import (
    Adjacency,
    Links,
    save_adjacency,
    traversal_order,
    write_adjacency,
)
from selfsup_ray.ops.diffusion import DiffusionOptions, weighted_adjacency
from selfsup_ray.ops.rng import permuted
from selfsup_ray.stages.graph import Graph

Best = Callable[[int, Array], tuple[Array, Array]]
"""A kept step, image ids -> classes and scores, both (n, top), best first."""
AllScores = Callable[[int, Array], Array]
"""A kept step, image ids -> (n, C) float32 scores."""


@dataclass(frozen=True)
class Stop:
    """Whose best step is the result, once `patience` further ones brought nothing better."""

    by: Literal["certainty", "accuracy"]
    patience: int

    def best(self, scores: Sequence[float]) -> int:
        """Return the best of the steps that count: the first of equals."""
        best = 0
        for t, score in enumerate(scores):
            if t - best > self.patience:
                break
            best = t if score > scores[best] else best
        return best

    def has_ended(self, scores: Sequence[float]) -> bool:
        """Return whether later steps count no more."""
        return len(scores) - 1 - self.best(scores) >= self.patience


@dataclass(frozen=True)
class Job:
    """A diffusion as its workers know it: folders and numbers; see DiffuseConfig."""

    out: Path
    graph: Path
    num_classes: int
    niter: int
    top: int
    full: bool
    dtype: Any
    options: DiffusionOptions
    sample: int
    seed: int
    memory_bytes: int
    resources: Resources
    keep: tuple[int, ...]
    """Steps whose scores are kept beside the result's."""
    stop: Stop | None

    def needs(self, t: int) -> bool:
        """Whether the scores of step t may be asked for in the end."""
        return t in self.keep or (t == self.niter if self.stop is None else True)

    @property
    def threads(self) -> int:
        """Threads of a worker."""
        return max(1, int(self.resources.cpus))

    @property
    def device(self) -> str:
        """Where a worker computes."""
        return "cuda" if self.resources.gpus else "cpu"

    @property
    def seeds(self) -> Array:
        """(N,) int32 class of the labelled images, -1 elsewhere; a memory map."""
        return np.load(self.out / "seeds.npy", mmap_mode="r")  # type: ignore[no-any-return]

    @property
    def watched(self) -> Array:
        """(n_w,) images whose best class of every step is noted: known, but no seeds."""
        return np.load(self.out / "watched.npy")  # type: ignore[no-any-return]

    @property
    def truth(self) -> Array:
        """(n_w,) labels of the watched images, which measure and, by `stop`, choose a step."""
        return np.load(self.out / "watched_labels.npy")  # type: ignore[no-any-return]

    @property
    def parts(self) -> Path:
        """Folder of what workers leave for each other; gone when the stage has finished."""
        return self.out / "parts"

    def adjacency(self) -> Adjacency:
        """Return the adjacency of the graph, written to disk by the first call."""
        folder, graph = self.out / "adjacency", Graph.open(self.graph)
        if (folder / "ids.npy").exists():
            return Adjacency.open(folder)
        stored: ShardedArray | None = getattr(graph, "order", None)
        order = None if stored is None else np.asarray(stored)
        if order is None and len(graph) * graph.k * 4 <= self.memory_bytes:
            order = traversal_order(np.asarray(graph.ids))
        if self.options.is_constant:
            least = self.options.min_similarity
            links = Links(graph.ids, None if least is None else graph.similarity, least)
            how: Any = {"order": order, "reciprocal": self.options.reciprocal}
            how |= {"threads": self.threads, "memory_bytes": self.memory_bytes}
            return write_adjacency(folder, links, **how)
        ids, similarity = np.asarray(graph.ids), np.asarray(graph.similarity)
        made = weighted_adjacency(ids, similarity, order=order, options=self.options)
        save_adjacency(folder, made)
        return Adjacency.open(folder)

    def sampled(self) -> Array:
        """Return the ascending ids of the images that entropy and coverage are measured on."""
        n = len(self.seeds)
        sample = min(self.sample, n)
        return np.sort(permuted(np.arange(sample), n=n, seed=self.seed, epoch=0))


def prepare(job: Job) -> None:
    """Write the adjacency where the workers are, unless it is there."""
    todo = [] if (job.out / "adjacency" / "ids.npy").exists() else [0]
    for _ in map_shards(_Prepare(job), todo, _cpus(job.resources), label="diffuse"):
        pass


@dataclass(frozen=True)
class _Prepare:
    job: Job

    def __call__(self, _: int) -> None:
        self.job.adjacency()


@dataclass
class Results:
    """What the parts of a diffusion found, put together.

    mass: (steps, C) float64 column sums before normalisation. totals, logs: (steps, n_s) float64
    sums of L and of L log L over all classes, of sampled images. watched_classes: (steps, n_w)
    int32 best class, -1 where no label arrived. best and rows: see there; rows may be None.
    """

    mass: Array
    totals: Array
    logs: Array
    watched_classes: Array
    best: Best
    rows: AllScores | None

    def chosen(self, job: Job) -> int:
        """Return the step whose scores are the result: the last, or the best by `job.stop`."""
        if job.stop is None:
            return len(self.mass) - 1
        return job.stop.best(self.stop_scores(job))

    def stop_scores(self, job: Job) -> list[float]:
        """Return what `job.stop` compares, of every step."""
        assert job.stop is not None
        steps = range(len(self.mass))
        if job.stop.by == "certainty":
            return [self.certainty(t, job.num_classes) for t in steps]
        facts = [self.accuracies(t, job.truth, job.stop) for t in steps]
        return [step["validation_accuracy"] for step in facts]

    def certainty(self, t: int, num_classes: int) -> float:
        """Return the mean over sampled images of 1 - entropy / log C, 0 where no label arrived."""
        facts, most = self.label_free(t), float(np.log(max(num_classes, 2)))
        return facts["coverage"] * (1 - facts["entropy"] / most)

    def accuracies(self, t: int, truth: Array, stop: Stop | None) -> dict[str, float]:
        """Return the accuracy on watched images; on half of them where the others choose."""
        if not len(truth):
            return {}
        hits = self.watched_classes[t] == truth
        if stop is None or stop.by != "accuracy":
            return {"accuracy": float(hits.mean())}
        return {
            "accuracy": float(hits[1::2].mean()),
            "validation_accuracy": float(hits[::2].mean()),
        }

    def label_free(self, t: int) -> dict[str, float]:
        """Return facts of step t that need no labels.

        mass: mean over classes with seeds of the column sum before normalisation; 1 keeps all.
        coverage: share of sampled images that any label has reached. entropy: mean over those of
        the entropy, in nats, of their scores as shares.
        """
        reached = self.totals[t] > 0
        total = np.where(reached, self.totals[t], 1)
        entropy = np.where(reached, np.log(total) - self.logs[t] / total, 0)
        labelled = self.mass[0] > 0
        return {
            "mass": float(self.mass[t][labelled].mean()),
            "coverage": float(reached.mean()),
            "entropy": float(entropy[reached].mean()) if reached.any() else 0.0,
        }


def entropy_sums(values: Array) -> tuple[Array, Array]:
    """Return the float64 sums over classes of L and of L log L, each (n,), of (n, C) values."""
    wide = values.astype(np.float64)
    logs = wide * np.log(np.where(wide > 0, wide, 1))
    return wide.sum(axis=1), logs.sum(axis=1)


def save(path: Path, values: Array) -> None:
    """Write an array whole or not at all."""
    with whole_file(path) as temporary, open(temporary, "wb") as file:
        np.save(file, values)


def write_results(results: Results, job: Job) -> None:
    """Write predictions, classes and scores of the result and of every kept step."""
    last = len(results.mass) - 1
    _write_step(results, job, results.chosen(job), job.out)
    for t in job.keep:
        if t <= last:
            _write_step(results, job, t, step_folder(job.out, t))


def step_folder(out: Path, t: int) -> Path:
    """Return where the scores of a kept step are."""
    return out / "steps" / f"{t:03d}"


def _write_step(results: Results, job: Job, t: int, out: Path) -> None:
    """Write the arrays of one step, cut at the shards of the graph."""
    ids = Graph.open(job.graph).ids
    shapes: dict[str, tuple[tuple[int, ...], str]] = {
        "classes": ((job.top,), "int32"),
        "scores": ((job.top,), "float32"),
        "predictions": ((), "int32"),
    }
    if results.rows is not None:
        shapes["all_scores"] = ((job.num_classes,), "float32")
    for name, (shape, dtype) in shapes.items():
        ShardedArray.create(out / name, shard_rows=ids.shard_rows, row_shape=shape, dtype=dtype)
    missing = ShardedArray.open(out / "predictions").unwritten()
    write = _Writer(results.best, results.rows, job, t, out)
    for _ in map_shards(write, missing, _cpus(job.resources), label="diffuse"):
        pass


def _cpus(resources: Resources) -> Resources:
    return Resources(workers=resources.workers, cpus=resources.cpus)


@dataclass(frozen=True)
class _Writer:
    best: Best
    all_scores: AllScores | None
    job: Job
    t: int
    out: Path

    def __call__(self, shard: int) -> None:
        """Write one shard of every array; predictions come last."""
        out = self.out
        arrays = {name: ShardedArray.open(out / name) for name in ("classes", "scores")}
        predictions = ShardedArray.open(out / "predictions")
        start, stop = predictions.offsets[shard], predictions.offsets[shard + 1]
        images = np.arange(start, stop)
        if self.all_scores is not None:
            rows = self.all_scores(self.t, images)
            ShardedArray.open(out / "all_scores").write_shard(shard, rows)
        classes, scores = self.best(self.t, images)
        arrays["classes"].write_shard(shard, classes)
        arrays["scores"].write_shard(shard, scores)
        seeds = self.job.seeds[start:stop]
        spread = np.where(scores[:, 0] > 0, classes[:, 0], -1)
        predictions.write_shard(shard, np.where(seeds >= 0, seeds, spread))
