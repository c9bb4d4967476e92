"""faiss's own files: linear transforms (.vt) and indices (.index), as arrays."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import numpy as np

from selfsup_ray.artifacts import Array, ShardedArray, whole_file
from selfsup_ray.errors import ArtifactError, ResourceError


def _faiss(path: Path) -> Any:
    try:
        import faiss
    except ImportError:
        raise ResourceError(
            f"{path} is a file of faiss, which is not installed here. Install "
            f"faiss-gpu or faiss-cpu."
        ) from None
    return faiss


def _read(path: Path, reader: str, *arguments: Any) -> Any:
    """Return what one of faiss's readers makes of a file; its errors in one sentence."""
    faiss = _faiss(path)
    try:
        return getattr(faiss, reader)(os.fspath(path), *arguments)
    except RuntimeError as error:
        reason = " ".join(str(error).split())[-160:]
        raise ArtifactError(f"{path} cannot be read by faiss (… {reason}).") from None


def read_transform(path: Path) -> tuple[Array, Array]:
    """Return matrix (dim, d) and bias (dim,), float32, of a faiss VectorTransform: A x + b.

    Raises ArtifactError when the file is damaged or holds a transform that is not linear.
    """
    faiss = _faiss(path)
    found = _read(path, "read_VectorTransform")
    if not isinstance(found, faiss.LinearTransform) or not found.is_trained:
        raise ArtifactError(
            f"{path} holds a {type(found).__name__}, which is no trained linear transform. Give a "
            f"PCAMatrix, OPQMatrix, RandomRotationMatrix or LinearTransform."
        )
    shape = (found.d_out, found.d_in)
    matrix = faiss.vector_to_array(found.A)[: shape[0] * shape[1]].reshape(shape)
    bias = faiss.vector_to_array(found.b) if found.have_bias else np.zeros(shape[0], np.float32)
    return np.array(matrix, np.float32), np.array(bias, np.float32)


def write_transform(path: Path, matrix: Array, bias: Array) -> None:
    """Write A x + b, matrix (dim, d) and bias (dim,), as a faiss LinearTransform."""
    faiss = _faiss(path)
    made = faiss.LinearTransform(matrix.shape[1], matrix.shape[0], True)
    faiss.copy_array_to_vector(np.ascontiguousarray(matrix, np.float32).ravel(), made.A)
    faiss.copy_array_to_vector(np.ascontiguousarray(bias, np.float32), made.b)
    made.is_trained = True
    with whole_file(path) as temporary:
        faiss.write_VectorTransform(made, str(temporary))


class IndexRows:
    """The vectors of a faiss index file, (N, d) float32 by id, as far as the index keeps them.

    The file is mapped into memory where faiss can do that. Flat and IVF indices give what was
    added, those with codes (scalar or product quantizers) what the codes stand for. Raises
    ArtifactError for other indices: their vectors are gone, or have ids of their own.
    """

    def __init__(self, path: Path) -> None:
        faiss = _faiss(path)
        self.path = path
        self.index = _read(path, "read_index", faiss.IO_FLAG_MMAP | faiss.IO_FLAG_READ_ONLY)
        inner = self.index
        while isinstance(inner, faiss.IndexPreTransform):
            inner = faiss.downcast_index(inner.index)
        # By type, since asking another index for its vectors ends the process.
        kept = (faiss.IndexFlat, faiss.IndexIVF, faiss.IndexScalarQuantizer, faiss.IndexPQ)
        if not isinstance(inner, kept):
            raise ArtifactError(
                f"{path} holds a {type(inner).__name__}, which does not give its vectors back by "
                f"id. Give a flat, IVF, scalar-quantizer or PQ index."
            )
        if isinstance(inner, faiss.IndexIVF):
            self._find_ids(inner)

    def _find_ids(self, index: Any) -> None:
        """Make the table from id to place: 8 bytes a row."""
        try:
            index.make_direct_map()
        except RuntimeError:
            raise ArtifactError(
                f"{self.path}: the vectors have other ids than 0 to {index.ntotal - 1}. Build the "
                f"index without ids of its own."
            ) from None

    @property
    def shape(self) -> tuple[int, int]:
        """(N, d)."""
        return int(self.index.ntotal), int(self.index.d)

    def read(self, start: int, stop: int) -> Array:
        """Return rows [start, stop): (n, d) float32."""
        assert 0 <= start <= stop <= self.shape[0], f"rows {start} to {stop} of {self.shape[0]}"
        return np.asarray(self.index.reconstruct_n(start, stop - start), np.float32)

    def search(self, queries: Array, k: int) -> tuple[Array, Array]:
        """Return ids (n, k) int64 and scores (n, k) float32 as the index itself has them."""
        scores, ids = self.index.search(np.ascontiguousarray(queries, np.float32), k)
        return ids, scores


def write_flat_index(path: Path, rows: Array | ShardedArray) -> None:
    """Write rows (N, d) as a flat index for inner products, a shard in memory at a time.

    The bytes are those of faiss.write_index: the header of an empty index, with the number of
    vectors at byte 8 and that of their numbers at its end, and then the numbers.
    """
    faiss, (n, dim) = _faiss(path), rows.shape
    header = faiss.serialize_index(faiss.IndexFlatIP(dim)).tobytes()
    assert header[8:16] == header[-8:] == bytes(8), "the header of a flat index is another one now"
    shards = range(rows.num_shards) if isinstance(rows, ShardedArray) else range(1)
    parts = (rows.shard(i) if isinstance(rows, ShardedArray) else rows for i in shards)
    with whole_file(path) as temporary, open(temporary, "wb") as file:
        file.write(header[:8] + n.to_bytes(8, "little"))
        file.write(header[16:-8] + (n * dim).to_bytes(8, "little"))
        for part in parts:
            file.write(np.ascontiguousarray(part, "<f4").data)
