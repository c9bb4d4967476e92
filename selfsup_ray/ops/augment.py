"""The papers' augmentation recipes as batched tensor functions, on the device of the batch.

A view is a pure function of the image, the recipe and (seed, epoch, image id, stream): how a batch
is split or ordered does not matter. Numbers are drawn on the CPU, so that no GPU is waited for.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from selfsup_ray.ops import color, geometry, strong_augment
from selfsup_ray.ops.geometry import BOX_DRAWS, Interpolation, resized, square_boxes
from selfsup_ray.ops.rng import uniforms
from selfsup_ray.ops.strong_augment import STRONG_DRAWS

ColorStep = Literal["jitter", "gray", "blur", "solarize"]


@dataclass(frozen=True)
class Recipe:
    """What to do to an image, as plain numbers; probabilities are per image and independent.

    Order: rotation, crop, flip, the color steps as in `order`, strong operations, normalisation,
    Cutout. (A flip commutes with the color steps, so recipes that flip last are the same.)
    """

    size: int
    """Side of the view in pixels."""
    mean: tuple[float, float, float]
    std: tuple[float, float, float]
    scale: tuple[float, float] | None = None
    """RandomResizedCrop's share of the area; None takes a square of `share` at a random place."""
    ratio: tuple[float, float] = (3 / 4, 4 / 3)
    share: float = 1.0
    """Side of the square crop as a share of the image's side; used when scale is None."""
    interpolation: Interpolation = "bilinear"
    flip_p: float = 0.0
    rotate_p: float = 0.0
    rotate_degrees: float = 0.0
    """Rotation uniform in [-rotate_degrees, rotate_degrees], nearest pixel, black outside."""
    jitter_p: float = 0.0
    jitter: tuple[float, float, float, float] = (0.0, 0.0, 0.0, 0.0)
    """Strengths of brightness, contrast, saturation, hue, as torchvision's ColorJitter."""
    additive_brightness: bool = False
    """Brightness adds a share of white (BYOL, first SimCLR) instead of multiplying."""
    gray_p: float = 0.0
    blur_p: float = 0.0
    blur_radius: int = 0
    """Taps on each side of the Gaussian's middle."""
    blur_sigma: tuple[float, float] = (0.1, 2.0)
    solarize_p: float = 0.0
    solarize_threshold: float = 0.5
    order: tuple[ColorStep, ...] = ("jitter", "gray", "blur", "solarize")
    strong_ops: int = 0
    """Operations of `strong_augment` per image."""
    cutout: int = 0
    """Largest side of the Cutout hole; 0 for none."""


# Columns of the table of uniforms that one view draws per image.
_BOX = slice(0, BOX_DRAWS)
_FLIP, _GRAY, _SOLARIZE, _JITTER, _BLUR, _ROTATE = range(BOX_DRAWS, BOX_DRAWS + 6)
_FACTORS = slice(_ROTATE + 1, _ROTATE + 5)
_ORDER, _SIGMA, _DEGREES = range(_FACTORS.stop, _FACTORS.stop + 3)
_HOLE = slice(_DEGREES + 1, _DEGREES + 4)
_STRONG = _HOLE.stop

# Bytes of float view handled at a time on a CPU: a few such arrays stay in the second-level cache.
_CHUNK_BYTES = 1 << 19


