"""What a stage costs: memory, disk and seconds, each with what the figure assumes."""

from __future__ import annotations

import os
from pathlib import Path

from selfsup_ray.costs_classify import classify_cost
from selfsup_ray.costs_graph import SEARCH_FLOPS, graph_cost
from selfsup_ray.costs_labelled import labelled_cost, maps_cost
from selfsup_ray.costs_lowshot import LINK_CLASSES_PER_S, LINKS_PER_NEIGHBOR, lowshot_cost
from selfsup_ray.costs_network import GPU_FLOPS, network, network_seconds
from selfsup_ray.costs_training import (
    WORKER_BYTES,
    Cost,
    backbone_of,
    feature_dim,
    stored_bytes,
    training_cost,
)
from selfsup_ray.experiment import Experiment
from selfsup_ray.ops.spreading import spread_bytes
from selfsup_ray.stages.imported import ImportFeaturesConfig

COVARIANCE_FLOPS = 40e9
"""Multiplications and additions a second of the sums over all patches on one CPU core, measured."""
PATCH_S = 2e-6
"""Seconds to draw, cut out and store a patch."""
KMEANS_FLOPS = 100e9
"""Multiplications and additions a second of k-means on one CPU core, in bfloat16."""
DECODED_PER_S = 500.0
"""Photos of about 500 x 400 pixels that one CPU core decodes, resizes and stores in a second."""
ROW_BYTES = 100
"""Label, source path and digest of one image."""


def cost(
    experiment: Experiment,
    stage: str,
    num_images: int | None,
    folder: Path,
    *,
    cpus: float | None = None,
) -> Cost:
    """Return what a stage of an experiment costs for num_images images (None: not known yet).

    A rate that an interrupted run left in `folder` is used in place of an assumption. cpus: what
    there is for a stage that takes all it gets; None: those of this machine.
    """
    if num_images is None:
        return Cost(assumes="the number of images is not known before ingest")
    match stage:
        case "ingest":
            return _ingest(experiment, num_images, cpus or os.cpu_count() or 1)
        case "pretext" | "sela" | "scan" | "selflabel":
            return training_cost(experiment, stage, num_images, folder)
        case "whiten":
            return _whiten(experiment, num_images)
        case "patches":
            return _patches(experiment)
        case "classify":
            return _classify(experiment, num_images)
        case "linear" | "finetune":
            return _labelled(experiment, stage, num_images)
        case "dimension":
            return _dimension(experiment, num_images)
        case "embed":
            return _embed(experiment, num_images)
        case "maps":
            return _maps(experiment, num_images)
        case "reduce":
            return _reduce(experiment, num_images)
        case "graph":
            return _graph(experiment, num_images)
        case "diffuse":
            return _diffuse(experiment, num_images)
        case "probe":
            return _probe(experiment, num_images)
        case "voc07":
            return _voc07(experiment)
        case "lowshot":
            return lowshot_cost(experiment, num_images, dim=searched_dim(experiment))
    return _tables(experiment, num_images)


def _classify(e: Experiment, n: int) -> Cost:
    assert e.classify is not None and e.ingest is not None
    made = classify_cost(
        e.classify,
        n=n,
        side=e.ingest.image_size,
        entries=e.patches.entries if e.patches else 0,
        patch_size=e.whiten.patch_size if e.whiten else 1,
    )
    return Cost(
        memory_bytes=WORKER_BYTES + made.memory_bytes,
        disk_bytes=made.disk_bytes,
        seconds=made.seconds,
        assumes=made.assumes,
    )


def _labelled(e: Experiment, stage: str, n: int) -> Cost:
    assert e.ingest is not None
    stored = e.ingest.image_size
    side = encoded_side(e)
    made = labelled_cost(getattr(e, stage), backbone_of(e), n=n, stored=stored, side=side)
    return Cost(WORKER_BYTES + made.memory_bytes, made.disk_bytes, made.seconds, made.assumes)


