"""Thumbnails of the report: one sprite sheet per group of images, and the map made of images."""

from __future__ import annotations

import base64
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape
from io import BytesIO
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch.nn.functional import interpolate

from selfsup_ray.data.corpus import Corpus
from selfsup_ray.plots import HUES

Array = np.ndarray[Any, np.dtype[Any]]

READ = 256
"""Images held at full size at a time."""
PIXELS = 10_000_000
"""Pixels of all contact sheets together: 8 MB of page when they are photographs."""
BLOCK = 8
"""JPEG works on blocks of 8 x 8: tiles start on a block, so that none stains its neighbor."""


def thumbnails(corpus: Corpus, ids: Array, *, side: int) -> Array:
    """Return images of these ids as (n, s, s, 3) uint8, s = side or the stored size if smaller."""
    s = min(side, corpus.image_size)
    out = np.empty((len(ids), s, s, 3), np.uint8)
    for start in range(0, len(ids), READ):
        images = corpus.images(ids[start : start + READ])
        if s < corpus.image_size:
            smaller = interpolate(images.float(), size=(s, s), mode="bilinear", antialias=True)
            images = smaller.round().clamp(0, 255).to(torch.uint8)
        out[start : start + READ] = images.permute(0, 2, 3, 1).numpy()
    return out


@dataclass(frozen=True)
class Sheet:
    """One JPEG that holds thumbnails side by side, `columns` in a row.

    style: CSS for the element around the thumbnails; they find the picture there, so it is in the
    page once.
    """

    style: str
    columns: int
    rows: int
    side: int
    pitch: int

    @classmethod
    def of(cls, tiles: Array, *, columns: int) -> Sheet:
        """Return the sheet of (n, s, s, 3) uint8 tiles, n > 0."""
        n, s = tiles.shape[:2]
        rows, pitch = -(-n // columns), -(-(s + 2) // BLOCK) * BLOCK
        before = (pitch - s) // 2
        rim = (before, pitch - s - before)
        # Repeated edges, so that a browser that scales the sheet blends a tile with itself only.
        padded = np.pad(tiles, ((0, rows * columns - n), rim, rim, (0, 0)), mode="edge")
        grid = padded.reshape(rows, columns, pitch, pitch, 3).transpose(0, 2, 1, 3, 4)
        picture = grid.reshape(rows * pitch, columns * pitch, 3)
        size = f"{100 * columns * pitch / s:.4f}% {100 * rows * pitch / s:.4f}%"
        style = (
            f"--sheet:url({jpeg_uri(picture)});--size:{size};--n:{columns};--m:{min(columns, 6)}"
        )
        return cls(style, columns, rows, s, pitch)

    def position(self, i: int) -> str:
        """Return the CSS background-position that shows tile i."""
        row, column = divmod(i, self.columns)
        return f"{self._percent(column, self.columns)} {self._percent(row, self.rows)}"

    def _percent(self, i: int, count: int) -> str:
        # A background at p % puts the point p % of the sheet on the point p % of the element.
        offset = i * self.pitch + (self.pitch - self.side) // 2
        return f"{100 * offset / (count * self.pitch - self.side):.4f}%"

    @property
    def css_class(self) -> str:
        """`crisp` for images so small that smoothing would only blur them."""
        return "crisp" if self.side <= 40 else ""


def thumb(sheet: Sheet, i: int, *, title: str, is_off: bool = False) -> str:
    """Return tile i of a sheet; the title shows on hover; an image that is off gets a cross."""
    classes = "thumb off" if is_off else "thumb"
    place = f"background-position:{sheet.position(i)}"
    return f'<i class="{classes}" style="{place}" title="{escape(title)}"></i>'


def sheet_size(groups: int, *, image_size: int, most: int = 12) -> tuple[int, int]:
    """Return (images per row, thumbnail side) for two rows of each of so many groups.

    At most PIXELS in all: 12 images of 64 pixels up to 100 groups, beyond that fewer, then
    smaller ones.
    """
    side = min(image_size, 64)
    per_row = PIXELS // max(2 * groups * side * side, 1)
    if per_row >= 6:
        return min(most, per_row), side
    return 6, max(24, min(side, int((PIXELS / (12 * groups)) ** 0.5)))


def jpeg_uri(picture: Array) -> str:
    """Return an (h, w, 3) uint8 picture as a JPEG data URI, in one channel when it is grey."""
    is_grey = bool((picture[..., :1] == picture).all())
    image = Image.fromarray(np.ascontiguousarray(picture[..., 0]) if is_grey else picture)
    buffer = BytesIO()
    image.save(buffer, "JPEG", quality=80, subsampling=0, optimize=True)
    return data_uri(buffer.getvalue(), "image/jpeg")


def data_uri(data: bytes, mime: str) -> str:
    """Return bytes as a data URI."""
    return f"data:{mime};base64,{base64.b64encode(data).decode()}"


@dataclass(frozen=True)
class Placed:
    """Which images a map of thumbnails shows: rows of the positions given, and their grid cells."""

    rows: Array
    cells: Array
    grid: tuple[int, int]


def place(xy: Array, *, cells: int) -> Placed:
    """Return at most one image for each cell of a grid over the map: the nearest to its center.

    xy: (n, 2) positions; cells: cells along the longer side.
    """
    low, span = xy.min(axis=0), np.maximum(np.ptp(xy, axis=0), 1e-9)
    step = float(span.max()) / cells
    grid = np.maximum(np.ceil(span / step - 1e-6).astype(int), 1)
    scaled = (xy - low) / step
    at = np.minimum(scaled.astype(int), grid - 1)
    distance = ((scaled - at - 0.5) ** 2).sum(axis=1)
    number = at[:, 1] * grid[0] + at[:, 0]
    order = np.lexsort((np.arange(len(xy)), distance, number))
    first = np.concatenate([[True], np.diff(number[order]) > 0])
    rows = order[first]
    return Placed(rows, at[rows], (int(grid[0]), int(grid[1])))


def map_picture(tiles: Array, placed: Placed, groups: Sequence[int] | Array) -> str:
    """Return the map of thumbnails as a transparent WebP data URI, framed in the group's colour.

    tiles: (m, s, s, 3) uint8 of the placed images; groups: (m,) index of the colour, -1 = grey.
    """
    s, rim = tiles.shape[1], 2
    pitch = s + 2 * rim + 1
    columns, rows = placed.grid
    canvas = np.zeros((rows * pitch, columns * pitch, 4), np.uint8)
    palette = np.array([[int(hue[i : i + 2], 16) for i in (1, 3, 5)] for hue in HUES], np.uint8)
    for tile, (x, y), group in zip(tiles, placed.cells, groups, strict=True):
        top, left = (rows - 1 - y) * pitch, x * pitch  # the map's y axis points up
        box = canvas[top : top + s + 2 * rim, left : left + s + 2 * rim]
        box[..., 3] = 255
        box[..., :3] = palette[group % len(palette)] if group >= 0 else 128
        box[rim:-rim, rim:-rim, :3] = tile
    buffer = BytesIO()
    Image.fromarray(canvas).save(buffer, "WEBP", quality=80, method=4)
    return data_uri(buffer.getvalue(), "image/webp")
