"""Files of the low-shot diffusion work (Douze et al. 2018) read and written: matrices and splits.

Raw float32 matrices, HDF5 blocks of features, and lists of base and novel classes; the graphs are
in `published_graph`. Readers map files into memory or read a few rows at a time.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np

from selfsup_ray.artifacts import Array, ShardedArray, whole_file
from selfsup_ray.errors import ArtifactError
from selfsup_ray.ops.faiss_files import IndexRows

if TYPE_CHECKING:
    import h5py


_ROWS_AT_ONCE = 16_384


class Rows(Protocol):
    """An (N, d) matrix that is read a piece at a time."""

    @property
    def shape(self) -> tuple[int, int]:
        """(N, d)."""
        ...

    def read(self, start: int, stop: int) -> Array:
        """Return rows [start, stop): (n, d) float32."""
        ...


def open_rows(paths: Sequence[Path], *, dim: int | None, num_rows: int | None = None) -> Rows:
    """Return the matrix in a file of any of these formats, or in several HDF5 blocks.

    .h5 and .hdf5: feature blocks; .index: a faiss index; everything else: raw float32 rows of `dim`
    numbers. num_rows: only the first that many. Raises ArtifactError for a file that is none.
    """
    if not paths:
        raise ArtifactError("No feature file was given. Name a raw matrix, HDF5 blocks or .index.")
    if all(path.suffix in (".h5", ".hdf5") for path in paths):
        return _first(FeatureBlocks(paths), num_rows, paths[0])
    if len(paths) > 1:
        raise ArtifactError(
            f"{paths[1]}: several files are read together only as HDF5 blocks (.h5, .hdf5). Give "
            f"one file."
        )
    if paths[0].suffix == ".index":
        require_file(paths[0])
        return _first(IndexRows(paths[0]), num_rows, paths[0])
    if dim is None:
        raise ArtifactError(f"{paths[0]} is a raw matrix, which does not say its width. Give dim.")
    return RawRows(paths[0], dim=dim, num_rows=num_rows)


def require_file(path: Path) -> None:
    """Raise ArtifactError unless there is a file."""
    if not path.is_file():
        raise ArtifactError(f"{path} is not there. Give the path of the file.")


class RawRows:
    """A raw little-endian float32 matrix, row after row, as a memory map."""

    def __init__(self, path: Path, *, dim: int, num_rows: int | None = None) -> None:
        self.array = raw_matrix(path, dtype="<f4", dim=dim, num_rows=num_rows)

    @property
    def shape(self) -> tuple[int, int]:
        """(N, d)."""
        return self.array.shape[0], self.array.shape[1]

    def read(self, start: int, stop: int) -> Array:
        """Return rows [start, stop): a view of the file."""
        return self.array[start:stop]


def raw_matrix(path: Path, *, dtype: str, dim: int, num_rows: int | None = None) -> Array:
    """Return the first rows of a raw matrix of 4-byte numbers as a read-only memory map.

    num_rows: all by default. Raises ArtifactError when the size does not fit.
    """
    require_file(path)
    size, row = path.stat().st_size, 4 * dim
    if size % row:
        raise ArtifactError(
            f"{path} has {size:,} bytes, which is no whole number of rows of {dim} numbers of 4 "
            f"bytes. Give the width it was written with, or fetch it again if it was cut off."
        )
    there = size // row
    if num_rows is not None and num_rows > there:
        raise ArtifactError(f"{path} has {there:,} rows of {dim}, but {num_rows:,} are asked for.")
    shape = (there if num_rows is None else num_rows, dim)
    if not shape[0]:
        return np.empty(shape, dtype)
    return np.memmap(path, dtype, "r", shape=shape)


def write_raw_matrix(path: Path, parts: Iterator[Array] | Sequence[Array], *, dtype: str) -> None:
    """Write rows, part after part, as a raw little-endian matrix, whole or not at all."""
    with whole_file(path) as temporary, open(temporary, "wb") as file:
        for part in parts:
            file.write(np.ascontiguousarray(part, dtype).data)


def write_rows(path: Path, array: ShardedArray) -> None:
    """Write an (N, d) array as a raw float32 matrix, one shard in memory at a time."""
    shards = (array.shard(i) for i in range(array.num_shards))
    write_raw_matrix(path, shards, dtype="<f4")


class FeatureBlocks:
    """HDF5 feature blocks as one matrix: the first `count` rows of `all_feats` of each, in order.

    Blocks follow the numbers in their names: block2 before block10. `all_feats` is longer than
    `count` where the last batch was filled up.
    """

    def __init__(self, paths: Sequence[Path]) -> None:
        self.paths = sorted(paths, key=_numbers)
        found = [_block_shape(path) for path in self.paths]
        dims = {dim for _, dim in found}
        if len(dims) > 1:
            raise ArtifactError(
                f"{self.paths[0].parent}: the blocks differ in width ({sorted(dims)}). Give blocks "
                f"of one network."
            )
        self.offsets = np.concatenate([[0], np.cumsum([n for n, _ in found])]).astype(np.int64)
        self.dim = dims.pop()

    @property
    def shape(self) -> tuple[int, int]:
        """(N, d)."""
        return int(self.offsets[-1]), self.dim

    def read(self, start: int, stop: int) -> Array:
        """Return features [start, stop): (n, d) float32."""
        return self._read("all_feats", start, stop, np.empty((0, self.dim), np.float32))

    def labels(self, start: int, stop: int) -> Array:
        """Return `all_labels` [start, stop): (n,) int64."""
        return self._read("all_labels", start, stop, np.empty(0, np.int64))

    def _read(self, name: str, start: int, stop: int, empty: Array) -> Array:
        parts = [empty]
        for path, first, end in zip(self.paths, self.offsets, self.offsets[1:], strict=False):
            a, b = max(start, int(first)), min(stop, int(end))
            if a < b:
                with _opened(path) as file:
                    parts.append(np.asarray(file[name][a - first : b - first], empty.dtype))
        return np.concatenate(parts)


def _numbers(path: Path) -> tuple[list[int], str]:
    return [int(digits) for digits in re.findall(r"\d+", path.stem)], path.name


@contextmanager
def _opened(path: Path) -> Iterator[h5py.File]:
    """Yield an open HDF5 file; what HDF5 says of a damaged one becomes an ArtifactError."""
    import h5py

    require_file(path)
    try:
        with h5py.File(path, "r") as file:
            yield file
    except (OSError, KeyError) as error:
        reason = " ".join(str(error).split())[:160]
        raise ArtifactError(
            f"{path} cannot be read as HDF5 features ({reason}). Fetch it again, or extract it "
            f"again: it needs all_feats, all_labels and count."
        ) from None


def _block_shape(path: Path) -> tuple[int, int]:
    """Return (valid rows, width) of a block."""
    with _opened(path) as file:
        features, count = file["all_feats"], int(np.ravel(file["count"][()])[0])
        shape, dtype, labels = features.shape, features.dtype, file["all_labels"].shape
    if len(shape) != 2 or dtype != np.float32:
        raise ArtifactError(f"{path}: all_feats is {shape} {dtype}, wanted (rows, d) float32.")
    if not 0 <= count <= min(shape[0], labels[0]):
        raise ArtifactError(
            f"{path}: count is {count:,}, but all_feats has {shape[0]:,} rows and all_labels "
            f"{labels[0]:,}. Extract it again: it was not finished."
        )
    return count, shape[1]


def write_feature_block(path: Path, features: Array, labels: Array, *, batch: int = 1) -> None:
    """Write features (n, d) and labels (n,) as one HDF5 block, filled up to whole batches."""
    _write_block(path, [features], labels, dim=features.shape[1], batch=batch)


def _write_block(
    path: Path, parts: Iterable[Array], labels: Array, *, dim: int, batch: int
) -> None:
    import h5py

    count, start = len(labels), 0
    size = -(-count // batch) * batch
    with whole_file(path) as temporary, h5py.File(temporary, "w") as file:
        block = file.create_dataset("all_feats", (size, dim), "f4")
        for part in parts:
            block[start : start + len(part)] = part
            start += len(part)
        assert start == count, f"{path}: {start} features, {count} labels"
        file.create_dataset("all_labels", (size,), "i4")[:count] = labels
        file.create_dataset("count", (1,), "i4")[0] = count


def write_feature_blocks(
    folder: Path, array: ShardedArray, labels: Array, *, block_rows: int = 1_000_000
) -> list[Path]:
    """Write an (N, d) array and labels (N,) as block0.hdf5, block1.hdf5 …; return their paths.

    A few thousand rows are in memory at a time.
    """
    n, dim = array.shape
    paths: list[Path] = []
    for start in range(0, max(n, 1), block_rows):
        stop = min(start + block_rows, n)
        cuts = range(start, stop, _ROWS_AT_ONCE)
        parts = (array.rows(np.arange(a, min(a + _ROWS_AT_ONCE, stop))) for a in cuts)
        paths.append(folder / f"block{len(paths)}.hdf5")
        _write_block(paths[-1], parts, labels[start:stop], dim=dim, batch=1)
    return paths


class _First:
    """The first rows of a matrix."""

    def __init__(self, rows: Rows, num_rows: int) -> None:
        self.shape = (num_rows, rows.shape[1])
        self.read = rows.read


def _first(rows: Rows, num_rows: int | None, path: Path) -> Rows:
    if num_rows is None or num_rows == rows.shape[0]:
        return rows
    if num_rows > rows.shape[0]:
        raise ArtifactError(
            f"{path}: there are {rows.shape[0]:,} rows in all, but {num_rows:,} are asked for."
        )
    return _First(rows, num_rows)


def read_class_split(path: Path) -> dict[str, Array]:
    """Return the lists of classes in a split file by name, each (n,) int64, ascending, from 0.

    JSON: {"base_classes_1": [1, …], "novel_classes_1": …}, the layout of `label_idx.json`, in which
    classes count from 1; lists of anything but numbers, such as `label_names`, are left out. Raises
    ArtifactError for a class 0, one given twice in a list, or one above the number of label names.
    """
    try:
        given = json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise ArtifactError(f"{path} cannot be read as JSON ({error}).") from None
    if not isinstance(given, dict):
        raise ArtifactError(f"{path} holds a {type(given).__name__}, wanted lists by name.")
    names = given.get("label_names")
    most = len(names) if isinstance(names, list) else None
    lists = {str(k): v for k, v in given.items() if _is_numbers(v)}
    if not lists:
        raise ArtifactError(f"{path} holds no list of class numbers; it has {sorted(given)}.")
    return {name: _from_zero(values, name, most, path) for name, values in lists.items()}


def _is_numbers(value: Any) -> bool:
    return isinstance(value, list) and bool(value) and all(type(item) is int for item in value)


def _from_zero(values: list[int], name: str, most: int | None, path: Path) -> Array:
    found = np.unique(np.array(values, np.int64))
    wrong = found[0] < 1 or (most is not None and found[-1] > most)
    if wrong or len(found) != len(values):
        raise ArtifactError(
            f"{path}: {name} has {len(values)} classes from {found[0]} to {found[-1]}; wanted are "
            f"distinct numbers from 1 to {most or 'the number of classes'}."
        )
    return found - 1


def sampled_digest(paths: Sequence[Path], *, pieces: int = 64) -> str:
    """Return a hash of the sizes of files and of pieces of 64 kB spread evenly over each.

    A hundred gigabytes take minutes to hash and hardly ever differ in a few bytes only.
    """
    whole = hashlib.sha256()
    for path in paths:
        require_file(path)
        size = path.stat().st_size
        whole.update(f"{size} ".encode())
        with open(path, "rb") as file:
            for at in np.linspace(0, max(0, size - 65_536), pieces).astype(np.int64):
                file.seek(int(at))
                whole.update(file.read(65_536))
    return whole.hexdigest()
