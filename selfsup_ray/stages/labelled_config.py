"""What the stages `linear` and `finetune` can be told: which labels, which protocol."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from selfsup_ray.config import NonNegative, Positive, PositiveFloat, Share, config
from selfsup_ray.data.views import AreaRange, PositiveShare
from selfsup_ray.optim import CosineSchedule, OptimConfig, ScheduleConfig, SGDConfig, StepSchedule
from selfsup_ray.stages.lowshot_config import HeldOutConfig, HeldOutShare
from selfsup_ray.training import TrainConfig


@config
class AllLabels:
    """Every labelled image that is not held out."""

    name: Literal["all"] = "all"


@config
class ShareOfLabels:
    """A share of every class, rounded, at least one image: 0.01 and 0.1 are the published ones."""

    name: Literal["share"] = "share"
    share: PositiveShare = 0.1


@config
class CountOfLabels:
    """So many images in all, as many of each class as that allows."""

    name: Literal["count"] = "count"
    count: Positive = 250


LabelBudget = Annotated[AllLabels | ShareOfLabels | CountOfLabels, Field(discriminator="name")]


@config
class LabelledConfig(TrainConfig):
    """What a linear probe and a fine-tuning have in common."""

    labels: LabelBudget = AllLabels()
    """Which labels are trained on: all | share | count. Chosen by a hash of the image id and the
    seed, the same number of each class; fewer labels are a part of more."""
    test: HeldOutConfig = HeldOutShare()
    """Which labelled images are only tested on: share | source | rows, as in lowshot."""
    validation_share: Annotated[float, Field(ge=0, lt=1)] = 0.0
    """Share of the other images that is held out too, to choose an epoch and a learning rate."""
    crop: AreaRange | None = (0.08, 1.0)
    """Share of the area that a random crop covers; None: the whole image. A view's side, mean and
    deviation are the encoder's."""
    flip_p: Share = 0.5
    """Probability of a left-right flip."""
    center: PositiveShare | None = None
    """Side of the central square that is tested on, as a share of the stored side (ImageNet, 224 of
    256: 0.875); None: as the encoder embeds."""
    start: Literal["normal", "zero"] = "normal"
    """First weights of the classifier: normal with deviation 0.01, or zero."""
    test_every: Positive = 1
    """Epochs between two measurements of the accuracy; the last epoch is always measured."""
    precision: Literal["float32", "bfloat16"] = "float32"


@config
class LinearConfig(LabelledConfig):
    """A linear classifier on the frozen encoder."""

    lrs: tuple[PositiveFloat, ...] = ()
    """Learning rates to try beside each other, in place of optim.lr; validation images choose."""
    features: Literal["views", "embeddings"] = "views"
    """`views`: every image is augmented and passes through the encoder in every epoch, as
    published. `embeddings`: the stored rows of `embed`, as vectors of length sqrt(d), with no
    augmentation: minutes in place of hours, but other learning rates suit them, so give `lrs`."""

    def __post_init__(self) -> None:
        if self.lrs and not self.validation_share:
            raise ValueError(
                f"lrs={list(self.lrs)} needs validation images to choose by: set validation_share"
            )
        if self.lrs and (not isinstance(self.optim, SGDConfig) or self.optim.weight_decay):
            raise ValueError(
                "lrs are tried beside each other by SGD without weight decay: set optim.name=sgd "
                "and optim.weight_decay=0, or try them one after the other in a sweep"
            )


@config
class CifarLinear(LinearConfig):
    """The probe of the published CIFAR comparison of InsDis, SimCLR and BYOL: flips only."""

    name: Literal["cifar"] = "cifar"
    epochs: Positive = 100
    batch_size: Positive = 256
    optim: OptimConfig = SGDConfig(lr=30.0, momentum=0.9, weight_decay=0)
    schedule: ScheduleConfig = StepSchedule(milestones=(40, 60, 80), rate=0.2)
    crop: AreaRange | None = None


@config
class SimCLRCifarLinear(LinearConfig):
    """SimCLR's probe on CIFAR-10 (Chen et al. 2020, public code)."""

    name: Literal["simclr_cifar"] = "simclr_cifar"
    epochs: Positive = 100
    batch_size: Positive = 512
    optim: OptimConfig = SGDConfig(lr=0.1, nesterov=True, weight_decay=0, linear_scaling=True)
    schedule: ScheduleConfig = CosineSchedule()
    start: Literal["normal", "zero"] = "zero"


