"""The stage `classify`: labelled networks on a patch dictionary, and the baselines beside them."""

from __future__ import annotations

import logging
import time
from collections.abc import Iterable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from selfsup_ray.artifacts import (
    begin,
    finish,
    read_config,
    read_done,
    read_json,
    write_json,
)
from selfsup_ray.config import build, flatten
from selfsup_ray.data.corpus import Corpus
from selfsup_ray.data.shifted import ShiftedViews
from selfsup_ray.errors import ConfigError
from selfsup_ray.models.classifier import Classifier
from selfsup_ray.models.encoder import Encoder
from selfsup_ray.models.locally_linear import PatchNetwork
from selfsup_ray.models.patch_layers import (
    CodeConfig,
    PhiFullConfig,
    PhiHardConfig,
    PhiSimpleConfig,
    entries,
)
from selfsup_ray.models.weights import read_weights, write_weights
from selfsup_ray.stages.classify_config import ClassifyConfig
from selfsup_ray.stages.classify_data import MeasuredImages, Split, TrainingImages, split_images
from selfsup_ray.stages.classify_layers import write_dictionary
from selfsup_ray.stages.classify_network import (
    WEIGHTS,
    NetworkPlan,
    dictionary_of,
    require_fits,
)
from selfsup_ray.stages.classify_results import facts_of, layer_result
from selfsup_ray.stages.code_cache import CodeCache, Coding, write_codes
from selfsup_ray.stages.patch_dictionary import PatchDictionary
from selfsup_ray.stages.patch_pictures import write_ranked
from selfsup_ray.stages.trained import trained
from selfsup_ray.storage import located, remove_tree
from selfsup_ray.tracking import Tracker

if TYPE_CHECKING:
    from torch import nn

    from selfsup_ray.training import MakeViews

log = logging.getLogger(__name__)

RESULT = "result.json"
"""In a layer's folder, written last: the layer has been trained."""


class Classified:
    """Handle on a finished `classify`: accuracies, curves, and the trained network.

    `metrics`: max_accuracy, last_accuracy (of the last layer's first output), counts, and `layers`,
    each {"outputs": {k or "-": accuracies}, "curve": [{"epoch", "test_accuracy", …}, …]}.
    """

    def __init__(self, path: Path, metrics: Mapping[str, Any]) -> None:
        self.path = path
        self.metrics = dict(metrics)

    @classmethod
    def open(cls, path: Path | str) -> Classified:
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
    def config(self) -> ClassifyConfig:
        """The config it was made with."""
        return build(ClassifyConfig, read_config(self.path))

    @property
    def max_accuracy(self) -> float:
        """Largest test accuracy over the epochs, in [0, 1]: the published number."""
        return float(self.metrics["max_accuracy"])

    @property
    def last_accuracy(self) -> float:
        """Test accuracy after the last epoch, in [0, 1]."""
        return float(self.metrics["last_accuracy"])

    @property
    def split(self) -> Split:
        """Ids of the images that were trained, validated and tested on."""
        return Split.read(self.path)

    def network(self) -> nn.Module:
        """Return the network: normalised images (B, 3, S, S) to a list of logits (B, C)."""
        size, classes = self.metrics["image_size"], self.metrics["num_classes"]
        return NetworkPlan(self.config, self.path, size, classes, None).trained_network()


def classify(
    corpus: Corpus,
    config: ClassifyConfig | None = None,
    *,
    encoder: Encoder | None = None,
    out: Path | str,
    tracker: Tracker | None = None,
) -> Classified:
    """Train a labelled network on the codes of an encoder's dictionary; return the accuracies.

    encoder: of the stage `patches`; networks without a dictionary read none. Test labels are only
    measured with: the network that is kept is that of the last epoch, and `max_accuracy` is the
    published measure, the maximum over epochs. Raises ConfigError before any work when images,
    labels and network do not go together.
    """
    config, out, began = config or ClassifyConfig(), located(out), time.monotonic()
    encoder = encoder if config.needs_dictionary else None
    if not corpus.has_labels:
        raise ConfigError("classify learns from labels, but no image has one. Give them to ingest.")
    num_classes = int(corpus.labels().max()) + 1
    plan = NetworkPlan(config, out.absolute(), corpus.image_size, num_classes, encoder)
    split = split_images(corpus, config)
    require_fits(plan, num_train=len(split.train))
    _require_batch(split, config)
    inputs = {"corpus": corpus.fingerprint}
    if encoder is not None:
        inputs["encoder"] = encoder.fingerprint
    if begin(out, stage="classify", config=config, inputs=inputs):
        log.info("classify: %s is current", out)
        remove_tree(out / "codes")  # if a kill came just before it was
        return Classified.open(out)
    split.write(out)
    if config.cache_codes and not _is_trained(plan, plan.depth):
        write_cache(corpus, plan)
    layers = [_layer(corpus, plan, layer, tracker) for layer in range(1, plan.depth + 1)]
    metrics = {**facts_of(layers), **_counts(plan, split), "layers": layers}
    write_json(out / "metrics.json", metrics)
    facts = {k: v for k, v in flatten(metrics | {"layers": None}).items() if v is not None}
    _track(tracker, facts, [*_pictures(plan), *sorted(out.glob("layer*_*.png"))])
    seconds = time.monotonic() - began
    finish(out, stage="classify", config=config, inputs=inputs, seconds=seconds, facts=facts)
    remove_tree(out / "codes")
    made = Classified.open(out)
    text = "classify: test accuracy %.4f at its best epoch, %.4f after the last, %s images, %.1f s"
    log.info(text, made.max_accuracy, made.last_accuracy, f"{len(split.test):,}", seconds)
    return made


