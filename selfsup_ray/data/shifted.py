"""Views by a shift of a few pixels and a flip: the usual augmentation of small images."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from selfsup_ray.config import NonNegative, Share, config
from selfsup_ray.data.views import Mean, Std
from selfsup_ray.ops.crop_flip import Windows, cut, draw_windows
from selfsup_ray.ops.pixel_shuffle import Shuffle, shuffled_pixels

EVALUATION_EPOCH = -1
"""Stands for the epoch where random numbers of evaluation views are drawn."""


@config
class ShiftedConfig:
    """A flip, then a crop of the image's own side out of the image with a black border."""

    padding: NonNegative = 4
    """Pixels of the border on every side; 0 leaves the images where they are."""
    flip_p: Share = 0.5
    """Probability of a left-right flip."""
    mean: Mean = (0.5, 0.5, 0.5)
    """Mean of red, green, blue in [0, 1], subtracted; the defaults scale to [-1, 1]."""
    std: Std = (0.5, 0.5, 0.5)
    """Standard deviation of red, green, blue, by which every view is divided."""
    shuffle: Shuffle | None = None
    """A comparison: every view's pixels in random places, `pixels` with their colors together,
    `values` each number alone. A dictionary for it needs the same in `whiten`."""


@dataclass(frozen=True)
class ShiftedViews:
    """Makes the shifted view of a batch; a `MakeViews`, picklable.

    What comes after the images, such as the codes of the same views, is passed on as it is.
    """

    config: ShiftedConfig
    seed: int

    def windows(self, ids: Tensor, epoch: int) -> Windows:
        """Return where the views of these ids lie in this epoch: by (seed, epoch, id) alone."""
        made = self.config
        return draw_windows(
            ids, seed=self.seed, epoch=epoch, padding=made.padding, flip_p=made.flip_p
        )

    def __call__(self, images: list[Tensor], ids: Tensor, epoch: int) -> list[Tensor]:
        """Return [float32 views (B, 3, S, S), …] of [uint8 images (B, 3, S, S), …]."""
        windows = self.windows(ids, epoch)
        views = cut(images[0], windows, padding=self.config.padding)
        return [self._finished(views, ids, epoch), *images[1:]]

    def evaluation(self, images: Tensor, ids: Tensor) -> Tensor:
        """Return the float32 view (B, 3, S, S) of uint8 images that accuracy is measured on."""
        return self._finished(images, ids, EVALUATION_EPOCH)

    def _finished(self, views: Tensor, ids: Tensor, epoch: int) -> Tensor:
        how = self.config.shuffle
        if how is not None:
            views = shuffled_pixels(views, ids, seed=self.seed, epoch=epoch, shuffle=how)
        return normalized(views, self.config)


def normalized(images: Tensor, config: ShiftedConfig) -> Tensor:
    """Return uint8 images (B, 3, S, S) as float32, (level / 255 - mean) / std by channel."""
    mean = torch.tensor(config.mean, device=images.device)[:, None, None]
    std = torch.tensor(config.std, device=images.device)[:, None, None]
    return (images.float() / 255 - mean) / std
