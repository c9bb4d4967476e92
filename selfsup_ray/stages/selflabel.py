"""The stage `selflabel`: the confident images of each cluster teach the rest."""

from __future__ import annotations

import logging
import time
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

from pydantic import Field

from selfsup_ray.artifacts import begin, finish
from selfsup_ray.config import Positive, config
from selfsup_ray.data.corpus import Corpus
from selfsup_ray.data.datasets import Images
from selfsup_ray.data.views import ScanStrongViews, ViewsConfig, WeakStrongViews
from selfsup_ray.models.clusterer import Clusterer, save_clusterer
from selfsup_ray.models.clustering import SelfLabel
from selfsup_ray.optim import AdamConfig, ConstantSchedule, OptimConfig, ScheduleConfig
from selfsup_ray.stages.trained import clustered, image_input, last_record
from selfsup_ray.storage import located
from selfsup_ray.training import TrainConfig

if TYPE_CHECKING:
    from selfsup_ray.models.objective import Objective
    from selfsup_ray.tracking import Tracker
    from selfsup_ray.training import MakeViews

log = logging.getLogger(__name__)


@config
class SelfLabelConfig(TrainConfig):
    """How the clusters are sharpened; the defaults are SCAN's for CIFAR-10."""

    threshold: Annotated[float, Field(gt=0, lt=1)] = 0.99
    """Probability above which an image teaches; it backs off while nobody is that sure."""
    class_balancing: bool = True
    """Every cluster present among the confident has the same weight."""
    ema: Annotated[float, Field(gt=0, lt=1)] | None = None
    """Share of the weights that stays at each step (SCAN on ImageNet: 0.999)."""
    views: ViewsConfig = ScanStrongViews()
    """The strong view that is learned from; the weak one is the evaluation view."""
    epochs: Positive = 200
    batch_size: Positive = 1000
    optim: OptimConfig = AdamConfig(lr=1e-4)
    schedule: ScheduleConfig = ConstantSchedule()


def self_label(
    corpus: Corpus,
    clusterer: Clusterer,
    config: SelfLabelConfig | None = None,
    *,
    out: str | Path,
    tracker: Tracker | None = None,
) -> Clusterer:
    """Return sharpened clusters (SCAN, section 2.3); no labels are read, the last epoch is kept."""
    config, out = config or SelfLabelConfig(), located(out)
    inputs = {"corpus": corpus.fingerprint, "clusterer": clusterer.fingerprint}
    if begin(out, stage="selflabel", config=config, inputs=inputs):
        return Clusterer.open(out)
    began = time.perf_counter()
    build = partial(_build, corpus, clusterer, config)
    save = partial(_save, corpus, config, out)
    _, state = clustered(build, save, corpus, config, stage="selflabel", out=out, tracker=tracker)
    _warn_of_lost_clusters(last_record(state), clusterer.num_clusters)
    facts, seconds = last_record(state), time.perf_counter() - began
    finish(out, stage="selflabel", config=config, inputs=inputs, seconds=seconds, facts=facts)
    (out / "checkpoint.pt").unlink(missing_ok=True)
    return Clusterer.open(out)


def _build(
    corpus: Corpus, clusterer: Clusterer, config: SelfLabelConfig
) -> tuple[SelfLabel, Images, MakeViews]:
    objective = SelfLabel(
        clusterer.backbone(),
        clusterer.head(),
        threshold=config.threshold,
        balance=config.class_balancing,
        ema=config.ema,
    )
    views = WeakStrongViews(config.views, image_size=corpus.image_size, seed=config.seed)
    return objective, Images(corpus), views


def _save(corpus: Corpus, config: SelfLabelConfig, out: Path, objective: Objective) -> Clusterer:
    assert isinstance(objective, SelfLabel)
    images = image_input(corpus, config.views)
    return save_clusterer(out, backbone=objective.backbone, head=objective.head, images=images)


def _warn_of_lost_clusters(record: dict[str, float], num_clusters: int) -> None:
    """Say when clusters without confident images will not have been taught."""
    taught = record.get("confident_clusters", num_clusters)
    if taught < num_clusters - 0.5:
        log.warning(
            "selflabel: on average only %.1f of %d clusters had confident images in a batch. "
            "Lower selflabel.threshold, raise batch_size, or train scan for longer.",
            taught,
            num_clusters,
        )
