"""The stage `sela`: an encoder and clusters learned together, by balanced pseudo-labels."""

from __future__ import annotations

import logging
import time
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

from pydantic import Field
from torch import nn

from selfsup_ray.artifacts import begin, finish
from selfsup_ray.batches import require_cut
from selfsup_ray.config import NonNegative, Positive, config
from selfsup_ray.data.corpus import Corpus
from selfsup_ray.data.datasets import Images
from selfsup_ray.data.views import EvalView, SeLaViews, Views, ViewsConfig
from selfsup_ray.models.alexnet import require_side
from selfsup_ray.models.backbone import AlexNetConfig, TrainedBackboneConfig
from selfsup_ray.models.backbones import build_backbone
from selfsup_ray.models.clusterer import Clusterer, save_clusterer
from selfsup_ray.models.encoder import save_encoder
from selfsup_ray.models.labels import Source, pieces
from selfsup_ray.models.sela import SeLa
from selfsup_ray.models.sela_config import (
    AugmentedPass,
    CleanPass,
    Events,
    FixedLabels,
    GivenPrior,
    LabelPass,
    Prior,
    QuadraticEvents,
    SeLaMethod,
    SinkhornConfig,
    UniformPrior,
)
from selfsup_ray.models.sela_weights import fill_published
from selfsup_ray.optim import OptimConfig, ScheduleConfig, SGDConfig, StepSchedule
from selfsup_ray.stages.sela_labels import given_labels, write_labels
from selfsup_ray.stages.trained import clustered, image_input, last_record, predict_in_actors
from selfsup_ray.storage import Place, located
from selfsup_ray.training import TrainConfig

if TYPE_CHECKING:
    from selfsup_ray.models.objective import Objective
    from selfsup_ray.tracking import Tracker
    from selfsup_ray.training import MakeViews

log = logging.getLogger(__name__)


@config
class SeLaConfig(TrainConfig):
    """How labels and network are learned; the defaults are the published ones for ImageNet."""

    num_clusters: Positive = 3000
    """K of each head."""
    num_heads: Annotated[int, Field(ge=1, le=100)] = 1
    """T heads, each with labels of its own; 10 in the paper's best networks."""
    backbone: TrainedBackboneConfig = AlexNetConfig()
    views: ViewsConfig = SeLaViews(size=224)
    events: Events = QuadraticEvents()
    """When labels are optimized: quadratic | linear | every; or `fixed`: they are given."""
    heads_per_event: Literal["all", "one"] = "all"
    """`one`: head (epoch mod T) alone, as CIFAR's code does."""
    label_pass: LabelPass = AugmentedPass()
    """What labels are optimized on: `augmented` views in training mode (the paper), or `clean`."""
    prior: Prior = UniformPrior()
    """Sizes of the clusters: uniform | given | estimated."""
    sinkhorn: SinkhornConfig = SinkhornConfig()
    rotation: bool = False
    """Also learn by which right angle an image is turned, on four copies of it and a head of its
    own: the paper's "+Rot", a network trained anew on given labels (events.name=fixed)."""
    initial_weights: Place | None = None
    """A published SeLa checkpoint to start from: network, heads and, of the same images, labels."""
    epochs: NonNegative = 401
    """The published 400 are 0 to 400. 0 keeps `initial_weights` as they are."""
    optim: OptimConfig = SGDConfig(lr=0.05, weight_decay=1e-5)
    schedule: ScheduleConfig = StepSchedule(milestones=(150, 300, 350))

    def __post_init__(self) -> None:
        if isinstance(self.prior, GivenPrior) and len(self.prior.shares) != self.num_clusters:
            raise ValueError(
                f"prior.shares has {len(self.prior.shares)} numbers for "
                f"num_clusters={self.num_clusters}; give one for each cluster"
            )
        if self.epochs == 0 and self.initial_weights is None:
            raise ValueError("epochs=0 needs initial_weights, or nothing has been learned")
        if isinstance(self.events, FixedLabels) and self.epochs == 0:
            raise ValueError("events.name=fixed needs epochs of 1 or more, to learn the labels")

    def method(self) -> SeLaMethod:
        """Return what the objective needs to know."""
        return SeLaMethod(
            num_clusters=self.num_clusters,
            num_heads=self.num_heads,
            events=self.events,
            heads_per_event=self.heads_per_event,
            label_pass=self.label_pass,
            prior=self.prior,
            sinkhorn=self.sinkhorn,
            epochs=self.epochs,
            batch_size=self.batch_size,
            precision=self.precision,
            channels_last=self.channels_last,
            seed=self.seed,
            rotation=self.rotation,
        )


