"""Building backbones, and ResNets for large and small images under torchvision's names."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils.fusion import fuse_conv_bn_eval

from selfsup_ray.models.alexnet import AlexNet
from selfsup_ray.models.backbone import (
    EXPANSION,
    AlexNetConfig,
    Backbone,
    BackboneConfig,
    PatchBackboneConfig,
    PreactResNetConfig,
    ResNetConfig,
)
from selfsup_ray.models.norm import BatchNorm
from selfsup_ray.models.patch_backbone import PatchBackbone
from selfsup_ray.models.preact_resnet import PreactResNet

__all__ = [
    "AlexNet",
    "AlexNetConfig",
    "Backbone",
    "BackboneConfig",
    "PatchBackbone",
    "PatchBackboneConfig",
    "PreactResNet",
    "PreactResNetConfig",
    "ResNet",
    "ResNetConfig",
    "build_backbone",
    "fold_batch_norm",
    "seeded",
]


@contextmanager
def seeded(seed: int) -> Iterator[None]:
    """Draw initial weights from a seed, and leave torch's own generator as it was."""
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)
        yield


def build_backbone(config: BackboneConfig, *, seed: int = 0) -> Backbone:
    """Return a new backbone; the same seed gives the same weights on every rank.

    A patch backbone has nothing to draw: its dictionary is zero until it is filled.
    """
    match config:
        case PatchBackboneConfig():
            return PatchBackbone(config)
        case ResNetConfig():
            with seeded(seed):
                return ResNet(config)
        case PreactResNetConfig():
            with seeded(seed):
                return PreactResNet(config)
        case AlexNetConfig():
            with seeded(seed):
                return AlexNet(config)


class ResNet(Backbone):
    """ResNet-18, 34 or 50; any image side, since the last pooling is global."""

    def __init__(self, config: ResNetConfig) -> None:
        depths, block = LAYERS[config.name]
        super().__init__(config)
        self.conv1, self.maxpool = _stem(config.stem, config.width)
        self.bn1 = BatchNorm(config.width)
        channels, stages = config.width, []
        for i, depth in enumerate(depths):
            out, stride = config.width * 2**i, 1 if i == 0 else 2
            first = block(channels, out, stride)
            channels = out * block.expansion
            rest = [block(channels, out, 1) for _ in range(depth - 1)]
            stages.append(nn.Sequential(first, *rest))
        self.layer1, self.layer2, self.layer3, self.layer4 = stages
        _initialize(self)

    def forward(self, images: Tensor) -> Tensor:
        """Return features (B, dim), the mean over positions, of images (B, 3, s, s)."""
        x = self.maxpool(F.relu_(self.bn1(self.conv1(images))))
        for stage in (self.layer1, self.layer2, self.layer3, self.layer4):
            x = stage(x)
        return torch.mean(x, dim=(2, 3))


def _stem(stem: str, width: int) -> tuple[nn.Conv2d, nn.Module]:
    match stem:
        case "imagenet":
            large = nn.Conv2d(3, width, 7, stride=2, padding=3, bias=False)
            return large, nn.MaxPool2d(3, stride=2, padding=1)
        case "stl":
            return _conv3x3(3, width), nn.MaxPool2d(2, stride=2, padding=1)
        case _:
            return _conv3x3(3, width), nn.Identity()


def _conv3x3(channels: int, out: int, stride: int = 1) -> nn.Conv2d:
    return nn.Conv2d(channels, out, 3, stride=stride, padding=1, bias=False)


def _shortcut(channels: int, out: int, stride: int) -> nn.Module | None:
    if stride == 1 and channels == out:
        return None
    return nn.Sequential(nn.Conv2d(channels, out, 1, stride=stride, bias=False), BatchNorm(out))


class _Block(nn.Module):
    """A residual block: relu(residual(x) + shortcut(x))."""

    expansion = 1

    def __init__(self, channels: int, out: int, stride: int) -> None:
        super().__init__()
        self.conv1 = _conv3x3(channels, out, stride)
        self.bn1 = BatchNorm(out)
        self.conv2 = _conv3x3(out, out)
        self.bn2 = BatchNorm(out)
        self.downsample = _shortcut(channels, out, stride)

    def forward(self, x: Tensor) -> Tensor:
        residual = self.conv2(F.relu_(self.bn1(self.conv1(x))))
        residual = self.bn2(residual)
        shortcut = x if self.downsample is None else self.downsample(x)
        return F.relu_(residual.add_(shortcut))


class _Bottleneck(nn.Module):
    """A residual block of 1x1, 3x3 (with the stride), 1x1 convolutions."""

    expansion = EXPANSION

    def __init__(self, channels: int, out: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(channels, out, 1, bias=False)
        self.bn1 = BatchNorm(out)
        self.conv2 = _conv3x3(out, out, stride)
        self.bn2 = BatchNorm(out)
        self.conv3 = nn.Conv2d(out, out * 4, 1, bias=False)
        self.bn3 = BatchNorm(out * 4)
        self.downsample = _shortcut(channels, out * 4, stride)

    def forward(self, x: Tensor) -> Tensor:
        residual = F.relu_(self.bn1(self.conv1(x)))
        residual = F.relu_(self.bn2(self.conv2(residual)))
        residual = self.bn3(self.conv3(residual))
        shortcut = x if self.downsample is None else self.downsample(x)
        return F.relu_(residual.add_(shortcut))


LAYERS: dict[str, tuple[tuple[int, ...], type[_Block] | type[_Bottleneck]]] = {
    "resnet18": ((2, 2, 2, 2), _Block),
    "resnet34": ((3, 4, 6, 3), _Block),
    "resnet50": ((3, 4, 6, 3), _Bottleneck),
}


def _initialize(network: nn.Module) -> None:
    """Kaiming-normal convolutions, fan-out; batch normalisation starts as 1 and 0."""
    for layer in network.modules():
        if isinstance(layer, nn.Conv2d):
            nn.init.kaiming_normal_(layer.weight, mode="fan_out", nonlinearity="relu")


def fold_batch_norm(network: nn.Module) -> None:
    """Multiply every batch normalisation into the convolution before it, for inference only.

    Features stay the same up to rounding, and come up to a quarter sooner on a CPU.
    """
    pairs = [("conv1", "bn1"), ("conv2", "bn2"), ("conv3", "bn3"), ("0", "1")]
    for block in list(network.modules()):
        for conv_name, norm_name in pairs:
            conv, norm = getattr(block, conv_name, None), getattr(block, norm_name, None)
            if isinstance(conv, nn.Conv2d) and isinstance(norm, BatchNorm):
                setattr(block, conv_name, fuse_conv_bn_eval(conv.eval(), norm.eval()))
                setattr(block, norm_name, nn.Identity())
