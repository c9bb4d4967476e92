"""The stage `pretext`: an encoder learned from images alone, by SimCLR, MoCo, BYOL or InsDis."""

from __future__ import annotations

import fnmatch
import itertools
import logging
import re
import time
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import numpy as np
import torch

from selfsup_ray.artifacts import Array, begin, finish
from selfsup_ray.batches import require_cut
from selfsup_ray.cluster.stream import require_reader
from selfsup_ray.config import NonNegative, Positive, config
from selfsup_ray.data.corpus import Corpus
from selfsup_ray.data.datasets import Dataset, Images
from selfsup_ray.data.stream import Feed, MappedFeed, Stream, StreamFeed
from selfsup_ray.data.views import ScanSimCLRViews, Views, ViewsConfig
from selfsup_ray.errors import ConfigError
from selfsup_ray.models.backbones import Backbone, ResNetConfig, build_backbone
from selfsup_ray.models.encoder import Encoder, save_encoder
from selfsup_ray.models.norm import LocalNorm, images_together
from selfsup_ray.models.online_probe import OnlineProbe, OnlineProbeConfig
from selfsup_ray.models.pretext import (
    PretextMethod,
    Pretraining,
    SimCLRConfig,
    build_pretext,
    check_method,
)
from selfsup_ray.models.weights import load_foreign
from selfsup_ray.optim import CosineSchedule, OptimConfig, ScheduleConfig, SGDConfig
from selfsup_ray.stages.trained import image_input, last_record, trained
from selfsup_ray.storage import Place, located
from selfsup_ray.training import TrainConfig

if TYPE_CHECKING:
    from selfsup_ray.models.objective import Objective
    from selfsup_ray.tracking import Tracker
    from selfsup_ray.training import MakeViews

log = logging.getLogger(__name__)

STREAMED = ("simclr", "moco", "byol")
"""Methods that keep nothing by image id and so can learn from a stream."""


@config
class PretextConfig(TrainConfig):
    """How the encoder is trained; the defaults are SCAN's for CIFAR-10 (SimCLR, ResNet-18)."""

    method: PretextMethod = SimCLRConfig()
    backbone: ResNetConfig = ResNetConfig()
    views: ViewsConfig = ScanSimCLRViews()
    initial_weights: Place | None = None
    """A published checkpoint to start the backbone from: MoCo, SimCLR, BYOL, DINO, SeLa,
    torchvision, timm, .safetensors; `selfsup-ray weights FILE` says what one holds."""
    output: Literal["backbone", "head"] = "backbone"
    """Whose unit rows `embed` writes; SCAN mines neighbors with the head's for SimCLR."""
    epochs: NonNegative = 500
    """0 keeps `initial_weights` as they are."""
    batch_size: Positive = 512
    optim: OptimConfig = SGDConfig(lr=0.4)
    schedule: ScheduleConfig = CosineSchedule(final_ratio=1e-3, per="epoch")
    feed: Feed = MappedFeed()
    """How images reach the workers: `mapped` from shards on each node, or `stream`ed to them."""
    without: str | None = None
    """Train on no image whose source matches, such as the test images' `test/*`: * stands for any
    text, slashes included."""
    online_probe: OnlineProbeConfig | None = None
    """Watch how well a line separates the labelled classes as training goes on, as
    `online_accuracy`; the encoder comes out the same, bit for bit. None: no labels are read."""

    def __post_init__(self) -> None:
        if isinstance(self.feed, StreamFeed):
            _require_streamable(self.feed, self.method.name, self.batch_size)
            if self.without is not None:
                raise ValueError(
                    f"feed.name=stream reads whole shards, but without={self.without!r} leaves out "
                    f"some images; take feed.name=mapped, or ingest the others alone"
                )
        if self.epochs == 0 and self.initial_weights is None:
            raise ValueError("epochs=0 needs initial_weights, or nothing has been learned")
        if self.epochs == 0 and self.output == "head":
            raise ValueError("output=head needs epochs of 1 or more: initial_weights fill no head")
        if self.resources.is_elastic and isinstance(self.method.batch_norm, LocalNorm):
            raise ValueError(
                f"resources.min_workers={self.resources.fewest} lets the number of workers change, "
                f"but with method.batch_norm.name=local the result depends on it; take another "
                f"batch_norm (sync, split, shuffle), or leave min_workers out"
            )


def _require_streamable(feed: StreamFeed, method: str, batch_size: int) -> None:
    if method not in STREAMED:
        raise ValueError(
            f"feed.name=stream reads images in its own order, but method.name={method} looks them "
            f"up by their ids; take feed.name=mapped, or one of the methods {', '.join(STREAMED)}"
        )
    if batch_size % feed.lanes:
        raise ValueError(
            f"batch_size={batch_size} cannot be drawn in equal parts from feed.lanes={feed.lanes}; "
            f"take a divisor of batch_size, and at least as many lanes as workers"
        )
    if feed.buffer < batch_size:
        raise ValueError(
            f"feed.buffer={feed.buffer} does not hold one batch of batch_size={batch_size} images; "
            f"take some ten batches or more"
        )


