"""The strong augmentation of SCAN's self-labelling: random operations as in Pillow, and Cutout.

Images are float (B, 3, s, s) of whole levels 0..255, and stay so: every operation gives the levels
that Pillow gives for uint8 images.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from selfsup_ray.ops.color import solarize
from selfsup_ray.ops.geometry import affine_nearest, rotations

OPERATIONS = (
    "identity",
    "autocontrast",
    "equalize",
    "rotate",
    "solarize",
    "color",
    "contrast",
    "brightness",
    "sharpness",
    "shear_x",
    "shear_y",
    "translate_x",
    "translate_y",
    "posterize",
)
"""SCAN's fourteen operations (Van Gansbeke et al. 2020, supplement)."""

STRONG_DRAWS = 3
"""Uniforms per image and operation: which one, how much, which sign."""

_RANGES = {
    "rotate": (0.0, 30.0),
    "solarize": (0.0, 256.0),
    "color": (0.05, 0.95),
    "contrast": (0.05, 0.95),
    "brightness": (0.05, 0.95),
    "sharpness": (0.05, 0.95),
    "shear_x": (0.0, 0.1),
    "shear_y": (0.0, 0.1),
    "translate_x": (0.0, 0.1),
    "translate_y": (0.0, 0.1),
    "posterize": (4.0, 8.0),
}
"""Magnitudes of the operations that have one; [-m, m] and a sign is [0, m] and a sign."""

_GEOMETRIC = ("rotate", "shear_x", "shear_y", "translate_x", "translate_y")


def strong_augment(images: Tensor, uniforms: Tensor) -> Tensor:
    """Return images after n operations each, drawn with replacement, with uniform magnitudes.

    uniforms: (B, n * STRONG_DRAWS) float64 in [0, 1), on the CPU.
    """
    for choice, amount, sign in uniforms.T.unflatten(0, (-1, STRONG_DRAWS)):
        which = (choice * len(OPERATIONS)).long()
        images = apply_operations(images, which, magnitudes(which, amount, sign))
    return images


def magnitudes(which: Tensor, uniforms: Tensor, signs: Tensor) -> Tensor:
    """Return each image's magnitude (B,) for operation which[i], uniform in its range.

    uniforms, signs: (B,) in [0, 1). Geometric magnitudes are negative where signs < 0.5; operations
    without a magnitude get 0.
    """
    table = torch.tensor(
        [_RANGES.get(name, (0.0, 0.0)) for name in OPERATIONS], dtype=torch.float64
    )
    signed = torch.tensor([name in _GEOMETRIC for name in OPERATIONS])
    low, high = table[which].unbind(1)
    values = low + (high - low) * uniforms
    return torch.where(signed[which] & (signs < 0.5), -values, values)


def apply_operations(images: Tensor, which: Tensor, magnitudes: Tensor) -> Tensor:
    """Return images with operation OPERATIONS[which[i]] of magnitudes[i] applied to image i."""
    out = images.clone()
    moved = torch.zeros_like(which, dtype=torch.bool)
    for code, name in enumerate(OPERATIONS):
        if name in _GEOMETRIC:
            moved |= which == code  # all five are affine maps: one gather below
        elif name != "identity":
            _apply_on_rows(out, images, which == code, magnitudes, _LEVEL_OPERATIONS[name])
    matrices = affine_matrices(which[moved], magnitudes[moved], side=images.shape[-1])
    _apply_on_rows(out, images, moved, matrices, affine_nearest, picked=True)
    return out


Operation = Callable[[Tensor, Tensor], Tensor]


def _apply_on_rows(
    out: Tensor,
    images: Tensor,
    mask: Tensor,
    numbers: Tensor,
    operation: Operation,
    *,
    picked: bool = False,
) -> None:
    rows = mask.nonzero()[:, 0]
    if len(rows) == 0:
        return
    numbers = numbers if picked else numbers[rows]
    rows = rows.to(images.device)
    out.index_copy_(0, rows, operation(images.index_select(0, rows), numbers))


def affine_matrices(which: Tensor, magnitudes: Tensor, *, side: int) -> Tensor:
    """Return (B, 6) matrices of the geometric operations for `affine_nearest`.

    Rotation in degrees about the middle; shear about the top left corner; translation as a share
    of the side, moving the content up or left for positive magnitudes (Pillow's affine, as SCAN).
    """
    names = [OPERATIONS[code] for code in which.tolist()]
    matrices = torch.tensor([1.0, 0, 0, 0, 1, 0], dtype=torch.float64).repeat(len(names), 1)
    place = {
        "shear_x": (1, 1),
        "translate_x": (2, side),
        "shear_y": (3, 1),
        "translate_y": (5, side),
    }
    for i, name in enumerate(names):
        if name in place:
            column, unit = place[name]
            matrices[i, column] = magnitudes[i] * unit
    turned = torch.tensor([name == "rotate" for name in names], dtype=torch.bool)
    matrices[turned] = rotations(magnitudes[turned], side=side)
    return matrices


