"""What every decoder shares: the decoded image, the error with its reason code, the pixel limit."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import numpy as np

from selfsup_ray.artifacts import Array
from selfsup_ray.errors import ArtifactError

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


class ImageError(ArtifactError):
    """One file that cannot become an image: a reason code and what exactly was found."""

    def __init__(self, reason: Reason, detail: str, *, name: str = "") -> None:
        super().__init__(f"{name or 'image'} is {reason}: {detail}")
        self.reason = reason
        self.detail = detail


def too_many_bytes(size_bytes: int, max_bytes: int) -> ImageError:
    """Return the error of a file that is not even read."""
    return ImageError("too_large", f"{size_bytes} bytes, at most {max_bytes} are allowed")


def require_pixels(width: int, height: int, max_pixels: int) -> None:
    """Raise ImageError when an image's header claims more pixels than allowed."""
    if width * height > max_pixels:
        raise ImageError(
            "too_large", f"{width} x {height} pixels, at most {max_pixels} are allowed"
        )


@dataclass(frozen=True)
class Stored:
    """An image as its file holds it: RGB, perhaps scaled down, not yet turned upright.

    pixels: (h, w, 3) uint8, of which the image covers `extent` = (height, width) rows and columns;
    a JPEG scaled down while decoding ends within its last row and column. turn: the EXIF
    orientation still to be applied, 1 to 8. kind: Pillow's name of the format.
    """

    pixels: Array
    kind: str
    notes: tuple[str, ...] = ()
    turn: int = 1
    extent: tuple[float, float] | None = None


def upright(pixels: Array, turn: int) -> Array:
    """Return (H, W, 3) pixels turned as EXIF's orientation says (EXIF 2.32, tag 0x0112)."""
    match turn:
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
