"""Which views a method trains on: the papers' presets as configs, and callables made of them.

Every preset is a config with the paper's numbers as defaults; `recipe` turns one into the plain
numbers that `ops.augment` works with. Every preset normalises with `mean` and `std`, also where the
paper feeds pixels in [0, 1] (SimCLR, BYOL): the backbone's first batch norm undoes the scale.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Annotated, Literal

from pydantic import AfterValidator, Field
from torch import Tensor

from selfsup_ray.config import NonNegative, NonNegativeFloat, Positive, PositiveFloat, Share, config
from selfsup_ray.ops.augment import Recipe, augment, center
from selfsup_ray.ops.geometry import Interpolation

IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)
CIFAR10_MEAN = (0.4914, 0.4822, 0.4465)
CIFAR10_STD = (0.2023, 0.1994, 0.2010)


def _ordered(pair: tuple[float, float]) -> tuple[float, float]:
    if pair[0] > pair[1]:
        raise ValueError(f"the lower end {pair[0]} is above the upper end {pair[1]}")
    return pair


PositiveShare = Annotated[float, Field(gt=0, le=1)]
AreaRange = Annotated[tuple[PositiveShare, PositiveShare], AfterValidator(_ordered)]
Range = Annotated[tuple[PositiveFloat, PositiveFloat], AfterValidator(_ordered)]
Jitter = tuple[
    NonNegativeFloat, NonNegativeFloat, NonNegativeFloat, Annotated[float, Field(ge=0, le=0.5)]
]
Mean = tuple[float, float, float]
Std = tuple[PositiveFloat, PositiveFloat, PositiveFloat]


@config
class BaseViews:
    """What every preset has."""

    size: Positive | None = None
    """Side of a view in pixels; None keeps the stored images' side."""
    mean: Mean = IMAGENET_MEAN
    """Mean of red, green, blue in [0, 1], subtracted from every view."""
    std: Std = IMAGENET_STD
    """Standard deviation of red, green, blue, by which every view is divided."""
    flip_p: Share = 0.5
    """Probability of a left-right flip."""


@config
class StandardViews(BaseViews):
    """Random resized crop and flip: linear probes, SCAN's `standard`."""

    name: Literal["standard"] = "standard"
    scale: AreaRange = (0.08, 1.0)
    """Share of the area that a crop covers."""
    ratio: Range = (3 / 4, 4 / 3)
    """Width over height of a crop."""


@config
class SimCLRViews(BaseViews):
    """SimCLR (Chen et al. 2020, appendix A). Its CIFAR-10 setting: strength 0.5, blur_p 0."""

    name: Literal["simclr"] = "simclr"
    scale: AreaRange = (0.08, 1.0)
    """Share of the area that a crop covers."""
    ratio: Range = (3 / 4, 4 / 3)
    """Width over height of a crop."""
    interpolation: Interpolation = "bicubic"
    """How a crop is resized."""
    strength: NonNegativeFloat = 1.0
    """Multiplies the four jitter strengths; hue stops at half a turn."""
    jitter: Jitter = (0.8, 0.8, 0.8, 0.2)
    """Brightness, contrast, saturation, hue; in random order."""
    jitter_p: Share = 0.8
    """Probability of the jitter."""
    gray_p: Share = 0.2
    """Probability of a grey view."""
    blur_p: Share = 0.5
    """Probability of the Gaussian blur."""
    blur_kernel: Share = 0.1
    """Width of the blur's kernel as a share of the side; made odd."""
    blur_sigma: Range = (0.1, 2.0)
    """Standard deviation of the blur in pixels, uniform."""


@config
class InsDisViews(BaseViews):
    """Instance discrimination on CIFAR: always jitter, then grey, and no flip."""

    name: Literal["insdis"] = "insdis"
    flip_p: Share = 0.0
    """Probability of a left-right flip."""
    scale: AreaRange = (0.2, 1.0)
    """Share of the area that a crop covers."""
    ratio: Range = (3 / 4, 4 / 3)
    """Width over height of a crop."""
    jitter: Jitter = (0.4, 0.4, 0.4, 0.4)
    """Brightness, contrast, saturation, hue; in random order."""
    jitter_p: Share = 1.0
    """Probability of the jitter."""
    gray_p: Share = 0.2
    """Probability of a grey view."""


