"""The fast way through the gated linear layer on a CPU: a few hundred positions at a time, one
product with all entries, and the sums over windows while it is in the cache; the same backward."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from selfsup_ray.artifacts import Array
from selfsup_ray.ops.gated_kernels import add_patches, pool_bands, spread_bands
from selfsup_ray.ops.patch_selection import LANES, packed_words, patch_rows, row_width
from selfsup_ray.ops.patch_tiles import on_threads, with_spare

_TILE_ROWS = 448  # positions multiplied at once, about: the products stay in the cache
_PIECE_IMAGES = 4  # whose sums are made in order; fixed, so that threads change no rounding


class GatedTiles:
    """The gated linear layer at some images; arguments as `gated_pool`, weight (N, C s s)."""

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
        self.dtype = torch.bfloat16 if precision == "bfloat16" else torch.float32
        self.words = packed_words(bits.numpy())
        self.pixels = with_spare(images)
        self.entries = self._entries(weight.detach(), bias.detach())

    def _entries(self, weight: Tensor, bias: Tensor) -> Tensor:
        """Return the matrix (width, 64 W) that rows (patch, 1, 1, 1, 0 …) are multiplied with."""
        columns = self.words.shape[1] * LANES
        made = torch.zeros(row_width(self.dim, self.patch_size), columns, dtype=self.dtype)
        made[: self.dim, : self.size] = weight.T
        rest = bias.float()
        for part in range(3):  # bfloat16 has 8 bits of the bias's 24
            made[self.dim + part, : self.size] = rest
            rest = rest - made[self.dim + part, : self.size].float()
        return made

    @property
    def out_shape(self) -> tuple[int, int, int, int]:
        """(B, h', w', N)."""
        return len(self.images), self.bands, -(-self.width // self.pool), self.size

    def forward(self) -> Tensor:
        """Return the window means (B, h', w', N) float32."""
        out = torch.empty(self.out_shape)
        means = out.flatten(0, 1).numpy()

        def piece(first: int, last: int) -> None:
            patches, left = self._buffers()
            scores = torch.empty(self.tile_rows, self.entries.shape[1], dtype=self.dtype)
            for a, b in self._tiles(first, last):
                n = self._load(a, b, patches, left)
                torch.mm(left[:n], self.entries, out=scores[:n])
                sizes = self.width, self.height, self.pool
                pool_bands(_numbers(scores), self.words, *sizes, a, b, means)

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
            patches, left = self._buffers()
            total = of_entries[first // (_PIECE_IMAGES * self.bands)]
            spread = torch.empty(self.tile_rows, self.entries.shape[1], dtype=self.dtype)
            product = torch.empty(self.entries.shape, dtype=self.dtype)
            for a, b in self._tiles(first, last):
                n = self._load(a, b, patches, left)
                sizes = self.width, self.height, self.pool
                spread_bands(means, self.words, *sizes, a, b, _numbers(spread))
                total += torch.mm(left[:n].T, spread[:n], out=product)
                if of_images is not None:
                    torch.mm(spread[:n], self.entries.T, out=left[:n])
                    rows = patches[:n].copy_(left[:n]).numpy()
                    add_patches(rows, self.patch_size, self._position(a), of_images.numpy())

        on_threads(piece, pieces)
        summed = of_entries.sum(dim=0)[:, : self.size]
        return of_images, summed[: self.dim].T, summed[self.dim].clone()

    @property
    def tile_bands(self) -> int:
        """Bands of one tile."""
        return max(1, _TILE_ROWS // (min(self.pool, self.height) * self.width))

    @property
    def tile_rows(self) -> int:
        """Positions of one tile at most."""
        return self.tile_bands * min(self.pool, self.height) * self.width

    def _pieces(self) -> list[tuple[int, int]]:
        step, last = _PIECE_IMAGES * self.bands, len(self.images) * self.bands
        return [(a, min(a + step, last)) for a in range(0, last, step)]

    def _tiles(self, first: int, last: int) -> list[tuple[int, int]]:
        return [(a, min(a + self.tile_bands, last)) for a in range(first, last, self.tile_bands)]

    def _position(self, band: int) -> int:
        """Return the position at which a band begins."""
        image, y = divmod(band, self.bands)
        return (image * self.height + y * self.pool) * self.width

    def _buffers(self) -> tuple[Tensor, Tensor]:
        patches = torch.empty(self.tile_rows, self.entries.shape[0])
        return patches, torch.empty(patches.shape, dtype=self.dtype)

    def _load(self, first: int, last: int, patches: Tensor, left: Tensor) -> int:
        """Fill both with the patches of bands [first, last); return how many they are."""
        a, b = self._position(first), self._position(last)
        patch_rows(self.pixels, self.patch_size, a, b, patches.numpy())
        left[: b - a].copy_(patches[: b - a])
        return b - a


def _numbers(tile: Tensor) -> Array:
    """Return a tile as the kernels take it: float32, or bits of bfloat16 as int16."""
    return (tile.view(torch.int16) if tile.dtype == torch.bfloat16 else tile).numpy()