def autocontrast(images: Tensor) -> Tensor:
    """Return images with every channel stretched to 0..255 (Pillow's ImageOps.autocontrast)."""
    low, high = images.amin(dim=(2, 3), keepdim=True), images.amax(dim=(2, 3), keepdim=True)
    # Pillow's very roundings in float64, since truncation makes a level of the last bit. (`255 / x`
    # is a reciprocal and a product in torch, with one rounding more.)
    span = (high - low).double()
    scale = torch.full_like(span, 255.0) / span
    stretched = (images.double() * scale - low * scale).clamp_(0, 255).floor_().to(images.dtype)
    return torch.where(high > low, stretched, images)


def equalize(images: Tensor) -> Tensor:
    """Return images with every channel's histogram equalised (Pillow's ImageOps.equalize)."""
    count, channels, height, width = images.shape
    levels = images.long().view(count * channels, height * width)
    histogram = torch.zeros(count * channels, 256, dtype=torch.long, device=images.device)
    histogram.scatter_add_(1, levels, torch.ones_like(levels))
    # Pillow leaves the last occupied level out of the step; a step of 0 means: nothing to do.
    last = histogram.gather(1, levels.amax(dim=1, keepdim=True))
    step = (height * width - last) // 255
    below = histogram.cumsum(dim=1) - histogram
    table = ((step // 2 + below) // step.clamp(min=1)).clamp_(max=255)
    table = torch.where(step > 0, table, torch.arange(256, device=images.device))
    return table.gather(1, levels).to(images.dtype).view(images.shape)


def posterize(images: Tensor, bits: Tensor) -> Tensor:
    """Return images with only the highest floor(bits) bits of each level; bits: (B,) in [1, 8]."""
    step = _column(2.0 ** (8 - bits.floor()), images)
    return (images / step).floor_().mul_(step)


def blend_gray(images: Tensor, factors: Tensor) -> Tensor:
    """Return images mixed with their grey version (Pillow's Color enhancement; 1 = unchanged)."""
    return _blend(_gray(images), images, factors)


def blend_mean(images: Tensor, factors: Tensor) -> Tensor:
    """Return images mixed with their mean grey level (Pillow's Contrast; 1 = unchanged)."""
    mean = _gray(images).mean(dim=(2, 3), keepdim=True)
    return _blend(mean.add_(0.5).floor_(), images, factors)


def blend_black(images: Tensor, factors: Tensor) -> Tensor:
    """Return images mixed with black (Pillow's Brightness; 1 = unchanged)."""
    return _blend(images.new_zeros(()), images, factors)


def blend_smooth(images: Tensor, factors: Tensor) -> Tensor:
    """Return images mixed with a smoothed version (Pillow's Sharpness; 1 = unchanged)."""
    kernel = images.new_tensor([[1.0, 1, 1], [1, 5, 1], [1, 1, 1]]).expand(3, 1, 3, 3)
    inner = F.conv2d(images, kernel, groups=3).div_(13).add_(0.5).floor_().clamp_(0, 255)
    smooth = images.clone()  # Pillow's 3 x 3 filters leave the border as it is
    smooth[:, :, 1:-1, 1:-1] = inner
    return _blend(smooth, images, factors)


def _gray(images: Tensor) -> Tensor:
    """Pillow's L: 16-bit fixed-point weights, rounded."""
    red, green, blue = images.chunk(3, dim=1)
    fixed = (red * 19595).add_(green, alpha=38470).add_(blue, alpha=7471)
    return fixed.add_(0x8000).div_(1 << 16).floor_()  # below 2^24: exact in float32


def _blend(degenerate: Tensor, images: Tensor, factors: Tensor) -> Tensor:
    """Pillow's Image.blend: degenerate + factor (image - degenerate), truncated."""
    mixed = degenerate + _column(factors, images) * (images - degenerate)
    return mixed.clamp_(0, 255).floor_()


def _column(numbers: Tensor, images: Tensor) -> Tensor:
    return numbers.to(images.device, images.dtype)[:, None, None, None]


_LEVEL_OPERATIONS: dict[str, Operation] = {
    "autocontrast": lambda images, _: autocontrast(images),
    "equalize": lambda images, _: equalize(images),
    "solarize": solarize,
    "color": blend_gray,
    "contrast": blend_mean,
    "brightness": blend_black,
    "sharpness": blend_smooth,
    "posterize": posterize,
}


def cutout(images: Tensor, uniforms: Tensor, *, length: int) -> Tensor:
    """Return images after one square hole of each was set to 0, in place (0 is the mean color).

    uniforms: (B, 3) in [0, 1): size, row, column. As SCAN: side 2 floor(l / 2) with l uniform in
    1..length, center uniform over the pixels, clipped at the borders; l = 1 removes nothing.
    """
    side = images.shape[-1]
    half = (1 + (uniforms[:, 0] * length).floor()).div(2).floor().long()
    row, column = (uniforms[:, 1:] * side).long().unbind(1)
    pixels = torch.arange(side)
    rows = (pixels >= (row - half)[:, None]) & (pixels < (row + half)[:, None])
    columns = (pixels >= (column - half)[:, None]) & (pixels < (column + half)[:, None])
    rows, columns = rows.to(images.device), columns.to(images.device)
    return images.mul_((~(rows[:, :, None] & columns[:, None])).to(images.dtype)[:, None])
