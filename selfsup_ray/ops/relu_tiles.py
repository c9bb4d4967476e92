"""The fast way through `relu_pool` on a CPU: bits are the signs of the products, tile by tile."""

from __future__ import annotations

from typing import Any, Literal

import torch
from llvmlite import ir
from numba import njit
from numba.core import types
from numba.extending import intrinsic
from torch import Tensor

from selfsup_ray.artifacts import Array
from selfsup_ray.ops.gated_kernels import pool_bands
from selfsup_ray.ops.gated_tiles import DenseTile, GatedTiles, numbers
from selfsup_ray.ops.patch_selection import LANES
from selfsup_ray.ops.patch_tiles import on_threads


def _signs(typing: Any, source: Any, i: Any) -> Any:
    """Return 64 bits: which of 64 numbers from place i on are above 0.

    source: bits of bfloat16 numbers as int16, whose order around 0 is that of the numbers, or
    float32.
    """

    def code(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        kind = signature.args[0]
        is_short = kind.dtype == types.int16
        vector = ir.VectorType(ir.IntType(16) if is_short else ir.FloatType(), LANES)
        data = context.make_array(kind)(context, builder, args[0]).data
        place = builder.bitcast(builder.gep(data, [args[1]]), vector.as_pointer())
        row = builder.load(place, align=kind.dtype.bitwidth // 8)
        zeros = ir.Constant(vector, None)
        compare = builder.icmp_signed if is_short else builder.fcmp_ordered
        return builder.bitcast(compare(">", row, zeros), ir.IntType(64))

    return types.uint64(source, types.intp), code


_sign_bits: Any = intrinsic(_signs)


@njit(nogil=True, cache=True)
def sign_words(scores: Any, rows: int, words: Any, first: int) -> None:
    """Fill words[first : first + rows] with the signs of scores (n, 64 W): (…, W) uint64."""
    columns = scores.shape[1]
    for row in range(rows):
        for w in range(words.shape[1]):
            words[first + row, w] = _sign_bits(scores, row * columns + w * LANES)


class ReluTiles(GatedTiles):
    """Convolution, ReLU and pooling of some images; the signs are kept for the backward."""

    def __init__(
        self,
        images: Tensor,
        weight: Tensor,
        bias: Tensor,
        pool: int,
        precision: Literal["bfloat16", "float32"],
    ) -> None:
        s = weight.shape[2]
        shape = (images.shape[0], images.shape[2] - s + 1, images.shape[3] - s + 1)
        bits = torch.full((*shape, -(-len(weight) // 8)), 255, dtype=torch.uint8)  # until known
        super().__init__(images.float(), bits, weight.flatten(1), bias, s, pool, precision)

    def forward(self) -> Tensor:
        """Return the window means (B, h', w', N) float32."""
        out = torch.empty(self.out_shape)
        means = out.flatten(0, 1).numpy()

        def piece(first: int, last: int) -> None:
            tile = _ReluTile(self)
            for a, b in self._tiles(first, last):
                tile.means(a, b, means)

        on_threads(piece, self._pieces())
        return out


class _ReluTile(DenseTile):
    """Products whose signs are noted before they are summed."""

    def means(self, first: int, last: int, out: Array) -> None:
        """Fill bands [first, last) of out, and their bits."""
        layer, n = self.layer, self._load(first, last)
        torch.mm(self.left[:n], layer.entries, out=self.products[:n])
        products = numbers(self.products)
        sign_words(products, n, layer.words, layer.position(first))
        pool_bands(products, layer.words, *layer.sizes, first, last, out)
