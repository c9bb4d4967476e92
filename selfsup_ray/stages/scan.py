"""The stage `scan`: clusters learned so that an image and its neighbors agree."""

from __future__ import annotations

import time
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from torch import nn

from selfsup_ray.artifacts import begin, finish
from selfsup_ray.config import NonNegativeFloat, Positive, config
from selfsup_ray.data.corpus import Corpus
from selfsup_ray.data.datasets import NeighborPairs
from selfsup_ray.data.views import ScanStrongViews, Views, ViewsConfig
from selfsup_ray.errors import ConfigError
from selfsup_ray.models.clusterer import Clusterer, save_clusterer
from selfsup_ray.models.clustering import Scan
from selfsup_ray.models.encoder import Encoder
from selfsup_ray.optim import AdamConfig, ConstantSchedule, OptimConfig, ScheduleConfig
from selfsup_ray.stages.graph import Graph
from selfsup_ray.stages.trained import clustered, image_input, last_record
from selfsup_ray.storage import located
from selfsup_ray.training import TrainConfig

if TYPE_CHECKING:
    from selfsup_ray.models.objective import Objective
    from selfsup_ray.tracking import Tracker
    from selfsup_ray.training import MakeViews


@config
class ScanConfig(TrainConfig):
    """How the clusters are learned; the defaults are SCAN's for CIFAR-10.

    ImageNet: num_heads=10, freeze_backbone=true, num_neighbors=50, SGD with lr 5, no weight decay.
    """

    num_clusters: Positive
    """K, whatever the number of classes; twice the classes is `overclustering`."""
    num_heads: Positive = 1
    """Heads trained side by side; the one with the lowest training loss is kept."""
    entropy_weight: NonNegativeFloat = 5.0
    """Weight of the entropy of the mean prediction; lower it for clusters of unequal size."""
    num_neighbors: Positive = 20
    """Neighbors drawn from; the graph's k may be larger."""
    freeze_backbone: bool = False
    """Train the heads only, on a backbone in evaluation mode."""
    views: ViewsConfig = ScanStrongViews()
    """Of anchors and neighbors alike."""
    epochs: Positive = 50
    batch_size: Positive = 128
    optim: OptimConfig = AdamConfig(lr=1e-4)
    schedule: ScheduleConfig = ConstantSchedule()


def scan(
    corpus: Corpus,
    encoder: Encoder,
    graph: Graph,
    config: ScanConfig,
    *,
    out: str | Path,
    tracker: Tracker | None = None,
) -> Clusterer:
    """Return clusters of a corpus (SCAN, Van Gansbeke et al. 2020, eq. 2); no labels are read.

    Raises ConfigError when more neighbors are asked for than the graph holds.
    """
    out = located(out)
    inputs = {
        "corpus": corpus.fingerprint,
        "encoder": encoder.fingerprint,
        "graph": graph.fingerprint,
    }
    if begin(out, stage="scan", config=config, inputs=inputs):
        return Clusterer.open(out)
    if config.num_neighbors > graph.k:
        raise ConfigError(
            f"scan.num_neighbors={config.num_neighbors}, but {graph.path} holds {graph.k} "
            f"neighbors per image. Lower it, or build the graph with a larger graph.k."
        )
    began = time.perf_counter()
    build = partial(_build, corpus, encoder, graph, config)
    save = partial(_save, corpus, config, out)
    objective, state = clustered(
        build, save, corpus, config, stage="scan", out=out, tracker=tracker
    )
    assert isinstance(objective, Scan)
    facts = last_record(state) | {"head": objective.best_head()}
    seconds = time.perf_counter() - began
    finish(out, stage="scan", config=config, inputs=inputs, seconds=seconds, facts=facts)
    (out / "checkpoint.pt").unlink(missing_ok=True)
    return Clusterer.open(out)


def _build(
    corpus: Corpus, encoder: Encoder, graph: Graph, config: ScanConfig
) -> tuple[Scan, NeighborPairs, MakeViews]:
    objective = Scan(
        encoder.backbone(),
        num_clusters=config.num_clusters,
        num_heads=config.num_heads,
        entropy_weight=config.entropy_weight,
        freeze_backbone=config.freeze_backbone,
        seed=config.seed,
    )
    pairs = NeighborPairs(corpus, graph.ids, num_neighbors=config.num_neighbors, seed=config.seed)
    return objective, pairs, Views(config.views, image_size=corpus.image_size, seed=config.seed)


def _save(corpus: Corpus, config: ScanConfig, out: Path, objective: Objective) -> Clusterer:
    """Write the backbone and the best head."""
    assert isinstance(objective, Scan)
    head = objective.heads[objective.best_head()]
    assert isinstance(head, nn.Linear)
    images = image_input(corpus, config.views)
    return save_clusterer(out, backbone=objective.backbone, head=head, images=images)
