"""k-means over a stored array: actors hold the points, sums of centroids come back.

The sums are exact integers and points are cut where tiles of the product end, so centroids are the
same bits for any number of actors and threads, and for `ops.kmeans.kmeans` in one process. The
state is written after every iteration; an actor that dies reads its points again.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import torch

from selfsup_ray.artifacts import Array, ShardedArray, whole_file
from selfsup_ray.cluster.failures import end_actors
from selfsup_ray.cluster.pairs import answers
from selfsup_ray.cluster.session import connect, require_resources
from selfsup_ray.config import Resources
from selfsup_ray.errors import ArtifactError, ConfigError
from selfsup_ray.ops.assignment import BLOCK, Precision, Sums, blocks, one_thread_each
from selfsup_ray.ops.kmeans import (
    Clustering,
    Points,
    State,
    Step,
    Totals,
    exponent_for,
    first_ids,
    hold,
    lloyd,
    unit,
)
from selfsup_ray.progress import track

STATE = "kmeans.safetensors"


class PointShard:
    """Points [start, stop) of a stored array, in memory: (n, d) float32, times the transform.

    They are read when first asked for, and again after a restart.
    """

    def __init__(
        self,
        path: Path,
        start: int,
        stop: int,
        *,
        transform: Array | None,
        threads: int,
        device: str,
    ) -> None:
        self.path, self.start, self.stop = path, start, stop
        self.transform, self.threads, self.device = transform, threads, device
        self._points: Points | None = None

    @property
    def points(self) -> Points:
        """The points."""
        if self._points is None:
            rows = self._read()
            self._points = hold(rows, threads=self.threads, device=self.device)
        return self._points

    def _read(self) -> Array:
        array = ShardedArray.open(self.path)
        dim = array.shape[1] if self.transform is None else self.transform.shape[1]
        rows = np.empty((self.stop - self.start, dim), np.float32)

        def fill(block: tuple[int, int]) -> None:
            a, b = block
            some = array.rows(np.arange(self.start + a, self.start + b))
            rows[a:b] = transformed(some, self.transform)

        with one_thread_each(self.threads) as pool:
            list(pool.map(fill, blocks(len(rows))))
        return rows

    def largest(self) -> float:
        """Return the largest magnitude among the numbers of all points."""
        return self.points.largest()

    def totals(self, exponent: int) -> tuple[Array, int]:
        """Return the sum (d,) int64 of x 2^exponent, rounded, and that of its squares."""
        return self.points.totals(exponent)

    def sums(self, centroids: Array, exponent: int, precision: Precision) -> Sums:
        """Return the sums over the points nearest to each centroid."""
        return self.points.sums(centroids, exponent, precision)


def transformed(rows: Array, transform: Array | None) -> Array:
    """Return rows (n, d) float32 times transform (d, e), or as they are without one."""
    rows = np.ascontiguousarray(rows, np.float32)
    if transform is None:
        return rows
    return (torch.from_numpy(rows) @ torch.from_numpy(transform)).numpy()


class _Shards:
    """All points: one shard in this process, or one in each actor."""

    def __init__(self, parts: list[PointShard], resources: Resources, stage: str) -> None:
        self.path = parts[0].path
        self.local: PointShard | None = None
        self.actors: list[Any] = []
        if resources.workers == 0:
            (self.local,) = parts
            return
        import ray

        connect()
        require_resources(resources, stage=stage)
        # Without end: a restart is nothing unusual on a spot machine, and a call repeats exactly.
        remote = ray.remote(max_restarts=-1, max_task_retries=-1)(PointShard).options(
            num_cpus=resources.cpus, num_gpus=resources.gpus, scheduling_strategy="SPREAD"
        )
        for part in parts:
            how = {"transform": part.transform, "threads": part.threads, "device": part.device}
            self.actors.append(remote.remote(part.path, part.start, part.stop, **how))

    def each(self, method: str, *arguments: Any) -> Iterator[Any]:
        """Yield what the method of every shard returns, in the order in which they finish."""
        if self.local is not None:
            yield getattr(self.local, method)(*arguments)
            return
        import ray

        shared = [ray.put(x) if isinstance(x, np.ndarray) else x for x in arguments]
        running = [getattr(actor, method).remote(*shared) for actor in self.actors]
        while running:
            done, running = ray.wait(running, num_returns=1)
            yield from answers(done)

    def totals(self, count: int) -> Totals:
        """Return the totals of all points."""
        largest = float(np.max(list(self.each("largest"))))
        if not np.isfinite(largest):
            raise ArtifactError(
                f"{self.path} holds a point that is not finite. Run the stage that writes it again."
            )
        exponent = exponent_for(largest)
        parts = list(self.each("totals", exponent))
        total = np.asarray(sum(sums for sums, _ in parts))
        return Totals(count, exponent, total, sum(squares for _, squares in parts))

    def sums(self, exponent: int, centroids: Array, precision: Precision) -> Sums:
        """Return the sums over all points nearest to each centroid."""
        total, *others = self.each("sums", centroids, exponent, precision)
        for part in others:
            total = total + part
        return total  # type: ignore[no-any-return]

    def close(self) -> None:
        """End the actors."""
        if self.actors:
            end_actors(self.actors)


def point_shards(
    points: ShardedArray, rows: int, *, transform: Array | None, resources: Resources
) -> list[PointShard]:
    """Return the shards of the first `rows` points, at most one a worker, cut at whole blocks."""
    num_blocks = len(blocks(rows))
    parts = min(max(1, resources.workers), num_blocks)
    cuts = np.linspace(0, num_blocks, parts + 1).astype(np.int64) * BLOCK
    how: dict[str, Any] = {
        "transform": transform,
        "threads": max(1, int(resources.cpus)),
        "device": "cuda" if resources.gpus else "cpu",
    }
    path = points.path.resolve()
    return [PointShard(path, a, min(b, rows), **how) for a, b in pairwise(cuts.tolist())]


def kmeans_sharded(
    points: ShardedArray,
    num_clusters: int,
    *,
    rows: int | None = None,
    transform: Array | None = None,
    iterations: int = 25,
    seed: int = 0,
    precision: Precision = "bfloat16",
    unit_norm: bool = False,
    resources: Resources,
    out: Path,
    stage: str = "patches",
) -> Clustering:
    """Return K centroids of the first `rows` points (n, d), without it of all: `ops.kmeans.kmeans`.

    transform: (d, e) float32, x -> x transform is what is clustered. resources: `workers` actors
    share the points in memory, 4 e bytes each, on `cpus` threads, or on a GPU; 0 holds them in
    this process. out: a folder for the state after each iteration, from which an interrupted call
    continues to the same bits. stage: whose resources an error names. Raises ConfigError when
    there are fewer points than rows or clusters, ArtifactError when `out` holds another k-means.
    """
    n = len(points) if rows is None else rows
    if n > len(points):
        raise ConfigError(
            f"k-means asks for {n:,} points, but {points.path} holds {len(points):,}. Sample more."
        )
    request = _request(n, num_clusters, iterations, seed, precision, unit_norm, transform)
    state = _read(out / STATE, request)
    if isinstance(state, Clustering):
        return state
    first = first_ids(n, num_clusters, seed=seed)
    how: dict[str, Any] = {
        "iterations": iterations,
        "seed": seed,
        "precision": precision,
        "unit_norm": unit_norm,
    }
    shards = _Shards(
        point_shards(points, n, transform=transform, resources=resources), resources, stage
    )
    try:
        totals = shards.totals(n)
        if state is None:
            start = transformed(points.rows(first), transform)
            state = State(unit(start) if unit_norm else start)
        assign = partial(shards.sums, totals.exponent)
        with track("k-means", iterations + 1, "iterations") as progress:
            progress.skip(len(state.objective))
            for step in lloyd(assign, totals, state, **how):
                _write(out / STATE, request, step)
                progress.advance()
    finally:
        shards.close()
    return step.clustering


def _request(
    points: int,
    num_clusters: int,
    iterations: int,
    seed: int,
    precision: Precision,
    unit_norm: bool,
    transform: Array | None,
) -> dict[str, Any]:
    """Return what decides the result, beside the points themselves."""
    digest = None if transform is None else hashlib.sha256(transform.tobytes()).hexdigest()
    return {
        "points": points,
        "num_clusters": num_clusters,
        "iterations": iterations,
        "seed": seed,
        "precision": precision,
        "unit_norm": unit_norm,
        "transform": digest,
    }


def _write(path: Path, request: dict[str, Any], step: Step) -> None:
    """Write where k-means stands: the state after the update, or the result."""
    from safetensors.numpy import save_file

    state = step.clustering if step.following is None else step.following
    tensors = {"centroids": state.centroids, "objective": np.array(step.objective)}
    if step.following is None:
        tensors["counts"] = step.counts
    with whole_file(path) as temporary:
        save_file(tensors, temporary, metadata={"request": json.dumps(request)})


def _read(path: Path, request: dict[str, Any]) -> State | Clustering | None:
    """Return where an earlier call stopped, its result if it finished, None if there was none."""
    from safetensors import safe_open

    if not path.exists():
        return None
    with safe_open(path, framework="numpy") as file:
        has = json.loads(file.metadata()["request"])
        tensors = {name: file.get_tensor(name) for name in file.keys()}
    for key, asked in request.items():
        if has[key] != asked:
            raise ArtifactError(
                f"{path} belongs to a k-means with {key}={has[key]}, but this run asks for "
                f"{asked}. Choose another `out`, or delete the file to start again."
            )
    objective = tuple(tensors["objective"].tolist())
    if "counts" in tensors:
        return Clustering(tensors["centroids"], tensors["counts"], objective[1:])
    return State(tensors["centroids"], objective)