def augment(
    images: Tensor, recipe: Recipe, *, seed: int, epoch: int, ids: Tensor, stream: int = 0
) -> Tensor:
    """Return one normalised random view of each image, (B, 3, size, size) float32.

    images: (B, 3, S, S) uint8, any memory format, any device. ids: (B,) int64 image ids.
    """
    _check(images)
    draws = uniforms(
        seed=seed,
        epoch=epoch,
        ids=ids.cpu(),
        draws=_STRONG + STRONG_DRAWS * recipe.strong_ops,
        stream=stream,
    ).double()
    out = images.new_empty((len(images), 3, recipe.size, recipe.size), dtype=torch.float32)
    chunk = len(images)
    if images.device.type == "cpu":
        chunk = max(8, _CHUNK_BYTES // (12 * recipe.size**2))
    for start in range(0, len(images), max(chunk, 1)):
        rows = slice(start, start + chunk)
        view = _colored(_cropped(images[rows], recipe, draws[rows]), recipe, draws[rows])
        if recipe.strong_ops:
            view = strong_augment.strong_augment(view, draws[rows, _STRONG:])
        _normalize(view, mean=recipe.mean, std=recipe.std, out=out[rows])
        if recipe.cutout:
            strong_augment.cutout(out[rows], draws[rows, _HOLE], length=recipe.cutout)
    return out


def center(
    images: Tensor,
    *,
    size: int,
    mean: tuple[float, float, float],
    std: tuple[float, float, float],
    share: float = 1.0,
) -> Tensor:
    """Return the evaluation view (B, 3, size, size) float32: no randomness, normalised.

    images: (B, 3, S, S) uint8. The central square of round(share * S) pixels is resized to size
    (antialiased bilinear); 0.875 is ImageNet's usual 224 of 256.
    """
    _check(images)
    middle = torch.full((len(images), 2), 0.5, dtype=torch.float64)
    boxes = square_boxes(middle, side=images.shape[-1], share=share)
    view = resized(images, boxes, size=size)
    return _normalize(view, mean=mean, std=std, out=view)


def _check(images: Tensor) -> None:
    assert images.dtype == torch.uint8, f"stored images are uint8, got {images.dtype}"
    assert images.ndim == 4 and images.shape[1] == 3 and images.shape[2] == images.shape[3], (
        f"stored images are (B, 3, S, S), got {tuple(images.shape)}"
    )


def _normalize(
    view: Tensor,
    *,
    mean: tuple[float, float, float],
    std: tuple[float, float, float],
    out: Tensor,
) -> Tensor:
    """Write (view / 255 - mean) / std as one product and sum."""
    scale = view.new_tensor([1 / (255 * s) for s in std]).view(3, 1, 1)
    shift = view.new_tensor([-m / s for m, s in zip(mean, std, strict=True)]).view(3, 1, 1)
    return torch.addcmul(shift, view, scale, out=out)


def _cropped(images: Tensor, recipe: Recipe, draws: Tensor) -> Tensor:
    side = images.shape[-1]
    if recipe.rotate_p > 0:
        degrees = (2 * draws[:, _DEGREES] - 1) * recipe.rotate_degrees
        turned = (draws[:, _ROTATE] < recipe.rotate_p).nonzero()[:, 0]
        matrices = geometry.rotations(degrees[turned], side=side)
        images = _on_rows(
            images.clone(), turned, lambda part: geometry.affine_nearest(part.float(), matrices)
        )
    if recipe.scale is None:
        boxes = square_boxes(draws[:, _BOX][:, -2:], side=side, share=recipe.share)
    else:
        boxes = geometry.random_boxes(
            draws[:, _BOX], side=side, scale=recipe.scale, ratio=recipe.ratio
        )
    flips = draws[:, _FLIP] < recipe.flip_p if recipe.flip_p > 0 else None
    return resized(images, boxes, size=recipe.size, flips=flips, interpolation=recipe.interpolation)


def _colored(view: Tensor, recipe: Recipe, draws: Tensor) -> Tensor:
    chances = {
        "jitter": (_JITTER, recipe.jitter_p),
        "gray": (_GRAY, recipe.gray_p),
        "blur": (_BLUR, recipe.blur_p),
        "solarize": (_SOLARIZE, recipe.solarize_p),
    }
    for step in recipe.order:
        column, chance = chances[step]
        rows = (draws[:, column] < chance).nonzero()[:, 0]
        if len(rows):
            operation = _color_operation(step, recipe, draws[rows])
            view = _on_rows(view, rows, operation)
    return view


def _color_operation(step: ColorStep, recipe: Recipe, draws: Tensor) -> Callable[[Tensor], Tensor]:
    match step:
        case "jitter":
            factors = jitter_factors(draws[:, _FACTORS], recipe)
            orders = (draws[:, _ORDER] * len(color.ORDERS)).long()
            return lambda part: color.jitter(
                part, factors, orders, additive_brightness=recipe.additive_brightness
            )
        case "gray":
            return color.grayscale
        case "blur":
            low, high = recipe.blur_sigma
            sigmas = low + (high - low) * draws[:, _SIGMA]
            return lambda part: color.blur(part, sigmas, radius=recipe.blur_radius)
        case "solarize":
            return lambda part: color.solarize(part, 255 * recipe.solarize_threshold)


def jitter_factors(uniforms: Tensor, recipe: Recipe) -> Tensor:
    """Return (B, 4) factors for `color.jitter` from uniforms (B, 4), as torchvision draws them."""
    strengths = uniforms.new_tensor(recipe.jitter)
    low, high = (1 - strengths).clamp(min=0), 1 + strengths
    low[color.HUE], high[color.HUE] = -strengths[color.HUE], strengths[color.HUE]
    if recipe.additive_brightness:
        high[0] = 255 * strengths[0]
        low[0] = -high[0]
    return low + (high - low) * uniforms


def _on_rows(images: Tensor, rows: Tensor, operation: Callable[[Tensor], Tensor]) -> Tensor:
    """Return images with an operation applied to some of them; images may be overwritten."""
    if len(rows) == len(images):
        return operation(images).to(images.dtype)
    rows = rows.to(images.device)
    changed = operation(images.index_select(0, rows))
    return images.index_copy_(0, rows, changed.to(images.dtype))
