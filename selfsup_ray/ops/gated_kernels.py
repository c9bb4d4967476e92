"""Numba kernels behind the gated linear layer: sums over windows of what the bits let through."""

from __future__ import annotations

from typing import Any

import numpy as np
from llvmlite import ir
from numba import njit
from numba.core import types
from numba.extending import intrinsic

from selfsup_ray.artifacts import Array
from selfsup_ray.ops.patch_selection import LANES, packed_words
from selfsup_ray.ops.pooling import Cells

_FLOATS = ir.VectorType(ir.FloatType(), LANES)
_BITS = ir.VectorType(ir.IntType(1), LANES)


def _place(context: Any, builder: Any, kind: Any, array: Any, at: Any, vector: Any) -> Any:
    """Return the address of LANES numbers of an array from place `at` on."""
    data = context.make_array(kind)(context, builder, array).data
    return builder.bitcast(builder.gep(data, [at]), vector.as_pointer())


def _let_through(builder: Any, mask: Any, row: Any) -> Any:
    """Return the numbers whose bit is set, 0 for the others."""
    return builder.select(builder.bitcast(mask, _BITS), row, ir.Constant(row.type, None))


def _add(typing: Any, source: Any, i: Any, mask: Any, sums: Any, j: Any) -> Any:
    """Add 64 numbers from place i of source, those whose bit is set, to sums from place j on.

    source: bits of bfloat16 numbers as int16, or float32.
    """

    def code(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        kind = signature.args[0]
        is_short = kind.dtype == types.int16
        vector = ir.VectorType(ir.IntType(16), LANES) if is_short else _FLOATS
        place = _place(context, builder, kind, args[0], args[1], vector)
        loaded = builder.load(place, align=kind.dtype.bitwidth // 8)
        row = _let_through(builder, args[2], loaded)
        if is_short:
            wide = ir.VectorType(ir.IntType(32), LANES)
            row = builder.shl(builder.zext(row, wide), ir.Constant(wide, [16] * LANES))
            row = builder.bitcast(row, _FLOATS)
        target = _place(context, builder, signature.args[3], args[3], args[4], _FLOATS)
        builder.store(builder.fadd(builder.load(target, align=4), row), target, align=4)
        return context.get_dummy_value()

    return types.void(source, types.intp, types.uint64, sums, types.intp), code


def _spread(typing: Any, source: Any, i: Any, mask: Any, target: Any, j: Any) -> Any:
    """Write 64 numbers from place i of source, 0 where no bit is set, to target from place j on."""

    def code(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        width = signature.args[0].dtype.bitwidth
        vector = ir.VectorType(ir.IntType(width), LANES)
        place = _place(context, builder, signature.args[0], args[0], args[1], vector)
        row = _let_through(builder, args[2], builder.load(place, align=width // 8))
        to = _place(context, builder, signature.args[3], args[3], args[4], vector)
        builder.store(row, to, align=width // 8)
        return context.get_dummy_value()

    return types.void(source, types.intp, types.uint64, target, types.intp), code


def _convert(typing: Any, source: Any, i: Any, target: Any, j: Any) -> Any:
    """Write 64 float32 from place i of source to target from place j on, in target's type.

    int16 stands for the bits of bfloat16, rounded to nearest even.
    """

    def code(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        kind = signature.args[2]
        row = builder.load(
            _place(context, builder, signature.args[0], args[0], args[1], _FLOATS), align=4
        )
        if kind.dtype == types.int16:
            wide, narrow = (ir.VectorType(ir.IntType(b), LANES) for b in (32, 16))
            half, one, half_width = (ir.Constant(wide, [v] * LANES) for v in (0x7FFF, 1, 16))
            bits = builder.bitcast(row, wide)
            odd = builder.and_(builder.lshr(bits, half_width), one)
            bits = builder.add(builder.add(bits, half), odd)
            row = builder.trunc(builder.lshr(bits, half_width), narrow)
        place = _place(context, builder, kind, args[2], args[3], row.type)
        builder.store(row, place, align=kind.dtype.bitwidth // 8)
        return context.get_dummy_value()

    return types.void(source, types.intp, target, types.intp), code


_add_lanes: Any = intrinsic(_add)
_spread_lanes: Any = intrinsic(_spread)
_convert_lanes: Any = intrinsic(_convert)


@njit(nogil=True, cache=True)
def pool_bands(
    scores: Any, words: Any, width: int, height: int, pool: int, first: int, last: int, out: Any
) -> None:
    """Fill bands [first, last) of out with window means of the scores whose bits are set.

    A band is a row of windows: band b h' + y is row y of image b. scores: (n, 64 W), bits of
    bfloat16 as int16 or float32, of the positions of these bands in order; words: (B height width,
    W) uint64; out: (B h', w', N) float32.
    """
    bands = -(-height // pool)
    columns, size = scores.shape[1], out.shape[2]
    sums = np.empty(columns, np.float32)
    row = 0  # of scores, where the band begins
    for band in range(first, last):
        image, y = divmod(band, bands)
        rows = min(pool, height - y * pool)
        start = (image * height + y * pool) * width
        for x in range(out.shape[1]):
            left, right = x * pool, min((x + 1) * pool, width)
            sums[:] = 0
            for dy in range(rows):
                for column in range(left, right):
                    at = dy * width + column
                    for w in range(words.shape[1]):
                        place = (row + at) * columns + w * LANES
                        _add_lanes(scores, place, words[start + at, w], sums, w * LANES)
            share = np.float32(1 / (rows * (right - left)))
            for n in range(size):
                out[band, x, n] = sums[n] * share
        row += rows * width


@njit(nogil=True, cache=True)
def spread_bands(
    gradient: Any, words: Any, width: int, height: int, pool: int, first: int, last: int, out: Any
) -> None:
    """Fill out with the gradient of the scores of bands [first, last): `pool_bands` turned round.

    gradient: (B h', w', N) float32; out: (n, 64 W) float32, or bits of bfloat16 as int16; columns
    past N get 0.
    """
    bands = -(-height // pool)
    columns, size = out.shape[1], gradient.shape[2]
    exact, values = np.zeros(columns, np.float32), np.zeros(columns, out.dtype)
    row = 0  # of out, where the band begins
    for band in range(first, last):
        image, y = divmod(band, bands)
        rows = min(pool, height - y * pool)
        start = (image * height + y * pool) * width
        for x in range(gradient.shape[1]):
            left, right = x * pool, min((x + 1) * pool, width)
            share = np.float32(1 / (rows * (right - left)))
            for n in range(size):
                exact[n] = gradient[band, x, n] * share
            for place in range(0, columns, LANES):
                _convert_lanes(exact, place, values, place)
            for dy in range(rows):
                for column in range(left, right):
                    at = dy * width + column
                    for w in range(words.shape[1]):
                        place = (row + at) * columns + w * LANES
                        _spread_lanes(values, w * LANES, words[start + at, w], out, place)
        row += rows * width


@njit(nogil=True, cache=True)
def add_patches(rows: Any, size: int, first: int, out: Any) -> None:
    """Add the patches (n, >= C s s) at positions first, first + 1, … to images: `unfold` undone.

    out: (B, C, H, W) float32.
    """
    channels, height, width = out.shape[1:]
    h, w = height - size + 1, width - size + 1
    for i in range(rows.shape[0]):
        b, place = divmod(first + i, h * w)
        y, x = divmod(place, w)
        t = 0
        for c in range(channels):
            for dy in range(size):
                for dx in range(size):
                    out[b, c, y + dy, x + dx] += rows[i, t]
                    t += 1


@njit(nogil=True, cache=True)
def _count_windows(words: Any, height: int, width: int, ys: Any, xs: Any, out: Any) -> None:
    """Fill out (B, len(ys), len(xs), N) float32 with the share of positions whose bit is set.

    words: (B height width, W) uint64; ys, xs: (n, 2) int64, [start, stop) of each window.
    """
    size = out.shape[3]
    sums = np.empty(words.shape[1] * LANES, np.float32)
    ones = np.ones(LANES, np.float32)
    for image in range(out.shape[0]):
        for i in range(ys.shape[0]):
            for j in range(xs.shape[0]):
                sums[:] = 0
                for y in range(ys[i, 0], ys[i, 1]):
                    for x in range(xs[j, 0], xs[j, 1]):
                        at = (image * height + y) * width + x
                        for w in range(words.shape[1]):
                            _add_lanes(ones, 0, words[at, w], sums, w * LANES)
                share = np.float32(1 / ((ys[i, 1] - ys[i, 0]) * (xs[j, 1] - xs[j, 0])))
                for n in range(size):
                    out[image, i, j, n] = sums[n] * share


def window_shares(bits: Array, size: int, *, ys: Cells, xs: Cells) -> Array:
    """Return the share of each window's positions whose bit is set: (B, len(ys), len(xs), N).

    bits: (B, h, w, ceil(N / 8)) uint8; ys, xs: windows along the two axes.
    """
    out = np.empty((len(bits), len(ys), len(xs), size), np.float32)
    axes = np.array(ys, np.int64), np.array(xs, np.int64)
    _count_windows(packed_words(bits), bits.shape[1], bits.shape[2], *axes, out)
    return out
