"""data/views.py: the presets' numbers against the papers', and the callables made of them."""

from __future__ import annotations

import pickle
from dataclasses import fields

import pytest
import torch
from torch import Tensor

from selfsup_ray.config import build, config, override, to_dict
from selfsup_ray.data.views import (
    IMAGENET_MEAN,
    IMAGENET_STD,
    BYOLViews,
    EvalView,
    InsDisViews,
    MoCoV1Views,
    MoCoV2Views,
    ScanSimCLRViews,
    ScanStrongViews,
    SeLaViews,
    SimCLRViews,
    StandardViews,
    Views,
    ViewsConfig,
    WeakStrongViews,
    recipe,
)
from selfsup_ray.errors import ConfigError
from selfsup_ray.ops.augment import augment, center

PRESETS = [
    StandardViews(),
    SimCLRViews(),
    InsDisViews(),
    MoCoV1Views(),
    MoCoV2Views(),
    BYOLViews(),
    ScanSimCLRViews(),
    ScanStrongViews(),
    SeLaViews(),
]
IDS = torch.arange(6) + 50


@config
class Holder:
    """A stage config with views in it."""

    views: ViewsConfig = SimCLRViews()


def some_images(seed: int = 0, side: int = 20) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, 256, (6, 3, side, side), generator=generator).byte()


def test_simclr_has_the_papers_numbers_at_224_and_its_cifar_setting():
    numbers = recipe(SimCLRViews(), 224)
    assert numbers.scale == (0.08, 1.0) and numbers.ratio == (3 / 4, 4 / 3)
    assert numbers.interpolation == "bicubic" and numbers.flip_p == 0.5
    assert numbers.jitter == (0.8, 0.8, 0.8, 0.2) and numbers.jitter_p == 0.8
    assert numbers.gray_p == 0.2 and numbers.order == ("jitter", "gray", "blur", "solarize")
    # Side // 10 = 22 taps, made odd: 23.
    assert numbers.blur_p == 0.5 and numbers.blur_radius == 11 and numbers.blur_sigma == (0.1, 2)
    assert numbers.solarize_p == 0 and not numbers.additive_brightness
    cifar = recipe(SimCLRViews(strength=0.5, blur_p=0.0), 32)
    assert cifar.jitter == (0.4, 0.4, 0.4, 0.1) and cifar.blur_p == 0 and cifar.size == 32


def test_moco_v1_is_gray_then_always_jitter_and_has_no_blur():
    numbers = recipe(MoCoV1Views(), 224)
    assert numbers.order == ("gray", "jitter") and numbers.gray_p == 0.2
    assert numbers.jitter == (0.4, 0.4, 0.4, 0.4) and numbers.jitter_p == 1
    assert numbers.scale == (0.2, 1.0) and numbers.blur_p == 0 and numbers.flip_p == 0.5


def test_insdis_on_cifar_is_always_jitter_then_gray_and_has_no_flip():
    numbers = recipe(InsDisViews(), 32)
    assert numbers.order == ("jitter", "gray", "blur", "solarize") and numbers.gray_p == 0.2
    assert numbers.jitter == (0.4, 0.4, 0.4, 0.4) and numbers.jitter_p == 1
    assert numbers.scale == (0.2, 1.0) and numbers.blur_p == 0 and numbers.flip_p == 0
    assert numbers.solarize_p == 0 and numbers.interpolation == "bilinear"


def test_aug_plus_differs_from_it_in_flip_jitter_hue_and_blur():
    base, plus = recipe(InsDisViews(), 32), recipe(MoCoV2Views(), 32)
    changed = {f.name for f in fields(base) if getattr(base, f.name) != getattr(plus, f.name)}
    assert changed - {"blur_radius", "rotate_degrees"} == {"flip_p", "jitter", "jitter_p", "blur_p"}


def test_moco_v2_blurs_with_three_of_the_largest_sigma():
    numbers = recipe(MoCoV2Views(), 224)
    assert numbers.scale == (0.2, 1.0) and numbers.interpolation == "bilinear"
    assert numbers.jitter == (0.4, 0.4, 0.4, 0.1) and numbers.jitter_p == 0.8
    assert numbers.gray_p == 0.2 and numbers.blur_p == 0.5 and numbers.blur_radius == 6
    assert numbers.rotate_p == 0
    turned = recipe(MoCoV2Views(rotate_p=0.5), 224)
    assert turned.rotate_p == 0.5 and turned.rotate_degrees == 30
    assert recipe(MoCoV2Views(), 5).blur_radius == 4  # a reflected border ends there


def test_byol_has_two_different_views():
    first, second, third = (recipe(BYOLViews(), 224, view) for view in range(3))
    assert (first.blur_p, first.solarize_p) == (1.0, 0.0)
    assert (second.blur_p, second.solarize_p) == (0.1, 0.2)
    assert third == first and first.solarize_threshold == 0.5
    assert first.jitter == (0.4, 0.4, 0.2, 0.1) and first.additive_brightness
    assert first.scale == (0.08, 1.0) and first.blur_radius == 11


def test_scan_has_its_simclr_and_its_strong_pipeline():
    simclr = recipe(ScanSimCLRViews(), 32)
    assert simclr.scale == (0.2, 1.0) and simclr.jitter == (0.4, 0.4, 0.4, 0.1)
    assert simclr.jitter_p == 0.8 and simclr.gray_p == 0.2 and simclr.blur_p == 0
    strong = recipe(ScanStrongViews(), 32)
    assert strong.scale is None and strong.share == 1 and strong.flip_p == 0.5
    assert strong.strong_ops == 4 and strong.cutout == 16 and strong.jitter_p == 0
    standard = recipe(StandardViews(), 32)
    assert standard.scale == (0.08, 1.0) and standard.flip_p == 0.5 and standard.jitter_p == 0


