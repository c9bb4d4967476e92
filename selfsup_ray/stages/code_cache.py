"""The codes of every view that flip and crop can make of a corpus, computed once, kept on disk.

A view is a window of the padded image or of its mirror image; the codes of all positions of those
two contain the code of every view. An epoch then only cuts windows: same bits, no distances.
"""

from __future__ import annotations

import os
import weakref
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property, partial
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from selfsup_ray.artifacts import Array, ShardedArray, create_mapped, require_disk, whole_file
from selfsup_ray.cluster.shards import map_shards
from selfsup_ray.config import Resources
from selfsup_ray.data.corpus import Corpus
from selfsup_ray.ops.crop_flip import Windows, padded
from selfsup_ray.ops.patch_codes import Kind, Precision, patch_bits

IMAGES_AT_ONCE = 32
"""Images that are encoded together: memory is bounded by them."""


@dataclass(frozen=True)
class Coding:
    """How images become codes; picklable.

    kernel: (N, 3 s s) float32, bias: (N,): of `code_kernel`. An image's levels enter as
    (level / 255 - mean) / std; mean and std: one number for each channel.
    """

    kernel: Array
    bias: Array
    patch_size: int
    k: int
    mean: tuple[float, float, float]
    std: tuple[float, float, float]
    kind: Kind = "up_to"
    precision: Precision = "bfloat16"

    def normalized(self, images: Tensor) -> Tensor:
        """Return uint8 images as the float32 numbers that are encoded."""
        mean, std = torch.tensor(self.mean)[:, None, None], torch.tensor(self.std)[:, None, None]
        return (images.float() / 255 - mean) / std

    @cached_property
    def _dictionary(self) -> tuple[Tensor, Tensor]:
        """Kernel and bias, the same tensors each time: `patch_bits` prepares them once."""
        return torch.from_numpy(self.kernel), torch.from_numpy(self.bias)

    def __call__(self, images: Tensor, *, threads: int = 1) -> Tensor:
        """Return the packed codes (B, h, w, ceil(N / 8)) of uint8 images (B, 3, S, S)."""
        [bits] = patch_bits(
            self.normalized(images),
            *self._dictionary,
            patch_size=self.patch_size,
            ks=[self.k],
            kind=self.kind,
            precision=self.precision,
            threads=threads,
        )
        return bits


class CodeCache:
    """The stored codes of a corpus: (N, 2, S + 2 p - s + 1, S + 2 p - s + 1, bytes) uint8.

    Index 0 of the second axis is the padded image, 1 its mirror image.
    """

    def __init__(self, array: ShardedArray, *, padding: int) -> None:
        self.array, self.padding = array, padding
        self._files: dict[int, tuple[int, int]] = {}

    @classmethod
    def open(cls, path: Path, *, padding: int) -> CodeCache:
        """Return the codes stored in a folder that `write_codes` has filled."""
        return cls(ShardedArray.open(path), padding=padding)

    def __reduce__(self) -> tuple[Callable[..., CodeCache], tuple[Path]]:
        return partial(CodeCache.open, padding=self.padding), (self.array.path,)

    @property
    def side(self) -> int:
        """Positions of a view along one axis."""
        return self.array.shape[2] - 2 * self.padding

    def windows(self, ids: Array, windows: Windows) -> Tensor:
        """Return the codes of one view of each of these images: (B, h, w, bytes) uint8.

        ids: (B,) corpus ids; windows: of the views, with this cache's padding.
        """
        width, count = self.array.shape[3:]
        out = np.empty((len(ids), self.side, self.side, count), np.uint8)
        owner = np.searchsorted(self.array.offsets, ids, side="right") - 1
        local = ids - self.array.offsets[owner]
        # Read, not mapped: a page that a map touches first costs more than its copy.
        lines = np.empty((self.side, width, count), np.uint8)
        for i, (shard, row) in enumerate(zip(owner.tolist(), local.tolist(), strict=True)):
            file, start = self._file(shard)
            line = (2 * row + int(windows.flips[i])) * width + int(windows.tops[i])
            read = os.preadv(file, [lines.data], start + line * width * count)
            assert read == lines.nbytes, f"shard {shard} of {self.array.path} is cut off"
            out[i] = lines[:, int(windows.lefts[i]) :][:, : self.side]
        return torch.from_numpy(out)

    def _file(self, i: int) -> tuple[int, int]:
        """Return shard i, opened once, as a file descriptor and the place of its first byte."""
        if i not in self._files:
            mapped = self.array.shard(i)
            assert isinstance(mapped, np.memmap)
            opened = os.open(self.array.shard_path(i), os.O_RDONLY)
            weakref.finalize(self, os.close, opened)
            self._files[i] = opened, mapped.offset
        return self._files[i]


def cache_bytes(corpus: Corpus, coding: Coding, *, padding: int) -> int:
    """Return how much disk the codes of a corpus take."""
    side = corpus.image_size + 2 * padding - coding.patch_size + 1
    return len(corpus) * 2 * side * side * -(-len(coding.bias) // 8)


def write_codes(
    corpus: Corpus, coding: Coding, *, padding: int, out: Path, resources: Resources
) -> CodeCache:
    """Write the codes of every image of a corpus, shard by shard; shards that exist are kept.

    Raises ArtifactError when the disk has no room for them.
    """
    side = corpus.image_size + 2 * padding - coding.patch_size + 1
    shape = (2, side, side, -(-len(coding.bias) // 8))
    array = ShardedArray.create(out, shard_rows=corpus.shard_rows, row_shape=shape, dtype="uint8")
    missing = [i for i in range(array.num_shards) if not array.is_written(i)]
    rows = sum(array.shard_rows[i] for i in missing)
    require_disk(out, size_bytes=rows * int(np.prod(shape)))
    threads = max(1, int(resources.cpus))
    work = partial(_write_shard, corpus, coding, array.path.absolute(), padding, threads)
    for _ in map_shards(work, missing, resources, label="codes"):
        pass
    return CodeCache(array, padding=padding)


def _write_shard(
    corpus: Corpus, coding: Coding, path: Path, padding: int, threads: int, shard: int
) -> None:
    """Write one shard; its pages go to disk as they are made, so that it need not fit memory."""
    array = ShardedArray.open(path)
    shape = (array.shard_rows[shard], *array.shape[1:])
    if 0 in shape:  # no bytes, nothing to map
        return array.write_shard(shard, np.empty(shape, np.uint8))
    with whole_file(array.shard_path(shard)) as temporary:
        out = create_mapped(temporary, shape, np.uint8)
        for start in range(0, len(out), IMAGES_AT_ONCE):
            images = corpus.shard_images(shard, start, start + IMAGES_AT_ONCE)
            wide = padded(images, padding=padding)
            for flip, mirrored in enumerate((wide, wide.flip(3))):
                codes = coding(mirrored, threads=threads)
                out[start : start + len(wide), flip] = codes.numpy()
        out.flush()
