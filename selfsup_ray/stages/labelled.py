"""What `linear` and `finetune` share: one labelled training, its folder and its numbers."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import nn

from selfsup_ray.artifacts import read_json, write_json
from selfsup_ray.data.corpus import Corpus
from selfsup_ray.errors import TrainingError
from selfsup_ray.models.backbones import build_backbone
from selfsup_ray.models.clusterer import save_clusterer
from selfsup_ray.models.encoder import Encoder
from selfsup_ray.models.inputs import ImageInput
from selfsup_ray.models.layer_maps import LayerMaps, map_shapes
from selfsup_ray.models.probe import BackboneClassifier, factors_of
from selfsup_ray.models.weights import write_weights
from selfsup_ray.ops.metrics import wilson
from selfsup_ray.stages.classify_results import accuracies
from selfsup_ray.stages.embed import Embeddings
from selfsup_ray.stages.labelled_config import FinetuneConfig, LayersLinear, LinearConfig
from selfsup_ray.stages.labelled_data import (
    AugmentedImages,
    LabelledIds,
    LabelledImages,
    Rows,
    StoredRows,
)
from selfsup_ray.stages.trained import trained
from selfsup_ray.training import Record

if TYPE_CHECKING:
    from selfsup_ray.tracking import Tracker
    from selfsup_ray.training import MakeViews

RESULT = "result.json"
"""In the folder of one training, written last."""


@dataclass(frozen=True)
class LabelledPlan:
    """One labelled training, as a worker builds it; picklable.

    origin: `frozen` and `pretrained` start from the encoder, `scratch` from new weights.
    """

    corpus: Corpus
    encoder: Encoder
    config: LinearConfig | FinetuneConfig
    ids: LabelledIds
    num_classes: int
    origin: Literal["frozen", "pretrained", "scratch"]
    features: Embeddings | None = None
    layers: dict[str, tuple[int, int]] | None = None
    """Of `layers_of`."""

    @property
    def images(self) -> ImageInput:
        """What the network expects, with the central square that is tested on."""
        images = self.encoder.description.images
        return images if self.config.center is None else replace(images, share=self.config.center)

    @property
    def factors(self) -> dict[str, float]:
        """The classifiers by name, with their learning rates over the optimizer's."""
        lrs = self.config.lrs if isinstance(self.config, LinearConfig) else ()
        return factors_of(lrs, self.config.optim.lr)

    def rows(self) -> Rows:
        """Return what is read of an image."""
        if self.features is not None:
            return StoredRows(self.features.array)
        return AugmentedImages(self.corpus, self.images, self.config)

    def backbone(self) -> tuple[nn.Module, int]:
        """Return the network below the classifiers, and the length of its features."""
        if self.features is not None:
            return nn.Identity(), self.features.shape[1]
        if self.origin == "scratch":
            made = build_backbone(self.encoder.description.backbone, seed=self.config.seed)
        else:
            made = self.encoder.backbone()
        return (made if self.layers is None else LayerMaps(made)), made.dim

    def labelled(self, ids: Any) -> LabelledImages:
        """Return labelled images of these ids."""
        return LabelledImages(self.rows(), ids, self.corpus.labels(ids))


def layers_of(
    encoder: Encoder, config: LinearConfig | FinetuneConfig
) -> dict[str, tuple[int, int]] | None:
    """Return the shapes of the maps that are classified, by layer; None: the features are.

    Raises ConfigError for an encoder without such layers.
    """
    if not isinstance(config, LayersLinear):
        return None
    images = encoder.description.images
    return map_shapes(encoder.description.backbone, images.view_size or images.image_size)


def build_labelled(plan: LabelledPlan) -> tuple[BackboneClassifier, LabelledImages, MakeViews]:
    """Return objective, training images and views."""
    train, config = plan.labelled(plan.ids.train), plan.config
    measured = {"test": plan.labelled(plan.ids.test)}
    if len(plan.ids.validation):
        measured["validation"] = plan.labelled(plan.ids.validation)
    backbone, dim = plan.backbone()
    objective = BackboneClassifier(
        backbone,
        torch.from_numpy(train.labels),
        dim=dim,
        num_classes=plan.num_classes,
        frozen=plan.origin == "frozen",
        factors=plan.factors,
        layers=plan.layers,
        start=config.start,
        seed=config.seed,
        measured=measured,
        epochs=config.epochs,
        every=config.test_every,
        first=config.test_from if isinstance(config, LayersLinear) else 0,
        precision=config.precision,
    )
    return objective, train, train.rows.make_views


