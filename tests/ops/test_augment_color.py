"""ops/color.py against torchvision, colorsys and slow loops, with the same numbers."""

from __future__ import annotations

import colorsys

import numpy as np
import pytest
import torch
import torchvision.transforms.functional as tv
from torch import Tensor

from selfsup_ray.ops import color

NUMBER = {"brightness": 0, "contrast": 1, "saturation": 2, "hue": 3}
ADJUST = [tv.adjust_brightness, tv.adjust_contrast, tv.adjust_saturation, tv.adjust_hue]


def some_images(count: int = 12, side: int = 9, seed: int = 0) -> Tensor:
    """Random levels, with grey, black, white and two-equal-channel pixels among them."""
    images = torch.randint(0, 256, (count, 3, side, side), generator=torch.manual_seed(seed))
    images[0] = images[0, :1]
    images[1] = torch.tensor([0, 255, 128])[:, None, None]
    images[2, 1] = images[2, 2]
    images[3, 0] = images[3, 1]
    images[4, :, 0], images[4, :, 1] = 0, 255
    return images.float()


def test_luma_and_grayscale_equal_torchvision():
    images = some_images()
    expected = tv.rgb_to_grayscale(images / 255, num_output_channels=3) * 255
    torch.testing.assert_close(color.grayscale(images), expected, atol=1e-3, rtol=0)


@pytest.mark.parametrize("turn", [-0.5, -0.31, -1 / 6, -0.01, 0.0, 0.1, 1 / 3, 0.4999, 0.5])
def test_turn_hue_equals_torchvision_and_colorsys(turn):
    images = some_images()
    got = color.turn_hue_(images.clone(), torch.full((12,), turn, dtype=torch.float64))
    torch.testing.assert_close(got, tv.adjust_hue(images / 255, turn) * 255, atol=0.01, rtol=0)
    for row in range(6):
        pixel = images[row, :, 3, 4].double() / 255
        hue, saturation, value = colorsys.rgb_to_hsv(*pixel.tolist())
        expected = colorsys.hsv_to_rgb((hue + turn) % 1, saturation, value)
        np.testing.assert_allclose(got[row, :, 3, 4], np.array(expected) * 255, atol=0.01)


def test_turn_hue_keeps_value_and_chroma_of_every_pixel():
    images = some_images()
    got = color.turn_hue_(images.clone(), torch.linspace(-0.5, 0.5, 12))
    torch.testing.assert_close(got.amax(1), images.amax(1), atol=1e-3, rtol=0)
    torch.testing.assert_close(got.amin(1), images.amin(1), atol=1e-3, rtol=0)


@pytest.mark.parametrize("name", NUMBER)
@pytest.mark.parametrize("factor", [0.0, 0.2, 0.73, 1.0, 1.4, 1.8])
def test_each_jitter_operation_alone_equals_torchvision(name, factor):
    images, number = some_images(), NUMBER[name]
    factor = factor / 2 - 0.5 if name == "hue" else factor
    factors = torch.tensor([1.0, 1.0, 1.0, 0.0], dtype=torch.float64).repeat(12, 1)
    factors[:, number] = factor
    got = color.jitter_(images.clone(), color.jitter_table(factors, torch.arange(12)))
    expected = torch.stack([ADJUST[number](image / 255, factor) for image in images]) * 255
    torch.testing.assert_close(got, expected, atol=0.02, rtol=0)


def test_jitter_equals_torchvision_in_all_24_orders_with_other_factors_per_image():
    images = some_images(48)
    generator = torch.Generator().manual_seed(1)
    factors = torch.rand(48, 4, generator=generator, dtype=torch.float64) * 2
    factors[:, 3] = factors[:, 3] / 2 - 0.5
    orders = torch.arange(48).roll(5) % 24
    got = color.jitter_(images.clone(), color.jitter_table(factors, orders))
    for i in range(48):
        expected = images[i] / 255
        for step in color.ORDERS[orders[i]].tolist():
            expected = ADJUST[step](expected, factors[i, step].item())
        torch.testing.assert_close(got[i], expected * 255, atol=0.05, rtol=0)


