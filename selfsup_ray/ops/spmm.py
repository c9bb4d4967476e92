"""Numba kernels of label diffusion: sparse rows times dense rows, at the speed of the memory.

A row's sum is kept in vector registers, 128 columns at a time, while the rows of its neighbors are
fetched ahead. Neighbors are added one after the other, so a neighbor that is zero can be left out
without changing a bit, and no column knows how many others there are.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
from llvmlite import ir
from numba import njit, types
from numba.core import cgutils
from numba.extending import intrinsic

LANES = 16
"""float32 numbers of a vector; the columns of L are padded to a multiple of it."""
AHEAD = 8
"""Neighbors between the one that is added and the one whose row is fetched."""

_FLOATS = ir.VectorType(ir.FloatType(), LANES)
_SHORTS = ir.VectorType(ir.IntType(16), LANES)
_INTS = ir.VectorType(ir.IntType(32), LANES)


def _row_sum(vectors: int, *, short: bool, weighted: bool) -> Any:
    """Return an intrinsic that sums `vectors` x 16 columns of some rows in registers.

    Called with addresses and counts: (x, row_bytes, ids, num_twice, num, values, out). Rows
    ids[:num_twice] count twice; with `weighted`, row i counts values[i] times instead.
    """

    def build(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        x, row_bytes, ids, num_twice, num, values, out = args
        sums = [ir.Constant(_FLOATS, [0.0] * LANES)] * vectors
        rows = _Rows(builder, x, row_bytes, ids, num, values if weighted else None, short=short)
        if not weighted:
            sums = rows.added(sums, ir.Constant(ir.IntType(64), 0), num_twice)
            sums = [builder.fadd(s, s) for s in sums]
            sums = rows.added(sums, num_twice, num)
        else:
            sums = rows.added(sums, ir.Constant(ir.IntType(64), 0), num)
        for v, total in enumerate(sums):
            place = builder.add(out, ir.Constant(ir.IntType(64), v * LANES * 4))
            builder.store(total, builder.inttoptr(place, _FLOATS.as_pointer()), align=4)
        return context.get_dummy_value()

    def typed(context: Any, *args: Any) -> Any:
        return types.void(*[types.int64] * 7), build

    def row_sum(context, x, row_bytes, ids, num_twice, num, values, out):  # type: ignore[no-untyped-def]
        return typed(context)

    return intrinsic(row_sum)


class _Rows:
    """Writes the loop over neighbors as LLVM instructions."""

    def __init__(
        self, builder: Any, x: Any, row_bytes: Any, ids: Any, num: Any, values: Any, *, short: bool
    ) -> None:
        self.builder, self.x, self.row_bytes, self.ids = builder, x, row_bytes, ids
        self.num, self.values, self.short = num, values, short

    def added(self, sums: list[Any], start: Any, stop: Any) -> list[Any]:
        """Return `sums` with the rows of ids[start:stop] added, in this order."""
        builder, int64 = self.builder, ir.IntType(64)
        before = builder.block
        head = builder.append_basic_block("rows.head")
        body = builder.append_basic_block("rows.body")
        after = builder.append_basic_block("rows.after")
        builder.branch(head)
        builder.position_at_end(head)
        i = builder.phi(int64)
        i.add_incoming(start, before)
        totals = [builder.phi(_FLOATS) for _ in sums]
        for total, initial in zip(totals, sums, strict=True):
            total.add_incoming(initial, before)
        builder.cbranch(builder.icmp_signed("<", i, stop), body, after)
        builder.position_at_end(body)
        self._fetch(builder.add(i, ir.Constant(int64, AHEAD)), len(sums))
        new = self._with_row(i, totals)
        i.add_incoming(builder.add(i, ir.Constant(int64, 1)), body)
        for total, value in zip(totals, new, strict=True):
            total.add_incoming(value, body)
        builder.branch(head)
        builder.position_at_end(after)
        return totals

    def _row(self, i: Any) -> Any:
        builder, int64 = self.builder, ir.IntType(64)
        place = builder.add(self.ids, builder.shl(i, ir.Constant(int64, 2)))
        number = builder.load(builder.inttoptr(place, ir.IntType(32).as_pointer()), align=4)
        return builder.add(self.x, builder.mul(builder.zext(number, int64), self.row_bytes))

    def _fetch(self, i: Any, vectors: int) -> None:
        """Ask for the cache lines of row i; of the last row when the list ends before."""
        builder, int64, int32 = self.builder, ir.IntType(64), ir.IntType(32)
        last = builder.sub(self.num, ir.Constant(int64, 1))
        row = self._row(builder.select(builder.icmp_signed("<", i, last), i, last))
        byte = ir.IntType(8).as_pointer()
        kind = ir.FunctionType(ir.VoidType(), [byte, int32, int32, int32])
        insert: Any = cgutils.get_or_insert_function
        call = insert(builder.module, kind, "llvm.prefetch.p0")
        flags = [ir.Constant(int32, value) for value in (0, 3, 1)]  # read, keep, data
        size = vectors * LANES * (2 if self.short else 4)
        for offset in range(0, size, 64):
            place = builder.add(row, ir.Constant(int64, offset))
            builder.call(call, [builder.inttoptr(place, byte), *flags])

    def _with_row(self, i: Any, totals: list[Any]) -> list[Any]:
        builder = self.builder
        row, weight, new = self._row(i), self._weight(i), []
        for v, total in enumerate(totals):
            numbers = self._vector(row, v)
            if weight is not None:
                numbers = builder.fmul(numbers, weight)
            new.append(builder.fadd(total, numbers))
        return new

    def _weight(self, i: Any) -> Any:
        if self.values is None:
            return None
        builder = self.builder
        place = builder.add(self.values, builder.shl(i, ir.Constant(ir.IntType(64), 2)))
        one = builder.load(builder.inttoptr(place, ir.FloatType().as_pointer()), align=4)
        empty = ir.Constant(_FLOATS, ir.Undefined)
        first = builder.insert_element(empty, one, ir.Constant(ir.IntType(32), 0))
        return builder.shuffle_vector(first, empty, ir.Constant(_INTS, [0] * LANES))

    def _vector(self, row: Any, v: int) -> Any:
        builder, size = self.builder, 2 if self.short else 4
        place = builder.add(row, ir.Constant(ir.IntType(64), v * LANES * size))
        if not self.short:
            return builder.load(builder.inttoptr(place, _FLOATS.as_pointer()), align=4)
        bits = builder.load(builder.inttoptr(place, _SHORTS.as_pointer()), align=2)
        wide = builder.shl(builder.zext(bits, _INTS), ir.Constant(_INTS, [16] * LANES))
        return builder.bitcast(wide, _FLOATS)


def _tiled(*, short: bool, weighted: bool) -> Callable[..., None]:
    """Return a compiled function that sums rows over all columns, tile by tile."""
    sum_8 = _row_sum(8, short=short, weighted=weighted)
    sum_4 = _row_sum(4, short=short, weighted=weighted)
    sum_2 = _row_sum(2, short=short, weighted=weighted)
    sum_1 = _row_sum(1, short=short, weighted=weighted)
    size = 2 if short else 4

    @njit(nogil=True)
    def sum_rows(
        x: int, row_bytes: int, ids: int, num_twice: int, num: int, values: int, out: Any
    ) -> None:
        columns, place = len(out), np.int64(out.ctypes.data)
        c = 0
        while columns - c >= 128:
            sum_8(x + c * size, row_bytes, ids, num_twice, num, values, place + c * 4)
            c += 128
        if columns - c >= 64:
            sum_4(x + c * size, row_bytes, ids, num_twice, num, values, place + c * 4)
            c += 64
        if columns - c >= 32:
            sum_2(x + c * size, row_bytes, ids, num_twice, num, values, place + c * 4)
            c += 32
        if columns - c >= 16:
            sum_1(x + c * size, row_bytes, ids, num_twice, num, values, place + c * 4)

    return sum_rows


_sum_floats = _tiled(short=False, weighted=False)
_sum_shorts = _tiled(short=True, weighted=False)
_sum_weighted = _tiled(short=False, weighted=True)


@njit(nogil=True)
def _reached(ids: Any, start: int, twice: int, stop: int, active: Any, kept: Any) -> Any:
    """Copy the neighbors that are not zero to `kept`; return how many count twice, and all."""
    num = 0
    for j in range(start, start + twice):
        kept[num] = ids[j]
        num += active[ids[j]]
    num_twice = num
    for j in range(start + twice, stop):
        kept[num] = ids[j]
        num += active[ids[j]]
    return num_twice, num


@njit(nogil=True)
def _store_floats(row: Any, out: Any, scale: Any, weight: Any, sums: Any) -> None:
    for c in range(len(row)):
        value = row[c] * (scale[c] * weight)
        out[c] = value
        sums[c] += value


@njit(nogil=True)
def _store_shorts(row: Any, out: Any, scale: Any, weight: Any, sums: Any) -> None:
    """Round to bfloat16, to the nearest and halves to even; the sums are of what is stored."""
    for c in range(len(row)):
        bits = np.float32(row[c] * (scale[c] * weight)).view(np.uint32)
        bits = (bits + np.uint32(0x7FFF) + ((bits >> np.uint32(16)) & np.uint32(1))) >> np.uint32(
            16
        )
        out[c] = np.uint16(bits)
        sums[c] += np.uint32(bits << np.uint32(16)).view(np.float32)


@njit(nogil=True, cache=True)
def multiply_floats(
    indptr: Any,
    ids: Any,
    twice: Any,
    x: Any,
    y: Any,
    scale: Any,
    start: int,
    stop: int,
    active: Any,
    reached: Any,
    sums: Any,
    row: Any,
    kept: Any,
) -> None:
    """Write rows [start, stop) of y = W x diag(scale) and add their float64 column sums.

    x, y: (N, C) float32, C a multiple of LANES; row i of W has weight 2 / total at the first
    twice[i] of its neighbors ids[indptr[i]:indptr[i + 1]] and 1 / total at the others. active: (N,)
    0 where a row of x is zero, or empty when all are to be read; reached: (N,) is set to 1 where a
    row of y is written. A row without active neighbors is left as it is: zero. row: (C,) and
    kept: (longest row,) are scratch.
    """
    size, base = x.shape[1] * 4, np.int64(x.ctypes.data)
    for i in range(start, stop):
        first, num = indptr[i], indptr[i + 1] - indptr[i]
        num_twice, total = twice[i], np.float32(num + twice[i])
        place = np.int64(ids.ctypes.data) + first * 4
        if len(active):
            num_twice, num = _reached(ids, first, num_twice, first + num, active, kept)
            place = np.int64(kept.ctypes.data)
        if num == 0:
            continue
        _sum_floats(base, size, place, num_twice, num, 0, row)
        _store_floats(row, y[i], scale, np.float32(1) / total, sums)
        reached[i] = 1


@njit(nogil=True, cache=True)
def multiply_shorts(
    indptr: Any,
    ids: Any,
    twice: Any,
    x: Any,
    y: Any,
    scale: Any,
    start: int,
    stop: int,
    active: Any,
    reached: Any,
    sums: Any,
    row: Any,
    kept: Any,
) -> None:
    """`multiply_floats` with x and y as the upper halves of float32 numbers: bfloat16 in uint16."""
    size, base = x.shape[1] * 2, np.int64(x.ctypes.data)
    for i in range(start, stop):
        first, num = indptr[i], indptr[i + 1] - indptr[i]
        num_twice, total = twice[i], np.float32(num + twice[i])
        place = np.int64(ids.ctypes.data) + first * 4
        if len(active):
            num_twice, num = _reached(ids, first, num_twice, first + num, active, kept)
            place = np.int64(kept.ctypes.data)
        if num == 0:
            continue
        _sum_shorts(base, size, place, num_twice, num, 0, row)
        _store_shorts(row, y[i], scale, np.float32(1) / total, sums)
        reached[i] = 1


@njit(nogil=True, cache=True)
def multiply_weighted(
    indptr: Any,
    ids: Any,
    values: Any,
    x: Any,
    y: Any,
    scale: Any,
    start: int,
    stop: int,
    reached: Any,
    sums: Any,
    row: Any,
) -> None:
    """`multiply_floats` with one float32 value per neighbor; rows of W are values / their sum."""
    size, base = x.shape[1] * 4, np.int64(x.ctypes.data)
    for i in range(start, stop):
        first, num = indptr[i], indptr[i + 1] - indptr[i]
        total = np.float64(0)
        for j in range(first, first + num):
            total += values[j]
        if total == 0:
            continue
        place = np.int64(values.ctypes.data) + first * 4
        _sum_weighted(base, size, np.int64(ids.ctypes.data) + first * 4, 0, num, place, row)
        _store_floats(row, y[i], scale, np.float32(1 / total), sums)
        reached[i] = 1


@njit(nogil=True, cache=True)
def sum_lists(lists: Any, x: Any, scale: Any, out: Any, row: Any, kept: Any) -> None:
    """Write out[i] = scale times the sum of rows lists[i] of x; -1 is no row.

    lists: (n, k) int32; x: (N, C') float32 or bfloat16 as uint16; out: (n, C <= C') float32.
    """
    is_short = x.itemsize == 2
    size, base = x.shape[1] * x.itemsize, np.int64(x.ctypes.data)
    for i in range(len(lists)):
        num = 0
        for j in range(lists.shape[1]):
            if lists[i, j] >= 0:
                kept[num] = lists[i, j]
                num += 1
        if is_short:
            _sum_shorts(base, size, np.int64(kept.ctypes.data), 0, num, 0, row)
        else:
            _sum_floats(base, size, np.int64(kept.ctypes.data), 0, num, 0, row)
        for c in range(out.shape[1]):
            out[i, c] = row[c] * scale[c]


@njit(nogil=True, cache=True)
def top_columns(places: Any, x: Any, scale: Any, columns: Any, values: Any, num: int) -> None:
    """Write the columns with the largest scale * x[places[i]], best first, ties by lower column.

    x: (N, C') float32 or bfloat16 as uint16, of which `num` columns count; columns (n, m) int32 and
    values (n, m) float32, m <= num. scale is positive.
    """
    is_short, most = x.itemsize == 2, columns.shape[1]
    for i in range(len(places)):
        row, used = x[places[i]], 0
        for c in range(num):
            if is_short:
                value = np.uint32(np.uint32(row[c]) << np.uint32(16)).view(np.float32) * scale[c]
            else:
                value = row[c] * scale[c]
            if used == most and value <= values[i, most - 1]:
                continue
            at = used if used < most else most - 1
            while at > 0 and values[i, at - 1] < value:
                values[i, at], columns[i, at] = values[i, at - 1], columns[i, at - 1]
                at -= 1
            values[i, at], columns[i, at] = value, c
            used = min(used + 1, most)
