"""AlexNet with batch normalisation, as SeLa trains it, and dropout as a function of image ids."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch.nn.functional as F
from torch import Tensor, nn

from selfsup_ray.errors import ConfigError
from selfsup_ray.models.backbone import AlexNetConfig, Backbone
from selfsup_ray.models.norm import BatchNorm
from selfsup_ray.ops.rng import uniforms

SIDE = 224
"""Of the views, in pixels: the first linear layer takes 6 x 6 maps."""
FILTERS = {"big": (96, 256, 384, 384, 256), "small": (64, 192, 384, 256, 256)}
KERNELS = ((11, 4, 2), (5, 1, 2), (3, 1, 1), (3, 1, 1), (3, 1, 1))
"""Side, stride and padding of each convolution."""
POOLED = (0, 1, 4)
"""Convolutions that a pooling follows."""
DROPOUT_STREAM = 1_010  # its own random numbers, apart from the views'; one stream a layer


class AlexNet(Backbone):
    """AlexNet without its classifier; layers are numbered as in SeLa's published checkpoints."""

    def __init__(self, config: AlexNetConfig) -> None:
        super().__init__(config)
        layers, channels = list[nn.Module](), 3
        filters = FILTERS[config.size]
        for i, (out, (side, stride, padding)) in enumerate(zip(filters, KERNELS, strict=True)):
            layers += [
                nn.Conv2d(channels, out, side, stride=stride, padding=padding),
                BatchNorm(out),
                nn.ReLU(inplace=True),
            ]
            layers += [nn.MaxPool2d(3, stride=2)] if i in POOLED else []
            channels = out
        self.features = nn.Sequential(*layers)
        self.classifier = nn.Sequential(
            Dropout(0.5, stream=DROPOUT_STREAM),
            nn.Linear(channels * 6 * 6, config.dim),
            nn.ReLU(inplace=True),
            Dropout(0.5, stream=DROPOUT_STREAM + 1),
            nn.Linear(config.dim, config.dim),
            nn.ReLU(inplace=True),
        )
        _initialize(self)

    def forward(self, images: Tensor) -> Tensor:
        """Return the last hidden layer (B, 4096), after its ReLU, of images (B, 3, 224, 224)."""
        require_side(images.shape[-1])
        maps = self.features(images)
        features: Tensor = self.classifier(maps.flatten(1))
        return features


def require_side(side: int, *, key: str = "views.size") -> None:
    """Raise ConfigError unless views have the side that AlexNet takes."""
    if side != SIDE:
        raise ConfigError(
            f"backbone.name=alexnet takes views of {SIDE} pixels, got {side}. Set {key}={SIDE}, "
            f"which enlarges smaller images as the published CIFAR runs do, or take a resnet."
        )


def _initialize(network: nn.Module) -> None:
    """Published: convolutions with deviation sqrt(2 / (k k out)), linear layers with 0.01."""
    for layer in network.modules():
        if isinstance(layer, nn.Conv2d):
            fan_out = layer.kernel_size[0] * layer.kernel_size[1] * layer.out_channels
            nn.init.normal_(layer.weight, std=math.sqrt(2 / fan_out))
        elif isinstance(layer, nn.Linear):
            nn.init.normal_(layer.weight, std=0.01)
        if isinstance(layer, nn.Conv2d | nn.Linear) and layer.bias is not None:
            nn.init.zeros_(layer.bias)


@dataclass(frozen=True)
class DropoutKey:
    """What the masks of a forward pass depend on: a seed, the step, and each image's id (B,)."""

    seed: int
    step: int
    ids: Tensor


class Dropout(nn.Module):
    """Dropout; with a `key`, an image's mask is a function of it, whichever rank has the image.

    Without one the masks come from torch's generator, which `fit` seeds by step and rank.
    """

    def __init__(self, p: float, *, stream: int) -> None:
        super().__init__()
        self.p, self.stream = p, stream
        self.key: DropoutKey | None = None

    def forward(self, x: Tensor) -> Tensor:
        """Return x (B, d) with a share p of its entries 0 and the others scaled up, in training."""
        if not self.training or self.key is None:
            return F.dropout(x, self.p, self.training)
        seed, step, ids = self.key.seed, self.key.step, self.key.ids
        drawn = uniforms(seed=seed, epoch=step, ids=ids, draws=x.shape[1], stream=self.stream)
        return x * ((drawn >= self.p).to(x) / (1 - self.p))


def set_dropout_key(network: nn.Module, key: DropoutKey | None) -> None:
    """Give every `Dropout` of a network its key."""
    for layer in network.modules():
        if isinstance(layer, Dropout):
            layer.key = key
