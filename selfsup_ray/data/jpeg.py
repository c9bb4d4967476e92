"""JPEG by libjpeg-turbo, strictly: it finds the damage that Pillow fills with grey in silence."""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial

import simplejpeg
from PIL import Image

from selfsup_ray.artifacts import Array
from selfsup_ray.data.images import ImageError, Stored, require_pixels
from selfsup_ray.data.pillow import alone, decode_pillow, orientation

Least = Callable[[int, int], tuple[int, int]]


def decode_jpeg(data: bytes, *, max_pixels: int, least: Least | None = None) -> Stored:
    """Return a JPEG; with `least`, scaled down by eighths, but not below least(height, width).

    Rare kinds (CMYK, lossless, odd subsampling) go through Pillow. Raises ImageError.
    """
    try:
        height, width, space, _ = simplejpeg.decode_jpeg_header(data)
    except ValueError:  # a cut header, or a rare kind
        return decode_pillow(data, max_pixels=max_pixels)
    require_pixels(width, height, max_pixels)
    if space not in ("YCbCr", "Gray", "RGB"):
        _strict(data, "CMYK", (0, 0))
        return decode_pillow(data, max_pixels=max_pixels)
    pixels, damaged = _strict(data, "RGB", least(height, width) if least else (0, 0))
    turn = _orientation(data)
    notes = [("grey", space == "Gray"), ("rotated", turn > 1), ("damaged", damaged)]
    return Stored(
        pixels,
        "JPEG",
        notes=tuple(note for note, holds in notes if holds),
        turn=turn,
        extent=_extent(pixels, height, width),
    )


def _strict(data: bytes, space: str, least: tuple[int, int]) -> tuple[Array, bool]:
    """Return pixels and whether the decoder warned of something that harms no pixel."""

    def read(*, strict: bool) -> Array:
        # Exact DCT and upsampling: the same pixels as Pillow, to the bit.
        pixels: Array = simplejpeg.decode_jpeg(
            data,
            space,
            fastdct=False,
            fastupsample=False,
            min_height=least[0],
            min_width=least[1],
            strict=strict,
        )
        return pixels

    try:
        return read(strict=True), False
    except ValueError as error:
        message = str(error)
    if "remature end" in message:
        raise ImageError("truncated", message)
    if "Corrupt JPEG data" in message and "extraneous bytes" not in message:
        raise ImageError("corrupt", message)
    try:
        return read(strict=False), True
    except ValueError as error:
        raise ImageError("unreadable", str(error)) from None


def _extent(pixels: Array, height: int, width: int) -> tuple[float, float]:
    """Return how many of the rows and columns the image covers when scaled by n eighths."""
    for n in range(1, 9):
        if pixels.shape[:2] == (math.ceil(height * n / 8), math.ceil(width * n / 8)):
            return height * n / 8, width * n / 8
    return pixels.shape[0], pixels.shape[1]


def _orientation(data: bytes) -> int:
    """Return the EXIF orientation, 1 to 8, read from the APP1 segment alone."""
    at = 2
    while data[at : at + 1] == b"\xff" and (marker := data[at + 1]) not in (0xDA, 0xD9):
        stop = at + 2 + int.from_bytes(data[at + 2 : at + 4], "big")
        if marker == 0xE1 and data[at + 4 : at + 10] == b"Exif\0\0":
            with alone():
                return orientation(partial(_parsed, data[at + 4 : stop]))
        at = at + 1 if marker == 0xFF else stop
    return 1


def _parsed(exif_data: bytes) -> Image.Exif:
    exif = Image.Exif()
    exif.load(exif_data)
    return exif
