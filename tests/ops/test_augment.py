"""ops/augment.py against torchvision: pixel by pixel with the same draws, and by distribution."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
import torchvision.transforms.functional as tv
from scipy import stats
from torch import Tensor
from torchvision.transforms import ColorJitter, v2

from selfsup_ray.ops import augment as module
from selfsup_ray.ops import color, strong_augment
from selfsup_ray.ops.augment import Recipe, augment, center, draw

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
EVERYTHING = Recipe(
    size=24,
    mean=MEAN,
    std=STD,
    scale=(0.2, 1.0),
    flip_p=0.5,
    rotate_p=0.5,
    rotate_degrees=30,
    jitter_p=0.8,
    jitter=(0.4, 0.4, 0.4, 0.1),
    gray_p=0.2,
    blur_p=0.5,
    blur_radius=2,
    solarize_p=0.2,
)
RECIPES = {
    "everything": EVERYTHING,
    "gray first": replace(EVERYTHING, order=("gray", "jitter"), rotate_p=0, jitter_p=1),
    "bicubic": replace(EVERYTHING, interpolation="bicubic", rotate_p=0),
    "additive": replace(EVERYTHING, additive_brightness=True, gray_p=0),
    "strong": Recipe(size=24, mean=MEAN, std=STD, share=0.75, flip_p=0.5, strong_ops=4, cutout=12),
}


def some_images(count: int, side: int = 32) -> Tensor:
    noise = torch.randint(0, 100, (count, 3, side, side), generator=torch.manual_seed(0))
    ramp = torch.linspace(0, 150, side).long()
    tint = torch.tensor([1.0, 0.3, 0.6])[:, None, None]
    return (noise + (ramp[:, None] * tint + (150 - ramp) * (1 - tint)).long()).byte()


def normalized(levels: Tensor) -> Tensor:
    return tv.normalize(levels / 255, list(MEAN), list(STD))


def color_step(step: str, image: Tensor, draws, i: int, recipe: Recipe, factors) -> Tensor:
    """One color step of one image, in [0, 1], by torchvision."""
    if step == "jitter" and draws.jittered[i]:
        for name in color.ORDERS[factors["order"][i]].tolist():
            value = float(factors["factor"][i, name])
            if name == color.BRIGHTNESS and recipe.additive_brightness:
                image = (image + value / 255).clamp(0, 1)
                continue
            adjust = [
                tv.adjust_brightness,
                tv.adjust_contrast,
                tv.adjust_saturation,
                tv.adjust_hue,
            ][name]
            image = adjust(image, value)
    if step == "gray" and draws.gray[i]:
        image = tv.rgb_to_grayscale(image, 3)
    if step == "blur" and draws.blurred[i]:
        kernel = [2 * recipe.blur_radius + 1] * 2
        image = tv.gaussian_blur(image, kernel, [float(draws.sigmas[i])] * 2)
    if step == "solarize" and draws.solarized[i]:
        image = tv.solarize(image, recipe.solarize_threshold)
    return image


def slow_view(image: Tensor, draws, i: int, recipe: Recipe, factors) -> Tensor:
    """The recipe for one image with torchvision's functions, in the documented order."""
    if draws.turned[i]:
        image = tv.rotate(image, float(draws.degrees[i]))
    mode = tv.InterpolationMode(recipe.interpolation)
    image = tv.resized_crop(image, *draws.boxes[i].tolist(), [recipe.size] * 2, mode)
    image = (tv.hflip(image) if draws.flips[i] else image).float() / 255
    for step in recipe.order:
        image = color_step(step, image, draws, i, recipe, factors)
    if recipe.strong_ops:
        levels = (image * 255).round()[None]
        image = strong_augment.strong_augment_(levels, draws.strong[i : i + 1])[0] / 255
    image = tv.normalize(image, list(recipe.mean), list(recipe.std))
    if recipe.cutout:
        strong_augment.cutout_(image[None], draws.hole[i : i + 1], length=recipe.cutout)
    return image


@pytest.mark.parametrize("name", RECIPES)
def test_augment_equals_torchvisions_functions_in_the_recipes_order(name, monkeypatch):
    recipe, images, ids = RECIPES[name], some_images(60), torch.arange(100, 160)
    factors = {}
    table = color.jitter_table

    def remember(factor: Tensor, order: Tensor, *, additive_brightness: bool) -> Tensor:
        factors.update(factor=factor, order=order)
        return table(factor, order, additive_brightness=additive_brightness)

    monkeypatch.setattr(color, "jitter_table", remember)
    draws = draw(recipe, side=32, seed=1, epoch=2, ids=ids, stream=1)
    got = augment(images, recipe, seed=1, epoch=2, ids=ids, stream=1)
    assert got.shape == (60, 3, 24, 24) and got.dtype == torch.float32
    for i in range(60):
        expected = slow_view(images[i], draws, i, recipe, factors)
        # Resizing may round a level to the other side, a contrast of many levels multiplies it.
        difference = (got[i] - expected).abs() * 255 * STD[0]
        assert difference.mean() < 0.6 and (difference > 3).float().mean() < 0.03, (name, i)


