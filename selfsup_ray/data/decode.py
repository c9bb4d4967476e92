"""From the bytes of any image file to right RGB, squared, or a reason code that says why not."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

import numpy as np
from PIL import Image

from selfsup_ray.artifacts import Array
from selfsup_ray.data.formats import is_mislabelled
from selfsup_ray.data.images import MAX_PIXELS, ImageError, Stored, upright
from selfsup_ray.data.jpeg import Least, decode_jpeg
from selfsup_ray.data.pillow import decode_pillow

Fit = Literal["crop", "pad", "squash"]


@dataclass(frozen=True)
class Decoded:
    """pixels: (H, W, 3) uint8, upright; notes: codes of what had to be interpreted.

    Codes: grey, palette, alpha (composited on white), cmyk, rotated (EXIF), animated (the first
    frame), deep (more than 8 bits a channel, scaled linearly), rescaled (a range had to be
    guessed), mislabelled (the name says another format), damaged (harmless decoder warnings).
    """

    pixels: Array
    notes: tuple[str, ...] = ()


def read_square(path: Path, *, size: int, fit: Fit, max_pixels: int = MAX_PIXELS) -> Array:
    """Return an image file as (size, size, 3) uint8.

    Raises ImageError, a user error, naming the path and the reason.
    """
    try:
        data = path.read_bytes()
    except PermissionError:
        raise ImageError("permission", "not allowed to read it", name=str(path)) from None
    except OSError as error:
        raise ImageError("missing", str(error.strerror), name=str(path)) from None
    return decode_square(data, name=str(path), size=size, fit=fit, max_pixels=max_pixels).pixels


def decode_square(
    data: bytes, *, name: str = "", size: int, fit: Fit, max_pixels: int = MAX_PIXELS
) -> Decoded:
    """Return an encoded image as (size, size, 3) uint8, resized with antialiasing (bilinear).

    fit `crop`: the central square; `pad`: all of it on black; `squash`: all of it, distorted.
    A JPEG more than twice as large as needed is scaled down by eighths while it is decoded.
    Raises ImageError.
    """

    def least(height: int, width: int) -> tuple[int, int]:
        rows, columns = scaled_sides(height, width, size=size, fit=fit)
        return 2 * rows, 2 * columns  # so that antialiasing still does most of the work

    stored = _stored(data, name=name, max_pixels=max_pixels, least=least)
    square = squared(stored.pixels, size=size, fit=fit, extent=stored.extent)
    # A square turns as the image does, and is smaller.
    return Decoded(upright(square, stored.turn), stored.notes)


def decode(data: bytes, *, name: str = "", max_pixels: int = MAX_PIXELS) -> Decoded:
    """Return an encoded image as upright RGB at its own size.

    name decides nothing but the note `mislabelled`; the format is found from the content.
    Raises ImageError.
    """
    stored = _stored(data, name=name, max_pixels=max_pixels, least=None)
    return Decoded(upright(stored.pixels, stored.turn), stored.notes)


def _stored(data: bytes, *, name: str, max_pixels: int, least: Least | None) -> Stored:
    if not data:
        raise ImageError("empty", "0 bytes", name=name)
    try:
        if data[:3] == b"\xff\xd8\xff":
            stored = decode_jpeg(data, max_pixels=max_pixels, least=least)
        else:
            stored = decode_pillow(data, max_pixels=max_pixels)
    except ImageError as bad:
        raise ImageError(bad.reason, bad.detail, name=name) from None
    if is_mislabelled(name, stored.kind):
        return replace(stored, notes=(*stored.notes, "mislabelled"))
    return stored


def squared(
    pixels: Array, *, size: int, fit: Fit, extent: tuple[float, float] | None = None
) -> Array:
    """Return (H, W, 3) pixels as (size, size, 3), resized with antialiasing (bilinear).

    extent: (height, width) that the image covers of them; all by default.
    """
    height, width = extent or pixels.shape[:2]
    if height == width == size:
        return pixels
    image = Image.fromarray(pixels)
    if fit == "pad":
        rows, columns = scaled_sides(height, width, size=size, fit=fit)
        whole = (0.0, 0.0, width, height)
        inner = image.resize((columns, rows), Image.Resampling.BILINEAR, box=whole)
        out = np.zeros((size, size, 3), np.uint8)
        above, before = (size - rows) // 2, (size - columns) // 2
        out[above : above + rows, before : before + columns] = np.asarray(inner)
        return out
    short = min(height, width)
    top, left = ((height - short) / 2, (width - short) / 2) if fit == "crop" else (0.0, 0.0)
    box = (left, top, width - left, height - top)
    return np.asarray(image.resize((size, size), Image.Resampling.BILINEAR, box=box))


def scaled_sides(height: float, width: float, *, size: int, fit: Fit) -> tuple[int, int]:
    """Return (height, width) of the whole image after the resize that `fit` asks for."""
    if fit == "squash":
        return size, size
    scale = size / (min(height, width) if fit == "crop" else max(height, width))
    return max(1, round(height * scale)), max(1, round(width * scale))
