"""Crop and flip: a view is the window that its draw says, and draws depend on the image alone."""

import numpy as np
import torch
import torch.nn.functional as F

from selfsup_ray.ops.crop_flip import center_windows, cut, draw_windows


def images(n: int) -> torch.Tensor:
    rng = np.random.default_rng(0)
    return torch.from_numpy(rng.integers(1, 256, (n, 3, 8, 6), dtype=np.uint8))


def test_a_view_is_the_flipped_padded_cropped_image():
    made = images(40)
    windows = draw_windows(torch.arange(40), seed=3, epoch=1, padding=2)
    views = cut(made, windows, padding=2)
    assert windows.flips.any() and not windows.flips.all()
    for i in range(40):
        image = made[i].flip(2) if windows.flips[i] else made[i]
        top, left = int(windows.tops[i]), int(windows.lefts[i])
        expected = F.pad(image, (2, 2, 2, 2))[:, top : top + 8, left : left + 6]
        assert torch.equal(views[i], expected)


def test_the_central_window_is_the_image():
    made = images(5)
    assert torch.equal(cut(made, center_windows(5, padding=4), padding=4), made)


def test_draws_are_uniform_and_do_not_depend_on_the_batch():
    ids = torch.arange(20_000)
    windows = draw_windows(ids, seed=0, epoch=0, padding=4)
    for corners in (windows.tops, windows.lefts):
        counts = torch.bincount(corners, minlength=9)
        assert len(counts) == 9 and (counts - 20_000 / 9).abs().max() < 5 * (20_000 / 9) ** 0.5
    assert abs(float(windows.flips.double().mean()) - 0.5) < 0.02
    some = draw_windows(ids[[7, 5]], seed=0, epoch=0, padding=4)
    assert torch.equal(some.tops, windows.tops[[7, 5]])
    later = draw_windows(ids, seed=0, epoch=1, padding=4)
    assert not torch.equal(later.lefts, windows.lefts)