@config
class MoCoV1Views(BaseViews):
    """MoCo v1 and InsDis on ImageNet: grey first, then always jitter."""

    name: Literal["moco_v1"] = "moco_v1"
    scale: AreaRange = (0.2, 1.0)
    """Share of the area that a crop covers."""
    ratio: Range = (3 / 4, 4 / 3)
    """Width over height of a crop."""
    gray_p: Share = 0.2
    """Probability of a grey view."""
    jitter: Jitter = (0.4, 0.4, 0.4, 0.4)
    """Brightness, contrast, saturation, hue; in random order."""
    jitter_p: Share = 1.0
    """Probability of the jitter."""


@config
class MoCoV2Views(BaseViews):
    """MoCo v2's `aug-plus`. Its CIFAR-10 notebook: scale (0.08, 1), blur_p 0."""

    name: Literal["moco_v2"] = "moco_v2"
    rotate_p: Share = 0.0
    """Probability of a rotation before the crop (`plusrotation` of the CIFAR comparison: 0.5)."""
    rotate_degrees: NonNegativeFloat = 30.0
    """Largest rotation to either side."""
    scale: AreaRange = (0.2, 1.0)
    """Share of the area that a crop covers."""
    ratio: Range = (3 / 4, 4 / 3)
    """Width over height of a crop."""
    jitter: Jitter = (0.4, 0.4, 0.4, 0.1)
    """Brightness, contrast, saturation, hue; in random order."""
    jitter_p: Share = 0.8
    """Probability of the jitter."""
    gray_p: Share = 0.2
    """Probability of a grey view."""
    blur_p: Share = 0.5
    """Probability of the Gaussian blur."""
    blur_sigma: Range = (0.1, 2.0)
    """Standard deviation of the blur in pixels, uniform; the kernel covers three of the largest."""


@config
class BYOLViews(BaseViews):
    """BYOL (Grill et al. 2020, appendix B): two different views, additive brightness."""

    name: Literal["byol"] = "byol"
    scale: AreaRange = (0.08, 1.0)
    """Share of the area that a crop covers."""
    ratio: Range = (3 / 4, 4 / 3)
    """Width over height of a crop."""
    interpolation: Interpolation = "bicubic"
    """How a crop is resized."""
    jitter: Jitter = (0.4, 0.4, 0.2, 0.1)
    """Brightness, contrast, saturation, hue; in random order."""
    jitter_p: Share = 0.8
    """Probability of the jitter."""
    gray_p: Share = 0.2
    """Probability of a grey view."""
    blur_p: tuple[Share, Share] = (1.0, 0.1)
    """Probability of the Gaussian blur, in even and in odd views."""
    blur_kernel: Share = 0.1
    """Width of the blur's kernel as a share of the side; made odd."""
    blur_sigma: Range = (0.1, 2.0)
    """Standard deviation of the blur in pixels, uniform."""
    solarize_p: tuple[Share, Share] = (0.0, 0.2)
    """Probability of solarisation, in even and in odd views."""
    solarize_threshold: Share = 0.5
    """Levels at or above this share of white are inverted."""


@config
class ScanSimCLRViews(BaseViews):
    """SCAN's `simclr`: its pretext on small images and its clustering step on ImageNet. No blur."""

    name: Literal["scan_simclr"] = "scan_simclr"
    scale: AreaRange = (0.2, 1.0)
    """Share of the area that a crop covers."""
    ratio: Range = (3 / 4, 4 / 3)
    """Width over height of a crop."""
    jitter: Jitter = (0.4, 0.4, 0.4, 0.1)
    """Brightness, contrast, saturation, hue; in random order."""
    jitter_p: Share = 0.8
    """Probability of the jitter."""
    gray_p: Share = 0.2
    """Probability of a grey view."""


