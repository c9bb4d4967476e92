"""What a stage asks of Ray: tasks, actors, bytes between workers, checkpoints; as plain numbers.

The functions say how the stages cut their work; `experiments/benchmarks/eight_nodes.py` runs a
small experiment on eight nodes and compares.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import ceil

from selfsup_ray.cluster.methods import ExactConfig, HNSWConfig, IVFConfig
from selfsup_ray.cluster.neighbors import block_rows
from selfsup_ray.cluster.pairs import FROM_ROWS
from selfsup_ray.costs import searched_dim
from selfsup_ray.costs_network import network
from selfsup_ray.costs_traffic import FLOAT, pretext_size
from selfsup_ray.costs_training import backbone_of
from selfsup_ray.experiment import Experiment
from selfsup_ray.ops.all_pairs import num_groups
from selfsup_ray.ops.assignment import blocks
from selfsup_ray.ops.spreading import spread_bytes
from selfsup_ray.stages.cell_graph import CellsConfig
from selfsup_ray.stages.patch_rows import ROWS
from selfsup_ray.stages.reduce import SAMPLE_BLOCK
from selfsup_ray.training import TrainConfig

LISTED = 12
"""Bytes of a neighbor that an actor answers with: an int64 id and a float32 similarity."""


@dataclass(frozen=True)
class Counts:
    """Of one stage that nothing interrupts; a kill adds a restart and what it interrupted.

    tasks: tasks of Ray, and calls of actors that do work. actors: processes that stay for the
    stage, Ray Train's workers among them. at_once: pieces that can be worked on side by side.
    sent_bytes: from worker to worker, or to the driver, when each is on a node of its own; what
    goes through files is not among them. checkpoint_bytes: of one checkpoint, which replaces the
    one before.
    """

    tasks: int = 0
    actors: int = 0
    at_once: int = 1
    sent_bytes: int = 0
    checkpoints: int = 0
    checkpoint_bytes: int = 0


def counts(e: Experiment, stage: str, n: int | None) -> Counts | None:
    """Return the counts of a stage for n images; None where they are not known beforehand."""
    if n is None or e.ingest is None:
        return None
    workers = getattr(e, stage).resources.workers
    shards = ceil(n / e.ingest.shard_size)
    if workers == 0 and stage not in ("pretext", "sela", "scan", "selflabel"):
        return Counts()
    match stage:
        case "ingest":
            return Counts(tasks=shards, at_once=min(workers, shards))
        case "pretext":
            return _pretext(e, n)
        case "sela" | "scan" | "selflabel":
            return _trained(e, stage, n)
        case "whiten":
            return _whiten(e, shards)
        case "patches":
            return _kmeans(e)
        case "embed":
            return _pool(workers, shards)
        case "reduce":
            assert e.reduce is not None
            fit = ceil(min(e.reduce.sample, n) / SAMPLE_BLOCK) if not e.reduce.transform else 0
            return Counts(tasks=fit + shards, at_once=min(workers, shards))
        case "graph":
            return _graph(e, n, shards)
        case "diffuse":
            return _diffuse(e, n, shards)
    return None


def _steps(config: TrainConfig, n: int) -> tuple[int, int]:
    """Return steps and checkpoints of a training."""
    steps = n // config.batch_size * config.epochs
    return steps, ceil(steps / config.checkpoint_every)


def _pretext(e: Experiment, n: int) -> Counts:
    assert e.pretext is not None and e.ingest is not None
    made, workers = e.pretext, e.pretext.resources.workers
    if made.epochs == 0:
        return Counts()
    steps, checkpoints = _steps(made, n)
    side = made.views.size or e.ingest.image_size
    size = pretext_size(made, workers=workers, side=side, n=n)
    return Counts(
        actors=workers,
        at_once=max(workers, 1),
        sent_bytes=steps * size.step.total,
        checkpoints=checkpoints,
        checkpoint_bytes=size.checkpoint_bytes,
    )


def _trained(e: Experiment, stage: str, n: int) -> Counts:
    """Return the counts of a clustering network: its workers train by gradients, then predict."""
    assert e.ingest is not None
    made = getattr(e, stage)
    workers = made.resources.workers
    if made.epochs == 0:  # published weights
        return _pool(workers, ceil(n / e.ingest.shard_size)) if workers else Counts()
    steps, checkpoints = _steps(made, n)
    parameters = network(backbone_of(e), made.views.size or e.ingest.image_size).parameters
    frozen = stage == "scan" and made.freeze_backbone
    return Counts(
        actors=workers,
        at_once=max(workers, 1),
        sent_bytes=0 if frozen else steps * 2 * (max(workers, 1) - 1) * parameters * FLOAT,
        checkpoints=checkpoints,
        checkpoint_bytes=parameters * FLOAT * (1 if frozen else 3),
    )


def _pool(workers: int, shards: int) -> Counts:
    """Return the counts of a pool of actors with a network, each image once."""
    actors = min(workers, shards)
    return Counts(tasks=shards, actors=actors, at_once=actors)


def _whiten(e: Experiment, shards: int) -> Counts:
    assert e.whiten is not None
    made, files = e.whiten, ceil(e.whiten.patches / ROWS)
    drawn = shards if made.source == "images" else files
    apart = made.source != "images" or made.covariance_from == "sample"
    workers = made.resources.workers
    return Counts(tasks=drawn + (files if apart else 0), at_once=min(workers, drawn))


def _kmeans(e: Experiment) -> Counts:
    """Return the counts of k-means: centroids to every actor, exact sums back, each round."""
    assert e.patches is not None and e.whiten is not None
    made, d = e.patches, 3 * e.whiten.patch_size**2
    if made.select != "kmeans" or made.backend != "own":
        return Counts()
    actors = min(made.resources.workers, len(blocks(made.patches)))
    rounds = made.iterations + 1
    each = made.size * (d * FLOAT + d * 8 + 8)
    return Counts(
        tasks=actors * (2 + rounds),
        actors=actors,
        at_once=actors,
        sent_bytes=actors * rounds * each,
    )


def _graph(e: Experiment, n: int, shards: int) -> Counts:
    assert e.graph is not None
    method, k, ask = e.graph.method, e.graph.k, e.graph.resources
    dim = searched_dim(e)
    workers = ask.workers
    if isinstance(method, CellsConfig):
        parts, ranges = _cell_parts(e, method, n, dim, shards)
        at_once = min(workers, parts, ranges)
        return Counts(tasks=2 * parts + 2 * ranges, at_once=at_once)
    if isinstance(method, ExactConfig) and n >= FROM_ROWS and not ask.gpus:
        threads = max(1, int(ask.cpus))
        groups = num_groups(n, dim, k, threads * workers)
        pairs = groups * (groups + 1) // 2 if groups > 1 else 0
        tasks = ceil(pairs / threads) + ceil(groups / threads) + shards
        return Counts(tasks=tasks, actors=workers, at_once=workers)
    return _search(e, method, n, dim)


def _cell_parts(
    e: Experiment, method: CellsConfig, n: int, dim: int, shards: int
) -> tuple[int, int]:
    """Return the parts that are sorted and the ranges of cells that are joined, about."""
    assert e.ingest is not None and e.graph is not None
    part = max(1, method.part_rows(n, dim=dim) // e.ingest.shard_size)
    most = method.range_rows(n, dim=dim, k=e.graph.k)
    return ceil(shards / part), min(ceil(n / most), method.cells(n))


def _search(
    e: Experiment, method: ExactConfig | IVFConfig | HNSWConfig, n: int, dim: int
) -> Counts:
    """Return the counts of queries that every actor of a replica answers and a task merges."""
    assert e.graph is not None and e.ingest is not None
    k, workers, probes = e.graph.k + 1, e.graph.resources.workers, 0
    pieces, build, replica = 0, 0, workers
    if not isinstance(method, ExactConfig):
        pieces = ceil(n / method.piece_rows)
        replica, build = min(workers, pieces), 1 + pieces
        probes = method.probes(n) if isinstance(method, IVFConfig) else 0
    actors = workers // replica * replica
    step = block_rows(
        k, dim=dim, actors=replica, replicas=workers // replica, probes=probes if pieces else None
    )
    size, last = e.ingest.shard_size, n % e.ingest.shard_size
    queried = n // size * ceil(size / step) + ceil(last / step)
    calls = replica + 1 + (1 if pieces else 0)  # search, merge, and the cells of the queries
    sent = n * (LISTED * (k * replica + k - 1) + (12 * probes * replica if pieces else 0))
    tasks = build + queried * calls + ceil(n / size)
    return Counts(tasks=tasks, actors=actors, at_once=actors, sent_bytes=sent)


def _diffuse(e: Experiment, n: int, shards: int) -> Counts | None:
    """Return the counts of a diffusion of up to 100 classes, in one block."""
    assert e.diffuse is not None
    made = e.diffuse
    if made.mode == "rows" or spread_bytes(n, 100, dtype=made.dtype) > made.memory_gb * 1e9:
        return None
    return Counts(tasks=2 + shards * (1 + len(made.kept)), at_once=1)
