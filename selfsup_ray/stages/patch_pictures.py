"""Pictures of a dictionary: its entries as patches, and whitened, in the order of their size."""

from __future__ import annotations

from math import isqrt
from pathlib import Path

import numpy as np
from PIL import Image

from selfsup_ray.artifacts import Array, whole_file
from selfsup_ray.stages.patch_dictionary import PatchDictionary

SHOWN = 256
"""Entries in a picture."""
ACROSS = 16
RANKED = 64
"""Entries in a picture of the best or the worst."""
ENLARGED = 6
"""Pixels of a picture for one of a patch."""


def write_pictures(dictionary: PatchDictionary, out: Path, *, prefix: str = "") -> list[Path]:
    """Write `raw.png` and `whitened.png`, the largest entries first; return their paths.

    prefix: of both names. Patches of maps with other than 1 or 3 channels show their channels as
    gray tiles beside each other.
    """
    paths = []
    for name, patches in (("raw", dictionary.raw), ("whitened", dictionary.zca)):
        shown = patches[by_size(dictionary.counts)[:SHOWN]]
        path = out / f"{prefix}{name}.png"
        tiles = patch_tiles(shown if shown.shape[1] in (1, 3) else _channels_beside(shown))
        with whole_file(path) as temporary:
            Image.fromarray(_picture(tiles)).save(temporary, "PNG")
        paths.append(path)
    return paths


def write_ranked(dictionary: PatchDictionary, scores: Array, out: Path) -> list[Path]:
    """Write the entries of highest and lowest score, an 8 x 8 grid each, as patches and whitened.

    scores: (N,). Files best.png, worst.png, best_whitened.png and worst_whitened.png; returns their
    paths. None where the patches are of maps with other than 1 or 3 channels.
    """
    if dictionary.raw.shape[1] not in (1, 3):
        return []
    best = np.argsort(-scores, kind="stable")
    paths = []
    for name, ids in (("best", best[:RANKED]), ("worst", best[::-1][:RANKED])):
        for kind, patches in (("", dictionary.raw), ("_whitened", dictionary.zca)):
            path = out / f"{name}{kind}.png"
            with whole_file(path) as temporary:
                tiles = patch_tiles(patches[ids])
                Image.fromarray(_picture(tiles, across=8)).save(temporary, "PNG")
            paths.append(path)
    return paths


def by_size(counts: Array) -> Array:
    """Return entries by the patches they stand for, most first, ties by lower entry: (N,) int64."""
    return np.argsort(-counts, kind="stable")


def patch_tiles(patches: Array) -> Array:
    """Return patches (n, C, s, s) as pictures (n, s, s, 3) uint8, C = 1 or 3.

    Each is stretched to the whole range of levels by itself, as an entry's pattern may be faint.
    """
    low = patches.min(axis=(1, 2, 3), keepdims=True)
    span = np.ptp(patches, axis=(1, 2, 3), keepdims=True)
    levels = np.where(span > 0, (patches - low) / np.where(span > 0, span, 1), 0.5) * 255
    tiles = levels.round().astype(np.uint8).transpose(0, 2, 3, 1)
    return np.repeat(tiles, 3, axis=3) if tiles.shape[3] == 1 else tiles


def _channels_beside(patches: Array) -> Array:
    """Return patches (n, C, s, s) as (n, 1, a s, b s) with a b = C: their channels in a rows."""
    n, channels, s = patches.shape[:3]
    a = next(a for a in range(isqrt(channels), 0, -1) if channels % a == 0)
    apart = patches.reshape(n, a, channels // a, s, s).transpose(0, 1, 3, 2, 4)
    return apart.reshape(n, 1, a * s, -1)


def _picture(tiles: Array, across: int = ACROSS) -> Array:
    """Return tiles (n, h, w, 3) enlarged, in rows with a white line between them."""
    n, h, w = tiles.shape[:3]
    columns = min(across, n)
    high, wide = h * ENLARGED + 2, w * ENLARGED + 2
    whole = np.full((-(-n // columns) * high, columns * wide, 3), 255, np.uint8)
    large = tiles.repeat(ENLARGED, axis=1).repeat(ENLARGED, axis=2)
    for i, tile in enumerate(large):
        top, left = (i // columns) * high + 1, (i % columns) * wide + 1
        whole[top : top + len(tile), left : left + tile.shape[1]] = tile
    return whole
