"""From the bytes of any image file to right RGB, squared, or a reason code that says why not."""

from __future__ import annotations

import functools
import struct
import threading
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from io import BytesIO
from pathlib import Path
from typing import Literal

import numpy as np
import simplejpeg
from PIL import Image, UnidentifiedImageError

from selfsup_ray.artifacts import Array
from selfsup_ray.errors import ArtifactError

Fit = Literal["crop", "pad", "squash"]
Reason = Literal[
    "empty",  # no bytes at all
    "truncated",  # the data ends before the image does
    "corrupt",  # complete, but the decoder found damage inside
    "not_an_image",  # text, video, anything else, whatever its name
    "unsupported",  # an image, of a format or kind that is not read here
    "too_large",  # more pixels or bytes than allowed: never decoded
    "unreadable",  # the decoder gave up
    "missing",  # listed, but no such file
    "permission",  # not allowed to read it
]

MAX_PIXELS = 89_478_485  # Pillow's own limit for one image: 256 MiB of RGB
ORIENTATION_TAG = 0x0112
# No EPS (it would start Ghostscript) and no TGA (it has no signature: any bytes might be one).
FORMATS = (
    *("AVIF", "BMP", "DIB", "GIF", "ICO", "JPEG", "JPEG2000", "PCX", "PNG", "PPM", "PSD"),
    *("QOI", "SGI", "TIFF", "WEBP"),
)
SUFFIX_FORMATS = {
    **dict.fromkeys((".jpg", ".jpeg", ".jpe", ".jfif"), ("JPEG", "MPO")),
    **dict.fromkeys((".tif", ".tiff"), ("TIFF",)),
    **dict.fromkeys((".jp2", ".j2k", ".jpx"), ("JPEG2000",)),
    **dict.fromkeys((".ppm", ".pgm", ".pbm", ".pnm"), ("PPM",)),
    ".avif": ("AVIF",),
    ".bmp": ("BMP", "DIB"),
    ".gif": ("GIF",),
    ".ico": ("ICO",),
    ".pcx": ("PCX",),
    ".png": ("PNG",),
    ".psd": ("PSD",),
    ".qoi": ("QOI",),
    ".sgi": ("SGI",),
    ".webp": ("WEBP",),
}
_SIGNATURES = {
    **dict.fromkeys((b"\xff\xd8", b"\x89PNG", b"GIF8", b"BM", b"II*\0", b"MM\0*"), True),
    **dict.fromkeys((b"qoif", b"8BPS", b"\0\0\x01\0", b"\0\0\0\x0cjP"), True),
    **dict.fromkeys((b"%PDF", b"%!PS", b"\xff\x0a", b"\0\0\0\x0cJXL", b"SIMPLE  ="), False),
}
_CONTAINERS = {b"WEBP": True, b"avif": True, b"heic": False, b"heix": False, b"mif1": False}

# Pillow's pixel limit and Python's warning filters are global: one thread at a time changes them.
_PILLOW = threading.Lock()


class ImageError(ArtifactError):
    """One file that cannot become an image: a reason code and what exactly was found."""

    def __init__(self, reason: Reason, detail: str, *, name: str = "") -> None:
        super().__init__(f"{name or 'image'} is {reason}: {detail}")
        self.reason = reason
        self.detail = detail


