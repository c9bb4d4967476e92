"""The code of an image on a dictionary of patches: which entries are near each of its patches.

With kernel -(c W^T) and bias |c|^2 / 2 of an entry c (whitened by W), the convolution of an image
is |xW - c|^2 / 2 less a number common to all entries: it ranks them by distance (Thiry et al.
2021, section 3.1). A code holds one bit for each entry at each position, packed as
`numpy.packbits(bitorder="little")` packs them.
"""

from __future__ import annotations

from collections.abc import Sequence
from importlib.util import find_spec
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from selfsup_ray.ops.pooling import Cells, adaptive_cells, pooled_cells

Kind = Literal["up_to", "kth"]
Precision = Literal["bfloat16", "float32"]

_BYTE_VALUES = (1, 2, 4, 8, 16, 32, 64, 128)
_SCORES_AT_ONCE = 1 << 27  # numbers of one block of distances on a GPU: half a gigabyte


def patch_bits(
    images: Tensor,
    kernel: Tensor,
    bias: Tensor,
    *,
    patch_size: int,
    ks: Sequence[int],
    kind: Kind = "up_to",
    precision: Precision = "bfloat16",
    threads: int = 1,
) -> list[Tensor]:
    """Return for every k the packed code of all positions: uint8 (B, h, w, ceil(N / 8)).

    images: (B, C, H, W) float32; kernel: (N, C s s), channel first as F.unfold has it; bias: (N,);
    h = H - s + 1. `up_to` sets the k nearest entries, `kth` the k-th alone. All ks come from one
    pass over the distances.
    bfloat16: exactly k bits are set; distances are compared in bfloat16 where that is faster, with
    ties at the threshold settled in float32. float32: the published form, distance <= k-th
    distance; entries as far as the k-th are set too. Of equally far entries the lower is nearer.
    A CPU without numba and a GPU compare in float32.
    """
    size = len(kernel)
    assert all(1 <= k <= size for k in ks), f"k must lie in [1, {size}], got {list(ks)}"
    exactly = precision == "bfloat16" or kind == "kth"
    with torch.no_grad():
        if images.device.type == "cpu" and find_spec("numba") is not None:
            from selfsup_ray.ops.patch_tiles import tiled_bits

            return tiled_bits(
                images,
                kernel,
                bias,
                patch_size=patch_size,
                ks=ks,
                kth=kind == "kth",
                precision=precision,
                threads=threads,
            )
        parts: list[list[Tensor]] = [[] for _ in ks]
        positions = (images.shape[2] - patch_size + 1) * (images.shape[3] - patch_size + 1)
        for some in torch.split(images, max(1, _SCORES_AT_ONCE // (positions * size))):
            scores = distances(some, kernel, bias, patch_size=patch_size).permute(0, 2, 3, 1)
            for found, k in zip(parts, ks, strict=True):
                code = _smallest(scores, k, exactly=exactly)
                if kind == "kth" and k > 1:
                    code &= ~_smallest(scores, k - 1, exactly=True)
                found.append(_pack(code))
        return [torch.cat(found) for found in parts]


def distances(images: Tensor, kernel: Tensor, bias: Tensor, *, patch_size: int) -> Tensor:
    """Return the convolution that ranks as distance: (B, N, h, w) float32, the plain reference.

    In full float32 also inside autocast, and on a GPU by a matrix product: convolutions there
    round to TF32, which loses the small distances among the large numbers.
    """
    with torch.autocast(images.device.type, enabled=False):
        if images.device.type == "cpu":
            filters = kernel.view(len(kernel), images.shape[1], patch_size, patch_size)
            return F.conv2d(images, filters, bias)
        height, width = images.shape[2] - patch_size + 1, images.shape[3] - patch_size + 1
        scores = kernel @ F.unfold(images, patch_size) + bias[:, None]
        return scores.view(len(images), len(kernel), height, width)


def unpack_bits(bits: Tensor, size: int) -> Tensor:
    """Return packed bits (..., ceil(size / 8)) as bool (..., size)."""
    values = torch.tensor(_BYTE_VALUES, dtype=torch.uint8, device=bits.device)
    return (bits[..., None] & values).ne(0).flatten(-2)[..., :size]


def pooled_counts(bits: Tensor, size: int, *, pool: int | None, grid: int | None) -> Tensor:
    """Return the mean of the 0/1 code over windows: float32 (B, N, h', w'), channels last.

    bits: (B, h, w, ceil(N / 8)). pool: windows as AvgPool2d(pool, stride=pool, ceil_mode=True),
    those at the border over what they cover; grid: as AdaptiveAvgPool2d(grid); one of the two.
    """
    assert (pool is None) != (grid is None), "give pool or grid"
    height, width = bits.shape[1:3]
    if pool is not None:
        ys, xs = pooled_cells(height, pool), pooled_cells(width, pool)
    else:
        ys, xs = adaptive_cells(height, grid or 0), adaptive_cells(width, grid or 0)
    if bits.device.type == "cpu" and find_spec("numba") is not None:
        from selfsup_ray.ops.gated_kernels import window_shares

        shares = window_shares(bits.numpy(), size, ys=ys, xs=xs)
        return torch.from_numpy(shares).permute(0, 3, 1, 2)
    return _plain_counts(bits, size, ys, xs).permute(0, 3, 1, 2)


def _plain_counts(bits: Tensor, size: int, ys: Cells, xs: Cells) -> Tensor:
    """Return the share of each window's positions whose bit is set: (B, len(ys), len(xs), N)."""
    code = unpack_bits(bits, size)
    rows = [
        torch.stack([code[:, a:b, c:d].float().mean(dim=(1, 2)) for c, d in xs], dim=1)
        for a, b in ys
    ]
    return torch.stack(rows, dim=1)


def triangle_code(images: Tensor, kernel: Tensor, bias: Tensor, *, patch_size: int) -> Tensor:
    """Return ReLU(mean over entries - distance), (B, N, h, w): Coates and Ng's triangle."""
    scores = distances(images, kernel, bias, patch_size=patch_size)
    return (scores.mean(dim=1, keepdim=True) - scores).relu_()


def full_embedding(images: Tensor, bits: Tensor, size: int, *, patch_size: int) -> Tensor:
    """Return the code times the patch, (B, N d, h, w): entry n's d values are at n d to n d + d.

    d = C s s. Zero where an entry is not among the nearest of the patch.
    """
    height, width = bits.shape[1:3]
    patches = F.unfold(images, patch_size).view(len(images), 1, -1, height, width)
    code = unpack_bits(bits, size).permute(0, 3, 1, 2)[:, :, None]
    return (code * patches).flatten(1, 2)


def _smallest(scores: Tensor, k: int, *, exactly: bool) -> Tensor:
    """Return bool, true at the k smallest of the last axis, and at all that equal the k-th.

    exactly: of those that equal the k-th only the first, so that k are true.
    """
    kth = scores.kthvalue(k, dim=-1, keepdim=True).values
    if not exactly:
        return scores <= kth
    less, equal = scores < kth, scores == kth
    missing = k - less.sum(dim=-1, keepdim=True)
    return less | (equal & (equal.cumsum(dim=-1) <= missing))


def _pack(code: Tensor) -> Tensor:
    """Return bool (..., N) packed: uint8 (..., ceil(N / 8))."""
    size = code.shape[-1]
    values = torch.tensor(_BYTE_VALUES, dtype=torch.uint8, device=code.device)
    whole = F.pad(code.to(torch.uint8), (0, -size % 8)).view(*code.shape[:-1], -(-size // 8), 8)
    return (whole * values).sum(dim=-1, dtype=torch.uint8)
