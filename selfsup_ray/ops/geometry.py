"""Where a view looks: random boxes, resampling of boxes, affine maps, another for every image.

Images are uint8 (B, 3, S, S) or float in [0, 255]; boxes and other per-image numbers are on the
CPU, so that no GPU is waited for.
"""

from __future__ import annotations

import math
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

Interpolation = Literal["bilinear", "bicubic"]

BOX_DRAWS = 22
"""Uniforms that `random_boxes` takes per image: ten (area, ratio) tries and one position."""
_TRIES = 10
# Below this many weights per axis two small matrix products beat one resize call per image.
_SMALL = 40 * 40


def random_boxes(
    uniforms: Tensor, *, side: int, scale: tuple[float, float], ratio: tuple[float, float]
) -> Tensor:
    """Return RandomResizedCrop's boxes as (B, 4) int64 rows (top, left, height, width).

    uniforms: (B, BOX_DRAWS) float64 in [0, 1). As in torchvision: area uniform in scale times S^2,
    log ratio (width / height) uniform, the first of ten tries that fits, otherwise the largest
    central box with an allowed ratio; the position is uniform.
    """
    area = side**2 * (scale[0] + (scale[1] - scale[0]) * uniforms[:, :_TRIES])
    low, high = math.log(ratio[0]), math.log(ratio[1])
    aspect = (low + (high - low) * uniforms[:, _TRIES : 2 * _TRIES]).exp()
    widths, heights = (area * aspect).sqrt().round(), (area / aspect).sqrt().round()
    fits = (widths > 0) & (widths <= side) & (heights > 0) & (heights <= side)
    # One more column, the fallback, that always fits; argmax of the ranks is the first that fits.
    fits = torch.cat([fits, fits.new_ones(len(fits), 1)], dim=1)
    chosen = (fits * torch.arange(_TRIES + 1, 0, -1)).argmax(dim=1, keepdim=True)
    fallback = area.new_tensor([round(side / max(ratio[0], 1.0)), round(side * min(ratio[1], 1.0))])
    heights, widths = (
        torch.cat([tries, fallback[i].expand(len(tries), 1)], dim=1).gather(1, chosen)[:, 0]
        for i, tries in enumerate([heights, widths])
    )
    top, left = (
        uniforms[:, 2 * _TRIES] * (side - heights + 1),
        uniforms[:, -1] * (side - widths + 1),
    )
    failed = chosen[:, 0] == _TRIES
    top = torch.where(failed, (side - heights) // 2, top.floor())
    left = torch.where(failed, (side - widths) // 2, left.floor())
    return torch.stack([top, left, heights, widths], dim=1).long()


def square_boxes(uniforms: Tensor, *, side: int, share: float) -> Tensor:
    """Return square boxes of round(share * S) pixels; uniforms (B, 2) place them, 0.5 centers."""
    edge = round(share * side)
    corners = (uniforms * (side - edge + 1)).floor().long()
    return torch.cat([corners, torch.full_like(corners, edge)], dim=1)


def resized(
    images: Tensor,
    boxes: Tensor,
    *,
    size: int,
    flips: Tensor | None = None,
    interpolation: Interpolation = "bilinear",
) -> Tensor:
    """Return each image's box resized to (B, 3, size, size), float32 whole levels in [0, 255].

    images: (B, 3, S, S) uint8. boxes: (B, 4) as from `random_boxes`. flips: (B,) bool, mirrored
    left to right. Antialiased and rounded like Pillow's and torchvision's resize of the cropped
    uint8 image; the two code paths differ by a level where a value lies at the rounding boundary.
    """
    side = images.shape[-1]
    if size == side and bool((boxes == boxes.new_tensor([0, 0, side, side])).all()):
        return _flipped(images.to(torch.float32, copy=True, memory_format=_PLANAR), flips)
    if images.device.type != "cpu" or side * size <= _SMALL or len(images) == 0:
        return _resized_by_matrices(images, boxes, size, flips, interpolation)
    images = images.contiguous(memory_format=torch.channels_last)  # the layout of the fast kernel
    views = [
        F.interpolate(
            images[i : i + 1, :, top : top + height, left : left + width],
            size=(size, size),
            mode=interpolation,
            antialias=True,
        )
        for i, (top, left, height, width) in enumerate(boxes.tolist())
    ]
    return _flipped(torch.cat(views).to(torch.float32, memory_format=_PLANAR), flips)


_PLANAR = torch.contiguous_format


def _flipped(images: Tensor, flips: Tensor | None, axis: int = 3) -> Tensor:
    if flips is None:
        return images
    rows = flips.nonzero()[:, 0].to(images.device)
    return images.index_copy_(0, rows, images.index_select(0, rows).flip(axis))


def _resized_by_matrices(
    images: Tensor, boxes: Tensor, size: int, flips: Tensor | None, interpolation: Interpolation
) -> Tensor:
    """Resize by one (size, S) matrix per axis and image: rows @ image @ columns^T."""
    count, _, side, _ = images.shape
    top, left, height, width = boxes.to(images.device, torch.float32).T
    weights = _resize_matrices(
        torch.cat([top, left]), torch.cat([height, width]), side, size, interpolation
    )
    rows, columns = weights[:count], weights[count:]
    if flips is not None:
        columns = _flipped(columns, flips, axis=1)
    images = images.to(torch.float32, memory_format=_PLANAR).view(count, 3 * side, side)
    # The training loop may have bfloat16 autocast on, which would cost the last bits of a level.
    with torch.autocast(images.device.type, enabled=False):
        images = torch.bmm(images, columns.mT).view(3 * count, side, size)
        # A copy of the matrix per channel: a broadcast product would make it, and one more.
        images = torch.bmm(rows.repeat_interleave(3, 0), images)
    return images.round_().clamp_(0, 255).view(count, 3, size, size)


def _resize_matrices(
    start: Tensor, length: Tensor, side: int, size: int, interpolation: Interpolation
) -> Tensor:
    """Return (B, size, S) weights of each source pixel in each output pixel; rows sum to 1.

    start, length: (B,) the box on one axis. The filter is widened by the reduction (antialias) and
    cut at the box's borders.
    """
    start, length = start[:, None, None], length[:, None, None]
    output = torch.arange(size, device=start.device)[:, None] + 0.5
    pixels = torch.arange(side, device=start.device) + 0.5
    stretch = length / size
    distance = (pixels - (start + output * stretch)).div_(stretch.clamp(min=1)).abs_()
    weights = _triangle(distance) if interpolation == "bilinear" else _cubic(distance)
    weights.mul_(((pixels > start) & (pixels < start + length)).float())
    return weights.div_(weights.sum(dim=2, keepdim=True))


def _triangle(distance: Tensor) -> Tensor:
    return distance.neg_().add_(1).clamp_(min=0)


def _cubic(distance: Tensor) -> Tensor:
    """Keys' cubic with a = -0.5, as Pillow and torch use it when antialiasing."""
    x = distance.clamp_(max=2)
    near = (1.5 * x - 2.5) * x * x + 1
    far = ((-0.5 * x + 2.5) * x - 4) * x + 2
    return torch.where(x < 1, near, far)


def affine_nearest(images: Tensor, matrices: Tensor) -> Tensor:
    """Return images seen through affine maps, nearest pixel, black outside (Pillow's default).

    images: (B, 3, S, S) float. matrices: (B, 6) rows (a, b, c, d, e, f): output position (x, y), at
    pixel centers, shows input position (a x + b y + c, d x + e y + f).
    """
    count, channels, side, _ = images.shape
    a, b, c, d, e, f = matrices.to(images.device, torch.float32).view(count, 6, 1, 1).unbind(1)
    centers = torch.arange(side, device=images.device) + 0.5
    x, y = centers[None, None, :], centers[None, :, None]
    column, row = (a * x + (b * y + c)).floor_(), (d * x + (e * y + f)).floor_()
    near_column, near_row = column.clamp(0, side - 1), row.clamp(0, side - 1)
    inside = column.eq_(near_column).mul_(row.eq_(near_row)).view(count, 1, side * side)
    index = near_row.mul_(side).add_(near_column).long().view(count, 1, side * side)
    flat = images.reshape(count, channels, side * side)
    return flat.gather(2, index.expand(-1, channels, -1)).mul_(inside).view(images.shape)


def rotations(degrees: Tensor, *, side: int) -> Tensor:
    """Return (B, 6) matrices for `affine_nearest`: counter-clockwise turns about the middle.

    degrees: (B,) float64.
    """
    cos, sin = degrees.deg2rad().cos(), degrees.deg2rad().sin()
    middle = side / 2
    c = middle - cos * middle + sin * middle
    f = middle - sin * middle - cos * middle
    return torch.stack([cos, -sin, c, sin, cos, f], dim=1)
