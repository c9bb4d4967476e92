"""Pixels in random places: the same pixels, a permutation of its own for every image."""

import pytest
import torch

from selfsup_ray.ops.pixel_shuffle import shuffled_pixels


def images(count: int = 6, side: int = 7) -> torch.Tensor:
    made = torch.randint(0, 256, (count, 3, side, side), generator=torch.manual_seed(0))
    return made.to(torch.uint8)


@pytest.mark.parametrize("shuffle", ["pixels", "values"])
def test_every_image_keeps_what_it_is_made_of(shuffle: str):
    x, ids = images(), torch.arange(6)
    mixed = shuffled_pixels(x, ids, seed=1, epoch=0, shuffle=shuffle)
    assert mixed.dtype == x.dtype and not torch.equal(mixed, x)
    if shuffle == "pixels":  # colors stay together: sort the pixels as triples
        for before, after in zip(x.flatten(2), mixed.flatten(2), strict=True):
            assert sorted(before.T.tolist()) == sorted(after.T.tolist())
    else:
        for before, after in zip(x.flatten(1), mixed.flatten(1), strict=True):
            torch.testing.assert_close(before.sort().values, after.sort().values)


def test_the_permutation_is_new_for_every_image_and_epoch_and_knows_no_batch():
    x = images(1).expand(4, -1, -1, -1)
    ids = torch.tensor([5, 9, 5, 2])
    mixed = shuffled_pixels(x, ids, seed=3, epoch=2, shuffle="pixels")
    torch.testing.assert_close(mixed[0], mixed[2])
    assert not torch.equal(mixed[0], mixed[1]) and not torch.equal(mixed[1], mixed[3])
    alone = shuffled_pixels(x[:1], ids[1:2], seed=3, epoch=2, shuffle="pixels")
    torch.testing.assert_close(alone[0], mixed[1])
    later = shuffled_pixels(x, ids, seed=3, epoch=3, shuffle="pixels")
    assert not torch.equal(later, mixed)
