"""Published kNN graphs: `ndis{N}_k32_I_11.int32` and `ndis{N}_k32_D_11.float32`.

Both are raw little-endian matrices of 4-byte numbers, one row per image: ids of the nearest images
and their similarities, best first, the image itself included as a rule.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from selfsup_ray.artifacts import Array, whole_file
from selfsup_ray.data.published import raw_matrix
from selfsup_ray.errors import ArtifactError

NAME = re.compile(r"^ndis(?P<n>\d+)_k(?P<k>\d+)_I_(?P<block>\w+)\.")


@dataclass(frozen=True)
class StoredGraph:
    """A published graph as memory maps: ids (N, k) int32, -1 = none, similarity (N, k) float32."""

    path: Path
    ids: Array
    similarity_path: Path
    similarity: Array

    @property
    def shape(self) -> tuple[int, int]:
        """(N, k), the image itself counted."""
        return self.ids.shape[0], self.ids.shape[1]


def graph_names(n: int, k: int) -> tuple[str, str]:
    """Return the file names of ids and similarities.

    The original derives the suffix from k, right for 32 only: numbers have 32 bits whatever k is.
    """
    return f"ndis{n}_k{k}_I_11.int32", f"ndis{n}_k{k}_D_11.float32"


def open_graph(
    path: Path, *, k: int | None = None, similarity: Path | None = None, columns: int | None = None
) -> StoredGraph:
    """Return the graph in a file of ids and the one of similarities that belongs to it.

    k: entries per row, by default the one in the name; similarity: by default the file with D_ in
    place of I_; columns: only the first that many, which are the nearest. Nothing is copied. Raises
    ArtifactError when names and sizes do not fit together.
    """
    match = NAME.match(path.name)
    k = k if k is not None else (int(match["k"]) if match else None)
    if k is None:
        raise ArtifactError(
            f"{path} does not say how many neighbors a row has, as ndis1000_k32_I_11.int32 does. "
            f"Give k."
        )
    ids = raw_matrix(path, dtype="<i4", dim=k)
    named = int(match["n"]) if match else len(ids)
    if len(ids) != named:
        raise ArtifactError(
            f"{path} is named after {named:,} rows but holds {len(ids):,} of k={k}. Fetch it "
            f"again if it was cut off, or give the k it was written with."
        )
    similarity = similarity or _similarity_of(path)
    values = raw_matrix(similarity, dtype="<f4", dim=k)
    if len(values) != len(ids):
        raise ArtifactError(f"{similarity} has {len(values):,} rows of {k}, {path} {len(ids):,}.")
    if columns is not None and not 0 < columns <= k:
        raise ArtifactError(f"{path} holds {k} neighbors a row; {columns} of them are asked for.")
    return StoredGraph(path, ids[:, :columns], similarity, values[:, :columns])


def _similarity_of(path: Path) -> Path:
    """Return the file of similarities beside one of ids, whatever suffix it has."""
    stem = path.name.replace("_I_", "_D_").rsplit(".", 1)[0]
    found = sorted(path.parent.glob(f"{stem}.*")) if "_I_" in path.name else []
    if len(found) != 1:
        raise ArtifactError(
            f"{path}: {len(found)} files beside it have the name of its similarities. Name the one "
            f"to read."
        )
    return found[0]


def checked_rows(graph: StoredGraph, start: int, stop: int) -> tuple[Array, Array]:
    """Return ids and similarity of rows [start, stop) as arrays.

    Raises ArtifactError naming the first row with an id that is no image's, an image listed in its
    own row twice, or a similarity that is not finite. An entry is valid by its id, whatever the
    sign of its similarity.
    """
    ids, similarity = np.array(graph.ids[start:stop]), np.array(graph.similarity[start:stop])
    n = len(graph.ids)
    is_self = ids == np.arange(start, start + len(ids))[:, None]
    for bad, what in (
        ((ids < -1) | (ids >= n), f"an id outside of 0 to {n - 1} (-1: none)"),
        ((ids >= 0) & ~np.isfinite(similarity), "a similarity that is not finite"),
        (is_self & (np.cumsum(is_self, axis=1) > 1), "the image itself more than once"),
    ):
        if bad.any():
            row = start + int(bad.any(axis=1).argmax())
            raise ArtifactError(
                f"{graph.path}: row {row:,} holds {what}. It is damaged, or no kNN graph with "
                f"{graph.ids.shape[1]} entries a row."
            )
    return ids, similarity


def self_column(ids: Array, first: int) -> Array:
    """Return (n,) the column that leaves each row: the image's own, by value, else the last.

    ids: (n, k) of the images first, first + 1, …; at most one entry of a row is its own image.
    """
    is_self = ids == np.arange(first, first + len(ids))[:, None]
    column = np.where(is_self.any(axis=1), is_self.argmax(axis=1), ids.shape[1] - 1)
    return np.asarray(column, np.int64)


def without_column(values: Array, column: Array) -> Array:
    """Return (n, k - 1): each row of values (n, k) without the entry in its column."""
    kept = np.arange(values.shape[1]) != column[:, None]
    return np.asarray(values[kept].reshape(len(values), values.shape[1] - 1))


def with_column(values: Array, column: Array, entries: Array) -> Array:
    """Return (n, k + 1): each row of values (n, k) with its entry put in at its column."""
    out = np.empty((len(values), values.shape[1] + 1), values.dtype)
    place = np.arange(out.shape[1]) == column[:, None]
    out[place], out[~place] = entries, values.ravel()
    return out


def write_graph(
    folder: Path, parts: Iterable[tuple[Array, Array]], *, n: int, k: int
) -> tuple[Path, Path]:
    """Write parts of (ids, similarity), each (rows, k), under the published names; return both."""
    ids, similarity = (folder / name for name in graph_names(n, k))
    with whole_file(ids) as ids_tmp, whole_file(similarity) as similarity_tmp:
        with open(ids_tmp, "wb") as ids_file, open(similarity_tmp, "wb") as similarity_file:
            for i, s in parts:
                ids_file.write(np.ascontiguousarray(i, "<i4").data)
                similarity_file.write(np.ascontiguousarray(s, "<f4").data)
    return ids, similarity
