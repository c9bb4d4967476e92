"""Windows of average pooling along one axis, as torch's layers place them."""

from __future__ import annotations

Cells = list[tuple[int, int]]
"""[start, stop) of each window."""


def pooled_cells(length: int, pool: int) -> Cells:
    """Return the windows of AvgPool(pool, stride=pool, ceil_mode=True); the last may be short."""
    return [(a, min(a + pool, length)) for a in range(0, length, pool)]


def adaptive_cells(length: int, grid: int) -> Cells:
    """Return the windows of AdaptiveAvgPool(grid); they overlap where grid does not divide."""
    return [(i * length // grid, -(-(i + 1) * length // grid)) for i in range(grid)]