def labelled_training(
    plan: LabelledPlan, *, stage: str, out: Path, tracker: Tracker | None
) -> dict[str, Any]:
    """Train one network, unless it has been, keep it in a folder, and return its numbers.

    Raises TrainingError when a frozen backbone has changed.
    """
    if (out / RESULT).exists():
        return dict(read_json(out / RESULT))
    out.mkdir(parents=True, exist_ok=True)
    objective, state = trained(
        partial(build_labelled, plan),
        plan.config,
        stage=f"{stage} ({plan.origin})",
        out=out,
        tracker=tracker,
    )
    assert isinstance(objective, BackboneClassifier)
    if plan.origin == "frozen":
        require_unchanged(objective.backbone, plan.backbone()[0])
    result = labelled_result(objective, state["history"])
    if plan.layers is not None:
        result = by_layer(result, len(plan.ids.test))
        heads = zip(result["layers"], objective.heads, strict=True)
        write_weights(out / "probes.safetensors", {f"{name}.": head for name, head in heads})
    elif plan.features is None:
        head = objective.head(str(result["classifier"]))
        save_clusterer(out, backbone=objective.encoder(), head=head, images=plan.images)
    write_json(out / RESULT, result)
    (out / "checkpoint.pt").unlink(missing_ok=True)
    return result


def require_unchanged(backbone: nn.Module, before: nn.Module) -> None:
    """Raise TrainingError unless a backbone has the weights and statistics it had before."""
    old = before.state_dict()
    changed = [key for key, value in backbone.state_dict().items() if not value.equal(old[key])]
    if changed:
        raise TrainingError(
            f"The probe changed {len(changed)} weights of the frozen encoder, {changed[0]} first, "
            f"so its accuracy is not the encoder's. This is an error in the program: report it."
        )


def labelled_result(objective: BackboneClassifier, history: Sequence[Record]) -> dict[str, Any]:
    """Return the numbers of one training from its history.

    last_accuracy: test accuracy after the last epoch, with a 95 % interval; max_accuracy: the
    largest over the epochs, which the test images choose and which is therefore optimistic;
    chosen_accuracy: of the epoch that validation images choose. Of several learning rates or layers
    the one whose last epoch validation images like best, or without them the last layer. per_class:
    of the last epoch.
    """
    curve = [_point(record) for record in history if any(map(_is_test, record))]
    tried = {name: accuracies(curve, name) for name in objective.factors}
    name = list(tried)[-1]
    if "validation" in objective.measured:
        name = max(tried, key=lambda one: curve[-1][f"validation_accuracy{one}"])
    last = tried[name]["last_accuracy"]
    return {
        "classifier": name,
        **tried[name],
        "interval": list(wilson(last, len(objective.measured["test"]))),
        "train_accuracy": curve[-1][f"train_accuracy{name}"],
        "per_class": objective.per_class("test", name),
        "tried": {one.removeprefix("_lr"): found for one, found in tried.items() if one},
        "curve": curve,
    }


def by_layer(result: Mapping[str, Any], num_test: int) -> dict[str, Any]:
    """Return the numbers of a training of layers: `layers` has those of each, by name."""
    last, layers = result["curve"][-1], {}
    for name, found in result["tried"].items():
        layers[name.removeprefix("_")] = {
            **found,
            "interval": list(wilson(found["last_accuracy"], num_test)),
            "train_accuracy": last[f"train_accuracy{name}"],
        }
    return {**result, "layers": layers, "tried": {}}


def _is_test(key: str) -> bool:
    return key.startswith("test_accuracy")


def _point(record: Record) -> dict[str, float]:
    kept = {key: v for key, v in record.items() if "accuracy" in key or key.startswith("loss")}
    return {"epoch": round(record["epoch"]), "lr": record["lr"], **kept}


def numbers_of(result: Mapping[str, Any]) -> dict[str, float]:
    """Return the single numbers of a result, for MLflow and the stage's stamp."""
    single = {key: v for key, v in result.items() if isinstance(v, int | float)}
    layers = result.get("layers", {})
    return single | {f"last_accuracy_{name}": one["last_accuracy"] for name, one in layers.items()}