def pretrain(
    corpus: Corpus,
    config: PretextConfig | None = None,
    *,
    out: str | Path,
    tracker: Tracker | None = None,
) -> Encoder:
    """Return the encoder trained on a corpus; labels never reach it.

    Raises ConfigError before any work when the batch or the queue cannot be cut as asked.
    """
    config, out = config or PretextConfig(), located(out)
    inputs = {"corpus": corpus.fingerprint}
    if begin(out, stage="pretext", config=config, inputs=inputs):
        return Encoder.open(out)
    began = time.perf_counter()
    if config.epochs == 0:
        return _keep_initial(corpus, config, out=out, inputs=inputs, began=began)
    if config.online_probe is not None and not corpus.has_labels:
        raise ConfigError("pretext.online_probe needs labels, but no image has one: leave it out.")
    _subset(corpus, config.without)
    check_method(config.method, batch_size=config.batch_size)
    together = images_together(config.method.batch_norm)
    require_cut(config, together=together, workers=config.resources.workers)
    if isinstance(config.feed, StreamFeed) and config.resources.workers:
        require_reader(config.resources, stage="pretext")
    build = partial(_build, corpus, config)
    objective, state = trained(build, config, stage="pretext", out=out, tracker=tracker)
    if isinstance(objective, OnlineProbe):
        objective = objective.method
    assert isinstance(objective, Pretraining)
    save_encoder(
        out,
        backbone=objective.encoder(),
        head=objective.head,
        output=config.output,
        images=image_input(corpus, config.views),
    )
    seconds = time.perf_counter() - began
    facts = last_record(state)
    finish(out, stage="pretext", config=config, inputs=inputs, seconds=seconds, facts=facts)
    (out / "checkpoint.pt").unlink(missing_ok=True)
    return Encoder.open(out)


def _build(corpus: Corpus, config: PretextConfig) -> tuple[Objective, Dataset, MakeViews]:
    backbone = _initial_backbone(config)
    images = Images(corpus, _subset(corpus, config.without))
    objective: Objective = build_pretext(
        config.method, backbone, num_images=len(images), seed=config.seed
    )
    if config.online_probe is not None:
        labels = corpus.labels(images.corpus_ids(np.arange(len(images))))
        objective = _watched(objective, config.online_probe, labels)
    views = Views(
        config.views,
        image_size=corpus.image_size,
        seed=config.seed,
        num_views=objective.num_views,
    )
    match config.feed:
        case MappedFeed():
            return objective, images, views
        case StreamFeed():
            size, seed = config.batch_size, config.seed
            return objective, Stream(corpus, config.feed, batch_size=size, seed=seed), views


def _subset(corpus: Corpus, without: str | None) -> Array | None:
    """Return the ids of the images that are trained on, ascending; None for all.

    Raises ConfigError when the pattern leaves all of them out, or none.
    """
    if without is None:
        return None
    fits, kept = re.compile(fnmatch.translate(without)).match, []
    for first, stop in itertools.pairwise(corpus.offsets):
        ids = np.arange(first, stop)
        is_out = np.array([fits(source) is not None for source in corpus.sources(ids)], bool)
        kept.append(ids[~is_out])
    found = np.concatenate(kept)
    if len(found) in (0, len(corpus)):
        raise ConfigError(
            f"pretext.without={without!r} matches {len(corpus) - len(found):,} of the "
            f"{len(corpus):,} images; the first one's source is "
            f"{corpus.sources(np.array([0]))[0]!r}. Change the pattern; * stands for any text."
        )
    return found


def _watched(method: Objective, probe: OnlineProbeConfig, labels: Array) -> OnlineProbe:
    num_classes = int(labels.max()) + 1
    return OnlineProbe(method, torch.from_numpy(labels), num_classes=num_classes, config=probe)


def _initial_backbone(config: PretextConfig) -> Backbone:
    if config.initial_weights is None:
        return build_backbone(config.backbone, seed=config.seed)
    foreign = load_foreign(config.initial_weights, config.backbone)
    log.info("pretext: %s: %s", config.initial_weights, foreign.text())
    return foreign.backbone


def _keep_initial(
    corpus: Corpus, config: PretextConfig, *, out: Path, inputs: dict[str, str], began: float
) -> Encoder:
    """Save published weights as the encoder, untrained by us."""
    images = image_input(corpus, config.views)
    encoder = save_encoder(out, backbone=_initial_backbone(config), images=images)
    seconds = time.perf_counter() - began
    finish(out, stage="pretext", config=config, inputs=inputs, seconds=seconds)
    return encoder
