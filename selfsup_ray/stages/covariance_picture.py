"""The picture of covariances before and after whitening, which a run keeps and a tracker takes."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from PIL import Image

from selfsup_ray.artifacts import Array, whole_file
from selfsup_ray.plots import covariance_cells

HEAT_MAP = 300
"""Pixels that the side of a covariance's heat-map has at most, unless it has more numbers."""


def write_covariances(before: Array, after: Array, path: Path) -> Path:
    """Write the heat-maps of two covariances (d, d) beside each other; return the path.

    Colors as in `plots.plot_covariance`, on white: raw patches left, whitened ones right.
    """
    times, maps = max(1, HEAT_MAP // len(before)), []
    for cells in (covariance_cells(before), covariance_cells(after)):
        opacity = cells[..., 3:]
        levels = (255 * (cells[..., :3] * opacity + 1 - opacity)).round().astype(np.uint8)
        maps.append(levels.repeat(times, axis=0).repeat(times, axis=1))
    gap = np.full((len(maps[0]), 20, 3), 255, np.uint8)
    with whole_file(path) as temporary:
        Image.fromarray(np.hstack([maps[0], gap, maps[1]])).save(temporary, "PNG")
    return path
