"""Flip, pad with black and crop back to size: the augmentation of small labelled images.

A view is one window of the padded image or of its mirror image, so that whatever is computed of
all windows once (a code of every position) need not be computed again of a view.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from selfsup_ray.ops.rng import uniforms


@dataclass(frozen=True)
class Windows:
    """Where the views of a batch lie, on the CPU."""

    flips: Tensor
    """(B,) bool: in the mirror image."""
    tops: Tensor
    """(B,) int64 in [0, 2 padding], as are `lefts`: the corner in the padded image."""
    lefts: Tensor


def draw_windows(
    ids: Tensor, *, seed: int, epoch: int, padding: int, flip_p: float = 0.5, stream: int = 0
) -> Windows:
    """Return a flip with probability flip_p and a uniform corner for each image id (B,) int64."""
    u = uniforms(seed=seed, epoch=epoch, ids=ids.cpu(), draws=3, stream=stream).double()
    corners = (u[:, 1:] * (2 * padding + 1)).long()
    return Windows(u[:, 0] < flip_p, corners[:, 0], corners[:, 1])


def center_windows(count: int, *, padding: int) -> Windows:
    """Return the windows that are the images themselves."""
    middle = torch.full((count,), padding)
    return Windows(torch.zeros(count, dtype=torch.bool), middle, middle)


def padded(images: Tensor, *, padding: int) -> Tensor:
    """Return images (B, C, H, W) with `padding` black pixels around them."""
    return F.pad(images, (padding, padding, padding, padding))


def cut(images: Tensor, windows: Windows, *, padding: int) -> Tensor:
    """Return the view of each image, of its own size: flipped, then padded, then cropped.

    images: (B, C, H, W) of any type, before normalisation: the padding is 0.
    """
    height, width = images.shape[2:]
    wide = padded(images, padding=padding)
    wide = torch.where(windows.flips.to(wide.device)[:, None, None, None], wide.flip(3), wide)
    rows = windows.tops[:, None] + torch.arange(height)  # (B, height)
    columns = windows.lefts[:, None] + torch.arange(width)
    at = torch.arange(len(images))[:, None, None]
    views = wide.permute(0, 2, 3, 1)[at, rows[:, :, None], columns[:, None, :]]
    return views.permute(0, 3, 1, 2)
