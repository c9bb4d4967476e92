"""Numba kernels behind the codes of patches: patches as rows, and the k smallest of each row.

Scores arrive as tiles of floating-point numbers seen as integers, and are put into an order-keeping
form in place. The threshold of a row is found by counting: one comparison of 64 numbers gives 64
bits, of which the number of ones is counted, and which at the threshold are the code itself.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from llvmlite import ir
from numba import njit
from numba.core import cgutils, types
from numba.extending import intrinsic

from selfsup_ray.artifacts import Array

LANES = 64
"""Numbers compared at once; a row has a multiple of them."""
COPIED = 8
"""Numbers of a patch's row copied at once, wanted or not."""
_DOT = 16  # numbers multiplied at once; rows are a multiple of it wide
_WORD = ir.IntType(64)


def _lanes(context: Any, builder: Any, keys: Any, args: Any) -> tuple[Any, Any, Any]:
    """Return LANES of keys from args[1] on: where they are, their vector type and the vector."""
    array = context.make_array(keys)(context, builder, args[0])
    width = keys.dtype.bitwidth
    vector = ir.VectorType(ir.IntType(width), LANES)
    place = builder.bitcast(builder.gep(array.data, [args[1]]), vector.as_pointer())
    return place, vector, builder.load(place, align=width // 8)


def _splat(builder: Any, vector: Any, value: Any) -> Any:
    empty, zero = ir.Constant(vector, ir.Undefined), ir.Constant(ir.IntType(32), 0)
    first = builder.insert_element(empty, value, zero)
    every = ir.Constant(ir.VectorType(ir.IntType(32), LANES), [0] * LANES)
    return builder.shuffle_vector(first, empty, every)


def _mask_of(condition: str) -> Any:
    """Return a function (keys, start, bound) -> uint64 with bit j: keys[start + j] ? bound.

    As a vector type, since the compiler does not make one comparison and one mask of a loop.
    """

    def mask(typing: Any, keys: Any, start: Any, bound: Any) -> Any:
        def code(context: Any, builder: Any, signature: Any, args: Any) -> Any:
            _, vector, row = _lanes(context, builder, signature.args[0], args)
            bounds = _splat(builder, vector, builder.trunc(args[2], vector.element))
            return builder.bitcast(builder.icmp_signed(condition, row, bounds), _WORD)

        return types.uint64(keys, types.intp, types.int64), code

    return intrinsic(mask)


at_most = _mask_of("<=")
equal_to = _mask_of("==")


def _ordered(typing: Any, bits: Any, start: Any) -> Any:
    """Put 64 numbers, the bits of floating-point ones, into the order of their values."""

    def code(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        place, vector, row = _lanes(context, builder, signature.args[0], args)
        width, lane = vector.element.width, vector.element
        sign = builder.ashr(row, ir.Constant(vector, [width - 1] * LANES))
        largest = ir.Constant(vector, [2 ** (width - 1) - 1] * LANES)
        keys = builder.xor(row, builder.and_(sign, largest))
        zero, negative_zero = (_splat(builder, vector, ir.Constant(lane, v)) for v in (0, -1))
        is_zero = builder.icmp_signed("==", keys, negative_zero)
        builder.store(builder.select(is_zero, zero, keys), place, align=width // 8)
        return context.get_dummy_value()

    return types.void(bits, types.intp), code


_order_lanes: Any = intrinsic(_ordered)


def _copied(typing: Any, source: Any, i: Any, target: Any, j: Any) -> Any:
    """Copy COPIED numbers from place i of source to place j of target, counted from their start."""

    def code(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        vector = ir.VectorType(ir.FloatType(), COPIED).as_pointer()
        places = [
            builder.bitcast(
                builder.gep(context.make_array(kind)(context, builder, array).data, [at]), vector
            )
            for kind, array, at in zip(signature.args[::2], args[::2], args[1::2], strict=True)
        ]
        builder.store(builder.load(places[0], align=4), places[1], align=4)
        return context.get_dummy_value()

    return types.void(source, types.intp, target, types.intp), code


_copy: Any = intrinsic(_copied)


def _product(typing: Any, a: Any, i: Any, b: Any, j: Any, length: Any) -> Any:
    """Return the float32 product of `length` numbers, a multiple of 16, from places i and j on."""

    def code(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        vector = ir.VectorType(ir.FloatType(), _DOT)
        variable: Any = cgutils.alloca_once_value
        total = variable(builder, ir.Constant(vector, None))

        def loaded(which: int, at: Any) -> Any:
            array = context.make_array(signature.args[which])(context, builder, args[which])
            place = builder.gep(array.data, [builder.add(args[which + 1], at)])
            return builder.load(builder.bitcast(place, vector.as_pointer()), align=4)

        width = ir.Constant(args[4].type, _DOT)
        with cgutils.for_range(builder, builder.udiv(args[4], width)) as loop:
            at = builder.mul(loop.index, width)
            product = builder.fmul(loaded(0, at), loaded(2, at), flags=["contract"])
            builder.store(builder.fadd(builder.load(total), product, flags=["contract"]), total)
        rest, lanes = builder.load(total), _DOT
        while lanes > 1:  # the upper half onto the lower
            lanes //= 2
            places = ir.VectorType(ir.IntType(32), lanes)
            halves = [
                builder.shuffle_vector(rest, rest, ir.Constant(places, [*range(c, c + lanes)]))
                for c in (0, lanes)
            ]
            rest = builder.fadd(*halves)
        return builder.extract_element(rest, ir.Constant(ir.IntType(32), 0))

    return types.float32(a, types.intp, b, types.intp, types.intp), code


_dot: Any = intrinsic(_product)


def _ones(typing: Any, word: Any) -> Any:
    """Return how many bits of a uint64 are set."""

    def code(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        return builder.ctpop(args[0])

    return types.uint64(types.uint64), code


ones: Any = intrinsic(_ones)


@njit(nogil=True, cache=True)
def patch_rows(images: Any, size: int, first: int, last: int, out: Any) -> None:
    """Fill out[: last - first] with the patches at positions [first, last), each followed by 1 1 1.

    images: (B, C, H, W) float32 with COPIED more numbers behind them; a position is
    ((image h) + row) w + column. out: (n, row_width) float32; a patch is channel first.
    """
    channels, height, width = images.shape[1:]
    h, w = height - size + 1, width - size + 1
    for i in range(last - first):
        b, place = divmod(first + i, h * w)
        y, x = divmod(place, w)
        target = i * out.shape[1]
        for c in range(channels):
            source = ((b * channels + c) * height + y) * width + x
            for dy in range(size):
                for dx in range(0, size, COPIED):  # what is too much is written over by the next
                    _copy(images, source + dy * width + dx, out, target + dx)
                target += size
        dim = channels * size * size
        for t in range(dim, out.shape[1]):
            out[i, t] = t < dim + 3


def packed_words(bits: Array) -> Array:
    """Return packed bits (…, bytes) uint8 as (n, W) uint64, filled up with zeros."""
    rows = bits.reshape(-1, bits.shape[-1])
    if rows.shape[1] % 8:
        rows = np.pad(rows, ((0, 0), (0, -rows.shape[1] % 8)))
    return np.require(rows, requirements=["C", "A"]).view(np.uint64)


def row_width(dim: int, size: int) -> int:
    """Return the width of a row that holds a patch, three more numbers, and what copying spills."""
    spilled = dim - size + -(-size // COPIED) * COPIED
    return -(-max(dim + 3, spilled) // 16) * 16


@njit(nogil=True, cache=True)
def _count(keys: Any, first: int, last: int, bound: Any) -> Any:
    total = np.uint64(0)
    for start in range(first, last, LANES):
        total += ones(at_most(keys, start, bound))
    return np.int64(total)


@njit(nogil=True, cache=True)
def _threshold(keys: Any, row: int, k: int, near: Any, step: float) -> Any:
    """Return (low, count): the count <= k keys up to low are chosen, others equal low + 1.

    near: where the search starts; step: keys between two entries there, a guess. They change how
    fast the threshold is found and nothing else.
    """
    info = np.iinfo(keys.dtype)
    lowest, highest = np.int64(info.min), np.int64(info.max)
    first, last = row * keys.shape[1], (row + 1) * keys.shape[1]
    low: Any = lowest
    high: Any = highest
    below, above, t, wide = 0, keys.shape[1], near, 0.0
    for turn in range(80):
        t = min(max(t, low + 1), high - 1)
        count = _count(keys, first, last, t)
        if count == k:
            return t, count
        if count < k:
            low, below = t, count
        else:
            high, above = t, count
        if high - low == 1:
            break
        if turn >= 8 and turn % 2 == 0:  # whatever the numbers are like, it ends
            t = (low + high) >> 1
        elif low > lowest and high < highest:
            t = low + (high - low) * (k - below) // (above - below)
        else:
            wide = max(2 * wide, 1 + abs(k - count) * step)
            t = t + np.int64(wide) if count < k else t - np.int64(wide)
    return low, below


@njit(nogil=True, cache=True)
def _tied(keys: Any, row: int, value: int, size: int, tied: Any) -> Any:
    """Write the entries of a row whose key is `value`, ascending; return how many they are."""
    used = 0
    for start in range(0, keys.shape[1], LANES):
        mask = equal_to(keys, row * keys.shape[1] + start, value)
        while mask:
            lowest = mask & (~mask + np.uint64(1))
            entry = start + np.int64(ones(lowest - np.uint64(1)))
            mask ^= lowest
            if entry < size:  # columns past the entries tie where a patch is not finite
                tied[used] = entry
                used += 1
    return used


@njit(nogil=True, cache=True)
def choose_rows(
    keys: Any, ks: Any, exactly: bool, step: float, patches: Any, kernel: Any, first: int, out: Any
) -> None:
    """Fill out[i, first : first + n] with bits at the ks[i] smallest of each row of keys.

    keys: (>= n, 64 W); patches: (n, d) and kernel (N, d) float32; out: (len(ks), …, W) uint64.
    Entries whose keys equal the k-th: exactly settles them by the product of patch and kernel in
    float32, then by the lower entry, so that k bits are set; otherwise all of them are set. step:
    keys between two entries near the threshold, a guess.
    """
    size, width = kernel.shape
    tied, values = np.empty(size, np.int64), np.empty(size, np.float32)
    near = np.zeros(len(ks), np.int64)
    for row in range(patches.shape[0]):
        for i in range(len(ks)):
            low, count = _threshold(keys, row, ks[i], near[i], step)
            near[i], more = low, ks[i] - count
            bound = low + 1 if more and not exactly else low
            for w in range(out.shape[2]):
                out[i, first + row, w] = at_most(keys, row * keys.shape[1] + w * LANES, bound)
            if more == 0 or not exactly:
                continue
            used = _tied(keys, row, low + 1, size, tied)
            for t in range(used):
                values[t] = _dot(patches, row * width, kernel, tied[t] * width, width)
            for _ in range(min(more, used)):
                best = 0
                for t in range(1, used):
                    if values[t] < values[best]:
                        best = t
                word, bit = divmod(tied[best], LANES)
                out[i, first + row, word] |= np.uint64(1) << np.uint64(bit)
                values[best] = np.inf


@njit(nogil=True, cache=True)
def order_keys(bits: Any) -> None:
    """Turn bits of floating-point numbers (n, 64 words), as signed integers, into ordered keys."""
    for start in range(0, bits.size, LANES):
        _order_lanes(bits, start)
