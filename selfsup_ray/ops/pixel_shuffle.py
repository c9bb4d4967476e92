"""Images with their pixels in random places: what is left when patches have no structure."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from selfsup_ray.ops.rng import uniforms

Shuffle = Literal["pixels", "values"]
"""`pixels` moves the colors of a pixel together, `values` moves each alone."""
STREAM = 2_001  # its own random numbers, apart from those of crops and flips


def shuffled_pixels(
    images: Tensor, ids: Tensor, *, seed: int, epoch: int, shuffle: Shuffle
) -> Tensor:
    """Return images (B, C, H, W) with a new permutation for each: by (seed, epoch, id) alone.

    ids: (B,) int64. (Brutzkus et al. 2022 draw a permutation for every image, not one for all.)
    """
    count, channels, height, width = images.shape
    rows = images.flatten(2) if shuffle == "pixels" else images.reshape(count, 1, -1)
    keys = uniforms(seed=seed, epoch=epoch, ids=ids.cpu(), draws=rows.shape[2], stream=STREAM)
    order = torch.argsort(keys, dim=1, stable=True).to(images.device)
    mixed = rows.gather(2, order[:, None].expand(-1, rows.shape[1], -1))
    return mixed.reshape(count, channels, height, width)
