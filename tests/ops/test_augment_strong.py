"""ops/strong_augment.py against Pillow's own operations on the same uint8 images and magnitudes."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
import torch
import torchvision.transforms.functional as tv
from PIL import Image, ImageEnhance, ImageOps
from scipy import stats
from torch import Tensor

from selfsup_ray.ops import strong_augment as strong
from selfsup_ray.ops.rng import uniforms

SIDE = 24


def affine(picture: Image.Image, a, b, c, d, e, f) -> Image.Image:
    return picture.transform(picture.size, Image.Transform.AFFINE, (a, b, c, d, e, f))


PILLOW: dict[str, Callable[[Image.Image, float], Image.Image]] = {
    "identity": lambda picture, _: picture,
    "autocontrast": lambda picture, _: ImageOps.autocontrast(picture),
    "equalize": lambda picture, _: ImageOps.equalize(picture),
    "rotate": lambda picture, v: picture.rotate(v),
    "solarize": lambda picture, v: ImageOps.solarize(picture, v),
    "color": lambda picture, v: ImageEnhance.Color(picture).enhance(v),
    "contrast": lambda picture, v: ImageEnhance.Contrast(picture).enhance(v),
    "brightness": lambda picture, v: ImageEnhance.Brightness(picture).enhance(v),
    "sharpness": lambda picture, v: ImageEnhance.Sharpness(picture).enhance(v),
    "shear_x": lambda picture, v: affine(picture, 1, v, 0, 0, 1, 0),
    "shear_y": lambda picture, v: affine(picture, 1, 0, 0, v, 1, 0),
    "translate_x": lambda picture, v: affine(picture, 1, 0, v * picture.size[0], 0, 1, 0),
    "translate_y": lambda picture, v: affine(picture, 1, 0, 0, 0, 1, v * picture.size[1]),
    "posterize": lambda picture, v: ImageOps.posterize(picture, int(v)),
}
RANGES = {
    **dict.fromkeys(["color", "contrast", "brightness", "sharpness"], (0.05, 0.95)),
    **dict.fromkeys(["shear_x", "shear_y", "translate_x", "translate_y"], (-0.1, 0.1)),
    **dict.fromkeys(["identity", "autocontrast", "equalize"], (0.0, 0.0)),
    "rotate": (-30.0, 30.0),
    "solarize": (0.0, 256.0),
    "posterize": (4.0, 8.0),
}


def some_images(count: int) -> Tensor:
    """Images of narrow and wide ranges, with a constant one and a two-level one among them."""
    generator = torch.Generator().manual_seed(0)
    images = torch.rand(count, 3, SIDE, SIDE, generator=generator)
    low = torch.randint(0, 120, (count, 3, 1, 1), generator=generator)
    span = torch.randint(5, 136, (count, 3, 1, 1), generator=generator)
    images = (low + images**2 * span).floor()
    images[0] = 77
    images[1] = (images[1] > 60) * 200.0
    images[2, :, : SIDE // 2] = 255
    return images


def drawn_magnitudes(name: str, count: int) -> Tensor:
    which = torch.full((count,), strong.OPERATIONS.index(name))
    draws = uniforms(seed=0, epoch=0, ids=torch.arange(count), draws=2).double()
    return strong.magnitudes(which, draws[:, 0], draws[:, 1])


def test_there_are_the_fourteen_operations_of_scan():
    assert set(strong.OPERATIONS) == set(PILLOW) and len(strong.OPERATIONS) == 14


@pytest.mark.parametrize("name", PILLOW)
def test_each_operation_equals_pillow(name):
    images, magnitudes = some_images(30), drawn_magnitudes(name, 30)
    which = torch.full((30,), strong.OPERATIONS.index(name))
    got = strong.apply_operations_(images.clone(), which, magnitudes)
    assert torch.equal(got, got.round()) and got.min() >= 0 and got.max() <= 255
    for i in range(30):
        picture = PILLOW[name](tv.to_pil_image(images[i].byte()), float(magnitudes[i]))
        difference = (got[i] - tv.pil_to_tensor(picture).float()).abs()
        # Float32 or Pillow's fixed-point positions put a few values on the other side of a floor.
        assert (difference == 0).float().mean() > 0.98
        if name not in ("rotate", "shear_x", "shear_y", "translate_x", "translate_y"):
            assert difference.max() <= 1


@pytest.mark.parametrize("name", PILLOW)
def test_magnitudes_are_uniform_in_the_papers_range(name):
    values = drawn_magnitudes(name, 4000).numpy()
    low, high = RANGES[name]
    if low == high:
        assert (values == 0).all()
        return
    assert stats.kstest((values - low) / (high - low), "uniform").pvalue > 1e-3


def test_every_operation_is_drawn_equally_often_in_every_place():
    draws = uniforms(seed=0, epoch=0, ids=torch.arange(6000), draws=4 * 3).double()
    for place in range(4):
        which = (draws[:, 3 * place] * 14).long()
        assert stats.chisquare(torch.bincount(which, minlength=14).numpy()).pvalue > 1e-3


def test_strong_augment_equals_a_loop_of_pillow_operations():
    images = some_images(40)
    draws = uniforms(seed=1, epoch=0, ids=torch.arange(40), draws=12).double()
    got = strong.strong_augment_(images.clone(), draws)
    exact = 0
    for i in range(40):
        picture = tv.to_pil_image(images[i].byte())
        for choice, amount, sign in draws[i].view(4, 3).tolist():
            name = strong.OPERATIONS[int(choice * 14)]
            low, high = RANGES[name]
            value = low + (high - low) * amount
            if low < 0:  # the documented draw: |magnitude| first, then the sign
                value = high * amount * (-1 if sign < 0.5 else 1)
            picture = PILLOW[name](picture, value)
        exact += (got[i] == tv.pil_to_tensor(picture).float()).float().mean() > 0.95
    assert exact >= 38  # equalising after a level was off by one spreads that difference


def test_strong_augment_works_in_place_and_treats_images_one_by_one():
    images = some_images(30)
    draws = uniforms(seed=2, epoch=0, ids=torch.arange(30), draws=12).double()
    whole = images.clone()
    assert strong.strong_augment_(whole, draws) is whole
    for i in range(30):
        alone = strong.strong_augment_(images[i : i + 1].clone(), draws[i : i + 1])
        assert torch.equal(alone[0], whole[i])


def slow_cutout(image: Tensor, size: float, row: float, column: float, length: int) -> Tensor:
    """SCAN's loop for one image: the hole's borders, clipped, then zeros."""
    side = image.shape[-1]
    edge = 1 + int(size * length)
    y, x = int(row * side), int(column * side)
    y0, y1 = np.clip(y - edge // 2, 0, side), np.clip(y + edge // 2, 0, side)
    x0, x1 = np.clip(x - edge // 2, 0, side), np.clip(x + edge // 2, 0, side)
    image = image.clone()
    image[:, y0:y1, x0:x1] = 0
    return image


@pytest.mark.parametrize("length", [1, 7, 16, 40])
def test_cutout_equals_scans_loop(length):
    images = some_images(50) + 1
    draws = uniforms(seed=0, epoch=0, ids=torch.arange(50), draws=3).double()
    got = strong.cutout_(images.clone(), draws, length=length)
    for i in range(50):
        assert torch.equal(got[i], slow_cutout(images[i], *draws[i].tolist(), length))


def test_cutout_of_side_one_removes_nothing_so_one_in_length_images_stay_whole():
    images = torch.ones(4000, 3, SIDE, SIDE)
    draws = uniforms(seed=0, epoch=0, ids=torch.arange(4000), draws=3).double()
    whole = (strong.cutout_(images, draws, length=16) == 1).flatten(1).all(dim=1)
    assert stats.binomtest(int(whole.sum()), 4000, 1 / 16).pvalue > 1e-3