def _ingest(e: Experiment, n: int, there: float) -> Cost:
    assert e.ingest is not None
    side, encoding = e.ingest.image_size, e.ingest.encoding
    stored = stored_bytes(e.ingest)
    ask = e.ingest.resources
    # `workers` is an upper bound here: 32 by default, fewer where there are fewer CPUs.
    cpus = min(max(ask.workers, 1) * ask.cpus, there)
    return Cost(
        memory_bytes=int(2 * e.ingest.shard_size * side * side * 3) + WORKER_BYTES,
        disk_bytes=int(n * (stored + ROW_BYTES)),
        seconds=n / (DECODED_PER_S * cpus),
        assumes=f"{cpus:g} CPUs, {DECODED_PER_S:.0f} photos/s each, "
        f"{stored / 1e3:.1f} kB an image as {encoding}",
    )


def _dimension(e: Experiment, n: int) -> Cost:
    assert e.dimension is not None and e.ingest is not None
    made, side = e.dimension, e.ingest.image_size
    d, per_image = 3 * made.patch_size**2, max(side - made.patch_size + 1, 0) ** 2
    points, sets = min(made.points, n * per_image), len(made.sets)
    per_centroid = made.points_per_centroid or points
    seen = [min(points, per_centroid * k) * made.iterations + points for k in made.all_k]
    work = sum(2.0 * d * k * rows for k, rows in zip(made.all_k, seen, strict=True)) * sets
    ask, workers = made.resources, max(made.resources.workers, 1)
    rate = workers * (ask.gpus * GPU_FLOPS if ask.gpus else ask.cpus * KMEANS_FLOPS)
    return Cost(
        memory_bytes=WORKER_BYTES + points * d * 4 * 4,
        disk_bytes=points * d * (4 * sets + 1),
        seconds=work / rate,
        assumes=f"{points:,} patches, {len(made.all_k)} numbers of centroids in {sets} sets; the "
        f"disk is freed at the end",
    )


def encoded_side(e: Experiment) -> int:
    """Return the side of the views that the experiment's encoder takes."""
    assert e.ingest is not None
    learned = e.pretext or e.sela
    return (learned.views.size if learned else None) or e.ingest.image_size


def _whiten(e: Experiment, n: int) -> Cost:
    assert e.whiten is not None and e.ingest is not None
    made, ask, side = e.whiten, e.whiten.resources, e.ingest.image_size
    d = 3 * made.patch_size**2
    read = made.source == "images"
    # Each pixel is multiplied with those below and beside it, once for every row of a patch.
    work = 2.0 * n * side**2 * 3 * made.patch_size * 3 * min(32 + made.patch_size, side)
    return Cost(
        memory_bytes=WORKER_BYTES + made.patches * 64 + 500_000_000,
        disk_bytes=made.patches * d * 4,
        seconds=(work / COVARIANCE_FLOPS if read else 0.0) / (max(ask.workers, 1) * ask.cpus)
        + made.patches * PATCH_S,
        assumes=f"{made.patches:,} patches of {d} numbers, the images read once",
    )


def _patches(e: Experiment) -> Cost:
    assert e.patches is not None and e.whiten is not None
    made, ask, d = e.patches, e.patches.resources, 3 * e.whiten.patch_size**2
    rounds = {"kmeans": made.iterations + 1, "farthest": 1, "sample": 0}[made.select]
    workers = max(ask.workers, 1)
    rate = workers * (ask.gpus * GPU_FLOPS if ask.gpus else ask.cpus * KMEANS_FLOPS)
    return Cost(
        memory_bytes=WORKER_BYTES + made.patches * d * 6 // workers + made.size * d * 16,
        disk_bytes=made.entries * d * 4 * 6,
        seconds=2.0 * made.patches * made.size * d * rounds / rate,
        assumes=f"{made.patches:,} patches, {rounds} times compared with {made.size:,} entries",
    )


def _embed(e: Experiment, n: int) -> Cost:
    assert e.embed is not None
    if e.embed.imported is not None:
        size = feature_dim(e) * (2 if e.embed.dtype == "float16" else 4)
        return Cost(
            memory_bytes=WORKER_BYTES + 2 * ImportFeaturesConfig().shard_rows * size,
            disk_bytes=n * (size + 8),
            assumes=f"{n:,} rows of {size / 1e3:.1f} kB copied from files",
        )
    side = encoded_side(e)
    net, batch = network(backbone_of(e), side), e.embed.batch_size
    seconds, note = network_seconds(
        backbone_of(e),
        side,
        passes=1,
        resources=e.embed.resources,
        bfloat16=e.embed.precision == "bfloat16",
    )
    return Cost(
        # A layer's output is freed when the next has read it: about a quarter is alive at once.
        memory_bytes=WORKER_BYTES + net.parameters * 4 + net.activation_bytes * batch // 4,
        disk_bytes=n * net.dim * 4,
        seconds=n * seconds,
        assumes=f"d={net.dim} at most, {note}",
    )


