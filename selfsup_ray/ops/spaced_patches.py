"""Patches some positions apart, and on a border of zeros, for ops that know neither."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor


def spaced(images: Tensor, *, patch_size: int, stride: int, padding: int) -> tuple[Tensor, int]:
    """Return images whose patches side by side are those of `images` at a stride, and their side.

    images: (B, C, H, W), with `padding` zeros put around. With stride 1 these are returned; else a
    pixel for each position that holds its whole patch, (B, C s s, h, w), and patches of side 1.
    Kernels (N, C s s), channel first, are the same for both.
    """
    wide = F.pad(images, (padding,) * 4) if padding else images
    if stride == 1:
        return wide, patch_size
    height, width = (positions(n, patch_size, stride, 0) for n in wide.shape[2:])
    return F.unfold(wide, patch_size, stride=stride).view(len(wide), -1, height, width), 1


def positions(side: int, patch_size: int, stride: int, padding: int) -> int:
    """Return the positions of a patch along an axis, at most 0 where none fits."""
    return (side + 2 * padding - patch_size) // stride + 1
