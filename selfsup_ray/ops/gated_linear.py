"""Gated linear layer: one linear function of the patch for each entry of a dictionary, where its
bit is set, and the average over windows; from packed bits, without the code ever unpacked."""

from __future__ import annotations

from importlib.util import find_spec
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from selfsup_ray.ops.patch_codes import unpack_bits

Precision = Literal["bfloat16", "float32"]


def gated_pool(
    images: Tensor,
    bits: Tensor,
    weight: Tensor,
    bias: Tensor,
    *,
    patch_size: int,
    pool: int | None,
    precision: Precision = "float32",
) -> Tensor:
    """Return AvgPool(m * (V x + b)): (B, N, h', w') float32, channels last, differentiable.

    images: (B, C, H, W); bits: (B, h, w, ceil(N / 8)) uint8, h = H - s + 1, the code m; weight V:
    (N, C s s) or (N, C, s, s); bias b: (N,). pool: windows as AvgPool2d(pool, stride=pool,
    ceil_mode=True); None for none. precision: of the products; sums are float32.
    On a CPU with numba nothing of the size of the code times a float is ever held.
    """
    height, width = bits.shape[1:3]
    assert (height, width) == (images.shape[2] - patch_size + 1, images.shape[3] - patch_size + 1)
    if images.device.type == "cpu" and find_spec("numba") is not None:
        made: Tensor = _GatedPool.apply(
            images, bits, weight.flatten(1), bias, patch_size, pool or 1, precision
        )
        return made.permute(0, 3, 1, 2)
    with torch.autocast(images.device.type, enabled=False):
        return plain_gated_pool(
            images, bits, weight, bias, patch_size=patch_size, pool=pool, precision=precision
        )


def plain_gated_pool(
    images: Tensor,
    bits: Tensor,
    weight: Tensor,
    bias: Tensor,
    *,
    patch_size: int,
    pool: int | None,
    precision: Precision = "float32",
) -> Tensor:
    """Return what `gated_pool` does, by a convolution of all entries: any device."""
    filters = weight.view(len(weight), images.shape[1], patch_size, patch_size)
    code = unpack_bits(bits, len(weight)).permute(0, 3, 1, 2)
    if precision == "bfloat16":
        linear = F.conv2d(images.bfloat16(), filters.bfloat16()).float() + bias[:, None, None]
    else:
        linear = F.conv2d(images, filters, bias)
    gated = torch.where(code, linear, 0.0)
    return gated if pool is None else F.avg_pool2d(gated, pool, pool, ceil_mode=True)


class _GatedPool(torch.autograd.Function):
    """`gated_pool` with its backward by hand: (B, h', w', N)."""

    @staticmethod
    def forward(
        ctx: Any,
        images: Tensor,
        bits: Tensor,
        weight: Tensor,
        bias: Tensor,
        patch_size: int,
        pool: int,
        precision: Precision,
    ) -> Tensor:
        from selfsup_ray.ops.gated_tiles import GatedTiles

        ctx.save_for_backward(images, bits, weight, bias)
        ctx.settings = patch_size, pool, precision
        return GatedTiles(images, bits, weight, bias, *ctx.settings).forward()

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        from selfsup_ray.ops.gated_tiles import GatedTiles

        tiles = GatedTiles(*ctx.saved_tensors, *ctx.settings)
        of_images, of_weight, of_bias = tiles.backward(gradient, images_too=ctx.needs_input_grad[0])
        return of_images, None, of_weight, of_bias, None, None, None