def _maps(e: Experiment, n: int) -> Cost:
    assert e.maps is not None
    made = maps_cost(e.maps, n=n, dim=backbone_of(e).dim)
    return Cost(WORKER_BYTES + made.memory_bytes, made.disk_bytes, made.seconds, made.assumes)


def _reduce(e: Experiment, n: int) -> Cost:
    assert e.reduce is not None
    ask, d = e.reduce.resources, feature_dim(e)
    m = min(e.reduce.sample, n)
    threads = max(1, int(ask.cpus))
    # Moments in float64 run at half the speed of the products in float32.
    work = 4.0 * m * d * d + 2.0 * n * d * e.reduce.dim
    return Cost(
        memory_bytes=WORKER_BYTES + 2 * threads * d * d * 8 + threads * 4096 * d * 12,
        disk_bytes=n * e.reduce.dim * 4,
        seconds=work / (SEARCH_FLOPS * ask.cpus * max(ask.workers, 1)),
        assumes=f"d={d} at most, fitted on {m:,} rows, {SEARCH_FLOPS / 1e9:.0f} GFLOP/s a core",
    )


def _graph(e: Experiment, n: int) -> Cost:
    assert e.graph is not None
    ask, dim = e.graph.resources, searched_dim(e)
    made = graph_cost(e.graph.method, n=n, dim=dim, k=e.graph.k, resources=ask)
    return Cost(
        memory_bytes=WORKER_BYTES + made.memory_bytes,
        disk_bytes=made.disk_bytes,
        seconds=made.seconds,
        assumes=made.assumes,
    )


def searched_dim(e: Experiment) -> int:
    """Return the width of the rows that the graph is built on, at most."""
    dim = feature_dim(e)
    return dim if e.reduce is None else min(dim, e.reduce.dim)


def _diffuse(e: Experiment, n: int) -> Cost:
    assert e.graph is not None and e.diffuse is not None
    ask, k, made = e.diffuse.resources, e.graph.k, e.diffuse
    links = LINKS_PER_NEIGHBOR * k * n
    step_s = links * 100 / (LINK_CLASSES_PER_S * max(ask.workers, 1) * ask.cpus)
    labels = min(made.memory_gb * 1e9, spread_bytes(n, 128, dtype=made.dtype))
    return Cost(
        memory_bytes=int(WORKER_BYTES + labels + links * 4),
        disk_bytes=int(links * 4 + n * (12 + made.top * 16 * (1 + made.num_held))),
        seconds=made.niter * step_s,
        assumes=f"100 classes, {made.niter} steps of {step_s:.1f} s, a link both ways for "
        f"{2 - LINKS_PER_NEIGHBOR:.0%} of the neighbors",
    )


def _voc07(e: Experiment) -> Cost:
    dim = backbone_of(e).dim
    return Cost(
        memory_bytes=WORKER_BYTES + 9963 * dim * 16,
        disk_bytes=1_000_000,
        assumes=f"the 9,963 images of VOC 2007, d={dim} at most; minutes a class",
    )


def _probe(e: Experiment, n: int) -> Cost:
    dim = backbone_of(e).dim
    return Cost(
        memory_bytes=WORKER_BYTES + n * dim * 4,
        disk_bytes=1_000_000,
        assumes=f"every labelled embedding in memory, d={dim} at most; minutes",
    )


def _tables(e: Experiment, n: int) -> Cost:
    clusters = e.scan.num_clusters if e.scan else 0
    return Cost(
        memory_bytes=WORKER_BYTES + n * 16,
        disk_bytes=1_000_000 + n * ROW_BYTES,
        seconds=n * (clusters + 100) * 1e-7,
        assumes="one pass over clusters, neighbors and labels",
    )