@config
class ScanStrongViews(BaseViews):
    """SCAN's `ours`: strong operations and Cutout; self-labelling, and clustering small images."""

    name: Literal["ours"] = "ours"
    share: PositiveShare = 1.0
    """Side of the random square crop as a share of the stored side; ImageNet 224 of 256: 0.875."""
    strong_ops: NonNegative = 4
    """Operations per image, drawn with replacement from fourteen."""
    cutout: NonNegative = 16
    """Largest side of the Cutout hole in pixels; CIFAR 16, STL-10 32, ImageNet 75, 0 for none."""


@config
class SeLaViews(BaseViews):
    """SeLa's levels of augmentation for ImageNet; CIFAR's: scale (0.2, 1), gray_first false."""

    name: Literal["sela"] = "sela"
    level: Annotated[int, Field(ge=0, le=3)] = 3
    """0: the central square alone; 1: and a flip; 2: random resized crop and flip; 3: also gray and
    a jitter of every image."""
    share: PositiveShare = 0.875
    """Side of the central square that levels 0 and 1 and evaluation take, as a share of the stored
    side: 224 of 256."""
    scale: AreaRange = (0.08, 1.0)
    """Share of the area that a crop covers, from level 2 on."""
    ratio: Range = (3 / 4, 4 / 3)
    """Width over height of a crop."""
    jitter: Jitter = (0.4, 0.4, 0.4, 0.4)
    """Brightness, contrast, saturation, hue of level 3; in random order."""
    gray_p: Share = 0.2
    """Probability of a grey view at level 3."""
    gray_first: bool = True
    """Grey before the jitter (ImageNet's code), or after it (CIFAR's)."""


ViewsConfig = Annotated[
    StandardViews
    | SimCLRViews
    | InsDisViews
    | MoCoV1Views
    | MoCoV2Views
    | BYOLViews
    | ScanSimCLRViews
    | ScanStrongViews
    | SeLaViews,
    Field(discriminator="name"),
]
"""Any preset; `name` says which."""


def recipe(views: ViewsConfig, image_size: int, view: int = 0) -> Recipe:
    """Return the plain numbers of one view of a preset, for stored images of image_size pixels."""
    size = views.size or image_size
    base = Recipe(size=size, mean=views.mean, std=views.std, flip_p=views.flip_p)
    match views:
        case StandardViews():
            return replace(base, scale=views.scale, ratio=views.ratio)
        case ScanStrongViews():
            return replace(
                base, share=views.share, strong_ops=views.strong_ops, cutout=views.cutout
            )
        case SeLaViews():
            return _sela(base, views)
    base = replace(
        base,
        scale=views.scale,
        ratio=views.ratio,
        jitter=views.jitter,
        jitter_p=views.jitter_p,
        gray_p=views.gray_p,
    )
    match views:
        case ScanSimCLRViews() | InsDisViews():
            return base
        case MoCoV1Views():
            return replace(base, order=("gray", "jitter"))
        case MoCoV2Views():
            return _moco_v2(base, views)
        case SimCLRViews():
            return _simclr(base, views)
        case BYOLViews():
            return _byol(base, views, odd=view % 2)


def _moco_v2(base: Recipe, views: MoCoV2Views) -> Recipe:
    # Pillow's blur, which MoCo uses, has no kernel size; three sigma hold 99.7 % of its weight.
    radius = min(math.ceil(3 * views.blur_sigma[1]), base.size - 1)
    return replace(
        base,
        rotate_p=views.rotate_p,
        rotate_degrees=views.rotate_degrees,
        blur_p=views.blur_p,
        blur_radius=radius,
        blur_sigma=views.blur_sigma,
    )


