"""The convolutional baselines of the patch-dictionary study: their lists of blocks, by name."""

from __future__ import annotations

import re
from typing import Literal

Block = int | Literal["M", "A"]

BLOCKS: dict[str, tuple[Block, ...]] = {
    "mlp": (),
    "VGGs": (8, "M", 16, "M", 32, "M"),
    "VGGsw": (64, "M", 128, "M", 256, "M"),
    "VGGsxw": (128, "M", 256, "M", 512, "M"),
    "VGG8c": (64, 128, "M", 256, 256, "M", 512, 512, "M"),
    "VGG8b": (128, 256, "M", 256, 512, "M", 512, "M", 512, "M"),
    "VGG11b": (128, 128, 128, 256, "M", 256, 512, "M", 512, 512, "M", 512, "M"),
    "VGG11c": (64, 128, "M", 256, 256, "M", *[512] * 4, "M"),
    "VGG13c": (64, 64, 128, 128, "M", 256, 256, "M", *[512] * 4, "M"),
    "VGG16c": (64, 64, 128, 128, "M", *[256] * 3, "M", *[512] * 6, "M"),
    "VGG19c": (64, 64, 128, 128, "M", *[256] * 4, "M", *[512] * 8, "M"),
    "VGG11": (64, "M", 128, "M", 256, 256, "M", 512, 512, "M", 512, 512, "M"),
    "VGG13": (64, 64, "M", 128, 128, "M", 256, 256, "M", 512, 512, "M", 512, 512, "M"),
    "VGG16": (64, 64, "M", 128, 128, "M", *[256] * 3, "M", *[512] * 3, "M", *[512] * 3, "M"),
    "VGG19": (64, 64, "M", 128, 128, "M", *[256] * 4, "M", *[512] * 4, "M", *[512] * 4, "M"),
}
"""Channels of each convolution; M: 2 x 2 maximum, A: 2 x 2 average inside the block before it."""

REGULAR = re.compile(r"VGGc([1-9]\d*)d([1-9]\d*)(A?)")


def blocks_of(architecture: str) -> tuple[Block, ...]:
    """Return the blocks of an architecture: channels of a convolution, or the letter of a pooling.

    Raises ValueError naming the ones there are.
    """
    if architecture in BLOCKS:
        return BLOCKS[architecture]
    if found := REGULAR.fullmatch(architecture):
        channels, depth = int(found[1]), int(found[2])
        first: tuple[Block, ...] = (channels, "A") if found[3] else (channels,)
        return (*first, *[channels] * (depth - 1))
    raise ValueError(
        f"architecture={architecture!r} is none of {', '.join(BLOCKS)}, nor of the form "
        f"VGGc{{channels}}d{{depth}}, with or without A, such as VGGc1024d2A"
    )
