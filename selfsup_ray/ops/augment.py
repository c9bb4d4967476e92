"""The papers' augmentation recipes as batched tensor functions, on the device of the batch.

A view is a pure function of the image, the recipe and (seed, epoch, image id, stream): how a batch
is split or ordered does not matter. Numbers are drawn on the CPU, so that no GPU is waited for.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, fields
from functools import partial
from typing import Literal

import torch
from torch import Tensor

from selfsup_ray.ops import color, strong_augment
from selfsup_ray.ops.geometry import (
    BOX_DRAWS,
    Interpolation,
    affine_nearest,
    random_boxes,
    resized,
    rotations,
    square_boxes,
)
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
    central: bool = False
    """Whether that square lies in the middle, and not at a random place."""
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
    """Operations of `strong_augment_` per image."""
    cutout: int = 0
    """Largest side of the Cutout hole; 0 for none."""


@dataclass(frozen=True)
class Draws:
    """What was drawn for each image of a batch: tensors with B rows, on the CPU."""

    boxes: Tensor
    """(B, 4) int64 crop: top, left, height, width."""
    flips: Tensor
    """(B,) bool, as are `turned`, `jittered`, `gray`, `blurred` and `solarized`."""
    turned: Tensor
    degrees: Tensor
    """(B,) rotation, if turned."""
    jittered: Tensor
    jitter: Tensor
    """(B, 16) `color.jitter_table`."""
    gray: Tensor
    blurred: Tensor
    sigmas: Tensor
    """(B,) standard deviation in pixels, if blurred."""
    solarized: Tensor
    hole: Tensor
    """(B, 3) uniforms for `strong_augment.cutout_`."""
    strong: Tensor
    """(B, 3 strong_ops) uniforms for `strong_augment.strong_augment_`."""

    def rows(self, rows: Tensor) -> Draws:
        """Return the draws of some images; rows: (b,) int64."""
        return Draws(**{f.name: getattr(self, f.name)[rows] for f in fields(self)})


# Columns of the table of uniforms that one view takes per image.
_BOX = slice(0, BOX_DRAWS)
_FLIP, _GRAY, _SOLARIZE, _JITTER, _BLUR, _ROTATE = range(BOX_DRAWS, BOX_DRAWS + 6)
_FACTORS = slice(_ROTATE + 1, _ROTATE + 5)
_ORDER, _SIGMA, _DEGREES = range(_FACTORS.stop, _FACTORS.stop + 3)
_HOLE = slice(_DEGREES + 1, _DEGREES + 4)


def draw(
    recipe: Recipe, *, side: int, seed: int, epoch: int, ids: Tensor, stream: int = 0
) -> Draws:
    """Return all random numbers of a batch of views; side: of the stored images."""
    columns = _HOLE.stop + STRONG_DRAWS * recipe.strong_ops
    u = uniforms(seed=seed, epoch=epoch, ids=ids.cpu(), draws=columns, stream=stream).double()
    if recipe.scale is None:
        place = u[:, _BOX][:, -2:]
        place = torch.full_like(place, 0.5) if recipe.central else place
        boxes = square_boxes(place, side=side, share=recipe.share)
    else:
        boxes = random_boxes(u[:, _BOX], side=side, scale=recipe.scale, ratio=recipe.ratio)
    low, high = recipe.blur_sigma
    return Draws(
        boxes=boxes,
        flips=u[:, _FLIP] < recipe.flip_p,
        turned=u[:, _ROTATE] < recipe.rotate_p,
        degrees=(2 * u[:, _DEGREES] - 1) * recipe.rotate_degrees,
        jittered=u[:, _JITTER] < recipe.jitter_p,
        jitter=color.jitter_table(
            _jitter_factors(u[:, _FACTORS], recipe),
            (u[:, _ORDER] * len(color.ORDERS)).long(),
            additive_brightness=recipe.additive_brightness,
        ),
        gray=u[:, _GRAY] < recipe.gray_p,
        blurred=u[:, _BLUR] < recipe.blur_p,
        sigmas=low + (high - low) * u[:, _SIGMA],
        solarized=u[:, _SOLARIZE] < recipe.solarize_p,
        hole=u[:, _HOLE],
        strong=u[:, _HOLE.stop :],
    )


def _jitter_factors(uniforms: Tensor, recipe: Recipe) -> Tensor:
    """Return (B, 4) factors for `color.jitter_table`, distributed as torchvision's."""
    strengths = uniforms.new_tensor(recipe.jitter)
    low, high = (1 - strengths).clamp(min=0), 1 + strengths
    low[color.HUE], high[color.HUE] = -strengths[color.HUE], strengths[color.HUE]
    if recipe.additive_brightness:
        high[color.BRIGHTNESS] = 255 * strengths[color.BRIGHTNESS]
        low[color.BRIGHTNESS] = -high[color.BRIGHTNESS]
    return low + (high - low) * uniforms


# Bytes of float view handled at a time on a CPU: small enough for the caches, large enough for the
# 150 calls of a recipe to cost little each. Measured: half of it is 5 to 10 % slower.
_CHUNK_BYTES = 1 << 21


