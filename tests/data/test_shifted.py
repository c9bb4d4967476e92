"""Shifted views: flip, black border, crop, by slow loops; chances; the codes that come along."""

import numpy as np
import torch

from selfsup_ray.data.shifted import ShiftedConfig, ShiftedViews, normalized

IMAGES = torch.randint(0, 256, (6, 3, 7, 7), generator=torch.Generator().manual_seed(0)).byte()
IDS = torch.arange(6) * 11


def test_a_view_is_a_flip_and_a_crop_of_the_image_with_a_black_border():
    made = ShiftedConfig(padding=2, mean=(0.5, 0.4, 0.3), std=(0.5, 0.2, 0.1))
    views = ShiftedViews(made, seed=3)
    [got] = views([IMAGES], IDS, 5)
    where = views.windows(IDS, 5)
    for i in range(6):
        image = IMAGES[i].numpy()
        image = image[:, :, ::-1] if where.flips[i] else image
        wide = np.pad(image, ((0, 0), (2, 2), (2, 2)))
        top, left = int(where.tops[i]), int(where.lefts[i])
        for c in range(3):
            level = wide[c, top : top + 7, left : left + 7] / 255
            want = (level - made.mean[c]) / made.std[c]
            np.testing.assert_allclose(got[i, c], want, rtol=1e-5, atol=1e-5)


def test_a_view_depends_on_seed_epoch_and_id_alone():
    views = ShiftedViews(ShiftedConfig(), seed=3)
    [whole], [part] = views([IMAGES], IDS, 5), views([IMAGES[2:4]], IDS[2:4], 5)
    assert torch.equal(whole[2:4], part)
    assert not torch.equal(whole, views([IMAGES], IDS, 6)[0])
    assert not torch.equal(whole, ShiftedViews(ShiftedConfig(), seed=4)([IMAGES], IDS, 5)[0])


def test_flips_and_shifts_have_even_chances():
    where = ShiftedViews(ShiftedConfig(padding=1), seed=0).windows(torch.arange(20_000), 0)
    assert abs(where.flips.float().mean() - 0.5) < 0.02
    for corners in (where.tops, where.lefts):
        counts = torch.bincount(corners, minlength=3) / 20_000
        assert len(counts) == 3 and (counts - 1 / 3).abs().max() < 0.02


def test_without_border_and_flip_a_view_is_the_image():
    made = ShiftedConfig(padding=0, flip_p=0)
    [got, codes] = ShiftedViews(made, seed=0)([IMAGES, IMAGES[:, 0]], IDS, 0)
    assert torch.equal(got, normalized(IMAGES, made)) and codes is not None
    assert torch.equal(codes, IMAGES[:, 0])