@pytest.mark.parametrize("name", RECIPES)
@pytest.mark.parametrize("side", [32, 80])
def test_a_view_does_not_depend_on_the_batch_it_is_in(name, side, monkeypatch):
    recipe, images, ids = RECIPES[name], some_images(40, side), torch.arange(40) * 7
    numbers = {"seed": 3, "epoch": 4, "stream": 1}
    whole = augment(images, recipe, ids=ids, **numbers)
    order = torch.randperm(40, generator=torch.Generator().manual_seed(0))
    shuffled = augment(images[order], recipe, ids=ids[order], **numbers)
    torch.testing.assert_close(shuffled, whole[order], atol=1e-5, rtol=0)
    parts = [augment(images[i], recipe, ids=ids[i], **numbers) for i in torch.split(order, 9)]
    torch.testing.assert_close(torch.cat(parts), whole[order], atol=1e-5, rtol=0)
    monkeypatch.setattr(module, "_CHUNK_BYTES", 1)
    torch.testing.assert_close(
        augment(images, recipe, ids=ids, **numbers), whole, atol=1e-5, rtol=0
    )


def test_the_same_call_twice_gives_the_same_bits_and_leaves_the_images_alone():
    for recipe in RECIPES.values():
        for images in (
            some_images(30),
            some_images(30).contiguous(memory_format=torch.channels_last),
        ):
            before, ids = images.clone(), torch.arange(30)
            first = augment(images, recipe, seed=0, epoch=0, ids=ids)
            assert torch.equal(augment(images, recipe, seed=0, epoch=0, ids=ids), first)
            assert torch.equal(images, before)


@pytest.mark.parametrize("name", RECIPES)
def test_another_seed_epoch_id_or_stream_gives_another_view(name):
    images = some_images(1).expand(20, -1, -1, -1)
    base = {"seed": 0, "epoch": 0, "stream": 0}
    views = [
        augment(images, RECIPES[name], ids=torch.arange(20) + first, **{**base, **change})
        for first, change in [
            (0, {}),
            (20, {}),
            (0, {"seed": 1}),
            (0, {"epoch": 1}),
            (0, {"stream": 1}),
        ]
    ]
    flat = torch.cat(views).flatten(1)
    distances = torch.cdist(flat, flat) + torch.eye(len(flat)) * 1e9
    assert (distances.min(dim=1).values > 1e-3).all()


def test_planar_and_channels_last_images_give_the_same_views():
    images, ids = some_images(20, 80), torch.arange(20)
    last = images.contiguous(memory_format=torch.channels_last)
    for recipe in RECIPES.values():
        expected = augment(images, recipe, seed=0, epoch=0, ids=ids)
        assert torch.equal(augment(last, recipe, seed=0, epoch=0, ids=ids), expected)


def test_bfloat16_autocast_around_it_changes_nothing():
    images, ids = some_images(20), torch.arange(20)
    for recipe in RECIPES.values():
        expected = augment(images, recipe, seed=0, epoch=0, ids=ids)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            assert torch.equal(augment(images, recipe, seed=0, epoch=0, ids=ids), expected)


def test_an_empty_batch_gives_an_empty_view():
    ids = torch.arange(0)
    for recipe in RECIPES.values():
        for side in (32, 80):
            images = torch.empty(0, 3, side, side, dtype=torch.uint8)
            assert augment(images, recipe, seed=0, epoch=0, ids=ids).shape == (0, 3, 24, 24)


def test_operations_are_drawn_with_the_recipes_probabilities_and_independently():
    draws = draw(EVERYTHING, side=32, seed=0, epoch=0, ids=torch.arange(20_000))
    chances = {
        "flips": 0.5, "turned": 0.5, "jittered": 0.8, "gray": 0.2, "blurred": 0.5, "solarized": 0.2
    }  # fmt: skip
    drawn = {name: getattr(draws, name).numpy() for name in chances}
    for name, chance in chances.items():
        assert stats.binomtest(int(drawn[name].sum()), 20_000, chance).pvalue > 1e-3, name
    correlation = np.corrcoef(np.stack(list(drawn.values())).astype(float)) - np.eye(6)
    assert np.abs(correlation).max() < 0.03
    assert stats.kstest((draws.degrees.numpy() + 30) / 60, "uniform").pvalue > 1e-3
    assert stats.kstest((draws.sigmas.numpy() - 0.1) / 1.9, "uniform").pvalue > 1e-3