@config
class MoCoLinear(LinearConfig):
    """MoCo's probe on ImageNet (He et al. 2020)."""

    name: Literal["moco"] = "moco"
    epochs: Positive = 100
    batch_size: Positive = 256
    optim: OptimConfig = SGDConfig(lr=30.0, momentum=0.9, weight_decay=0)
    schedule: ScheduleConfig = StepSchedule(milestones=(60, 80), rate=0.1)


@config
class BYOLLinear(LinearConfig):
    """BYOL's probe on ImageNet (Grill et al. 2020): 80 epochs; lrs around 0.2 by validation."""

    name: Literal["byol"] = "byol"
    epochs: Positive = 80
    batch_size: Positive = 1024
    optim: OptimConfig = SGDConfig(lr=0.2, nesterov=True, weight_decay=0, linear_scaling=True)
    schedule: ScheduleConfig = CosineSchedule()


@config
class LayersLinear(LinearConfig):
    """One probe for each layer of an AlexNet or a ResNet, all at once (SeLa's for ImageNet).

    Each classifier sees the whole pooled map of its layer, normalised by channel.
    """

    name: Literal["layers"] = "layers"
    epochs: Positive = 36
    batch_size: Positive = 192
    optim: OptimConfig = SGDConfig(lr=0.01, momentum=0.9, weight_decay=1e-5)
    schedule: ScheduleConfig = StepSchedule(milestones=(10, 20, 30), rate=0.1)
    center: PositiveShare | None = 0.875
    """Side of the squares that are tested on, as a share of the stored side; None: as the encoder
    embeds."""
    ten_crop: bool = True
    """Test on ten squares, the middle and the corners and their mirror images, by the mean of their
    logits; or on the middle alone."""
    test_from: NonNegative = 26
    """Epoch, counted from 0, from which the accuracy is measured."""

    def __post_init__(self) -> None:
        if self.features == "embeddings":
            raise ValueError(
                "name=layers looks at maps inside the encoder, and features=embeddings stores only "
                "its output: set features=views, or choose another name"
            )
        if self.lrs:
            raise ValueError(
                "name=layers trains all layers at one rate: set optim.lr, or sweep over it"
            )
        if self.start != "normal":
            raise ValueError("name=layers starts from Xavier's weights: leave start out")


LinearProtocol = Annotated[
    CifarLinear | SimCLRCifarLinear | MoCoLinear | BYOLLinear | LayersLinear,
    Field(discriminator="name"),
]
"""The protocols of `linear`, told apart by `name`."""


@config
class FinetuneConfig(LabelledConfig):
    """The encoder and a linear classifier, trained together on few labels."""

    labels: LabelBudget = ShareOfLabels()
    """Which labels are trained on: all | share | count. Chosen by a hash of the image id and the
    seed, the same number of each class; fewer labels are a part of more."""
    scratch: bool = True
    """Train a new network on the same labels by the same schedule, to compare with."""
    start: Literal["normal", "zero"] = "zero"


@config
class SimCLRFinetune(FinetuneConfig):
    """SimCLR's semi-supervised protocol (appendix B.5): no decay, no warm-up, crops and flips."""

    name: Literal["simclr"] = "simclr"
    epochs: Positive = 30
    """30 for 10 % of the labels, 60 for 1 %."""
    batch_size: Positive = 4096
    optim: OptimConfig = SGDConfig(lr=0.05, nesterov=True, weight_decay=0, linear_scaling=True)
    schedule: ScheduleConfig = CosineSchedule()


@config
class BYOLFinetune(FinetuneConfig):
    """BYOL's semi-supervised protocol: lr and epochs (30 or 50) were chosen on validation images.

    Published were learning rates 0.005, 0.01, 0.02, 0.05 and 0.1.
    """

    name: Literal["byol"] = "byol"
    epochs: Positive = 50
    batch_size: Positive = 1024
    optim: OptimConfig = SGDConfig(lr=0.02, nesterov=True, weight_decay=0)
    schedule: ScheduleConfig = CosineSchedule()


FinetuneProtocol = Annotated[SimCLRFinetune | BYOLFinetune, Field(discriminator="name")]
"""The protocols of `finetune`, told apart by `name`."""
