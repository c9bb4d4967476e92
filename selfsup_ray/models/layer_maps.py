"""The maps of a network's layers, pooled, and a linear classifier on one of them."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from selfsup_ray.errors import ConfigError
from selfsup_ray.models.alexnet import AlexNet
from selfsup_ray.models.backbone import AlexNetConfig, PatchBackboneConfig
from selfsup_ray.models.backbones import (
    Backbone,
    BackboneConfig,
    PreactResNet,
    ResNet,
    build_backbone,
)
from selfsup_ray.models.norm import BatchNorm

POOLS = ((6, 6, 3), (4, 4, 0), (3, 3, 1), (3, 3, 1), (2, 2, 0))
"""Side, stride and padding of the maximum over each of AlexNet's maps, as published: 9,600 numbers
of an image are left of conv1, conv3 and conv4, and 9,216 of conv2 and conv5."""
MOST_NUMBERS = 9_600
"""Of a ResNet's stage that a classifier sees: its average over as fine a grid as that allows."""


class LayerMaps(nn.Module):
    """A network whose output is the pooled map of each of its layers.

    AlexNet's are conv1 to conv5, each after normalisation and ReLU; a ResNet's are layer1 to
    layer4, its stages (of `resnet50v2` before any further normalisation, as it ends).
    """

    def __init__(self, backbone: Backbone) -> None:
        super().__init__()
        self.backbone = backbone

    def forward(self, images: Tensor) -> list[Tensor]:
        """Return the maps (B, channels, s, s) of images (B, 3, S, S)."""
        if isinstance(self.backbone, AlexNet):
            return _of_alexnet(self.backbone, images)
        found = []
        for x in _stages(self.backbone, images):
            side = min(x.shape[-1], math.isqrt(MOST_NUMBERS // x.shape[1]))
            found.append(F.adaptive_avg_pool2d(x, max(1, side)))
        return found


def _of_alexnet(network: AlexNet, images: Tensor) -> list[Tensor]:
    x, found = images, list[Tensor]()
    for layer in network.features:
        x = layer(x)
        if isinstance(layer, nn.ReLU):
            side, stride, padding = POOLS[len(found)]
            found.append(F.max_pool2d(x, side, stride, padding))
    return found


def _stages(network: Backbone, images: Tensor) -> list[Tensor]:
    stages: list[nn.Module]
    if isinstance(network, ResNet):
        x = network.maxpool(F.relu_(network.bn1(network.conv1(images))))
        stages = [network.layer1, network.layer2, network.layer3, network.layer4]
    else:
        assert isinstance(network, PreactResNet), "no other network has stages"
        x, stages = network.pool(network.stem(images)), list(network.stages)
    found = []
    for stage in stages:
        x = stage(x)
        found.append(x)
    return found


def map_shapes(config: BackboneConfig, side: int) -> dict[str, tuple[int, int]]:
    """Return {layer: (channels, side)} of the pooled maps of views of `side` pixels.

    Raises ConfigError for a network that has no such layers.
    """
    if isinstance(config, PatchBackboneConfig):
        raise ConfigError(
            "linear.name=layers measures the layers of an AlexNet or a ResNet, but the encoder is "
            "a patch code. Choose another linear.name."
        )
    with torch.device("meta"), torch.no_grad():
        maps = LayerMaps(build_backbone(config)).eval()(torch.empty(1, 3, side, side))
    kind = "conv" if isinstance(config, AlexNetConfig) else "layer"
    return {f"{kind}{i}": (x.shape[1], x.shape[2]) for i, x in enumerate(maps, start=1)}


class MapProbe(nn.Module):
    """A linear classifier on the whole of a map, normalised by channel without scale or offset.

    As published a convolution of the map's size with Xavier's weights (Glorot and Bengio 2010,
    uniform) and no bias at the start: its fans count the positions on both sides.
    """

    def __init__(self, channels: int, side: int, num_classes: int) -> None:
        super().__init__()
        self.norm = BatchNorm(channels, affine=False)
        self.linear = nn.Linear(channels * side**2, num_classes)
        bound = math.sqrt(6 / ((channels + num_classes) * side**2))
        nn.init.uniform_(self.linear.weight, -bound, bound)
        nn.init.zeros_(self.linear.bias)

    def forward(self, x: Tensor) -> Tensor:
        """Return the logits (B, C) of maps (B, channels, side, side)."""
        logits: Tensor = self.linear(self.norm(x).flatten(1))
        return logits
