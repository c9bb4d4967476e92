"""A pre-activation ResNet-50 (He et al. 2016, Identity mappings) in the variant SeLa trains."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from selfsup_ray.models.backbone import EXPANSION, Backbone, PreactResNetConfig
from selfsup_ray.models.norm import BatchNorm

DEPTHS = (3, 4, 6, 3)


class PreactResNet(Backbone):
    """Bottlenecks whose normalisations come first; none follows the stem or the last stage."""

    def __init__(self, config: PreactResNetConfig) -> None:
        super().__init__(config)
        self.stem = nn.Conv2d(3, config.width, 7, stride=2, padding=3, bias=False)
        self.pool = nn.MaxPool2d(3, stride=2, padding=1)
        channels, stages = config.width, []
        for i, depth in enumerate(DEPTHS):
            middle, blocks = config.width * 2**i, list[nn.Module]()
            for j in range(depth):
                blocks.append(_Bottleneck(channels, middle, 2 if i and j == 0 else 1))
                channels = middle * EXPANSION
            stages.append(nn.Sequential(*blocks))
        self.stages = nn.ModuleList(stages)
        for layer in self.modules():
            if isinstance(layer, nn.Conv2d):
                fan_out = layer.kernel_size[0] * layer.kernel_size[1] * layer.out_channels
                nn.init.normal_(layer.weight, std=math.sqrt(2 / fan_out))

    def forward(self, images: Tensor) -> Tensor:
        """Return features (B, dim), the mean over positions, of images (B, 3, s, s)."""
        x = self.pool(self.stem(images))
        for stage in self.stages:
            x = stage(x)
        return torch.mean(x, dim=(2, 3))


class _Bottleneck(nn.Module):
    """1x1, 3x3 (with the stride), 1x1 convolutions of normalised, rectified inputs.

    The normalisations are called norm, since `fold_batch_norm` takes bn1 for one after conv1.
    """

    def __init__(self, channels: int, middle: int, stride: int) -> None:
        super().__init__()
        out = middle * EXPANSION
        self.norm1 = BatchNorm(channels)
        self.conv1 = nn.Conv2d(channels, middle, 1, bias=False)
        self.norm2 = BatchNorm(middle)
        self.conv2 = nn.Conv2d(middle, middle, 3, stride=stride, padding=1, bias=False)
        self.norm3 = BatchNorm(middle)
        self.conv3 = nn.Conv2d(middle, out, 1, bias=False)
        changes = stride > 1 or channels != out
        self.shortcut = nn.Conv2d(channels, out, 1, stride=stride, bias=False) if changes else None

    def forward(self, x: Tensor) -> Tensor:
        active = F.relu(self.norm1(x))
        shortcut = x if self.shortcut is None else self.shortcut(active)
        out = self.conv1(active)
        out = self.conv2(F.relu(self.norm2(out)))
        out = self.conv3(F.relu(self.norm3(out)))
        return torch.add(out, shortcut)
