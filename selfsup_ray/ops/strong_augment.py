"""The strong augmentation of SCAN's self-labelling: random operations as in Pillow, and Cutout.

Images are float (B, 3, s, s) of whole levels 0..255, and stay so: every operation gives the levels
that Pillow gives for uint8 images.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial

import torch
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
"""Magnitudes of the operations that have one; [-m, m] is [0, m] and a random sign."""

_GEOMETRIC = ("rotate", "shear_x", "shear_y", "translate_x", "translate_y")
_PLACE = {"shear_x": 1, "translate_x": 2, "shear_y": 3, "translate_y": 5}  # in (a, b, c, d, e, f)


LevelOperation = Callable[[Tensor, Tensor], Tensor]


def strong_augment_(images: Tensor, uniforms: Tensor) -> Tensor:
    """Apply n operations to each image, drawn with replacement, with uniform magnitudes, in place.

    uniforms: (B, n * STRONG_DRAWS) float64 in [0, 1), on the CPU.
    """
    for choice, amount, sign in torch.split(uniforms.T, STRONG_DRAWS):
        which = (choice * len(OPERATIONS)).long()
        apply_operations_(images, which, magnitudes(which, amount, sign))
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


def apply_operations_(images: Tensor, which: Tensor, magnitudes: Tensor) -> Tensor:
    """Apply operation OPERATIONS[which[i]] with magnitudes[i] to image i, in place."""
    for rows, operation in _groups(which, magnitudes, side=images.shape[-1]):
        shown = rows.to(images.device)
        images.index_copy_(0, shown, operation(images.index_select(0, shown)))
    return images


def _groups(
    which: Tensor, magnitudes: Tensor, *, side: int
) -> Iterator[tuple[Tensor, Callable[[Tensor], Tensor]]]:
    """Yield the rows that draw the same operation, and that operation with their magnitudes."""
    geometric = torch.zeros_like(which, dtype=torch.bool)
    for code, name in enumerate(OPERATIONS):
        if name in _GEOMETRIC:
            geometric |= which == code  # all five are affine maps, done together below
            continue
        rows = (which == code).nonzero()[:, 0]
        if name != "identity" and len(rows):
            yield rows, _with_numbers(_LEVEL_OPERATIONS[name], magnitudes[rows])
    rows = geometric.nonzero()[:, 0]
    if len(rows):
        matrices = affine_matrices(which[rows], magnitudes[rows], side=side)
        yield rows, partial(affine_nearest, matrices=matrices)


def _with_numbers(operation: LevelOperation, numbers: Tensor) -> Callable[[Tensor], Tensor]:
    return lambda images: operation(images, numbers)


def affine_matrices(which: Tensor, magnitudes: Tensor, *, side: int) -> Tensor:
    """Return (B, 6) matrices of the geometric operations for `affine_nearest`.

    Rotation in degrees about the middle; shear about the top left corner; translation as a share
    of the side, moving the content up or left for positive magnitudes (Pillow's affine, as SCAN).
    """
    place = torch.tensor([_PLACE.get(name, 0) for name in OPERATIONS])[which]
    amounts = torch.where((place == 2) | (place == 5), magnitudes * side, magnitudes)
    matrices = torch.tensor([1.0, 0, 0, 0, 1, 0], dtype=torch.float64).repeat(len(which), 1)
    matrices.scatter_(1, place[:, None], amounts.double()[:, None])
    turned = which == OPERATIONS.index("rotate")
    matrices[turned] = rotations(magnitudes[turned].double(), side=side)
    return matrices


def autocontrast(images: Tensor) -> Tensor:
    """Return images with every channel stretched to 0..255 (Pillow's ImageOps.autocontrast)."""
    low = images.amin(dim=(2, 3)).double().view(-1, 1)
    high = images.amax(dim=(2, 3)).double().view(-1, 1)
    # Pillow's very roundings in float64, since truncation makes a level of the last bit. (`255 / x`
    # is a reciprocal and a product in torch, with one rounding more.)
    span = high - low
    scale = torch.full_like(span, 255.0) / span.clamp(min=1)
    table = _all_levels(images) * scale - low * scale
    return _looked_up(images.long(), table, unchanged=span <= 0)


def equalize(images: Tensor) -> Tensor:
    """Return images with every channel's histogram equalised (Pillow's ImageOps.equalize)."""
    levels = images.long()
    flat = levels.flatten(2).flatten(0, 1)
    histogram = torch.zeros(len(flat), 256, dtype=torch.long, device=images.device)
    histogram.scatter_add_(1, flat, torch.ones_like(flat))
    # Pillow leaves the last occupied level out of the step; a step of 0 means: nothing to do.
    last = histogram.gather(1, flat.amax(dim=1, keepdim=True))
    step = ((flat.shape[1] - last) // 255).double()
    below = (histogram.cumsum(dim=1) - histogram).double()
    table = ((step / 2).floor() + below) / step.clamp(min=1)
    return _looked_up(levels, table, unchanged=step == 0)


def _all_levels(images: Tensor) -> Tensor:
    return torch.arange(256, device=images.device, dtype=torch.float64)


def _looked_up(levels: Tensor, table: Tensor, *, unchanged: Tensor) -> Tensor:
    """Return floor(table) at each level; table: (B * 3, 256), a row per image and channel."""
    table = torch.where(unchanged, _all_levels(levels), table.clamp(0, 255).floor_()).float()
    return table.gather(1, levels.flatten(2).flatten(0, 1)).view(levels.shape)


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
    # Pillow's SMOOTH is [[1, 1, 1], [1, 5, 1], [1, 1, 1]] / 13, and leaves the border as it is.
    rows = (images[:, :, :-2] + images[:, :, 1:-1]).add_(images[:, :, 2:])
    total = (rows[..., :-2] + rows[..., 1:-1]).add_(rows[..., 2:])
    total.add_(images[:, :, 1:-1, 1:-1], alpha=4)
    smooth = images.clone()
    smooth[:, :, 1:-1, 1:-1] = total.div_(13).add_(0.5).floor_()
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


_LEVEL_OPERATIONS: dict[str, LevelOperation] = {
    "autocontrast": lambda images, _: autocontrast(images),
    "equalize": lambda images, _: equalize(images),
    "solarize": solarize,
    "color": blend_gray,
    "contrast": blend_mean,
    "brightness": blend_black,
    "sharpness": blend_smooth,
    "posterize": posterize,
}


def cutout_(images: Tensor, uniforms: Tensor, *, length: int) -> Tensor:
    """Set one square hole of each image to 0, the mean color of normalised images, in place.

    uniforms: (B, 3) in [0, 1): size, row, column. As SCAN: side 2 floor(l / 2) with l uniform in
    1..length, center uniform over the pixels, clipped at the borders; l = 1 removes nothing.
    """
    side = images.shape[-1]
    half = (1 + (uniforms[:, 0] * length).floor()).div(2).floor().long()
    row, column = (uniforms[:, 1:] * side).long().unbind(1)
    pixels = torch.arange(side)
    rows = (pixels >= (row - half)[:, None]) & (pixels < (row + half)[:, None])
    columns = (pixels >= (column - half)[:, None]) & (pixels < (column + half)[:, None])
    rows, columns = (edge.to(images.device, images.dtype) for edge in (rows, columns))
    hole = rows[:, :, None] * columns[:, None]
    return images.mul_(hole.neg_().add_(1)[:, None])
