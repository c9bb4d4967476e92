"""Patches of images: which ones are drawn, and how they are cut out.

Patches are flattened channel first (C, s, s), as `torch.nn.functional.unfold` gives them. A
position is a number in [0, n P): image, row and column of the patch's first pixel, with
P = (H - s + 1) (W - s + 1) of them in each of n images.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from selfsup_ray.artifacts import Array
from selfsup_ray.ops.assignment import one_thread_each
from selfsup_ray.ops.pca import Moments, merged_moments
from selfsup_ray.ops.rng import permuted

_FLOATS = 1 << 22  # of unfolded patches held at a time: 32 MB in float64


@dataclass(frozen=True)
class Positions:
    """Where patches are: image, row, column, each (m,) int64, in the order they were drawn."""

    image: Array
    row: Array
    column: Array

    def __len__(self) -> int:
        return len(self.image)

    def chosen(self, which: Array | slice) -> Positions:
        """Return some of the positions, by index, mask or slice."""
        return Positions(self.image[which], self.row[which], self.column[which])


def num_positions(height: int, width: int, *, patch_size: int) -> int:
    """Return P, the positions of a patch in one image: stride 1, no padding."""
    return max(height - patch_size + 1, 0) * max(width - patch_size + 1, 0)


def drawn_positions(
    start: int, stop: int, *, num_images: int, height: int, width: int, patch_size: int, seed: int
) -> Positions:
    """Return draws [start, stop) out of a uniformly random order of all positions.

    The order is a permutation computed where it is asked for, so draws are distinct, need memory
    for themselves only, and do not depend on how many others are drawn. stop <= n P.
    """
    columns = width - patch_size + 1
    per_image = num_positions(height, width, patch_size=patch_size)
    total = num_images * per_image
    assert stop <= total, f"{stop:,} draws of {total:,} positions"
    at = permuted(np.arange(start, stop), n=total, seed=seed, epoch=0)
    image, inside = np.divmod(at, per_image)
    row, column = np.divmod(inside, columns)
    return Positions(image, row, column)


def patches_at(images: Array, at: Positions, *, patch_size: int) -> Array:
    """Return patches (m, C s s) of images (B, C, H, W), in the images' type.

    at.image counts within this batch.
    """
    views = np.lib.stride_tricks.sliding_window_view(
        images, (patch_size, patch_size), axis=(2, 3)
    )  # (B, C, H - s + 1, W - s + 1, s, s), nothing copied
    dim = images.shape[1] * patch_size**2
    return np.asarray(views[at.image, :, at.row, at.column]).reshape(len(at), dim)


def norms(patches: Array) -> Array:
    """Return the L2 norm of each patch (m, d): (m,) float64."""
    wide = np.asarray(patches, np.float64)
    return np.asarray(np.sqrt(np.einsum("md,md->m", wide, wide)))


def random_patches(count: int, dim: int, *, kind: str, seed: int, block: int = 0) -> Array:
    """Return noise in place of patches (count, dim) float32, by (seed, block).

    kind: `gaussian` for N(0, 1), `uniform` for [-1, 1).
    """
    generator = np.random.Generator(np.random.Philox(key=[seed, block]))
    if kind == "gaussian":
        return generator.standard_normal((count, dim), dtype=np.float32)
    assert kind == "uniform", f"gaussian or uniform, got {kind}"
    return generator.random((count, dim), dtype=np.float32) * 2 - 1


def patch_moments(maps: Tensor, *, patch_size: int, threads: int = 1) -> Moments:
    """Return the moments of all patches of maps (B, C, H, W), in float64.

    For images of bytes `patch_sums` is exact and faster; this is for feature maps. Products are
    cut, and merged in order, alike for any number of threads.
    """
    assert len(maps) > 0, "moments need at least one image"
    channels, height, width = maps.shape[1:]
    per_image = num_positions(height, width, patch_size=patch_size) * channels * patch_size**2
    step = max(1, _FLOATS // per_image)
    with one_thread_each(threads) as pool:
        return merged_moments(pool.map(partial(_moments, patch_size), torch.split(maps, step)))


def _moments(patch_size: int, maps: Tensor) -> Moments:
    x = (
        F.unfold(maps.double(), patch_size)
        .transpose(1, 2)
        .reshape(-1, maps.shape[1] * patch_size**2)
    )
    mean = x.mean(dim=0)
    centered = x - mean
    scatter = (centered.T @ centered).cpu().numpy()
    return Moments(len(x), mean.cpu().numpy(), scatter)


@dataclass(frozen=True)
class PatchSums:
    """Sums over all patches of some images of bytes, less 128: exact, so any order adds up alike.

    count: patches; total: (d,), sum of x; products: (d, d), sum of x x^T; int64.
    """

    count: int
    total: Array
    products: Array

    def __add__(self, other: PatchSums) -> PatchSums:
        return PatchSums(
            self.count + other.count, self.total + other.total, self.products + other.products
        )

    def moments(self, *, scale: float, shift: float) -> Moments:
        """Return the moments of scale * level + shift, level in 0..255, in float64."""
        mean = self.total / self.count
        scatter = self.products - np.outer(mean, mean) * self.count
        return Moments(self.count, (mean + _CENTER) * scale + shift, scatter * scale**2)


_CENTER = 128
_EXACT = 1024
"""Products of two bytes less 128 are at most 2^14: so many add up exactly in float32 (2^24)."""
_PIXELS = 1 << 25
"""Numbers of one block of images: 134 MB in float32."""
_TILE = 32
"""Columns multiplied with their neighborhood at a time."""


def patch_sums(images: Tensor, *, patch_size: int, threads: int = 1) -> PatchSums:
    """Return the sums over every patch of uint8 images (B, C, H, W), the same on any device.

    No patch is cut out. For each offset between two pixels that lie in one patch, the products of
    all such pixels are added over images, by matrix products that are exact in float32, and then
    over the positions of the patch. `threads` blocks of images are worked on at once.
    """
    assert images.dtype == torch.uint8, f"images are uint8, got {images.dtype}"
    count, channels, height, width = images.shape
    step = max(1, min(_EXACT, _PIXELS // (channels * height * width), -(-count // threads)))
    per_image = num_positions(height, width, patch_size=patch_size)

    def block_sums(block: Tensor) -> PatchSums:
        x = block.permute(2, 3, 1, 0).contiguous().float().sub_(_CENTER)  # (H, W, C, b)
        return PatchSums(len(block) * per_image, *_block_sums(x, patch_size))

    d = channels * patch_size**2
    sums = PatchSums(0, np.zeros(d, np.int64), np.zeros((d, d), np.int64))
    if not count:
        return sums
    with one_thread_each(threads) as pool:
        return sum(pool.map(block_sums, torch.split(images, step)), sums)


def _block_sums(x: Tensor, s: int) -> tuple[Array, Array]:
    """Return total (d,) and products (d, d) of pixels (H, W, C, b), in order (C, s, s)."""
    height, width, channels, _ = x.shape
    rows, columns = _windows(height, s).to(x), _windows(width, s).to(x)
    rows, columns = rows.double(), columns.double()
    pixels = x.sum(dim=3).double()
    total = torch.einsum("ay,bx,yxc->cab", rows, columns, pixels)
    products = x.new_zeros((channels, s, s, channels, s, s), dtype=torch.float64)
    for dy in range(s):
        for dx, near in _offset_products(x, dy, s).items():
            first = max(0, -dx)
            inside = columns[:, first : first + near.shape[3]]
            # Entry [a, b] adds up the positions of the pixel at (a, b) in its patch.
            sums = torch.einsum("ay,bx,yijx->abij", rows[:, : height - dy], inside, near.double())
            for a in range(s - dy):
                for b in range(max(0, -dx), min(s, s - dx)):
                    products[:, a, b, :, a + dy, b + dx] = sums[a, b]
                    products[:, a + dy, b + dx, :, a, b] = sums[a, b].T
    d = channels * s * s
    whole = products.reshape(d, d).round().long().cpu().numpy()
    return total.reshape(d).round().long().cpu().numpy(), whole


def _offset_products(x: Tensor, dy: int, s: int) -> dict[int, Tensor]:
    """Return by dx, |dx| < s, the products of pixels (y, x) and (y + dy, x + dx), added over b.

    x: (H, W, C, b); each result (H - dy, C, C, W - |dx|), from the first x that has a partner.
    """
    height, width, channels, b = x.shape
    flat = x.reshape(height, width * channels, b)
    found: dict[int, list[Tensor]] = {dx: [] for dx in range(1 - s, s)}
    for low in range(0, width, _TILE):
        high = min(low + _TILE, width)
        left, right = max(0, low - s + 1), min(width, high + s - 1)
        anchors = flat[: height - dy, low * channels : high * channels]
        others = flat[dy:, left * channels : right * channels]
        products = torch.bmm(anchors, others.transpose(1, 2))
        table = products.view(height - dy, high - low, channels, right - left, channels)
        for dx, parts in found.items():
            parts.append(table.diagonal(low - left + dx, dim1=1, dim2=3))
    return {dx: torch.cat(parts, dim=3) for dx, parts in found.items()}


def _windows(side: int, s: int) -> Tensor:
    """Return (s, side): 1 where pixel y of the image is pixel a of some patch."""
    y, a = torch.arange(side)[None], torch.arange(s)[:, None]
    return ((y >= a) & (y < a + side - s + 1)).float()
