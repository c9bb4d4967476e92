"""Every format but plain JPEG by Pillow: to RGB, with all that its modes need."""

from __future__ import annotations

import struct
import threading
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from io import BytesIO

import numpy as np
from PIL import Image, UnidentifiedImageError

from selfsup_ray.artifacts import Array
from selfsup_ray.data.formats import FORMATS, signature
from selfsup_ray.data.images import ORIENTATION_TAG, ImageError, Stored, require_pixels

# Pillow's pixel limit and Python's warning filters are global: one thread at a time changes them.
_PILLOW = threading.Lock()


def decode_pillow(data: bytes, *, max_pixels: int) -> Stored:
    """Return an image of any format but plain JPEG, the first frame of several.

    Raises ImageError, whatever Pillow raises.
    """
    try:
        with alone() as caught, Image.open(BytesIO(data), formats=FORMATS) as image:
            require_pixels(image.width, image.height, max_pixels)
            notes = ["animated"] if getattr(image, "n_frames", 1) > 1 else []
            turn = orientation(image.getexif)
            notes += ["rotated"] if turn > 1 else []
            image.load()
            pixels, how = _to_rgb(image)
    except ImageError:
        raise
    except UnidentifiedImageError:
        raise _unidentified(data) from None
    except Exception as error:  # hostile bytes make Pillow's parsers raise anything at all
        raise _failed(error, data) from None
    notes += [how] if how else []
    notes += ["damaged"] if caught else []
    kind = str(image.format)
    # Pillow turns a TIFF itself while loading.
    return Stored(pixels, kind, notes=tuple(notes), turn=1 if kind == "TIFF" else turn)


def orientation(read: Callable[[], Image.Exif]) -> int:
    """Return the orientation, 1 to 8, in the EXIF data that `read` parses."""
    try:
        turn = read().get(ORIENTATION_TAG, 1)
    except (SyntaxError, ValueError, KeyError, TypeError, struct.error):
        return 1  # damaged metadata does not make a bad image
    return turn if turn in range(1, 9) else 1


@contextmanager
def alone() -> Iterator[list[warnings.WarningMessage]]:
    """Yield the list of Pillow's warnings; its own pixel limit is off, ours is checked instead."""
    with _PILLOW, warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        limit, Image.MAX_IMAGE_PIXELS = Image.MAX_IMAGE_PIXELS, None
        try:
            yield caught
        finally:
            Image.MAX_IMAGE_PIXELS = limit


def _unidentified(data: bytes) -> ImageError:
    match signature(data[:16]):
        case True:
            return ImageError(
                "unreadable", "it begins like an image, but its header cannot be read"
            )
        case False:
            return ImageError("unsupported", f"a format that is not read here ({data[:12]!r})")
    if b"<svg" in data[:1024]:
        return ImageError("unsupported", "SVG, a drawing without pixels")
    return ImageError("not_an_image", f"begins with {data[:12]!r}")


def _failed(error: Exception, data: bytes) -> ImageError:
    text = f"{type(error).__name__}: {error}"
    lower = text.lower()
    is_cut_riff = data[:4] == b"RIFF" and len(data) < 8 + int.from_bytes(data[4:8], "little")
    if "truncated" in lower or is_cut_riff:
        return ImageError("truncated", text)
    damaged = any(word in lower for word in ("broken", "corrupt", "crc", "checksum"))
    return ImageError("corrupt" if damaged else "unreadable", text)


def _to_rgb(image: Image.Image) -> tuple[Array, str]:
    """Return (H, W, 3) uint8 and the note that says what was interpreted, if anything."""
    mode = image.mode
    if mode in ("RGBA", "RGBa", "LA", "La", "PA") or "transparency" in image.info:
        return _on_white(image.convert("RGBA")), "alpha"
    if mode.startswith("I;16"):
        return _grey(np.asarray(image).astype(np.float64) / 257), "deep"
    if mode in ("I", "F"):
        return _grey(_in_range(np.asarray(image).astype(np.float64))), "rescaled"
    notes = {"L": "grey", "1": "grey", "P": "palette", "CMYK": "cmyk"}
    return np.array(image.convert("RGB")), notes.get(mode, "")


def _on_white(image: Image.Image) -> Array:
    white = Image.new("RGBA", image.size, (255, 255, 255, 255))
    return np.array(Image.alpha_composite(white, image).convert("RGB"))


def _grey(values: Array) -> Array:
    """Return (H, W) values in [0, 255] as equal red, green and blue."""
    rounded = np.clip(np.rint(values), 0, 255).astype(np.uint8)
    return np.repeat(rounded[:, :, None], 3, axis=2)


def _in_range(values: Array) -> Array:
    """Return values scaled to [0, 255] from the smallest usual range that holds them.

    The ranges are [0, 1], [0, 255] and [0, 65535]; whatever fits none is stretched from its
    least to its greatest value. Raises ImageError when there is a NaN or an infinity.
    """
    low, high = float(values.min()), float(values.max())
    if not np.isfinite([low, high]).all():
        raise ImageError("corrupt", "pixels that are not finite numbers")
    for top in (1, 255, 65535):
        if 0 <= low and high <= top:
            return values * (255 / top)
    return (values - low) * (255 / (high - low))