def too_many_bytes(size_bytes: int, max_bytes: int) -> ImageError:
    """Return the error of a file that is not even read."""
    return ImageError("too_large", f"{size_bytes} bytes, at most {max_bytes} are allowed")


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
    A JPEG more than twice as large as needed is decoded at a half, a quarter or an eighth first.
    Raises ImageError.
    """
    decoded = decode(data, name=name, max_pixels=max_pixels, shrink=(size, fit))
    return Decoded(squared(decoded.pixels, size=size, fit=fit), decoded.notes)


def decode(
    data: bytes,
    *,
    name: str = "",
    max_pixels: int = MAX_PIXELS,
    shrink: tuple[int, Fit] | None = None,
) -> Decoded:
    """Return an encoded image as upright RGB, at full size unless `shrink` allows less.

    name decides nothing but the note `mislabelled`; the format is found from the content.
    Raises ImageError.
    """
    if not data:
        raise ImageError("empty", "0 bytes", name=name)
    try:
        if data[:3] == b"\xff\xd8\xff":
            decoded, kind = _decode_jpeg(data, max_pixels, shrink), "JPEG"
        else:
            decoded, kind = _decode_pillow(data, max_pixels)
    except ImageError as bad:
        raise ImageError(bad.reason, bad.detail, name=name) from None
    wanted = SUFFIX_FORMATS.get(Path(name).suffix.lower())
    if wanted is not None and kind not in wanted:
        return Decoded(decoded.pixels, (*decoded.notes, "mislabelled"))
    return decoded


def squared(pixels: Array, *, size: int, fit: Fit) -> Array:
    """Return (H, W, 3) pixels as (size, size, 3), resized with antialiasing (bilinear)."""
    height, width = pixels.shape[:2]
    if height == width == size:
        return pixels
    image = Image.fromarray(pixels)
    if fit == "pad":
        rows, columns = scaled_sides(height, width, size=size, fit=fit)
        inner = np.asarray(image.resize((columns, rows), Image.Resampling.BILINEAR))
        out = np.zeros((size, size, 3), np.uint8)
        top, left = (size - rows) // 2, (size - columns) // 2
        out[top : top + rows, left : left + columns] = inner
        return out
    side = min(height, width)
    left, top = (width - side) / 2, (height - side) / 2
    box = (left, top, left + side, top + side) if fit == "crop" else None
    return np.asarray(image.resize((size, size), Image.Resampling.BILINEAR, box=box))


def scaled_sides(height: int, width: int, *, size: int, fit: Fit) -> tuple[int, int]:
    """Return (height, width) of the whole image after the resize that `fit` asks for."""
    if fit == "squash":
        return size, size
    scale = size / (min(height, width) if fit == "crop" else max(height, width))
    return max(1, round(height * scale)), max(1, round(width * scale))


def looks_like_image(head: bytes) -> bool:
    """Return whether the first 16 bytes of a file carry the signature of an image format."""
    return _signature(head) is not None


def _signature(head: bytes) -> bool | None:
    """Return whether a known signature is of a format that is read here; None: none known."""
    for start, readable in _SIGNATURES.items():
        if head.startswith(start):
            return readable
    return _CONTAINERS.get(head[8:12]) if head[:4] == b"RIFF" or head[4:8] == b"ftyp" else None


# JPEG: libjpeg-turbo, strict, so that damage is found which Pillow fills with grey in silence.


def _decode_jpeg(data: bytes, max_pixels: int, shrink: tuple[int, Fit] | None) -> Decoded:
    try:
        height, width, space, _ = simplejpeg.decode_jpeg_header(data)
    except ValueError:  # a cut header, or a rare kind (lossless, odd subsampling)
        return _decode_pillow(data, max_pixels)[0]
    _require_pixels(width, height, max_pixels)
    if space not in ("YCbCr", "Gray", "RGB"):
        _strict_jpeg(data, "CMYK", (0, 0))
        return _decode_pillow(data, max_pixels)[0]
    sides = (0, 0) if shrink is None else scaled_sides(height, width, size=shrink[0], fit=shrink[1])
    # At least twice the final size, so that antialiasing still does most of the work.
    pixels, damaged = _strict_jpeg(data, "RGB", (2 * sides[0], 2 * sides[1]))
    turn = _jpeg_orientation(data)
    notes = [("grey", space == "Gray"), ("rotated", turn > 1), ("damaged", damaged)]
    return Decoded(_upright(pixels, turn), tuple(note for note, holds in notes if holds))


def _strict_jpeg(data: bytes, space: str, least: tuple[int, int]) -> tuple[Array, bool]:
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


def _jpeg_orientation(data: bytes) -> int:
    """Return the EXIF orientation, 1 to 8, read from the APP1 segment alone."""
    at = 2
    while data[at : at + 1] == b"\xff" and (marker := data[at + 1]) not in (0xDA, 0xD9):
        stop = at + 2 + int.from_bytes(data[at + 2 : at + 4], "big")
        if marker == 0xE1 and data[at + 4 : at + 10] == b"Exif\0\0":
            return _orientation(functools.partial(_parsed, data[at + 4 : stop]))
        at = at + 1 if marker == 0xFF else stop
    return 1


def _orientation(read: Callable[[], Image.Exif]) -> int:
    try:
        turn = read().get(ORIENTATION_TAG, 1)
    except (SyntaxError, ValueError, KeyError, TypeError, struct.error):
        return 1  # damaged metadata does not make a bad image
    return turn if turn in range(1, 9) else 1


def _parsed(exif_data: bytes) -> Image.Exif:
    exif = Image.Exif()
    exif.load(exif_data)
    return exif


def _upright(pixels: Array, orientation: int) -> Array:
    """Return the pixels turned as EXIF says (EXIF 2.32, tag 0x0112)."""
    match orientation:
        case 2:
            turned = pixels[:, ::-1]
        case 3:
            turned = pixels[::-1, ::-1]
        case 4:
            turned = pixels[::-1]
        case 5:
            turned = pixels.transpose(1, 0, 2)
        case 6:
            turned = np.rot90(pixels, -1)
        case 7:
            turned = pixels[::-1, ::-1].transpose(1, 0, 2)
        case 8:
            turned = np.rot90(pixels)
        case _:
            return pixels
    return np.ascontiguousarray(turned)


# Everything else: Pillow.


def _decode_pillow(data: bytes, max_pixels: int) -> tuple[Decoded, str]:
    """Return the image and the name of its format."""
    try:
        with _pillow_alone() as caught, Image.open(BytesIO(data), formats=FORMATS) as image:
            _require_pixels(image.width, image.height, max_pixels)
            notes = ["animated"] if getattr(image, "n_frames", 1) > 1 else []
            turn = _orientation(image.getexif)
            notes += ["rotated"] if turn > 1 else []
            image.load()
            # Pillow turns a TIFF itself while loading.
            pixels, how = _to_rgb(image)
            pixels = pixels if image.format == "TIFF" else _upright(pixels, turn)
    except ImageError:
        raise
    except UnidentifiedImageError:
        raise _unidentified(data) from None
    except Exception as error:  # hostile bytes make Pillow's parsers raise anything at all
        raise _failed(error) from None
    notes += [how] if how else []
    return Decoded(pixels, (*notes, *(["damaged"] if caught else []))), str(image.format)


@contextmanager
def _pillow_alone() -> Iterator[list[warnings.WarningMessage]]:
    """Yield the list of Pillow's warnings; its own pixel limit is off, ours is checked instead."""
    with _PILLOW, warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        limit, Image.MAX_IMAGE_PIXELS = Image.MAX_IMAGE_PIXELS, None
        try:
            yield caught
        finally:
            Image.MAX_IMAGE_PIXELS = limit


def _require_pixels(width: int, height: int, max_pixels: int) -> None:
    if width * height > max_pixels:
        raise ImageError(
            "too_large", f"{width} x {height} pixels, at most {max_pixels} are allowed"
        )


def _unidentified(data: bytes) -> ImageError:
    match _signature(data[:16]):
        case True:
            return ImageError(
                "unreadable", "it begins like an image, but its header cannot be read"
            )
        case False:
            return ImageError("unsupported", f"a format that is not read here ({data[:12]!r})")
    if b"<svg" in data[:1024]:
        return ImageError("unsupported", "SVG, a drawing without pixels")
    return ImageError("not_an_image", f"begins with {data[:12]!r}")


def _failed(error: Exception) -> ImageError:
    text = f"{type(error).__name__}: {error}"
    return ImageError("truncated" if "truncated" in text.lower() else "unreadable", text)


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
