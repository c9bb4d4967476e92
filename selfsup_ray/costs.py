"""What a stage costs: memory, disk and seconds, each with what the figure assumes."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

from selfsup_ray.cluster.stream import held_bytes
from selfsup_ray.costs_classify import classify_cost
from selfsup_ray.costs_graph import SEARCH_FLOPS, graph_cost
from selfsup_ray.costs_labelled import labelled_cost, maps_cost
from selfsup_ray.costs_network import GPU_FLOPS, network, network_seconds, view_seconds
from selfsup_ray.costs_sela import labels_bytes, relabeling_bytes, relabeling_passes
from selfsup_ray.costs_traffic import bank_bytes
from selfsup_ray.data.views import ViewsConfig
from selfsup_ray.experiment import Experiment
from selfsup_ray.models.backbones import BackboneConfig, PatchBackboneConfig
from selfsup_ray.models.pretext import BYOLConfig, InsDisConfig, MoCoConfig, SimCLRConfig
from selfsup_ray.ops.spreading import spread_bytes
from selfsup_ray.stages.ingest import IngestConfig
from selfsup_ray.stages.pretext import PretextConfig
from selfsup_ray.stages.sela import SeLaConfig
from selfsup_ray.tracking import read_records
from selfsup_ray.training import TrainConfig

COVARIANCE_FLOPS = 40e9
"""Multiplications and additions a second of the sums over all patches on one CPU core, measured."""
PATCH_S = 2e-6
"""Seconds to draw, cut out and store a patch."""
LINKS_PER_NEIGHBOR = 1.45
"""Links of an image for each neighbor it lists, once every link goes both ways."""
LINK_CLASSES_PER_S = 5e9
"""Links times classes of diffusion that one CPU core does in a second, in any order of images."""
KMEANS_FLOPS = 100e9
"""Multiplications and additions a second of k-means on one CPU core, in bfloat16."""
DECODED_PER_S = 500.0
"""Photos of about 500 x 400 pixels that one CPU core decodes, resizes and stores in a second."""
WORKER_BYTES = 600_000_000
"""Memory of a Python process with torch, before it does anything."""
ROW_BYTES = 100
"""Label, source path and digest of one image."""


@dataclass(frozen=True)
class Cost:
    """Figures of one stage; None where nothing sensible can be said before it runs.

    memory_bytes: of one worker at its peak; disk_bytes: what the stage leaves.
    """

    memory_bytes: int | None = None
    disk_bytes: int | None = None
    seconds: float | None = None
    assumes: str = ""


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
            return _training(experiment, stage, num_images, folder)
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
            return _lowshot(experiment, num_images)
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
    stored = _stored_bytes(e.ingest)
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


def _stored_bytes(made: IngestConfig) -> float:
    """Return the bytes of an image in a shard."""
    return made.image_size**2 * 3 * {"raw": 1.0, "png": 0.7, "jpeg": 0.15}[made.encoding]


@dataclass(frozen=True)
class _Training:
    """Forward passes per image and step, a backward pass counting two; outputs kept per image."""

    config: TrainConfig
    views: ViewsConfig
    passes: float
    kept: float
    copies: float
    """Sets of weights in memory: the network, its gradient, optimizer state, an EMA copy."""
    num_views: int = 2


def _described(e: Experiment, stage: str) -> _Training:
    match stage:
        case "pretext":
            assert e.pretext is not None
            return _pretext(e.pretext)
        case "sela":
            assert e.sela is not None
            return _sela(e.sela)
        case "scan":
            assert e.scan is not None
            frozen = e.scan.freeze_backbone
            return _Training(e.scan, e.scan.views, 2 if frozen else 6, 0.1 if frozen else 2, 4)
        case _:
            assert e.selflabel is not None
            return _Training(e.selflabel, e.selflabel.views, 4, 1, 4, num_views=1)


def _pretext(made: PretextConfig) -> _Training:
    match made.method:
        case SimCLRConfig():
            return _Training(made, made.views, passes=6, kept=2, copies=3)
        case MoCoConfig(symmetric=symmetric):
            return _Training(made, made.views, passes=8 if symmetric else 4, kept=1, copies=4)
        case BYOLConfig():
            return _Training(made, made.views, passes=8, kept=2, copies=4)
        case InsDisConfig():
            return _Training(made, made.views, passes=3, kept=1, copies=3, num_views=1)


def _sela(made: SeLaConfig) -> _Training:
    """Return a forward and backward pass of one view, and a forward pass at every event."""
    passes = 3 + relabeling_passes(made)
    return _Training(made, made.views, passes=passes, kept=1, copies=3, num_views=1)


def _training(e: Experiment, stage: str, n: int, folder: Path) -> Cost:
    assert e.ingest is not None
    made = _described(e, stage)
    if made.config.epochs == 0:
        return Cost(memory_bytes=WORKER_BYTES, assumes="initial_weights are kept as they are")
    side, backbone = made.views.size or e.ingest.image_size, backbone_of(e)
    net, bfloat16 = network(backbone, side), made.config.precision == "bfloat16"
    ask, batch = made.config.resources, made.config.batch_size
    per_worker = batch / max(ask.workers, 1) / made.config.accumulate
    kept = net.activation_bytes * made.kept * per_worker * (0.6 if bfloat16 else 1)
    kept += relabeling_bytes(e.sela, n) if e.sela and stage == "sela" else 0
    if stage == "pretext" and e.pretext is not None:
        kept += held_bytes(e.pretext.feed, _stored_bytes(e.ingest), workers=ask.workers)
        kept += bank_bytes(e.pretext, n)
    num_images = n // batch * batch * made.config.epochs
    seconds, note = _seconds_per_image(made, backbone, side, e.ingest.image_size, folder)
    return Cost(
        memory_bytes=int(WORKER_BYTES + net.parameters * 4 * made.copies + kept),
        disk_bytes=net.parameters * 4 * 4 + _assignments(e, stage, n),
        seconds=num_images * seconds,
        assumes=f"{num_images:,} images in {made.config.epochs} epochs, {note}",
    )


def _assignments(e: Experiment, stage: str, n: int) -> int:
    """Return the bytes of clusters and probabilities of every image, float32."""
    if e.sela and stage == "sela":
        return labels_bytes(e.sela, n)
    return n * (e.scan.num_clusters + 1) * 4 if e.scan and stage != "pretext" else 0


def _seconds_per_image(
    made: _Training, backbone: BackboneConfig, side: int, stored: int, folder: Path
) -> tuple[float, str]:
    measured = [
        r["images_per_s"] for r in read_records(folder / "metrics.jsonl") if r.get("images_per_s")
    ]
    if measured:
        rate = sorted(measured)[len(measured) // 2]
        return 1 / rate, f"{rate:,.0f} images/s, as this stage ran before it was interrupted"
    ask, bfloat16 = made.config.resources, made.config.precision == "bfloat16"
    network_s, note = network_seconds(
        backbone, side, passes=made.passes, resources=ask, bfloat16=bfloat16
    )
    if ask.gpus:
        return network_s, note
    views_s = view_seconds(made.views, stored) * made.num_views / (max(ask.workers, 1) * ask.cpus)
    return network_s + views_s, f"{made.passes:g} passes an image, {note}, views timed too"


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


def backbone_of(e: Experiment) -> BackboneConfig:
    """Return the backbone of the experiment's encoder."""
    if e.pretext is not None:
        return e.pretext.backbone
    if e.sela is not None:
        return e.sela.backbone
    assert e.patches is not None and e.whiten is not None
    made = e.patches
    return PatchBackboneConfig(
        size=made.entries,
        k=made.backbone_k,
        patch_size=e.whiten.patch_size,
        code=made.code,
        grid=made.grid,
        precision=made.precision,
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
    assert e.ingest is not None and e.embed is not None
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
    ask, d = e.reduce.resources, backbone_of(e).dim
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
    dim = backbone_of(e).dim
    return dim if e.reduce is None else min(dim, e.reduce.dim)


def _diffuse(e: Experiment, n: int) -> Cost:
    assert e.graph is not None and e.diffuse is not None
    ask, k, made = e.diffuse.resources, e.graph.k, e.diffuse
    links = LINKS_PER_NEIGHBOR * k * n
    step_s = links * 100 / (LINK_CLASSES_PER_S * max(ask.workers, 1) * ask.cpus)
    labels = min(made.memory_gb * 1e9, spread_bytes(n, 128, dtype=made.dtype))
    return Cost(
        memory_bytes=int(WORKER_BYTES + labels + links * 4),
        disk_bytes=int(links * 4 + n * (12 + made.top * 16)),
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


def _lowshot(e: Experiment, n: int) -> Cost:
    assert e.lowshot is not None
    made, dim = e.lowshot, searched_dim(e)
    ask = made.resources
    # Both set-ups search their own images once: about half of the pairs each.
    seconds = 2.0 * n * n * dim / (SEARCH_FLOPS * ask.cpus * max(ask.workers, 1))
    return Cost(
        memory_bytes=WORKER_BYTES + n * (dim * 4 + made.k * 16),
        disk_bytes=2 * n * (dim * 4 + made.k * 8),
        seconds=seconds if seconds > 600 else None,
        assumes=f"{len(made.shots) * len(made.seeds)} runs of each set-up, d={dim} at most; the "
        f"search alone takes {seconds:,.0f} s, the grid of the linear classifier adds to it",
    )


def _tables(e: Experiment, n: int) -> Cost:
    clusters = e.scan.num_clusters if e.scan else 0
    return Cost(
        memory_bytes=WORKER_BYTES + n * 16,
        disk_bytes=1_000_000 + n * ROW_BYTES,
        seconds=n * (clusters + 100) * 1e-7,
        assumes="one pass over clusters, neighbors and labels",
    )
