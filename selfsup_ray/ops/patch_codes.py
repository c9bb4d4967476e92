"""The code of an image on a dictionary of patches: which entries are near each of its patches.

With kernel -(c W^T) and bias |c|^2 / 2 of an entry c (whitened by W), the convolution of an image
is |xW - c|^2 / 2 less a number common to all entries: it ranks them by distance (Thiry et al.
2021, section 3.1). A code holds one bit for each entry at each position, packed as
`numpy.packbits(bitorder="little")` packs them.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from selfsup_ray.ops.pooling import adaptive_cells, pooled_cells

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
    bfloat16: distances are compared in bfloat16 and ties at the threshold settled in float32, so
    that exactly k bits are set. float32: the published form, distance <= k-th distance; entries as
    far as the k-th are set too.
    """
    size = len(kernel)
    assert all(1 <= k <= size for k in ks), f"k must lie in [1, {size}], got {list(ks)}"
    parts: list[list[Tensor]] = [[] for _ in ks]
    positions = (images.shape[2] - patch_size + 1) * (images.shape[3] - patch_size + 1)
    for some in torch.split(images, max(1, _SCORES_AT_ONCE // (positions * size))):
        scores = distances(some, kernel, bias, patch_size=patch_size).permute(0, 2, 3, 1)
        for i, k in enumerate(ks):
            parts[i].append(_pack(_selected(scores, k, kind, exactly=precision == "bfloat16")))
    return [torch.cat(found) for found in parts]


def distances(images: Tensor, kernel: Tensor, bias: Tensor, *, patch_size: int) -> Tensor:
    """Return the convolution that ranks as distance: (B, N, h, w), the plain reference."""
    filters = kernel.view(len(kernel), images.shape[1], patch_size, patch_size)
    return F.conv2d(images, filters, bias)


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
    cells = (
        (pooled_cells(height, pool), pooled_cells(width, pool))
        if pool is not None
        else (adaptive_cells(height, grid or 0), adaptive_cells(width, grid or 0))
    )
    code = unpack_bits(bits, size)
    rows = [
        torch.stack([code[:, a:b, c:d].float().mean(dim=(1, 2)) for c, d in cells[1]], dim=1)
        for a, b in cells[0]
    ]
    return torch.stack(rows, dim=1).permute(0, 3, 1, 2)


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


def _selected(scores: Tensor, k: int, kind: Kind, *, exactly: bool) -> Tensor:
    """Return bool (B, h, w, N); scores: (B, h, w, N), smaller is nearer; ties by lower entry."""
    if exactly:
        order = scores.argsort(dim=-1, stable=True)
        chosen = order[..., :k] if kind == "up_to" else order[..., k - 1 : k]
        return torch.zeros_like(scores, dtype=torch.bool).scatter_(-1, chosen, True)
    kth = scores.kthvalue(k, dim=-1, keepdim=True).values
    return scores <= kth if kind == "up_to" else scores == kth


def _pack(code: Tensor) -> Tensor:
    """Return bool (..., N) packed: uint8 (..., ceil(N / 8))."""
    size = code.shape[-1]
    values = torch.tensor(_BYTE_VALUES, dtype=torch.uint8, device=code.device)
    whole = F.pad(code.to(torch.uint8), (0, -size % 8)).view(*code.shape[:-1], -1, 8)
    return (whole * values).sum(dim=-1, dtype=torch.uint8)