def augment(
    images: Tensor, recipe: Recipe, *, seed: int, epoch: int, ids: Tensor, stream: int = 0
) -> Tensor:
    """Return one normalised random view of each image, (B, 3, size, size) float32.

    images: (B, 3, S, S) uint8, any memory format, any device. ids: (B,) int64 image ids.
    """
    _check(images)
    draws = draw(recipe, side=images.shape[-1], seed=seed, epoch=epoch, ids=ids, stream=stream)
    out = images.new_empty((len(images), 3, recipe.size, recipe.size), dtype=torch.float32)
    scale, shift = _scale_shift(out, mean=recipe.mean, std=recipe.std)
    # Jittered images first, those that turn hue at the same place side by side: then the jitter
    # works on slices, without copies.
    order = torch.where(draws.jittered, draws.jitter[:, 0], 4).argsort(stable=True)
    for rows in torch.split(order, _chunk_size(images, recipe)):
        chosen = draws.rows(rows)
        rows = rows.to(images.device)
        view = _view(_select(images, rows), chosen, recipe).mul_(scale).add_(shift)
        if recipe.cutout:
            strong_augment.cutout_(view, chosen.hole, length=recipe.cutout)
        out.index_copy_(0, rows, view)
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
    return _square(images, (0.5, 0.5), size=size, mean=mean, std=std, share=share)


def ten_crops(
    images: Tensor,
    *,
    size: int,
    mean: tuple[float, float, float],
    std: tuple[float, float, float],
    share: float,
) -> Iterator[Tensor]:
    """Yield the square in the middle and those in the four corners, each and its mirror image.

    Arguments and views as of `center` (Krizhevsky et al. 2012: 224 of 256 pixels, so 0.875).
    """
    for place in ((0.5, 0.5), (0.0, 0.0), (0.0, 1.0), (1.0, 0.0), (1.0, 1.0)):
        view = _square(images, place, size=size, mean=mean, std=std, share=share)
        yield view
        yield view.flip(-1)


def _square(
    images: Tensor,
    place: tuple[float, float],
    *,
    size: int,
    mean: tuple[float, float, float],
    std: tuple[float, float, float],
    share: float,
) -> Tensor:
    """Return the normalised square at a place, from (0, 0), the upper left, to (1, 1)."""
    _check(images)
    side = images.shape[-1]
    # Just below 1: at 1 a random number, which never is, would choose one place too many.
    places = torch.tensor(place, dtype=torch.float64).clamp_max(1 - 2**-40).expand(len(images), 2)
    view = resized(images, square_boxes(places, side=side, share=share), size=size)
    scale, shift = _scale_shift(view, mean=mean, std=std)
    return view.mul_(scale).add_(shift)


def _check(images: Tensor) -> None:
    assert images.dtype == torch.uint8, f"stored images are uint8, got {images.dtype}"
    assert images.ndim == 4 and images.shape[1] == 3 and images.shape[2] == images.shape[3], (
        f"stored images are (B, 3, S, S), got {tuple(images.shape)}"
    )


def _scale_shift(
    view: Tensor, *, mean: tuple[float, float, float], std: tuple[float, float, float]
) -> tuple[Tensor, Tensor]:
    """Return a and b, (3, 1, 1), with (level / 255 - mean) / std = a level + b."""
    scale = view.new_tensor([1 / (255 * s) for s in std]).view(3, 1, 1)
    shift = view.new_tensor([-m / s for m, s in zip(mean, std, strict=True)]).view(3, 1, 1)
    return scale, shift


def _chunk_size(images: Tensor, recipe: Recipe) -> int:
    if images.device.type != "cpu":
        return max(len(images), 1)
    return max(2, _CHUNK_BYTES // (12 * recipe.size**2))


def _view(images: Tensor, draws: Draws, recipe: Recipe) -> Tensor:
    """Return the views of some images, float levels in [0, 255]."""
    if recipe.rotate_p > 0:
        matrices = rotations(draws.degrees[draws.turned], side=images.shape[-1])
        rotate = partial(affine_nearest, matrices=matrices)
        images = _where(draws.turned, images, lambda part: rotate(part.float()))
    view = resized(
        images,
        draws.boxes,
        size=recipe.size,
        flips=draws.flips,
        interpolation=recipe.interpolation,
    )
    for step in recipe.order:
        view = _color_step(step, view, draws, recipe)
    return strong_augment.strong_augment_(view, draws.strong) if recipe.strong_ops else view


def _color_step(step: ColorStep, view: Tensor, draws: Draws, recipe: Recipe) -> Tensor:
    match step:
        case "jitter":
            first = int(draws.jittered.sum())  # `augment` has put the jittered images first
            color.jitter_(view[:first], draws.jitter[:first])
            return view
        case "gray":
            return _where(draws.gray, view, color.grayscale)
        case "blur":
            sigmas = draws.sigmas[draws.blurred]
            blur = partial(color.blur, sigmas=sigmas, radius=recipe.blur_radius)
            return _where(draws.blurred, view, blur)
        case "solarize":
            solarize = partial(color.solarize, thresholds=255 * recipe.solarize_threshold)
            return _where(draws.solarized, view, solarize)


def _where(chosen: Tensor, images: Tensor, operation: Callable[[Tensor], Tensor]) -> Tensor:
    """Return images with an operation applied to the chosen ones, in place where possible."""
    rows = chosen.nonzero()[:, 0]
    if len(rows) == 0:
        return images
    if len(rows) == len(images):
        return operation(images).to(images.dtype)
    rows = rows.to(images.device)
    return images.index_copy_(0, rows, operation(_select(images, rows)).to(images.dtype))


def _select(images: Tensor, rows: Tensor) -> Tensor:
    """Return images[rows] in their memory format; index_select alone gives contiguous ones."""
    if images.is_contiguous():
        return images.index_select(0, rows)
    return images.permute(0, 2, 3, 1).index_select(0, rows).permute(0, 3, 1, 2)
