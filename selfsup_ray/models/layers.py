"""The layers of an encoder whose features can be embedded, probed and drawn."""

from __future__ import annotations

from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from selfsup_ray.models.backbones import Backbone, ResNet, ResNetConfig

Layer = Literal["layer1", "layer2", "layer3", "pooled", "head"]
"""`layer1` to `layer3`: the mean over positions of a stage's output; `pooled`: of the last stage,
the backbone's features; `head`: of the projection head."""

STAGES = ("layer1", "layer2", "layer3")


class StageFeatures(nn.Module):
    """The first stages of a ResNet, from images (B, 3, s, s) to the mean (B, dim) of the last."""

    def __init__(self, network: ResNet, layer: str) -> None:
        super().__init__()
        self.network, self.layer = network, layer

    def forward(self, images: Tensor) -> Tensor:
        """Return the mean over positions of the stage's output."""
        net = self.network
        x = net.maxpool(F.relu_(net.bn1(net.conv1(images))))
        for name in STAGES[: STAGES.index(self.layer) + 1]:
            x = getattr(net, name)(x)
        return torch.mean(x, dim=(2, 3))


def up_to(backbone: Backbone, layer: Layer) -> nn.Module:
    """Return the network from images to a layer below the head."""
    if layer not in STAGES:
        return backbone
    assert isinstance(backbone, ResNet), "only a ResNet has stages"
    return StageFeatures(backbone, layer)


def stage_dim(config: ResNetConfig, layer: str) -> int:
    """Return the length of a stage's features."""
    return config.dim >> (len(STAGES) - STAGES.index(layer))
