"""The fast way to the codes of patches on a CPU: a few hundred patches at a time as rows of a
matrix, one product with the whole dictionary, and the selection while the scores are in the cache.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import lru_cache, partial
from itertools import pairwise
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from selfsup_ray.artifacts import Array
from selfsup_ray.ops.patch_selection import (
    COPIED,
    LANES,
    choose_rows,
    order_keys,
    patch_rows,
    row_width,
)

Precision = Literal["bfloat16", "float32"]

_TILE_BYTES = 1 << 20  # of scores: larger ones leave the cache, smaller ones are slow to multiply
_TILE_ROWS = (256, 2048)
_HUGE = 3e38  # the distance of columns that are no entries; finite in bfloat16 too
# Keys between two entries near the threshold, about: where the search for it looks next.
_STEP = {torch.int16: 0.25, torch.int32: 0.25 * 2**16}


@dataclass(frozen=True)
class Prepared:
    """A dictionary as matrices; a row of patches is (patch, 1, 1, 1, 0 …), `row_width` wide.

    rotation: (width, width) float32 from such rows to those that are multiplied, None for
    themselves; entries: (width, columns) of the type of the scores; exact: (N, width) float32.
    """

    rotation: Tensor | None
    entries: Tensor
    exact: Array

    @property
    def columns(self) -> int:
        """N, filled up to a multiple of LANES."""
        return self.entries.shape[1]


def prepare(kernel: Tensor, bias: Tensor, patch_size: int, precision: Precision) -> Prepared:
    """Return the matrices whose product ranks the entries of a dictionary by distance.

    bfloat16 numbers have 8 bits. Pixels in their own basis would lose the distances in them: what
    the kernel weighs most, fine detail, is what a patch has least of. So patches are turned to the
    basis in which the kernel weighs everything alike (the whitened one, up to a rotation), the
    mean over entries, which ranks nothing, is taken off, and the bias is cut into three parts.
    """
    size, dim = kernel.shape
    columns, width = -(-size // LANES) * LANES, row_width(dim, patch_size)
    exact = torch.zeros(size, width)
    exact[:, :dim], exact[:, dim] = kernel, bias
    if precision == "float32":
        entries = torch.zeros(width, columns)
        entries[:, :size], entries[dim, size:] = exact.T, _HUGE
        return Prepared(None, entries, exact.numpy())
    weights = kernel.double() - kernel.double().mean(dim=0)
    values, vectors = torch.linalg.eigh(weights.T @ weights / size)
    scale = values.clamp(min=max(float(values.max()), 1e-30) * 1e-12).sqrt()
    rotation, entries = torch.zeros(width, width), torch.zeros(width, columns).bfloat16()
    rotation[:dim, :dim] = vectors * scale
    rotation[range(dim, dim + 3), range(dim, dim + 3)] = 1
    entries[:dim, :size] = (weights @ (vectors / scale)).T.bfloat16()
    rest = (bias.double() - bias.double().mean()).float()
    for part in range(3):
        entries[dim + part, :size] = rest.bfloat16()
        rest = rest - entries[dim + part, :size].float()
    entries[dim, size:] = _HUGE
    return Prepared(rotation, entries, exact.numpy())


class _Key:
    """Two tensors as they are now, compared by identity."""

    def __init__(self, kernel: Tensor, bias: Tensor) -> None:
        self.kernel, self.bias = kernel, bias
        self.versions = tuple(-1 if t.is_inference() else t._version for t in (kernel, bias))

    def __hash__(self) -> int:
        return hash((id(self.kernel), id(self.bias), self.versions))

    def __eq__(self, other: object) -> bool:
        return (
            isinstance(other, _Key)
            and self.kernel is other.kernel
            and self.bias is other.bias
            and self.versions == other.versions
        )


@lru_cache(maxsize=4)
def _prepared(key: _Key, patch_size: int, precision: Precision) -> Prepared:
    return prepare(key.kernel.detach(), key.bias.detach(), patch_size, precision)


def tiled_bits(
    images: Tensor,
    kernel: Tensor,
    bias: Tensor,
    *,
    patch_size: int,
    ks: Sequence[int],
    kth: bool,
    precision: Precision,
    threads: int,
) -> list[Tensor]:
    """Return what `patch_bits` describes; images on the CPU, numba installed."""
    found = _prepared(_Key(kernel, bias), patch_size, precision)
    batch, height, width = images.shape[0], images.shape[2], images.shape[3]
    h, w = height - patch_size + 1, width - patch_size + 1
    pixels = with_spare(images)
    # The k-th alone is what the k nearest have and the k - 1 nearest have not.
    wanted = np.array([*ks, *(k - 1 for k in ks if kth)], np.int64)
    codes = np.empty((len(wanted), batch * h * w, found.columns // LANES), np.uint64)
    exactly = kth or precision == "bfloat16"
    work = partial(_range_bits, found, pixels, patch_size, wanted, exactly, codes)
    cuts = np.linspace(0, batch * h * w, threads + 1).astype(int).tolist()
    on_threads(work, list(pairwise(cuts)), threads=threads)
    if kth:
        codes = codes[: len(ks)] & ~codes[len(ks) :]
    used = -(-len(kernel) // 8)
    rows = codes.view(np.uint8)[:, :, :used].reshape(len(ks), batch, h, w, used)
    return [torch.from_numpy(code) for code in rows]


def _range_bits(
    found: Prepared,
    pixels: Array,
    size: int,
    ks: Array,
    exactly: bool,
    out: Array,
    first: int,
    last: int,
) -> None:
    """Write the codes of positions [first, last); one thread."""
    kind = torch.int16 if found.entries.dtype == torch.bfloat16 else torch.int32
    item, width = found.entries.element_size(), found.exact.shape[1]
    # Always as many rows, so that no product's rounding depends on how many patches there are.
    rows = min(max(_TILE_BYTES // (item * found.columns) // 64 * 64, _TILE_ROWS[0]), _TILE_ROWS[1])
    patches, turned = torch.zeros(rows, width), torch.empty(rows, width)
    left = torch.empty(rows, width, dtype=found.entries.dtype)
    scores = torch.empty(rows, found.columns, dtype=found.entries.dtype)
    for a in range(first, last, rows):
        n = min(rows, last - a)
        patch_rows(pixels, size, a, a + n, patches.numpy())
        if found.rotation is None:
            torch.mm(patches, found.entries, out=scores)
        else:
            torch.mm(patches, found.rotation, out=turned)
            torch.mm(left.copy_(turned), found.entries, out=scores)
        keys = scores[:n].view(kind).numpy()
        order_keys(keys)
        choose_rows(keys, ks, exactly, _STEP[kind], patches[:n].numpy(), found.exact, a, out)


def with_spare(images: Tensor) -> Array:
    """Return a copy of images (B, C, H, W), float32, that `patch_rows` may read a little past."""
    spare = torch.zeros(images.numel() + COPIED)
    return spare[: images.numel()].view(images.shape).copy_(images).numpy()


def on_threads(
    work: Callable[[int, int], None],
    ranges: Sequence[tuple[int, int]],
    *,
    threads: int | None = None,
) -> None:
    """Do all ranges, each on one thread, `threads` at a time: as many as torch has by default."""
    if not ranges:
        return
    before = torch.get_num_threads()
    threads = min(threads or before, len(ranges))
    if threads == 1 and before == 1:
        for first, last in ranges:
            work(first, last)
        return
    try:
        with ThreadPoolExecutor(threads, initializer=torch.set_num_threads, initargs=(1,)) as pool:
            list(pool.map(work, *zip(*ranges, strict=True)))
    finally:
        torch.set_num_threads(before)
