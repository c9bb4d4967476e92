"""What a saved network expects of images, and how new files become that."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from selfsup_ray.config import Positive, PositiveFloat, config
from selfsup_ray.data.decode import read_square
from selfsup_ray.data.views import PositiveShare

Channels = tuple[float, float, float]
PositiveChannels = tuple[PositiveFloat, PositiveFloat, PositiveFloat]
Source = str | Path | Sequence[str | Path] | Tensor


@config
class ImageInput:
    """How a network's images were made: stored side, fit, and the evaluation view's numbers."""

    image_size: Positive
    """Side in pixels that files are decoded to, as the corpus stored them."""
    view_size: Positive | None = None
    """Side the network sees; None: image_size."""
    share: PositiveShare = 1.0
    """Side of the central square that is seen, as a share of image_size."""
    mean: Channels = (0.485, 0.456, 0.406)
    """Per channel, of pixels in [0, 1]; the defaults are ImageNet's."""
    std: PositiveChannels = (0.229, 0.224, 0.225)
    """Per channel, of pixels in [0, 1]."""
    fit: Literal["crop", "pad", "squash"] = "crop"
    """How an oblong file becomes a square: see data.decode."""


def image_batches(source: Source, images: ImageInput, *, batch_size: int) -> Iterator[Tensor]:
    """Yield uint8 batches (b, 3, S, S), b <= batch_size, of files or of a uint8 tensor, in order.

    source: a path, a sequence of paths, or (n, 3, S, S) uint8.
    Raises ImageError (a user error) naming the first file that is no readable image.
    """
    if isinstance(source, Tensor):
        assert source.dtype == torch.uint8, f"images are uint8, got {source.dtype}"
        yield from torch.split(source, batch_size)
        return
    paths = [source] if isinstance(source, str | Path) else list(source)
    for first in range(0, len(paths), batch_size):
        pixels = [
            read_square(Path(path), size=images.image_size, fit=images.fit)
            for path in paths[first : first + batch_size]
        ]
        yield torch.from_numpy(np.stack(pixels)).permute(0, 3, 1, 2)
