"""Spread: the labels L_t of some classes on every node of a graph, and the step to L_{t + 1}.

Columns are independent, their normalisation included, so any group of classes can be spread alone:
the bits of a column do not depend on the others, nor on the number of threads.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

import numpy as np

if TYPE_CHECKING:
    from selfsup_ray.artifacts import Array


@dataclass(frozen=True)
class Variant:
    """What a step does beyond W L: see DiffusionOptions for the meaning."""

    normalize_columns: bool = True
    reset_seeds: bool = False
    sinkhorn: int = 0

    @property
    def normalizes(self) -> bool:
        """Whether the columns of L_t sum to 1 in the end."""
        return self.normalize_columns or self.sinkhorn > 0


class Spread(Protocol):
    """L_t of the classes [first, stop) for all N nodes, C = stop - first columns."""

    mass: Array
    """(C,) float64: the column sums of L_t before they are normalised to 1."""

    def step(self) -> None:
        """Go from L_t to L_{t + 1}."""
        ...

    def sums(self, lists: Array) -> Array:
        """Return (n, C) float32: L_t summed over the places of each list (n, k), -1 = none."""
        ...

    def top(self, places: Array, num: int) -> tuple[Array, Array]:
        """Return the `num` best classes of L_t at these places and their values, both (n, num).

        Best first, ties by lower class; int32 classes, float32 values; num <= C.
        """
        ...


@dataclass(frozen=True)
class Seeds:
    """Labelled nodes of some classes: their places, and columns counted from the first class."""

    places: Array
    columns: Array
    num: int

    @classmethod
    def of(cls, seeds: Array, first: int, stop: int) -> Seeds:
        """Return the nodes whose class is in [first, stop)."""
        places = np.flatnonzero((seeds >= first) & (seeds < stop))
        return cls(places, seeds[places].astype(np.int64) - first, stop - first)

    def counts(self, width: int) -> Array:
        """Return (width,) float64 labelled nodes of each column."""
        return np.bincount(self.columns, minlength=width).astype(np.float64)


def column_width(classes: int) -> int:
    """Return the columns a block of so many classes takes in memory: whole vectors."""
    return -(-classes // 16) * 16


def spread_bytes(nodes: int, classes: int, *, dtype: str) -> int:
    """Return the memory of a Spread: two copies of L and two flags a node."""
    return nodes * (2 * column_width(classes) * (2 if dtype == "bfloat16" else 4) + 2)


def class_ranges(
    num_classes: int,
    nodes: int,
    *,
    dtype: str,
    memory_bytes: int,
    widest: int,
    together: bool = False,
) -> list[tuple[int, int]]:
    """Return class ranges of about equal width whose Spread fits `memory_bytes`; [] if none does.

    widest: classes of a range at most. together: all classes are one range, since rows are
    normalised over them.
    """
    widths = [num_classes] if together else range(column_width(min(widest, num_classes)), 0, -16)
    for width in widths:
        if spread_bytes(nodes, width, dtype=dtype) <= memory_bytes:
            num = math.ceil(num_classes / width)
            each = column_width(math.ceil(num_classes / num))
            starts = range(0, num_classes, each)
            return [(first, min(first + each, num_classes)) for first in starts]
    return []


def scales(totals: Array, normalize: bool = True) -> Array:
    """Return the float32 factors that make columns sum to 1; 1 for an empty column."""
    if not normalize:
        return np.ones(len(totals), np.float32)
    return (1 / np.where(totals > 0, totals, 1)).astype(np.float32)


def widened(bits: Array) -> Array:
    """Return bfloat16 numbers, held in uint16, as float32."""
    return (bits.astype(np.uint32) << 16).view(np.float32)


def shortened(values: Array) -> Array:
    """Return float32 numbers as bfloat16 in uint16, to the nearest and halves to even."""
    bits = np.ascontiguousarray(values, np.float32).view(np.uint32)
    return ((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16).astype(np.uint16)