def _sela(base: Recipe, views: SeLaViews) -> Recipe:
    if views.level < 2:
        flip_p = views.flip_p if views.level == 1 else 0.0
        return replace(base, share=views.share, central=True, flip_p=flip_p)
    base = replace(base, scale=views.scale, ratio=views.ratio)
    if views.level == 2:
        return base
    return replace(
        base,
        jitter=views.jitter,
        jitter_p=1.0,
        gray_p=views.gray_p,
        order=("gray", "jitter") if views.gray_first else ("jitter", "gray"),
    )


def _simclr(base: Recipe, views: SimCLRViews) -> Recipe:
    brightness, contrast, saturation, hue = (views.strength * value for value in views.jitter)
    return replace(
        base,
        interpolation=views.interpolation,
        jitter=(brightness, contrast, saturation, min(hue, 0.5)),
        blur_p=views.blur_p,
        blur_radius=_radius(views.blur_kernel, base.size),
        blur_sigma=views.blur_sigma,
    )


def _byol(base: Recipe, views: BYOLViews, *, odd: int) -> Recipe:
    return replace(
        base,
        interpolation=views.interpolation,
        additive_brightness=True,
        blur_p=views.blur_p[odd],
        blur_radius=_radius(views.blur_kernel, base.size),
        blur_sigma=views.blur_sigma,
        solarize_p=views.solarize_p[odd],
        solarize_threshold=views.solarize_threshold,
    )


def _radius(kernel: float, size: int) -> int:
    """SimCLR's and BYOL's rule: kernel = side // 10, made odd by 2 (kernel // 2) + 1."""
    return min(int(kernel * size) // 2, size - 1)


@dataclass(frozen=True)
class Views:
    """Makes the random views of a batch; a `MakeViews`, picklable.

    Of one image batch it returns num_views views; of several (anchors, neighbors) one view of
    each with the same recipe. A view depends on (seed, epoch, id, its number) and nothing else.
    """

    config: ViewsConfig
    image_size: int
    seed: int
    num_views: int = 2

    def __call__(self, images: list[Tensor], ids: Tensor, epoch: int) -> list[Tensor]:
        """Return float32 (B, 3, s, s) views; images: uint8 (B, 3, S, S) each, ids: (B,) int64."""
        if len(images) == 1:
            recipes = [recipe(self.config, self.image_size, i) for i in range(self.num_views)]
            images = images * self.num_views
        else:
            recipes = [recipe(self.config, self.image_size)] * len(images)
        return [
            augment(batch, numbers, seed=self.seed, epoch=epoch, ids=ids, stream=i)
            for i, (batch, numbers) in enumerate(zip(images, recipes, strict=True))
        ]


@dataclass(frozen=True)
class EvalView:
    """Makes the evaluation view of every image batch it is given; a `MakeViews`, picklable.

    The central square of `share` of the stored side, resized to size, normalised; no randomness.
    """

    size: int
    mean: Mean = IMAGENET_MEAN
    std: Std = IMAGENET_STD
    share: float = 1.0

    def __call__(self, images: list[Tensor], ids: Tensor, epoch: int) -> list[Tensor]:
        """Return one float32 (B, 3, size, size) view per uint8 batch; ids and epoch are unused."""
        return [
            center(batch, size=self.size, mean=self.mean, std=self.std, share=self.share)
            for batch in images
        ]


@dataclass(frozen=True)
class WeakStrongViews:
    """Makes self-labelling's pair (evaluation view, strong view) of a batch; a `MakeViews`."""

    strong: ViewsConfig
    image_size: int
    seed: int

    def __call__(self, images: list[Tensor], ids: Tensor, epoch: int) -> list[Tensor]:
        """Return [weak, strong] of images[0]; shapes as `Views`."""
        share = self.strong.share if isinstance(self.strong, ScanStrongViews) else 1.0
        size = self.strong.size or self.image_size
        weak = EvalView(size=size, mean=self.strong.mean, std=self.strong.std, share=share)
        strong = Views(self.strong, image_size=self.image_size, seed=self.seed, num_views=1)
        return weak(images[:1], ids, epoch) + strong(images[:1], ids, epoch)
