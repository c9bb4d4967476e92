"""Views by a shift of a few pixels and a flip: the usual augmentation of small images."""

from __future__ import annotations

from selfsup_ray.config import NonNegative, Share, config
from selfsup_ray.data.views import Mean, Std


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