def test_jitter_factors_and_orders_are_distributed_as_torchvision_draws_them(monkeypatch):
    caught = {}
    table = color.jitter_table

    def remember(factor: Tensor, order: Tensor, **rest: bool) -> Tensor:
        caught.update(factor=factor.numpy(), order=order.numpy())
        return table(factor, order, **rest)

    monkeypatch.setattr(color, "jitter_table", remember)
    recipe = replace(EVERYTHING, jitter=(0.4, 1.3, 0.2, 0.1))
    draw(recipe, side=32, seed=0, epoch=0, ids=torch.arange(4000))
    torch.manual_seed(0)
    peer = ColorJitter(0.4, 1.3, 0.2, 0.1)
    theirs = [
        peer.get_params(peer.brightness, peer.contrast, peer.saturation, peer.hue)
        for _ in range(4000)
    ]
    for column in range(4):
        expected = [row[column + 1] for row in theirs]
        assert stats.ks_2samp(caught["factor"][:, column], expected).pvalue > 1e-3
    codes = [color.ORDERS.tolist().index(row[0].tolist()) for row in theirs]
    counts = np.stack(
        [np.bincount(caught["order"], minlength=24), np.bincount(codes, minlength=24)]
    )
    assert stats.chi2_contingency(counts).pvalue > 1e-3


def statistics(views: Tensor) -> dict[str, np.ndarray]:
    """Numbers of each view that every part of the recipe moves."""
    right, left = views[..., 12:].mean((1, 2, 3)), views[..., :12].mean((1, 2, 3))
    return {
        "mean": views.mean((1, 2, 3)).numpy(),
        "red": views[:, 0].mean((1, 2)).numpy(),
        "blue": views[:, 2].mean((1, 2)).numpy(),
        "contrast": views.std(dim=(1, 2, 3)).numpy(),
        "colorfulness": views.std(dim=1).mean((1, 2)).numpy(),
        "sharpness": views.diff(dim=3).abs().mean((1, 2, 3)).numpy(),
        "lean": (right - left).numpy(),
    }


def test_views_are_distributed_as_torchvisions_whole_pipeline():
    image, count = some_images(1)[0], 1500
    recipe = replace(EVERYTHING, rotate_p=0, solarize_p=0, scale=(0.08, 1.0))
    peer = v2.Compose(
        [
            v2.RandomResizedCrop(24, antialias=True),
            v2.RandomHorizontalFlip(),
            v2.ToDtype(torch.float32, scale=True),
            v2.RandomApply([v2.ColorJitter(0.4, 0.4, 0.4, 0.1)], p=0.8),
            v2.RandomGrayscale(0.2),
            v2.RandomApply([v2.GaussianBlur(5, (0.1, 2.0))], p=0.5),
            v2.Normalize(MEAN, STD),
        ]
    )
    torch.manual_seed(0)
    theirs = statistics(torch.stack([peer(image) for _ in range(count)]))
    images = image.expand(count, -1, -1, -1)
    ours = statistics(augment(images, recipe, seed=0, epoch=0, ids=torch.arange(count)))
    for name, values in theirs.items():
        assert stats.ks_2samp(ours[name], values).pvalue > 1e-3, name


def test_center_of_the_whole_image_at_its_own_size_only_normalizes():
    images = some_images(5)
    got = center(images, size=32, mean=MEAN, std=STD)
    torch.testing.assert_close(got, normalized(images.float()), atol=1e-5, rtol=0)


@pytest.mark.parametrize(("side", "size", "share"), [(64, 56, 0.875), (80, 32, 1.0), (32, 24, 0.9)])
def test_center_equals_torchvisions_center_crop_and_resize(side, size, share):
    images = some_images(5, side)
    got = center(images, size=size, mean=MEAN, std=STD, share=share)
    cropped = tv.center_crop(images, [round(share * side)] * 2)
    expected = normalized(tv.resize(cropped, [size, size], antialias=True).float())
    torch.testing.assert_close(got, expected, atol=1.01 / 255 / min(STD), rtol=0)
    assert (got - expected).abs().mean() < 0.2 / 255 / min(STD)


def test_images_of_another_type_or_shape_are_refused():
    ids = torch.arange(2)
    with pytest.raises(AssertionError, match=r"stored images are uint8, got torch\.float32"):
        augment(torch.zeros(2, 3, 8, 8), EVERYTHING, seed=0, epoch=0, ids=ids)
    with pytest.raises(
        AssertionError, match=r"stored images are \(B, 3, S, S\), got \(2, 3, 8, 9\)"
    ):
        center(torch.zeros(2, 3, 8, 9, dtype=torch.uint8), size=8, mean=MEAN, std=STD)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("name", RECIPES)
def test_views_on_a_gpu_equal_those_on_the_cpu(name):
    images, ids = some_images(64), torch.arange(64)
    expected = augment(images, RECIPES[name], seed=0, epoch=0, ids=ids)
    got = augment(images.cuda(), RECIPES[name], seed=0, epoch=0, ids=ids.cuda()).cpu()
    difference = (got - expected).abs() * 255 * STD[0]
    assert difference.mean() < 0.3 and (difference > 3).float().mean() < 0.02
