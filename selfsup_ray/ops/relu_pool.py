"""Convolution, ReLU and average pooling in one: ReLU(z) is z gated by its own sign, so the gated
linear layer's tiles serve it too, and no map of all filters is ever held."""

from __future__ import annotations

from importlib.util import find_spec
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor

from selfsup_ray.ops.gated_linear import Precision

if TYPE_CHECKING:
    from selfsup_ray.ops.relu_tiles import ReluTiles


def relu_pool(
    images: Tensor, weight: Tensor, bias: Tensor, *, pool: int, precision: Precision = "float32"
) -> Tensor:
    """Return AvgPool(ReLU(conv(images))): (B, N, h', w') float32, channels last, differentiable.

    images: (B, C, H, W); weight: (N, C, s, s), no padding, stride 1; bias: (N,). pool: windows as
    AvgPool2d(pool, stride=pool, ceil_mode=True). precision: of the products; sums are float32.
    """
    if images.device.type == "cpu" and find_spec("numba") is not None:
        made: Tensor = _ReluPool.apply(images, weight, bias, pool, precision)
        return made.permute(0, 3, 1, 2)
    with torch.autocast(images.device.type, torch.bfloat16, enabled=precision == "bfloat16"):
        z = F.relu(F.conv2d(images, weight, bias))
        return F.avg_pool2d(z, pool, pool, ceil_mode=True)


class _ReluPool(torch.autograd.Function):
    """`relu_pool` with its backward by hand: (B, h', w', N)."""

    @staticmethod
    def forward(
        ctx: Any, images: Tensor, weight: Tensor, bias: Tensor, pool: int, precision: Precision
    ) -> Tensor:
        from selfsup_ray.ops.relu_tiles import ReluTiles

        ctx.shape = weight.shape
        ctx.tiles = ReluTiles(images.detach(), weight.detach(), bias.detach(), pool, precision)
        return ctx.tiles.forward()  # type: ignore[no-any-return]

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        tiles: ReluTiles = ctx.tiles
        wanted = ctx.needs_input_grad[0]
        of_images, of_weight, of_bias = tiles.backward(gradient, images_too=wanted)
        return of_images, of_weight.reshape(ctx.shape), of_bias, None, None
