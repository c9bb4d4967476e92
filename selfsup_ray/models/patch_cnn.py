"""The convolutional baselines of the patch-dictionary study, trained end to end."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from selfsup_ray.models.norm import BatchNorm
from selfsup_ray.models.patch_layers import CNNConfig, blocks_of
from selfsup_ray.ops.patch_codes import Precision
from selfsup_ray.ops.relu_pool import relu_pool


class PatchCNN(nn.Module):
    """Blocks of convolution, ReLU, average pooling, batch norm, bottleneck; then linear layers.

    A bottleneck is not followed by a ReLU: the released command line asks for one, and that model
    ignores it.
    """

    head_names = ("",)
    output_names = ("-",)

    def __init__(
        self, config: CNNConfig, *, image_size: int, num_classes: int, channels: int = 3
    ) -> None:
        super().__init__()
        self.blocks, features = _blocks(config, side=image_size, channels=channels)
        self.classifier = _linear_layers(config, features, num_classes)

    def forward(self, images: Tensor, codes: list[Tensor] | None = None) -> list[Tensor]:
        """Return [logits (B, C)] of images (B, channels, S, S); there are no codes."""
        assert codes is None, "a convolutional network reads no codes"
        x: Tensor = self.blocks(images)
        return [self.classifier(x.flatten(1))]


def _blocks(config: CNNConfig, *, side: int, channels: int) -> tuple[nn.Sequential, int]:
    """Return the blocks and the number of values they make of an image."""
    layout = blocks_of(config.architecture)
    blocks: list[nn.Module] = []
    number = 0
    for i, block in enumerate(layout):
        if block == "M":
            blocks.append(nn.MaxPool2d(2))
            side //= 2
        elif isinstance(block, int):
            averaged = layout[i + 1 : i + 2] == ("A",)
            kernel, padding = _of(config.kernel_size, number), _of(config.padding, number)
            blocks.append(_block(config, channels, block, number, averaged=averaged))
            side = (side + 2 * padding - kernel + 1) // (2 if averaged else 1)
            channels, number = config.bottleneck or block, number + 1
        if side < 1:
            raise ValueError(f"{config.architecture} leaves nothing of the image at block {i + 1}")
    return nn.Sequential(*blocks), channels * side * side


def _block(
    config: CNNConfig, channels: int, out: int, number: int, *, averaged: bool
) -> nn.Sequential:
    kernel, padding = _of(config.kernel_size, number), _of(config.padding, number)
    conv = nn.Conv2d(channels, out, kernel, padding=padding)
    layers: list[nn.Module] = [_ConvReLU(conv, pool=2 if averaged else 1)]
    if config.batch_norm == "all" or (config.batch_norm == "first" and number == 0):
        layers.append(BatchNorm(out))
    if config.bottleneck is not None:
        layers.append(nn.Conv2d(out, config.bottleneck, 1))
    return nn.Sequential(*layers)


class _ConvReLU(nn.Module):
    """Convolution, ReLU and average pooling, of which a last odd row or column is left out."""

    def __init__(self, conv: nn.Conv2d, *, pool: int) -> None:
        super().__init__()
        self.conv, self.pool = conv, pool
        self.is_padded = conv.padding != (0, 0)

    def forward(self, images: Tensor) -> Tensor:
        """Return the map (B, N, h', w') of images (B, C, H, W)."""
        sides = [length - self.conv.kernel_size[0] + 1 for length in images.shape[2:]]
        if self.is_padded or any(side % self.pool for side in sides):
            z = F.relu(self.conv(images))
            return z if self.pool == 1 else F.avg_pool2d(z, self.pool)
        kind = images.device.type
        precision: Precision = "bfloat16" if torch.is_autocast_enabled(kind) else "float32"
        weight, bias = self.conv.weight, self.conv.bias
        assert bias is not None, "the convolution has a bias"
        with torch.autocast(kind, enabled=False):
            return relu_pool(images.float(), weight, bias, pool=self.pool, precision=precision)


def _of(values: tuple[int, ...], number: int) -> int:
    return values[number] if len(values) > 1 else values[0]


def _linear_layers(config: CNNConfig, features: int, num_classes: int) -> nn.Sequential:
    layers: list[nn.Module] = []
    for width in config.hidden:
        layers.append(nn.Linear(features, width))
        if config.batch_norm == "all":
            layers.append(BatchNorm(width))
        layers.append(nn.ReLU())
        features = width
    return nn.Sequential(*layers, nn.Linear(features, num_classes))
