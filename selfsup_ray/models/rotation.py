"""Rotation prediction beside another task: by how many right angles an image is turned."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

TURNS = 4


def turned(images: Tensor) -> Tensor:
    """Return images (n, 3, s, s) as they are, then turned by 90, 180 and 270 degrees: (4 n, ...).

    Counter-clockwise; the memory layout of the images is kept.
    """
    is_last = images.is_contiguous(memory_format=torch.channels_last)
    order = torch.channels_last if is_last else torch.contiguous_format
    every = [images.rot90(turns, (2, 3)) for turns in range(TURNS)]
    return torch.cat(every).contiguous(memory_format=order)


class RotationHead(nn.Linear):
    """A classifier of the four rotations (RotNet: Gidaris, Singh, Komodakis 2018)."""

    def __init__(self, dim: int) -> None:
        """dim: of the features."""
        super().__init__(dim, TURNS)
        nn.init.normal_(self.weight, std=0.01)
        nn.init.zeros_(self.bias)

    def loss(self, features: Tensor) -> tuple[Tensor, Tensor]:
        """Return cross-entropy (nats) and accuracy in [0, 1], means over the rows of `turned`.

        features: (4 n, dim), of the images in the order of `turned`.
        """
        logits = self(features)
        turns = torch.arange(TURNS, device=logits.device).repeat_interleave(len(logits) // TURNS)
        hits = logits.detach().argmax(dim=1) == turns
        return F.cross_entropy(logits, turns), hits.float().mean()