def test_jitter_agrees_with_pillow_to_its_rounding():
    images = some_images(24)
    factors = torch.tensor([[0.7, 1.3, 0.6, 0.0]], dtype=torch.float64).repeat(24, 1)
    got = color.jitter_(images.clone(), color.jitter_table(factors, torch.arange(24)))
    for i in range(24):
        picture = tv.to_pil_image(images[i].byte())
        for step in color.ORDERS[i].tolist():
            picture = ADJUST[step](picture, factors[i, step].item())
        difference = got[i] - tv.pil_to_tensor(picture).float()
        # Pillow rounds down after each of four steps; its 8-bit HSV costs up to three levels more.
        assert difference.abs().mean() < 2.5 and difference.abs().max() < 8


def test_additive_brightness_adds_levels_and_clamps():
    images = some_images()
    factors = torch.tensor([[-60.0, 1.0, 1.0, 0.0]], dtype=torch.float64).repeat(12, 1)
    got = color.jitter_(
        images.clone(), color.jitter_table(factors, torch.arange(12), additive_brightness=True)
    )
    torch.testing.assert_close(got, (images - 60).clamp(0, 255), atol=1e-3, rtol=0)


def test_jitter_works_in_place_and_treats_images_one_by_one():
    images = some_images(24)
    generator = torch.Generator().manual_seed(2)
    factors = torch.rand(24, 4, generator=generator, dtype=torch.float64) - 0.2
    factors[:, 3] /= 2
    orders = torch.randint(0, 24, (24,), generator=generator)
    table = color.jitter_table(factors.abs(), orders)
    whole = images.clone()
    assert color.jitter_(whole, table) is whole
    for i in range(24):
        alone = color.jitter_(images[i : i + 1].clone(), table[i : i + 1])
        torch.testing.assert_close(alone[0], whole[i], atol=1e-3, rtol=0)


@pytest.mark.parametrize("radius", [1, 3, 6])
def test_blur_equals_torchvision_with_a_sigma_per_image(radius):
    images = some_images(side=11)
    sigmas = torch.linspace(0.1, 2.0, 12, dtype=torch.float64)
    got = color.blur(images, sigmas, radius=radius)
    for i in range(12):
        kernel = 2 * radius + 1
        expected = tv.gaussian_blur(images[i], [kernel, kernel], [float(sigmas[i])] * 2)
        torch.testing.assert_close(got[i], expected, atol=0.01, rtol=0)


def test_blur_with_three_sigma_taps_is_close_to_pillow_inside_the_image():
    from PIL import ImageFilter

    images = torch.randint(0, 256, (4, 3, 40, 40), generator=torch.manual_seed(0)).float()
    for sigma in (0.8, 1.3, 2.0):
        got = color.blur(images, torch.full((4,), sigma), radius=6)[:, :, 8:-8, 8:-8]
        for i in range(4):
            picture = tv.to_pil_image(images[i].byte()).filter(ImageFilter.GaussianBlur(sigma))
            expected = tv.pil_to_tensor(picture).float()[:, 8:-8, 8:-8]
            # Pillow approximates by three box blurs; the unblurred difference is 60 levels.
            assert (got[i] - expected).abs().mean() < 4


def test_solarize_equals_torchvision_for_one_threshold_and_for_one_per_image():
    images = some_images()
    expected = tv.solarize(images / 255, 0.5) * 255
    torch.testing.assert_close(color.solarize(images, 127.5), expected, atol=1e-3, rtol=0)
    thresholds = torch.arange(12) * 23.0
    got = color.solarize(images, thresholds)
    for i in range(12):
        expected = tv.solarize(images[i].byte(), float(thresholds[i])).float()
        torch.testing.assert_close(got[i], expected)
