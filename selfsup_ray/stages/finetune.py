"""The stage `finetune`: encoder and classifier trained together on few labels, against scratch."""

from __future__ import annotations

import logging
import time
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from selfsup_ray.artifacts import begin, finish, read_done, read_json, write_json
from selfsup_ray.data.corpus import Corpus
from selfsup_ray.errors import ConfigError
from selfsup_ray.models.backbones import ResNetConfig
from selfsup_ray.models.clusterer import Clusterer
from selfsup_ray.models.encoder import Encoder
from selfsup_ray.stages.classify import LayerTracker
from selfsup_ray.stages.labelled import LabelledPlan, labelled_training, numbers_of
from selfsup_ray.stages.labelled_config import FinetuneConfig
from selfsup_ray.stages.labelled_data import labelled_ids
from selfsup_ray.storage import located

if TYPE_CHECKING:
    from selfsup_ray.tracking import Tracker

log = logging.getLogger(__name__)


class Finetuned:
    """Handle on a finished fine-tuning: `metrics` by origin (`pretrained`, `scratch`), counts."""

    def __init__(self, path: Path, metrics: Mapping[str, Any]) -> None:
        self.path = path
        self.metrics = dict(metrics)

    @classmethod
    def open(cls, path: Path | str) -> Finetuned:
        """Return the finished networks in a folder.

        Raises ArtifactError when the stage has not finished there.
        """
        read_done(located(path))
        return cls(located(path), read_json(located(path) / "metrics.json"))

    @property
    def fingerprint(self) -> str:
        """Hash of the config and the inputs."""
        return read_done(self.path).fingerprint

    @property
    def accuracy(self) -> float:
        """Test accuracy of the fine-tuned encoder after the last epoch, in [0, 1]."""
        return float(self.metrics["pretrained"]["last_accuracy"])

    @property
    def scratch_accuracy(self) -> float | None:
        """Test accuracy of a new network on the same labels; None when none was trained."""
        found = self.metrics.get("scratch")
        return None if found is None else float(found["last_accuracy"])

    def classifier(self, origin: Literal["pretrained", "scratch"] = "pretrained") -> Clusterer:
        """Return the trained network; its clusters are the classes."""
        return Clusterer.open(self.path / origin)


def finetune(
    corpus: Corpus,
    encoder: Encoder,
    config: FinetuneConfig,
    *,
    out: Path | str,
    tracker: Tracker | None = None,
) -> Finetuned:
    """Train the encoder with a classifier on some labels, and a new network on the same ones.

    Both are tested on held-out images after every epoch. Raises ConfigError before any work when
    labels and batch do not suffice, or the encoder has nothing to train.
    """
    out, began = located(out), time.monotonic()
    if not isinstance(encoder.description.backbone, ResNetConfig):
        raise ConfigError(
            f"finetune trains a ResNet, but {encoder.path} holds a "
            f"{encoder.description.backbone.name}, which has no weights to train. Use `classify`."
        )
    ids = labelled_ids(corpus, config, stage="finetune")
    inputs = {"corpus": corpus.fingerprint, "encoder": encoder.fingerprint}
    if begin(out, stage="finetune", config=config, inputs=inputs):
        log.info("finetune: %s is current", out)
        return Finetuned.open(out)
    num_classes = int(corpus.labels().max()) + 1
    origins: list[Literal["pretrained", "scratch"]] = ["pretrained"]
    origins += ["scratch"] if config.scratch else []
    results = {}
    for origin in origins:
        plan = LabelledPlan(corpus, encoder, config, ids, num_classes, origin)
        folder = out / origin
        own = LayerTracker(folder, tracker, f"{origin}.")
        results[origin] = labelled_training(plan, stage="finetune", out=folder, tracker=own)
    counts = {"num_classes": num_classes, "num_train": len(ids.train), "num_test": len(ids.test)}
    write_json(out / "metrics.json", {**results, **counts, "num_validation": len(ids.validation)})
    facts = {f"{name}.{k}": v for name, one in results.items() for k, v in numbers_of(one).items()}
    facts |= counts
    seconds = time.monotonic() - began
    finish(out, stage="finetune", config=config, inputs=inputs, seconds=seconds, facts=facts)
    if tracker is not None:
        tracker.log([facts])
    made = Finetuned.open(out)
    text = "finetune: test accuracy %.4f on %s labels, %s from scratch, %.1f s"
    scratch = "untried" if made.scratch_accuracy is None else f"{made.scratch_accuracy:.4f}"
    log.info(text, made.accuracy, f"{len(ids.train):,}", scratch, seconds)
    return made
