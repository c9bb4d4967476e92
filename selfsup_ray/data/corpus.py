"""Corpus: memory-mapped Arrow shards of square images, read at random by image id."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import torch
from torch import Tensor

from selfsup_ray.artifacts import Array, read_done, read_json
from selfsup_ray.data.pixels import Pixels
from selfsup_ray.data.shard_files import Encoding, damage_named, open_shard, shard_path
from selfsup_ray.storage import located

MAX_OPEN_SHARDS = 16_384  # Linux allows about 65,000 memory maps per process


@dataclass(frozen=True)
class _Shard:
    """One memory-mapped shard."""

    batch: pa.RecordBatch
    pixels: Pixels
    labels: Array


class Corpus:
    """Square uint8 RGB images with ids 0..N-1, their labels and where they came from.

    A handle on a finished ingest folder. Opening reads a small manifest; an image costs a page
    fault. Pickles as its path; safe to read from several threads.
    """

    def __init__(self, path: Path, manifest: Mapping[str, Any], *, fingerprint: str) -> None:
        self.path = path
        self.fingerprint = fingerprint
        self.image_size: int = manifest["image_size"]
        self.encoding: Encoding = manifest["encoding"]
        self.shard_rows: tuple[int, ...] = tuple(manifest["shard_rows"])
        self.offsets: Array = np.concatenate([[0], np.cumsum(self.shard_rows)]).astype(np.int64)
        self.class_names: list[str] | None = manifest["class_names"]
        self.num_labelled: int = manifest["num_labelled"]
        self.counts: dict[str, Any] = manifest["counts"]
        self._shards: dict[int, _Shard] = {}

    @classmethod
    def open(cls, path: str | Path) -> Corpus:
        """Return the corpus in a finished ingest folder.

        Raises ArtifactError when ingest has not finished there.
        """
        path = located(path)
        done = read_done(path)
        manifest = read_json(path / "corpus.json")
        content = hashlib.sha256(f"{done.fingerprint} {manifest['content']}".encode())
        return cls(path, manifest, fingerprint=content.hexdigest())

    def __reduce__(self) -> tuple[Callable[[Path], Corpus], tuple[Path]]:
        return Corpus.open, (self.path,)

    def __len__(self) -> int:
        return int(self.offsets[-1])

    @property
    def num_shards(self) -> int:
        """Number of shard files; every later array is cut at the same rows."""
        return len(self.shard_rows)

    @property
    def has_labels(self) -> bool:
        """Whether at least one image has a label."""
        return self.num_labelled > 0

    def images(self, ids: Array | Tensor) -> Tensor:
        """Return the images of these ids in their order: (n, 3, S, S) uint8, channels last."""
        ids = self._checked(ids)
        out = np.empty((len(ids), self.image_size, self.image_size, 3), np.uint8)
        for shard, rows, local in self._by_shard(ids):
            self._shard(shard).pixels.read(local, out, rows)
        return torch.from_numpy(out).permute(0, 3, 1, 2)

    def shard_images(self, i: int, start: int, stop: int) -> Tensor:
        """Return rows [start, stop) of shard i: (n, 3, S, S) uint8, channels last."""
        first = int(self.offsets[i])
        stop = min(stop, self.shard_rows[i])
        return self.images(np.arange(first + start, first + max(start, stop), dtype=np.int64))

    def labels(self, ids: Array | Tensor | None = None) -> Array:
        """Return the labels of these ids, of all images by default: (n,) int64, -1 is unknown."""
        if ids is None:
            return np.concatenate([self._shard(i).labels for i in range(self.num_shards)])
        ids = self._checked(ids)
        out = np.empty(len(ids), np.int64)
        for shard, rows, local in self._by_shard(ids):
            out[rows] = self._shard(shard).labels[local]
        return out

    def sources(self, ids: Array | Tensor) -> list[str]:
        """Return where each image came from: a path, or archive/member."""
        ids = self._checked(ids)
        out = [""] * len(ids)
        for shard, rows, local in self._by_shard(ids):
            found = self._shard(shard).batch.column("source").take(pa.array(local)).to_pylist()
            for row, source in zip(rows.tolist(), found, strict=True):
                out[row] = source
        return out

    def encoded(self, id: int) -> bytes:
        """Return the stored bytes of one image: JPEG, PNG, or S*S*3 raw values (rows, RGB)."""
        shard, _, local = next(self._by_shard(self._checked(np.array([id]))))
        return bytes(self._shard(shard).batch.column("image")[int(local[0])].as_py())

    def digests(self, i: int) -> Array:
        """Return the digests of shard i's original files: (n, 16) uint8."""
        column = self._shard(i).batch.column("digest")
        return np.frombuffer(column.buffers()[1], np.uint8, len(column) * 16).reshape(-1, 16)

    def _checked(self, ids: Array | Tensor) -> Array:
        array = np.asarray(ids, dtype=np.int64)
        if len(array) and not (0 <= array.min() and array.max() < len(self)):
            raise IndexError(
                f"image ids must lie in [0, {len(self)}), got {array.min()}, {array.max()}"
            )
        return array

    def _by_shard(self, ids: Array) -> Iterator[tuple[int, Array, Array]]:
        """Yield (shard, rows of `ids` in it, their rows inside the shard)."""
        owner = np.searchsorted(self.offsets, ids, side="right") - 1
        order = np.argsort(owner, kind="stable")
        cuts = np.flatnonzero(np.diff(owner[order])) + 1
        for rows in np.split(order, cuts):
            if len(rows):
                shard = int(owner[rows[0]])
                yield shard, rows, ids[rows] - self.offsets[shard]

    def _shard(self, i: int) -> _Shard:
        shard = self._shards.get(i)
        if shard is None:
            if len(self._shards) >= MAX_OPEN_SHARDS:
                self._shards.clear()
            shard = self._shards[i] = self._open_shard(i)
        return shard

    def _open_shard(self, i: int) -> _Shard:
        path = shard_path(self.path, i)
        with damage_named(path):
            batch = open_shard(path)
        pixels = Pixels(batch.column("image"), encoding=self.encoding, image_size=self.image_size)
        return _Shard(batch, pixels, batch.column("label").to_numpy())
