"""A dictionary of patches: how its entries are chosen from a sample, and its file."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np

from selfsup_ray.artifacts import Array, whole_file
from selfsup_ray.errors import ArtifactError
from selfsup_ray.ops.whitening import (
    code_kernel,
    whitened,
    whitening_matrix,
)
from selfsup_ray.stages.whiten import PatchSample
from selfsup_ray.storage import located

Select = Literal["kmeans", "farthest", "sample"]
FILE = "dictionary.safetensors"


@dataclass(frozen=True)
class PatchDictionary:
    """Entries of a dictionary, whitened and as patches.

    centroids: (N, d) float32, whitened by matrix, W (d, d) float32. raw: (N, C, s, s) float32, the
    same entries as patches, in the sample's range of levels. zca: (N, C, s, s) float32, the entries
    whitened by ZCA, which look like patches again whatever W is. counts: (N,) int64, patches of the
    sample nearest to each entry; 0 where nobody counted.
    """

    centroids: Array
    matrix: Array
    raw: Array
    zca: Array
    counts: Array

    @classmethod
    def of(
        cls, centroids: Array, sample: PatchSample, counts: Array | None = None
    ) -> PatchDictionary:
        """Return the dictionary of whitened entries (N, d) of a sample's patches."""
        shape = (len(centroids), sample.channels, sample.patch_size, sample.patch_size)
        raw = sample.unwhitened(centroids)
        scale = max(
            sample.config.regularization, 1e-6
        )  # for pictures: no direction is divided by 0
        zca = whitened(raw, whitening_matrix(sample.covariance, regularization=scale, kind="zca"))
        counts = np.zeros(len(centroids), np.int64) if counts is None else counts
        return cls(centroids, sample.matrix, raw.reshape(shape), zca.reshape(shape), counts)

    @classmethod
    def open(cls, folder: Path | str) -> PatchDictionary:
        """Return the dictionary in the folder of the stage `patches`.

        Raises ArtifactError when there is none, or when it is damaged.
        """
        from safetensors import SafetensorError
        from safetensors.numpy import load_file

        path = located(folder) / FILE
        try:
            return cls(**load_file(path))
        except (OSError, SafetensorError, TypeError) as error:
            raise ArtifactError(
                f"{path} cannot be read ({error}). Run the stage patches again."
            ) from None

    def save(self, folder: Path) -> None:
        """Write the dictionary into a folder, whole or not at all."""
        from safetensors.numpy import save_file

        with whole_file(folder / FILE) as temporary:
            tensors = {name: np.ascontiguousarray(values) for name, values in vars(self).items()}
            save_file(tensors, temporary)

    def __len__(self) -> int:
        return len(self.centroids)

    @property
    def kernel(self) -> tuple[Array, Array]:
        """Kernel (N, d) and bias (N,), float32, of the convolution that ranks as distance."""
        return code_kernel(self.centroids, self.matrix)


def unit_entries(centroids: Array) -> Array:
    """Return entries (N, d) at length 1; an entry of zeros stays one."""
    length = np.sqrt((centroids.astype(np.float64) ** 2).sum(axis=1, keepdims=True))
    return np.asarray(centroids / np.where(length == 0, 1, length), np.float32)


def with_copies(centroids: Array, sample: PatchSample, *, flips: bool, negatives: bool) -> Array:
    """Return the entries (N, d), then their mirror images, then the negatives of all of these.

    A mirror image is that of the patch: left and right are swapped before whitening.
    """
    if flips:
        shape = (len(centroids), sample.channels, sample.patch_size, sample.patch_size)
        mirrored = sample.unwhitened(centroids).reshape(shape)[..., ::-1]
        mirror = sample.whitened(mirrored.reshape(len(centroids), -1))
        centroids = np.concatenate([centroids, mirror])
    return np.concatenate([centroids, -centroids]) if negatives else centroids


def first_whitened(sample: PatchSample, count: int) -> Array:
    """Return the first patches of a sample, whitened: (count, d) float32."""
    array = sample.array
    rows = np.empty((count, array.shape[1]), np.float32)
    for i in range(array.num_shards):
        low, high = int(array.offsets[i]), min(int(array.offsets[i + 1]), count)
        if low < high:
            rows[low:high] = sample.whitened(array.shard(i)[: high - low])
    return rows
