"""ops/geometry.py against torchvision and Pillow: samplers by distribution, pixels by value."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
import torchvision.transforms.functional as tv
from PIL import Image
from scipy import stats
from torch import Tensor
from torchvision.transforms import InterpolationMode, RandomResizedCrop

from selfsup_ray.ops import geometry
from selfsup_ray.ops.geometry import BOX_DRAWS, affine_nearest, random_boxes, resized, square_boxes
from selfsup_ray.ops.rng import uniforms

MODES = {"bilinear": InterpolationMode.BILINEAR, "bicubic": InterpolationMode.BICUBIC}


def some_images(count: int, side: int) -> Tensor:
    """Noise on smooth color ramps: both fine and coarse structure."""
    noise = torch.randint(0, 120, (count, 3, side, side), generator=torch.manual_seed(0))
    ramp = torch.linspace(0, 135, side).long()
    return (noise + ramp[:, None] * torch.tensor([1, 0, 0])[:, None, None] + ramp % 97).byte()


def our_boxes(count: int, *, side: int, scale, ratio) -> Tensor:
    draws = uniforms(seed=0, epoch=0, ids=torch.arange(count), draws=BOX_DRAWS).double()
    return random_boxes(draws, side=side, scale=scale, ratio=ratio)


def their_boxes(count: int, *, side: int, scale, ratio) -> np.ndarray:
    torch.manual_seed(0)
    image = torch.zeros(3, side, side)
    rows = [RandomResizedCrop.get_params(image, list(scale), list(ratio)) for _ in range(count)]
    return np.array(rows)


@pytest.mark.parametrize(
    ("scale", "ratio"),
    [((0.08, 1.0), (3 / 4, 4 / 3)), ((0.2, 1.0), (3 / 4, 4 / 3)), ((0.9, 1.0), (0.25, 4.0))],
)
def test_boxes_are_distributed_as_torchvision_draws_them(scale, ratio):
    side = 200
    ours = our_boxes(3000, side=side, scale=scale, ratio=ratio).numpy()
    theirs = their_boxes(3000, side=side, scale=scale, ratio=ratio)
    for name, of in {
        "top": lambda b: b[:, 0],
        "left": lambda b: b[:, 1],
        "height": lambda b: b[:, 2],
        "width": lambda b: b[:, 3],
        "area": lambda b: b[:, 2] * b[:, 3],
        "ratio": lambda b: np.log(b[:, 3] / b[:, 2]),
        "bottom": lambda b: b[:, 0] + b[:, 2],
    }.items():
        assert stats.ks_2samp(of(ours), of(theirs)).pvalue > 1e-3, name


def test_boxes_lie_inside_the_image_and_their_position_is_uniform_over_the_places_left():
    boxes = our_boxes(5000, side=32, scale=(0.08, 1.0), ratio=(3 / 4, 4 / 3))
    top, left, height, width = boxes.unbind(1)
    assert boxes.min() >= 0 and (height > 0).all() and (width > 0).all()
    assert (top + height <= 32).all() and (left + width <= 32).all()
    room = 32 - height
    shares = ((top.double() + 0.5) / (room + 1))[room > 8]
    assert abs(shares.mean() - 0.5) < 0.02 and abs(shares.var() - 1 / 12) < 0.01


@pytest.mark.parametrize("ratio", [(3.0, 4.0), (0.25, 0.3), (0.9, 1.1)])
def test_boxes_fall_back_to_torchvisions_central_box_when_no_try_fits(ratio):
    # An area above the whole image never fits, so both must take the fallback.
    ours = our_boxes(4, side=60, scale=(30.0, 40.0), ratio=ratio)
    theirs = their_boxes(1, side=60, scale=(30.0, 40.0), ratio=ratio)
    assert ours.tolist() == [theirs[0].tolist()] * 4


def test_a_degenerate_range_keeps_the_whole_image():
    boxes = our_boxes(10, side=32, scale=(1.0, 1.0), ratio=(1.0, 1.0))
    assert boxes.tolist() == [[0, 0, 32, 32]] * 10


def test_square_boxes_reach_every_place_equally_often():
    draws = uniforms(seed=0, epoch=0, ids=torch.arange(8000), draws=2).double()
    boxes = square_boxes(draws, side=12, share=0.75)
    assert boxes[:, 2:].unique().tolist() == [9]
    counts = torch.bincount(boxes[:, 0] * 4 + boxes[:, 1], minlength=16)
    assert stats.chisquare(counts.numpy()).pvalue > 1e-3
    middle = square_boxes(torch.full((1, 2), 0.5), side=256, share=0.875)
    assert middle.tolist() == [[16, 16, 224, 224]]


CASES = [
    (32, 32, [(0, 0, 32, 32), (3, 5, 20, 14), (11, 0, 9, 32), (31, 30, 1, 2)]),
    (96, 40, [(0, 0, 96, 96), (10, 20, 70, 55), (50, 3, 12, 17), (0, 1, 95, 95)]),
]


@pytest.mark.parametrize("interpolation", ["bilinear", "bicubic"])
@pytest.mark.parametrize(("side", "size", "boxes"), CASES)
@pytest.mark.parametrize("path", ["matrices", "kernel"])
def test_resized_equals_pillow_and_torchvision(side, size, boxes, interpolation, path, monkeypatch):
    monkeypatch.setattr(geometry, "_SMALL", 10**9 if path == "matrices" else 0)
    images = some_images(len(boxes), side)
    flips = torch.tensor([False, True, False, True])
    got = resized(images, torch.tensor(boxes), size=size, flips=flips, interpolation=interpolation)
    assert got.dtype == torch.float32 and torch.equal(got, got.round()) and got.is_contiguous()
    for i, (top, left, height, width) in enumerate(boxes):
        picture = tv.to_pil_image(images[i])
        for peer in (picture, images[i]):
            view = tv.resized_crop(
                peer, top, left, height, width, [size, size], MODES[interpolation], antialias=True
            )
            view = tv.hflip(view) if flips[i] else view
            view = tv.pil_to_tensor(view) if isinstance(view, Image.Image) else view
            difference = (got[i] - view.float()).abs()
            assert difference.mean() < 0.25
            # Between its two passes Pillow clips the overshoot of the cubic, our matrices do not.
            assert (difference > 1).float().mean() <= (0 if interpolation == "bilinear" else 0.01)


def test_resized_works_the_same_on_channels_last_images_and_leaves_them_alone():
    images = some_images(3, 64)
    boxes = torch.tensor([[0, 0, 64, 64], [5, 6, 40, 30], [1, 2, 9, 60]])
    flips = torch.tensor([True, False, True])
    for size in (24, 64):
        expected = resized(images, boxes, size=size, flips=flips)
        last = images.contiguous(memory_format=torch.channels_last)
        before = last.clone()
        assert torch.equal(resized(last, boxes, size=size, flips=flips), expected)
        assert torch.equal(last, before)


def test_resized_whole_images_of_the_same_size_are_the_images():
    images = some_images(3, 20)
    boxes = torch.tensor([[0, 0, 20, 20]] * 3)
    flips = torch.tensor([True, False, False])
    expected = images.float()
    expected[0] = expected[0].flip(2)
    assert torch.equal(resized(images, boxes, size=20, flips=flips), expected)


@pytest.mark.parametrize("side", [17, 32])
def test_rotations_equal_pillow(side):
    images = some_images(8, side)
    degrees = torch.linspace(-30, 30, 8, dtype=torch.float64)
    got = affine_nearest(images.float(), geometry.rotations(degrees, side=side))
    for i in range(8):
        picture = tv.to_pil_image(images[i]).rotate(float(degrees[i]))
        # Pillow computes positions in 16-bit fixed point: a few pixels at .5 differ.
        same = (got[i] == tv.pil_to_tensor(picture).float()).float().mean()
        assert same > 0.98


def test_affine_maps_equal_pillows_transform_with_black_outside():
    images = some_images(40, 24)
    generator = np.random.default_rng(0)
    matrices = np.array([[1, 0, 0, 0, 1, 0]]) + generator.normal(0, 0.2, (40, 6))
    matrices[:, [2, 5]] *= 20
    got = affine_nearest(images.float(), torch.from_numpy(matrices))
    for i in range(40):
        picture = tv.to_pil_image(images[i]).transform(
            (24, 24), Image.Transform.AFFINE, tuple(matrices[i])
        )
        assert (got[i] == tv.pil_to_tensor(picture).float()).float().mean() > 0.98


def test_a_quarter_turn_is_exact():
    images = some_images(2, 10).float()
    matrices = geometry.rotations(torch.tensor([90.0, -90.0], dtype=torch.float64), side=10)
    got = affine_nearest(images, matrices)
    assert torch.equal(got[0], images[0].rot90(1, (1, 2)))
    assert torch.equal(got[1], images[1].rot90(-1, (1, 2)))
    assert math.isclose(float(matrices[0, 0]), 0, abs_tol=1e-12)
