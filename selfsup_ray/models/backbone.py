"""What every backbone is: a config of one of these kinds, and a network from images to features."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field
from torch import nn

from selfsup_ray.config import Positive, config

EXPANSION = 4
"""Times the output of a bottleneck block is wider than its middle."""


@config
class ResNetConfig:
    """A residual network (He et al. 2016) without its classifier."""

    name: Literal["resnet18", "resnet34", "resnet50"] = "resnet18"
    stem: Literal["imagenet", "cifar", "stl"] = "imagenet"
    """`imagenet`: 7x7 stride 2 and a stride-2 pool, for 128 pixels and more. `stl`: 3x3 and a
    stride-2 pool, for 48 to 128 pixels, or cheaper training of smaller ones. `cifar`: 3x3, no pool,
    for about 32 pixels."""
    width: Positive = 64
    """Channels of the first stage; 64 in the paper. Cost grows with its square."""

    @property
    def dim(self) -> int:
        """Dimension of the features: 512, or 2048 for resnet50, at width 64."""
        return 8 * self.width * (EXPANSION if self.name == "resnet50" else 1)


@config
class PatchBackboneConfig:
    """A code on a dictionary of patches (Brutzkus et al. 2022), averaged over a grid."""

    name: Literal["patches"] = "patches"
    size: Positive
    """N, entries of the dictionary."""
    k: Positive
    """Nearest entries that are set at each position; `triangle` does without."""
    channels: Positive = 3
    """Of the images."""
    patch_size: Positive = 5
    """Side of a patch in pixels."""
    code: Literal["hard", "kth", "triangle"] = "hard"
    """`hard`: the k nearest entries are 1, the others 0; `kth`: the k-th alone is 1; `triangle`:
    how much nearer than the average an entry is, 0 if it is not (Coates and Ng)."""
    grid: Positive = 2
    """The code is averaged over grid x grid parts of the image."""
    precision: Literal["bfloat16", "float32"] = "bfloat16"
    """Of distances: `bfloat16` settles ties in float32 and sets exactly k entries."""

    def __post_init__(self) -> None:
        if self.k > self.size:
            raise ValueError(f"k={self.k} is more than the size={self.size} entries there are")

    @property
    def dim(self) -> int:
        """Dimension of the features: N grid^2."""
        return self.size * self.grid**2


@config
class AlexNetConfig:
    """AlexNet with batch normalisation after each convolution, for views of 224 pixels (SeLa)."""

    name: Literal["alexnet"] = "alexnet"
    size: Literal["big", "small"] = "big"
    """Filters: `big` 96, 256, 384, 384, 256; `small` 64, 192, 384, 256, 256."""

    @property
    def dim(self) -> int:
        """Dimension of the features, those of the last hidden layer: 4096."""
        return 4096


@config
class PreactResNetConfig:
    """A ResNet-50 with normalisation before each convolution, as SeLa's `resnetv2` has it."""

    name: Literal["resnet50v2"] = "resnet50v2"
    width: Positive = 64
    """Channels of the first stage; 64 in the paper. Cost grows with its square."""

    @property
    def dim(self) -> int:
        """Dimension of the features: 2048 at width 64."""
        return 8 * self.width * EXPANSION


TrainedBackboneConfig = Annotated[
    ResNetConfig | PreactResNetConfig | AlexNetConfig, Field(discriminator="name")
]
"""Backbones that are trained by gradients."""
BackboneConfig = Annotated[
    ResNetConfig | PreactResNetConfig | AlexNetConfig | PatchBackboneConfig,
    Field(discriminator="name"),
]


class Backbone(nn.Module):
    """A network from images (B, 3, s, s), normalised, to features (B, dim), not unit rows."""

    def __init__(self, config: BackboneConfig) -> None:
        super().__init__()
        self.config = config
        self.dim = config.dim
