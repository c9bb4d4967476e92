"""Color operations of the papers' recipes, batched, with other numbers for every image.

Images are float (B, 3, s, s) in [0, 255]; results are clamped to that range after every operation,
as torchvision does. Per-image numbers are (B,) and on the CPU, so that no GPU is waited for.
"""

from __future__ import annotations

from itertools import groupby, permutations

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
    red, green, blue = images.unsqueeze(2).unbind(1)
    return (red * 0.2989).add_(green, alpha=0.587).add_(blue, alpha=0.114)


def grayscale(images: Tensor) -> Tensor:
    """Return images with all three channels at the grey level."""
    return luma(images).repeat(1, 3, 1, 1)


def jitter_table(factors: Tensor, orders: Tensor, *, additive_brightness: bool = False) -> Tensor:
    """Return what `jitter_` needs, one row of 16 numbers per image.

    factors: (B, 4) columns brightness, contrast, saturation (1 changes nothing) and hue in turns,
    [-0.5, 0.5]. orders: (B,) rows of ORDERS. Columns: how many operations come before hue (0..3);
    for each of the three others, in order, the numbers of own x + gray luma + mean (mean of luma)
    + added, which each of them is; and what makes a hue relative to red, green and blue.
    """
    which = _OTHERS[orders]
    own = factors.gather(1, which)
    gray, mean = (1 - own) * (which == SATURATION), (1 - own) * (which == CONTRAST)
    added = torch.zeros_like(own)
    if additive_brightness:
        brightness = which == BRIGHTNESS
        added, own = own * brightness, own.masked_fill(brightness, 1)
    blends = torch.stack([own, gray, mean, added], dim=2).flatten(1)
    place = _HUE_AT[orders][:, None].to(factors.dtype)
    return torch.cat([place, blends, _hue_moves(factors[:, HUE])], dim=1)


def jitter_(images: Tensor, table: Tensor) -> Tensor:
    """Apply brightness, contrast, saturation and hue in each image's own order, in place.

    table: (B, 16) from `jitter_table`. As torchvision's ColorJitter: brightness multiplies (or, if
    additive, adds levels), contrast blends with the mean grey level, saturation with the grey
    image, hue turns in HSV. Hue runs once per run of images that have it at the same place, so it
    is fastest when the table is sorted by its first column.
    """
    runs = _runs(table[:, 0].tolist())
    numbers = table.to(images.device, images.dtype)
    blends = numbers[:, 1:13].T.reshape(3, 4, -1, 1, 1, 1)
    for place in range(4):
        if place > 0:
            _blend_(images, blends[place - 1])
        for start, stop in runs[place]:
            _move_hue_(images[start:stop], numbers[start:stop, 13:])
    return images


def _runs(places: list[float]) -> list[list[tuple[int, int]]]:
    """Return, for each place 0..3, the [start, stop) runs of neighbors that have it."""
    runs: list[list[tuple[int, int]]] = [[], [], [], []]
    start = 0
    for place, members in groupby(places):
        stop = start + len(list(members))
        runs[int(place)].append((start, stop))
        start = stop
    return runs


def _blend_(images: Tensor, numbers: Tensor) -> None:
    own, gray, mean, added = numbers
    level = luma(images)
    average = level.mean(dim=(2, 3), keepdim=True)
    level.mul_(gray).add_(average.mul_(mean).add_(added))
    torch.addcmul(level, images, own, out=images).clamp_(0, 255)


def turn_hue_(images: Tensor, turns: Tensor) -> Tensor:
    """Move the HSV hue of images by turns (B,) in [-0.5, 0.5], in place; S and V stay.

    With V the largest, m the smallest channel, C = V - m, and hue counted in sixths of a turn from
    red, the hue is sign(G - B) (1 + (G + B - R - m) / C), in [-3, 3]; and a channel that stands at
    circular distance t <= 3 from the pixel's hue is m + C clamp(2 - t, 0, 1). No branches.
    """
    return _move_hue_(images, _hue_moves(turns).to(images.device, images.dtype))


def _hue_moves(turns: Tensor) -> Tensor:
    """Return (B, 3), what to add to a hue to have it relative to each channel, in [-3, 3]."""
    moves = 6 * turns[:, None] + turns.new_tensor([0.0, -2.0, 2.0])
    return torch.remainder(moves + 3, 6) - 3


def _move_hue_(images: Tensor, moves: Tensor) -> Tensor:
    red, green, blue = images.unbind(1)
    low = images.amin(dim=1)
    chroma = images.amax(dim=1).sub_(low)
    hue = (green + blue).sub_(red).sub_(low).div_(chroma.clamp(min=1e-6)).add_(1)
    hue.copysign_(green - blue)
    torch.add(
        hue[:, None], moves[:, :, None, None], out=images
    )  # in [-6, 6]: one fold gives 3 - circular distance
    folded = images.abs_().sub_(3).abs_().clamp_(1, 2)
    low.sub_(chroma)
    return folded.mul_(chroma[:, None]).add_(low[:, None])


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
    # Float masks: on a CPU torch.where and bool arithmetic cost ten times as much.
    inverted = images.clone().ge_(thresholds)
    return torch.addcmul(images, inverted, 255 - 2 * images)