def _counts(plan: NetworkPlan, split: Split) -> dict[str, int]:
    return {
        "num_classes": plan.num_classes,
        "image_size": plan.image_size,
        "num_train": len(split.train),
        "num_validation": len(split.validation),
        "num_test": len(split.test),
    }


def _track(tracker: Tracker | None, facts: Mapping[str, Any], pictures: Sequence[Path]) -> None:
    if tracker is None:
        return
    tracker.log([{k: v for k, v in facts.items() if isinstance(v, int | float)}])
    for picture in pictures:
        tracker.artifact(picture)


def _require_batch(split: Split, config: ClassifyConfig) -> None:
    if len(split.train) < config.batch_size:
        raise ConfigError(
            f"classify.batch_size={config.batch_size}, but only {len(split.train):,} images are "
            f"for training. Lower it to {len(split.train)} or less."
        )


def write_cache(corpus: Corpus, plan: NetworkPlan) -> None:
    """Write the codes of all views of the corpus that are not in the folder yet."""
    config = plan.config
    write_codes(
        corpus,
        coding(plan),
        padding=config.views.padding,
        out=plan.out / "codes",
        resources=config.resources,
    )


def coding(plan: NetworkPlan) -> Coding:
    """Return how the first layer's code is made of uint8 images."""
    config, dictionary = plan.config, dictionary_of(plan.encoder)
    model = config.model
    assert isinstance(model, CodeConfig | PhiSimpleConfig), "only codes can be cached"
    kind = model.code if isinstance(model, CodeConfig) else "up_to"
    assert kind != "triangle", "only bits can be cached"
    return Coding(
        dictionary.kernel.numpy(),
        dictionary.bias.numpy(),
        dictionary.patch_size,
        k=entries(model.k, dictionary.size),
        mean=config.views.mean,
        std=config.views.std,
        kind=kind,
        precision=config.precision,
    )


def _is_trained(plan: NetworkPlan, layer: int) -> bool:
    return (plan.folder(layer) / RESULT).exists()


def _layer(
    corpus: Corpus, plan: NetworkPlan, layer: int, tracker: Tracker | None
) -> dict[str, Any]:
    """Train a layer, unless it has been, and return its numbers."""
    folder = plan.folder(layer)
    if _is_trained(plan, layer):
        return dict(read_json(folder / RESULT))
    folder.mkdir(parents=True, exist_ok=True)
    if layer > 1 and plan.config.needs_dictionary:
        write_dictionary(corpus, plan, layer)
    name = "classify" if plan.depth == 1 else f"classify: layer {layer} of {plan.depth}"
    prefix = "" if plan.depth == 1 else f"layer{layer}."
    objective, state = trained(
        partial(_build, corpus, plan, layer),
        plan.config,
        stage=name,
        out=folder,
        tracker=LayerTracker(folder, tracker, prefix),
    )
    assert isinstance(objective, Classifier)
    network = objective.network
    own = network.top if isinstance(network, PatchNetwork) else network
    write_weights(folder / WEIGHTS, {"": own})
    result = layer_result(layer, objective, state["history"])
    write_json(folder / RESULT, result)
    (folder / "checkpoint.pt").unlink(missing_ok=True)
    return result


def _build(
    corpus: Corpus, plan: NetworkPlan, layer: int
) -> tuple[Classifier, TrainingImages, MakeViews]:
    config, split = plan.config, Split.read(plan.out)
    views = ShiftedViews(config.views, config.seed)
    codes = None
    if config.cache_codes:
        codes = CodeCache.open(plan.out / "codes", padding=config.views.padding)
    measured = {"test": split.test}
    if len(split.validation):
        measured["validation"] = split.validation
    objective = Classifier(
        plan.network(layer),
        corpus.labels(split.train),
        measured={
            name: MeasuredImages(corpus, ids, views, codes) for name, ids in measured.items()
        },
        epochs=config.epochs,
        every=config.test_every,
        precision=config.precision,
    )
    return objective, TrainingImages(corpus, split.train, views, codes), views


def _pictures(plan: NetworkPlan) -> list[Path]:
    """Draw the dictionary's entries that weigh most and least in the bottleneck; return the files.

    An entry's weight is the length of its column in the bottleneck of the first layer.
    """
    model = plan.config.model
    if plan.encoder is None or not isinstance(model, PhiFullConfig | PhiHardConfig):
        return []
    summed = isinstance(model, PhiFullConfig) and model.maps_per_entry is not None
    if model.bottleneck is None or model.embedding != "dictionary" or summed:
        return []  # no channel stands for an entry
    weight = read_weights(plan.folder(1) / WEIGHTS)["layers.0.bottleneck.weight"]
    scores = weight.transpose(0, 1).flatten(1).norm(dim=1).numpy()
    return write_ranked(PatchDictionary.open(plan.encoder.path), scores, plan.out)


class LayerTracker(Tracker):
    """The records of one layer: in its own folder, and under its name in those of the stage."""

    def __init__(self, folder: Path, above: Tracker | None, prefix: str) -> None:
        super().__init__(folder, None)
        self.above, self.prefix = above, prefix

    def log(self, records: Iterable[Mapping[str, Any]]) -> None:
        """Add records to both."""
        kept = list(records)
        super().log(kept)
        if self.above is not None:
            self.above.log([self._named(record) for record in kept])

    def _named(self, record: Mapping[str, Any]) -> dict[str, Any]:
        return {key if key == "step" else f"{self.prefix}{key}": v for key, v in record.items()}
