"""Files of the cell join: rows gathered from memory maps and written a block at a time.

Fresh memory is what costs here, not copying: a page that a process or a map touches first costs
about ten times a write. So blocks are small enough that their memory is used again.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import BinaryIO

import numpy as np

from selfsup_ray.artifacts import Array, create_mapped, whole_file
from selfsup_ray.object_store import version_of
from selfsup_ray.storage import StoredPath
from selfsup_ray.storage_cache import derived

BLOCK = 16_384
"""Rows read, compared or written at once."""

Rows = Callable[[Array], Array]
"""Positions (n,) -> the rows there, (n, …)."""


def gathered(pieces: Sequence[Array], ids: Array) -> Array:
    """Return the rows at these positions of arrays that follow one another: (n, …)."""
    starts = np.cumsum([0, *(len(piece) for piece in pieces)])
    out = np.empty((len(ids), *pieces[0].shape[1:]), pieces[0].dtype)
    owner = np.searchsorted(starts, ids, side="right") - 1
    for i in np.unique(owner):
        here = np.flatnonzero(owner == i)
        out[here] = pieces[i][ids[here] - starts[i]]
    return out


def write_new(path: Path, rows: Rows, order: Array, *, like: Array) -> None:
    """Write the rows at the positions `order` as a .npy file, whole or not at all.

    like: an array with the type and the row shape of what is written.
    """
    header = {
        "descr": np.lib.format.dtype_to_descr(like.dtype),
        "fortran_order": False,
        "shape": (len(order), *like.shape[1:]),
    }
    with whole_file(path) as temporary, open(temporary, "wb") as file:
        np.lib.format.write_array_header_1_0(file, header)
        _write(file, rows, order)


def write_into(path: Path, place: int, rows: Rows, order: Array) -> None:
    """Write the rows at the positions `order` into an existing .npy file, from row `place` on."""
    target = np.load(path, mmap_mode="r")
    with open(path, "r+b") as file:
        file.seek(target.offset + place * target.strides[0])
        _write(file, rows, order)
        file.flush()
        os.fsync(file.fileno())


def joined(path: StoredPath, pieces: Sequence[StoredPath]) -> Path:
    """Return a local .npy file with the rows of several on an object store, one after another.

    For nodes that share no disk, and so cannot write into one file.
    """
    versions = [version_of(piece.url) for piece in pieces]
    tags = " ".join("" if version is None else version.tag for version in versions)
    size_bytes = sum(version.size_bytes for version in versions if version is not None)

    def write(half: Path) -> None:
        sizes = [np.load(piece, mmap_mode="r").shape for piece in pieces]
        like = np.load(pieces[0], mmap_mode="r")
        shape = (sum(size[0] for size in sizes), *like.shape[1:])
        out, start = create_mapped(half, shape, like.dtype), 0
        for piece in pieces:
            rows = np.load(piece, mmap_mode="r")
            out[start : start + len(rows)] = rows
            start += len(rows)
        out.flush()

    return derived(f"{path.url} {tags}", path.name, size_bytes, write)


def remove_work(folder: Path) -> None:
    """Delete what only an interrupted build needs; the cells and the order stay."""
    for path in (folder / "cells").glob("*.npy"):
        if path.name != "borders.npy":
            path.unlink()


def _write(file: BinaryIO, rows: Rows, order: Array) -> None:
    for i in range(0, len(order), BLOCK):
        file.write(np.ascontiguousarray(rows(order[i : i + BLOCK])).data)
