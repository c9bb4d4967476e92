"""Color operations of the papers' recipes, batched, with other numbers for every image.

Images are float (B, 3, s, s) in [0, 255]; results are clamped to that range after every operation,
as torchvision does. Per-image numbers are (B,) and on the CPU, so that no GPU is waited for.
"""

from __future__ import annotations

from itertools import permutations

import torch
import torch.nn.functional as F
from torch import Tensor

BRIGHTNESS, CONTRAST, SATURATION, HUE = range(4)
ORDERS = torch.tensor(list(permutations(range(4))))
"""(24, 4): the orders in which `jitter` may apply its four operations."""
_HUE_AT = (ORDERS == HUE).int().argmax(dim=1)  # (24,): how many of the other three come before hue
_OTHERS = ORDERS[ORDERS != HUE].view(24, 3)


def luma(images: Tensor) -> Tensor:
    """Return the grey level (B, 1, s, s): 0.2989 R + 0.587 G + 0.114 B (ITU-R 601-2)."""
    red, green, blue = images.chunk(3, dim=1)
    return (red * 0.2989).add_(green, alpha=0.587).add_(blue, alpha=0.114)


def grayscale(images: Tensor) -> Tensor:
    """Return images with all three channels at the grey level."""
    return luma(images).repeat(1, 3, 1, 1)


def jitter(
    images: Tensor, factors: Tensor, orders: Tensor, *, additive_brightness: bool = False
) -> Tensor:
    """Return images after brightness, contrast, saturation and hue, in each image's own order.

    factors: (B, 4) columns brightness, contrast, saturation (1 changes nothing) and hue in turns,
    [-0.5, 0.5]. orders: (B,) rows of ORDERS. As torchvision's ColorJitter: brightness multiplies
    (or, if additive_brightness, adds that many levels), contrast blends with the mean grey level,
    saturation with the grey image, hue turns in HSV.
    """
    by_hue = _HUE_AT[orders].argsort()  # images whose hue comes at the same place side by side
    factors, others = factors[by_hue], _OTHERS[orders[by_hue]]
    bounds = torch.searchsorted(_HUE_AT[orders[by_hue]], torch.arange(5)).tolist()
    shown = by_hue.to(images.device)
    x = images.index_select(0, shown)
    for place in range(4):
        if place > 0:
            _blend(x, factors, others[:, place - 1], additive_brightness)
        rows = slice(bounds[place], bounds[place + 1])
        if rows.start < rows.stop:
            x[rows] = turn_hue(x[rows], factors[rows, HUE])
    return torch.empty_like(x).index_copy_(0, shown, x)


def _blend(x: Tensor, factors: Tensor, which: Tensor, additive_brightness: bool) -> None:
    """Apply one of brightness, contrast, saturation (which: (B,)) to each image, in place.

    All three are own * x + gray * luma + mean * (mean of luma) + added, clamped.
    """
    factor = factors.gather(1, which[:, None])[:, 0]
    own, added = factor.clone(), torch.zeros_like(factor)
    if additive_brightness:
        own[which == BRIGHTNESS] = 1
        added = factor * (which == BRIGHTNESS)
    gray, mean = (1 - factor) * (which == SATURATION), (1 - factor) * (which == CONTRAST)
    numbers = torch.stack([own, gray, mean, added]).to(x.device, x.dtype)
    own, gray, mean, added = numbers.view(4, -1, 1, 1, 1)
    level = luma(x)
    average = level.mean(dim=(2, 3), keepdim=True)
    x.mul_(own).add_(level.mul_(gray).add_(average.mul_(mean).add_(added))).clamp_(0, 255)


def turn_hue(images: Tensor, turns: Tensor) -> Tensor:
    """Return images with their HSV hue moved by turns (B,), value and saturation unchanged.

    With V the largest, m the smallest channel, C = V - m, and hue counted in sixths of a turn from
    red, the hue is sign(G - B) (1 + (G + B - R - m) / C), in [-3, 3]; and a channel that stands at
    circular distance t <= 3 from the pixel's hue is m + C clamp(2 - t, 0, 1). No branches.
    """
    low = images.amin(dim=1, keepdim=True)
    chroma = images.amax(dim=1, keepdim=True).sub_(low)
    red, green, blue = images.chunk(3, dim=1)
    hue = (green + blue).sub_(red).sub_(low)
    hue = torch.copysign(hue.div_(chroma.clamp(min=1e-6)).add_(1), green - blue)
    moves = 6 * turns[:, None] + turns.new_tensor(
        [0.0, -2.0, 2.0]
    )  # red, green, blue stand at 0, 2, 4
    moves = torch.remainder(moves + 3, 6) - 3  # so that |hue + move| <= 6: one fold is enough
    distance = hue + moves.to(images.device, images.dtype)[:, :, None, None]
    folded = distance.abs_().sub_(3).abs_()  # 3 - circular distance
    return folded.sub_(1).clamp_(0, 1).mul_(chroma).add_(low)


def blur(images: Tensor, sigmas: Tensor, *, radius: int) -> Tensor:
    """Return images under a Gaussian of 2 radius + 1 taps and per-image sigma, borders reflected.

    sigmas: (B,) in pixels, positive. radius < s.
    """
    offsets = torch.arange(radius + 1)
    taps = torch.exp(-0.5 * (offsets / sigmas[:, None]) ** 2)
    taps = taps / (2 * taps.sum(dim=1, keepdim=True) - taps[:, :1])
    taps = taps.to(images.device, images.dtype)[:, :, None, None, None]
    return _blur_axis(_blur_axis(images, taps, radius, axis=3), taps, radius, axis=2)


def _blur_axis(images: Tensor, taps: Tensor, radius: int, *, axis: int) -> Tensor:
    length = images.shape[axis]
    padding = (radius, radius, 0, 0) if axis == 3 else (0, 0, radius, radius)
    padded = F.pad(images, padding, mode="reflect")
    total = padded.narrow(axis, radius, length) * taps[:, 0]
    for offset in range(1, radius + 1):
        before = padded.narrow(axis, radius - offset, length)
        after = padded.narrow(axis, radius + offset, length)
        total.addcmul_(before + after, taps[:, offset])
    return total


def solarize(images: Tensor, thresholds: Tensor | float) -> Tensor:
    """Return images with levels at or above the threshold (number or (B,)) inverted."""
    if isinstance(thresholds, Tensor):
        thresholds = thresholds.to(images.device, images.dtype)[:, None, None, None]
    return torch.where(images >= thresholds, 255 - images, images)
