"""The stage `linear`: the accuracy of a linear classifier on the frozen encoder, as published.

Where `probe` solves for the optimum on stored embeddings, this one trains as the papers do: SGD of
a published schedule on augmented views, each of which passes through the encoder.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from selfsup_ray.artifacts import begin, finish, read_done, read_json, write_json
from selfsup_ray.data.corpus import Corpus
from selfsup_ray.errors import ConfigError
from selfsup_ray.models.encoder import Encoder
from selfsup_ray.stages.embed import Embeddings
from selfsup_ray.stages.labelled import LabelledPlan, labelled_training, layers_of, numbers_of
from selfsup_ray.stages.labelled_config import LinearConfig
from selfsup_ray.stages.labelled_data import labelled_ids
from selfsup_ray.storage import located

if TYPE_CHECKING:
    from selfsup_ray.tracking import Tracker

log = logging.getLogger(__name__)


class Linear:
    """Handle on a finished linear probe: `metrics` as `labelled_result` has them, and counts."""

    def __init__(self, path: Path, metrics: Mapping[str, Any]) -> None:
        self.path = path
        self.metrics = dict(metrics)

    @classmethod
    def open(cls, path: Path | str) -> Linear:
        """Return the finished probe in a folder.

        Raises ArtifactError when the stage has not finished there.
        """
        read_done(located(path))
        return cls(located(path), read_json(located(path) / "metrics.json"))

    @property
    def fingerprint(self) -> str:
        """Hash of the config and the inputs."""
        return read_done(self.path).fingerprint

    @property
    def last_accuracy(self) -> float:
        """Test accuracy after the last epoch, in [0, 1]."""
        return float(self.metrics["last_accuracy"])

    @property
    def max_accuracy(self) -> float:
        """Largest test accuracy over the epochs, in [0, 1]: optimistic, published by some."""
        return float(self.metrics["max_accuracy"])


def linear(
    corpus: Corpus,
    encoder: Encoder,
    config: LinearConfig,
    *,
    out: Path | str,
    features: Embeddings | None = None,
    tracker: Tracker | None = None,
) -> Linear:
    """Train a linear classifier on the frozen encoder and return its accuracy on held-out images.

    features: the encoder's embeddings, for config.features=embeddings. Raises ConfigError before
    any work when labels and batch do not suffice or the encoder has no layers to probe,
    TrainingError when the encoder changes.
    """
    out, began = located(out), time.monotonic()
    if config.features == "embeddings" and features is None:
        raise ConfigError("linear.features=embeddings needs embeddings: add the key `embed: {}`.")
    features = features if config.features == "embeddings" else None
    ids, layers = labelled_ids(corpus, config, stage="linear"), layers_of(encoder, config)
    inputs = {"corpus": corpus.fingerprint, "encoder": encoder.fingerprint}
    if features is not None:
        inputs["features"] = features.fingerprint
    if begin(out, stage="linear", config=config, inputs=inputs):
        log.info("linear: %s is current", out)
        return Linear.open(out)
    num_classes = int(corpus.labels().max()) + 1
    plan = LabelledPlan(corpus, encoder, config, ids, num_classes, "frozen", features, layers)
    result = labelled_training(plan, stage="linear", out=out, tracker=tracker)
    counts = {"num_classes": num_classes, "num_train": len(ids.train), "num_test": len(ids.test)}
    write_json(out / "metrics.json", result | counts | {"num_validation": len(ids.validation)})
    facts = numbers_of(result) | counts
    seconds = time.monotonic() - began
    finish(out, stage="linear", config=config, inputs=inputs, seconds=seconds, facts=facts)
    if tracker is not None:
        tracker.log([facts])
    made = Linear.open(out)
    text = "linear: test accuracy %.4f after the last epoch, %.4f at its best, %s images, %.1f s"
    log.info(text, made.last_accuracy, made.max_accuracy, f"{len(ids.test):,}", seconds)
    return made