def require_views(made: SeLaConfig, image_size: int) -> None:
    """Raise ConfigError unless the network takes views of their side."""
    if not isinstance(made.backbone, AlexNetConfig):
        return
    require_side(made.views.size or image_size, key="sela.views.size")
    if isinstance(made.label_pass, AugmentedPass) and made.label_pass.views is not None:
        side = made.label_pass.views.size or image_size
        require_side(side, key="sela.label_pass.views.size")


def sela(
    corpus: Corpus,
    config: SeLaConfig | None = None,
    *,
    out: str | Path,
    tracker: Tracker | None = None,
) -> Clusterer:
    """Return clusters of a corpus, found together with an encoder, which lies in the same folder.

    Labels of the corpus are only compared with. Raises ConfigError before any work when the batch
    cannot be cut as asked, or the pseudo-labels do not fit.
    """
    config, out = config or SeLaConfig(), located(out)
    inputs = {"corpus": corpus.fingerprint}
    if begin(out, stage="sela", config=config, inputs=inputs):
        return Clusterer.open(out)
    began = time.perf_counter()
    require_views(config, corpus.image_size)
    require_cut(config, together=1, workers=config.resources.workers)
    _require_given(config, len(corpus))
    objective, facts = _learned(corpus, config, out, tracker)
    clusterer, best = Clusterer.open(out), objective.best_head()
    facts |= {"head": best}
    facts |= write_labels(out, corpus, clusterer, objective, head=best)
    seconds = time.perf_counter() - began
    finish(out, stage="sela", config=config, inputs=inputs, seconds=seconds, facts=facts)
    (out / "checkpoint.pt").unlink(missing_ok=True)
    return clusterer


def _require_given(made: SeLaConfig, num_images: int) -> None:
    """Raise ConfigError unless labels that are given fit, all of them, some at a time."""
    source = _given_labels(made, num_images)
    if source is not None:
        for first, stop in pieces(0, num_images, num_heads=made.num_heads):
            source(first, stop)


def _learned(
    corpus: Corpus, made: SeLaConfig, out: Path, tracker: Tracker | None
) -> tuple[SeLa, dict[str, Any]]:
    """Return the objective after training, or with published weights as they are.

    Network and clusters of the corpus are in the folder then.
    """
    build, save = partial(_build, corpus, made), partial(_save, corpus, made, out)
    if made.epochs == 0:
        published = build()[0].eval()
        predict_in_actors(corpus, save(published), resources=made.resources)
        return published, {}
    objective, state = clustered(build, save, corpus, made, stage="sela", out=out, tracker=tracker)
    assert isinstance(objective, SeLa)
    return objective, dict(last_record(state))


def _save(corpus: Corpus, made: SeLaConfig, out: Path, objective: Objective) -> Clusterer:
    """Write the backbone, also as an encoder, and the best head."""
    assert isinstance(objective, SeLa)
    head, images = objective.heads[objective.best_head()], image_input(corpus, made.views)
    assert isinstance(head, nn.Linear)
    save_encoder(out, backbone=objective.backbone, images=images)
    return save_clusterer(out, backbone=objective.backbone, head=head, images=images)


def _build(corpus: Corpus, made: SeLaConfig) -> tuple[SeLa, Images, MakeViews]:
    objective = SeLa(
        made.method(),
        build_backbone(made.backbone, seed=made.seed),
        num_images=len(corpus),
        pass_views=_pass_views(corpus, made),
        labels=_given_labels(made, len(corpus)),
        truth=corpus.labels if corpus.has_labels else None,
    )
    if made.initial_weights is not None:
        log.info("sela: %s", fill_published(objective, made.initial_weights))
    views = Views(made.views, image_size=corpus.image_size, seed=made.seed, num_views=1)
    return objective, Images(corpus), views


def _given_labels(made: SeLaConfig, num_images: int) -> Source | None:
    """Return the labels of `events.name=fixed`, None with other events."""
    if not isinstance(made.events, FixedLabels):
        return None
    return given_labels(
        made.events.labels,
        num_heads=made.num_heads,
        num_images=num_images,
        num_clusters=made.num_clusters,
    )


def _pass_views(corpus: Corpus, made: SeLaConfig) -> MakeViews:
    match made.label_pass:
        case AugmentedPass(views=views):
            chosen = views or made.views
            return Views(chosen, image_size=corpus.image_size, seed=made.seed, num_views=1)
        case CleanPass():
            images = image_input(corpus, made.views)
            return EvalView(
                size=images.view_size or images.image_size,
                mean=images.mean,
                std=images.std,
                share=images.share,
            )
