"""What a trained stage costs, and what every cost consists of."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from selfsup_ray.cluster.stream import held_bytes
from selfsup_ray.costs_network import network, network_seconds, view_seconds
from selfsup_ray.costs_sela import labels_bytes, relabeling_bytes, relabeling_passes
from selfsup_ray.costs_traffic import bank_bytes
from selfsup_ray.data.views import ViewsConfig
from selfsup_ray.experiment import Experiment
from selfsup_ray.models.backbones import BackboneConfig, PatchBackboneConfig
from selfsup_ray.models.pretext import BYOLConfig, InsDisConfig, MoCoConfig, SimCLRConfig
from selfsup_ray.models.rotation import TURNS
from selfsup_ray.stages.imported_rows import imported_shape
from selfsup_ray.stages.ingest import IngestConfig
from selfsup_ray.stages.pretext import PretextConfig
from selfsup_ray.stages.sela import SeLaConfig
from selfsup_ray.tracking import read_records
from selfsup_ray.training import TrainConfig

WORKER_BYTES = 600_000_000
"""Memory of a Python process with torch, before it does anything."""


@dataclass(frozen=True)
class Cost:
    """Figures of one stage; None where nothing sensible can be said before it runs.

    memory_bytes: of one worker at its peak; disk_bytes: what the stage leaves.
    """

    memory_bytes: int | None = None
    disk_bytes: int | None = None
    seconds: float | None = None
    assumes: str = ""


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


def feature_dim(e: Experiment) -> int:
    """Return the numbers in a row of the embeddings, at most."""
    if e.embed is not None and e.embed.imported is not None:
        return imported_shape(e.embed.imported)[1]
    return backbone_of(e).dim


def stored_bytes(made: IngestConfig) -> float:
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
    """Return a forward and backward pass of each copy, and a forward pass at every event."""
    copies = TURNS if made.rotation else 1
    passes = 3 * copies + relabeling_passes(made)
    return _Training(made, made.views, passes=passes, kept=copies, copies=3, num_views=1)


def training_cost(e: Experiment, stage: str, n: int, folder: Path) -> Cost:
    """Return what pretext, sela, scan or selflabel costs for n images."""
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
        kept += held_bytes(e.pretext.feed, stored_bytes(e.ingest), workers=ask.workers)
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
