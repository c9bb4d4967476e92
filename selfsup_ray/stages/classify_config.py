"""What the stage `classify` can be told: network, depth, test images, labels, training."""

from __future__ import annotations

from typing import Annotated

from pydantic import Field

from selfsup_ray.config import Positive, config
from selfsup_ray.data.shifted import ShiftedConfig
from selfsup_ray.models.patch_layers import (
    CNNConfig,
    CodeConfig,
    DeeperCodeConfig,
    DeeperConfig,
    DeeperConvConfig,
    ModelConfig,
    PhiFullConfig,
    PhiSimpleConfig,
    VanillaConfig,
)
from selfsup_ray.optim import OptimConfig, ScheduleConfig, SGDConfig, StepSchedule
from selfsup_ray.stages.lowshot_config import HeldOutConfig, HeldOutShare
from selfsup_ray.training import TrainConfig


@config
class ClassifyConfig(TrainConfig):
    """How a labelled network is trained on a patch dictionary; the defaults are Phi_full's.

    Published: 200 epochs of SGD with lr 0.003 in batches of 64, divided by ten after 100 and 150.
    """

    model: ModelConfig = PhiFullConfig()
    """The first layer, or the whole network where there is no dictionary."""
    deeper: tuple[DeeperConfig, ...] = ()
    """Further layers. Each is trained for the whole schedule on top of the ones below, which are
    kept as they are; its dictionary is made of patches of the map below. `model.code` and
    `model.embedding` are those of all layers; how its dictionary is made, each layer says."""
    sum_logits: bool = False
    """Each layer's classifier is added to those of the layers below, in place of standing alone."""
    views: ShiftedConfig = ShiftedConfig()
    test: HeldOutConfig = HeldOutShare()
    """Which labelled images are only tested on: share | source | rows, as in lowshot."""
    validation_share: Annotated[float, Field(ge=0, lt=1)] = 0.0
    """Share of the other images that are held out too; then `chosen_accuracy` is the test accuracy
    of the epoch that they choose. The published numbers have none: they are maxima over epochs."""
    label_budget: Positive | None = None
    """Labelled images to train on, drawn uniformly whatever their class; None: all."""
    test_every: Positive = 1
    """Epochs between two measurements of the accuracy; the last epoch is always measured."""
    cache_codes: bool = False
    """Compute the codes of every window of the padded images and their mirror images once, into
    the stage's folder: the same code, and each epoch only reads. About 330 kB an image of 32 pixels
    at N = 1024."""
    epochs: Positive = 200
    batch_size: Positive = 64
    optim: OptimConfig = SGDConfig(lr=0.003, momentum=0.9, weight_decay=0)
    schedule: ScheduleConfig = StepSchedule(milestones=(100, 150), rate=0.1)
    log_every: Positive = 100
    checkpoint_every: Positive = 500

    def __post_init__(self) -> None:
        self._require_layers()
        if not self.cache_codes:
            return
        if self.views.shuffle is not None:
            raise ValueError(
                f"cache_codes=true keeps codes of windows, but views.shuffle={self.views.shuffle} "
                f"makes every view anew; leave one of them out"
            )
        if not isinstance(self.model, CodeConfig | PhiSimpleConfig):
            raise ValueError(f"cache_codes=true, but model.name={self.model.name} has no code")
        if isinstance(self.model, CodeConfig) and self.model.also_k:
            raise ValueError("cache_codes=true keeps the codes of one k: leave model.also_k out")
        if isinstance(self.model, CodeConfig) and self.model.code == "triangle":
            raise ValueError("cache_codes=true keeps bits, which model.code=triangle does not have")
        if isinstance(self.model, CodeConfig) and (self.model.stride > 1 or self.model.padding):
            raise ValueError(
                f"cache_codes=true keeps the codes of every position inside a view, but "
                f"model.stride={self.model.stride} and model.padding={self.model.padding} want "
                f"others; leave them or cache_codes out"
            )

    def _require_layers(self) -> None:
        model = self.model
        if not self.deeper:
            if self.sum_logits:
                raise ValueError("sum_logits=true needs `deeper` layers to add up")
            return
        if isinstance(model, CNNConfig | PhiSimpleConfig):
            raise ValueError(
                f"model.name={model.name} has no layers to put others on; leave `deeper` out, or "
                f"choose phi_full, phi_hard or vanilla"
            )
        kind = DeeperConvConfig if isinstance(model, VanillaConfig) else DeeperCodeConfig
        wrong = [one.name for one in self.deeper if not isinstance(one, kind)]
        if wrong:
            wanted = "conv" if kind is DeeperConvConfig else "code"
            raise ValueError(f"`deeper` has a layer {wrong[0]}, but {model.name} needs {wanted}")
        if isinstance(model, CodeConfig) and model.also_k:
            raise ValueError("`deeper` layers stand on one network: leave model.also_k out")
        if isinstance(model, PhiFullConfig) and model.maps_per_entry is not None:
            raise ValueError("model.maps_per_entry is for one layer: leave it or `deeper` out")

    @property
    def needs_dictionary(self) -> bool:
        """Whether the network starts from the experiment's `patches`."""
        return isinstance(self.model, CodeConfig | PhiSimpleConfig)