@pytest.mark.parametrize("preset", PRESETS, ids=lambda preset: preset.name)
def test_a_preset_survives_yaml_values_pickling_and_an_override_of_its_size(preset):
    holder = Holder(views=preset)
    assert build(Holder, to_dict(holder)) == holder
    assert pickle.loads(pickle.dumps(preset)) == preset
    smaller = override(holder, {"views.size": 12}).views
    assert recipe(smaller, 20).size == 12 and recipe(preset, 20).size == 20


@pytest.mark.parametrize("preset", PRESETS, ids=lambda preset: preset.name)
def test_views_are_the_recipes_views_with_the_view_as_stream(preset):
    images = some_images()
    make = pickle.loads(pickle.dumps(Views(preset, image_size=20, seed=7, num_views=3)))
    views = make([images], IDS, 5)
    assert len(views) == 3
    for i, view in enumerate(views):
        expected = augment(images, recipe(preset, 20, i), seed=7, epoch=5, ids=IDS, stream=i)
        assert torch.equal(view, expected)
    assert not torch.equal(views[0], views[1])


def test_anchor_and_neighbor_get_one_view_each_of_the_same_recipe():
    anchors, neighbors = some_images(0), some_images(1)
    views = Views(BYOLViews(), image_size=20, seed=7)([anchors, neighbors], IDS, 0)
    numbers = recipe(BYOLViews(), 20)
    assert len(views) == 2
    assert torch.equal(views[0], augment(anchors, numbers, seed=7, epoch=0, ids=IDS, stream=0))
    assert torch.equal(views[1], augment(neighbors, numbers, seed=7, epoch=0, ids=IDS, stream=1))


def test_eval_view_is_the_same_for_every_id_and_epoch():
    images = some_images()
    make = pickle.loads(pickle.dumps(EvalView(size=12, share=0.9)))
    (first,), (second,) = make([images], IDS, 0), make([images], IDS + 1, 3)
    expected = center(images, size=12, mean=IMAGENET_MEAN, std=IMAGENET_STD, share=0.9)
    assert torch.equal(first, expected) and torch.equal(second, expected)
    assert len(make([images, images], IDS, 0)) == 2


def test_weak_and_strong_views_share_size_normalization_and_crop():
    preset = ScanStrongViews(share=0.8, mean=(0.5, 0.5, 0.5), std=(0.2, 0.2, 0.2), size=14)
    make = pickle.loads(pickle.dumps(WeakStrongViews(preset, image_size=20, seed=3)))
    images = some_images()
    weak, strong = make([images], IDS, 1)
    expected = center(images, size=14, mean=(0.5, 0.5, 0.5), std=(0.2, 0.2, 0.2), share=0.8)
    assert torch.equal(weak, expected)
    numbers = recipe(preset, 20)
    assert torch.equal(strong, augment(images, numbers, seed=3, epoch=1, ids=IDS))
    plain = WeakStrongViews(SimCLRViews(), image_size=20, seed=3)([images], IDS, 1)
    assert torch.equal(plain[0], EvalView(size=20)([images], IDS, 1)[0])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"views.scale": [0.5, 0.2]}, r"`views\.scale`: the lower end 0\.5 is above .* 0\.2"),
        ({"views.scale": [0.0, 1.0]}, r"`views\.scale\.0`: .* greater than 0"),
        (
            {"views.jitter": [0.4, 0.4, 0.4, 0.6]},
            r"`views\.jitter\.3`: .* less than or equal to 0\.5",
        ),
        ({"views.std": [0.2, 0.2, 0.0]}, r"`views\.std\.2`: .* greater than 0"),
        ({"views.blur": 0.5}, r"Unknown key `views\.blur`: did you mean `blur_p`"),
        ({"views.name": "simcrl"}, r"`views\.name`: 'simcrl' is not one of standard, simclr"),
    ],
)
def test_a_wrong_value_is_refused_by_its_dotted_key(change, message):
    with pytest.raises(ConfigError, match=message):
        override(Holder(), change)


def test_sela_has_the_four_published_levels():
    square, flipped, cropped, full = (recipe(SeLaViews(size=224, level=i), 256) for i in range(4))
    assert square.central and square.share == 0.875 and square.scale is None
    assert (square.flip_p, flipped.flip_p, cropped.flip_p) == (0.0, 0.5, 0.5)
    assert cropped.scale == (0.08, 1.0) and cropped.jitter_p == cropped.gray_p == 0
    assert full.scale == (0.08, 1.0) and full.order == ("gray", "jitter") and full.gray_p == 0.2
    assert full.jitter == (0.4, 0.4, 0.4, 0.4) and full.jitter_p == 1
    cifar = recipe(SeLaViews(size=224, scale=(0.2, 1.0), gray_first=False), 32)
    assert cifar.order == ("jitter", "gray") and cifar.scale == (0.2, 1.0)


def test_selas_lowest_level_is_the_evaluation_view():
    images = some_images(side=32)
    views = Views(SeLaViews(size=28, level=0), image_size=32, seed=0, num_views=1)
    plain = center(images, size=28, mean=IMAGENET_MEAN, std=IMAGENET_STD, share=0.875)
    torch.testing.assert_close(views([images], IDS, 3)[0], plain)
