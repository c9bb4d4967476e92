"""The fast way through the gated linear layer on a CPU, forward and backward.

A few hundred positions at a time: one product with all entries, and the sums over windows while it
is in the cache. Where few bits are set, one product for each of them instead.
"""

from __future__ import annotations

from typing import Literal

import numpy as np
import torch
from torch import Tensor

from selfsup_ray.artifacts import Array
from selfsup_ray.ops.gated_kernels import add_patches, pool_bands, spread_bands
from selfsup_ray.ops.gated_sparse import add_gradients, pool_bits
from selfsup_ray.ops.patch_selection import LANES, packed_words, patch_rows, row_width
from selfsup_ray.ops.patch_tiles import on_threads, with_spare

_TILE_ROWS = 784  # positions multiplied at once, about: the products stay in the cache
_SPARSE = {torch.bfloat16: 1 / 32, torch.float32: 1 / 8}  # up to this share of bits it is faster
_PIECES = 16  # at most, each at least 4 images: sums in a fixed order, so threads round nothing


class GatedTiles:
    """The gated linear layer at some images; arguments as `gated_pool`, weight (N, C s s).

    entries: what rows (patch, 1, 1, 1, 0 …) are multiplied with, (width, 64 W) or, where few bits
    are set, (N, width) float32.
    """

    def __init__(
        self,
        images: Tensor,
        bits: Tensor,
        weight: Tensor,
        bias: Tensor,
        patch_size: int,
        pool: int,
        precision: Literal["bfloat16", "float32"],
    ) -> None:
        self.size, self.dim = weight.shape
        self.images, self.patch_size, self.pool = images, patch_size, pool
        self.height, self.width = bits.shape[1:3]
        self.bands = -(-self.height // pool)  # rows of windows in an image
        self.words = packed_words(bits.numpy())
        self.pixels = with_spare(images)
        dtype = torch.bfloat16 if precision == "bfloat16" else torch.float32
        # Every position has as many bits as the first, but for ties.
        few = np.bitwise_count(self.words[:1]).sum() <= _SPARSE[dtype] * self.size
        self.is_sparse = bool(few)
        self.entries = self._entries(weight.detach(), bias.detach(), dtype)

    def _entries(self, weight: Tensor, bias: Tensor, dtype: torch.dtype) -> Tensor:
        columns = self.size if self.is_sparse else self.words.shape[1] * LANES
        width = row_width(self.dim, self.patch_size)
        made = torch.zeros(width, columns, dtype=torch.float32 if self.is_sparse else dtype)
        made[: self.dim, : self.size] = weight.T
        rest = bias.float()
        for part in range(3):  # bfloat16 has 8 bits of the bias's 24
            made[self.dim + part, : self.size] = rest
            rest = rest - made[self.dim + part, : self.size].float()
        return made.T.contiguous() if self.is_sparse else made

    @property
    def out_shape(self) -> tuple[int, int, int, int]:
        """(B, h', w', N)."""
        return len(self.images), self.bands, -(-self.width // self.pool), self.size

    def forward(self) -> Tensor:
        """Return the window means (B, h', w', N) float32."""
        out = torch.empty(self.out_shape)
        means = out.flatten(0, 1).numpy()

        def piece(first: int, last: int) -> None:
            tile = SparseTile(self) if self.is_sparse else DenseTile(self)
            for a, b in self._tiles(first, last):
                tile.means(a, b, means)

        on_threads(piece, self._pieces())
        return out

    def backward(
        self, gradient: Tensor, *, images_too: bool
    ) -> tuple[Tensor | None, Tensor, Tensor]:
        """Return the gradients of images (None unless asked for), weight and bias.

        gradient: (B, h', w', N), of what `forward` returned.
        """
        pieces = self._pieces()
        of_entries = torch.zeros(len(pieces), *self.entries.shape)
        of_images = torch.zeros(self.images.shape) if images_too else None
        means = gradient.float().contiguous().flatten(0, 1).numpy()

        def piece(first: int, last: int) -> None:
            tile = SparseTile(self) if self.is_sparse else DenseTile(self)
            total = of_entries[pieces.index((first, last))]
            for a, b in self._tiles(first, last):
                rows = tile.gradients(a, b, means, total, patches_too=images_too)
                if of_images is not None:
                    add_patches(rows, self.patch_size, self.position(a), of_images.numpy())

        on_threads(piece, pieces)
        summed = of_entries.sum(dim=0)
        if not self.is_sparse:
            summed = summed[:, : self.size].T
        return of_images, summed[:, : self.dim], summed[:, self.dim].clone()

    @property
    def sizes(self) -> tuple[int, int, int]:
        """What the kernels ask for: width and height of the code, and the pool."""
        return self.width, self.height, self.pool

    @property
    def tile_bands(self) -> int:
        """Bands of one tile."""
        return max(1, _TILE_ROWS // (min(self.pool, self.height) * self.width))

    @property
    def tile_rows(self) -> int:
        """Positions of one tile at most."""
        return self.tile_bands * min(self.pool, self.height) * self.width

    def _pieces(self) -> list[tuple[int, int]]:
        step = max(4, -(-len(self.images) // _PIECES)) * self.bands
        last = len(self.images) * self.bands
        return [(a, min(a + step, last)) for a in range(0, last, step)]

    def _tiles(self, first: int, last: int) -> list[tuple[int, int]]:
        return [(a, min(a + self.tile_bands, last)) for a in range(first, last, self.tile_bands)]

    def position(self, band: int) -> int:
        """Return the position at which a band begins."""
        image, y = divmod(band, self.bands)
        return (image * self.height + y * self.pool) * self.width

    def load(self, first: int, last: int, patches: Tensor) -> int:
        """Fill rows with the patches of bands [first, last); return how many they are."""
        a, b = self.position(first), self.position(last)
        patch_rows(self.pixels, self.patch_size, a, b, patches.numpy())
        return b - a


class DenseTile:
    """The products of some positions with all entries, and the buffers they are made in."""

    def __init__(self, layer: GatedTiles) -> None:
        width, columns = layer.entries.shape
        self.layer, dtype = layer, layer.entries.dtype
        self.patches = torch.empty(layer.tile_rows, width)
        self.left = torch.empty(layer.tile_rows, width, dtype=dtype)
        self.products = torch.empty(layer.tile_rows, columns, dtype=dtype)
        self.sums = torch.empty(width, columns, dtype=dtype)

    def _load(self, first: int, last: int) -> int:
        n = self.layer.load(first, last, self.patches)
        self.left[:n].copy_(self.patches[:n])
        return n

    def means(self, first: int, last: int, out: Array) -> None:
        """Fill bands [first, last) of out."""
        layer, n = self.layer, self._load(first, last)
        torch.mm(self.left[:n], layer.entries, out=self.products[:n])
        pool_bands(numbers(self.products), layer.words, *layer.sizes, first, last, out)

    def gradients(
        self, first: int, last: int, of_means: Array, total: Tensor, *, patches_too: bool
    ) -> Array:
        """Add the entries' gradient from bands [first, last); return the patches', if wanted."""
        layer, n = self.layer, self._load(first, last)
        spread = self.products[:n]
        spread_bands(of_means, layer.words, *layer.sizes, first, last, numbers(spread))
        total += torch.mm(self.left[:n].T, spread, out=self.sums)
        if patches_too:
            torch.mm(spread, layer.entries.T, out=self.left[:n])
            self.patches[:n].copy_(self.left[:n])
        return self.patches[:n].numpy()


class SparseTile:
    """The same with a product for each bit that is set."""

    def __init__(self, layer: GatedTiles) -> None:
        self.layer = layer
        self.patches = torch.empty(layer.tile_rows, layer.entries.shape[1])
        self.spread = torch.empty_like(self.patches)

    def means(self, first: int, last: int, out: Array) -> None:
        """Fill bands [first, last) of out."""
        layer = self.layer
        layer.load(first, last, self.patches)
        rows = self.patches.numpy(), layer.entries.numpy()
        pool_bits(*rows, layer.words, *layer.sizes, first, last, out)

    def gradients(
        self, first: int, last: int, of_means: Array, total: Tensor, *, patches_too: bool
    ) -> Array:
        """Add the entries' gradient from bands [first, last); return the patches', if wanted."""
        layer = self.layer
        n = layer.load(first, last, self.patches)
        rows = self.patches.numpy(), layer.entries.numpy()
        found = self.spread[: n if patches_too else 0].numpy()
        where = (*layer.sizes, first, last)
        add_gradients(of_means, *rows, layer.words, *where, total.numpy(), found)
        return found


def numbers(tile: Tensor) -> Array:
    """Return a tile as the kernels take it: float32, or bits of bfloat16 as int16."""
    return (tile.view(torch.int16) if tile.dtype == torch.bfloat16 else tile).numpy()
