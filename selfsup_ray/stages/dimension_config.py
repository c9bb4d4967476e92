"""What the stage `dimension` can be told: patches, sets, numbers of centroids, neighbors."""

from __future__ import annotations

from typing import Literal

from selfsup_ray.config import (
    NonNegative,
    NonNegativeFloat,
    Positive,
    Resources,
    Share,
    config,
)
from selfsup_ray.ops.intrinsic_dimension import SETS, PointSet


@config
class LevinaBickelConfig:
    """Levina and Bickel's estimate: from which neighbors, of how many points."""

    first: Positive = 10
    """k1: the estimate is averaged over j = first..last, the rank of the farthest neighbor used."""
    last: Positive = 20
    """k2."""
    queries: Positive = 4096
    """Points whose neighbors among all points are looked up; the error is that of their mean."""

    def __post_init__(self) -> None:
        if not 2 <= self.first <= self.last:
            raise ValueError(
                f"`first` and `last` must hold 2 <= first <= last, not {self.first} and {self.last}"
            )


@config
class DimensionConfig:
    """Which patches are compared, and with how many centroids.

    A task holds all points of a set in memory, four times at its peak: 1.3 GB as published.
    """

    patch_size: Positive = 5
    """Side of a patch."""
    points: Positive = 1_048_576
    """Patches drawn uniformly from all positions of all images; all where there are fewer."""
    sets: tuple[PointSet, ...] = SETS
    """Patches; whitened; whitened or not with every patch's values shuffled; Gaussian noise."""
    ks: tuple[Positive, ...] = (2, 4, 8, 16, 32, 64, 128, 256, 512, 1024)
    """Numbers of centroids."""
    between: bool = False
    """Every number between the smallest and the largest of `ks` too: the published figure has all
    from 2 to 1024."""
    whitening: Literal["pca", "zca"] = "pca"
    """By the covariance of all patches. A rotation apart, so it matters for whitened_shuffled."""
    regularization: NonNegativeFloat = 1e-3
    """Added to the root of each variance before dividing by it."""
    smallest_share: Share = 0.01
    """Share of the points of each set that is dropped: those of smallest norm."""
    points_per_centroid: Positive | None = 256
    """k-means sees so many points for each centroid, faiss's default with which the published
    numbers were made; None: all."""
    iterations: Positive = 25
    """Rounds of k-means."""
    precision: Literal["bfloat16", "float32"] = "bfloat16"
    """Of the products that find the nearest centroid; distances are float32 in either case."""
    levina_bickel: LevinaBickelConfig = LevinaBickelConfig()
    seed: NonNegative = 0
    """Of the draw, the shuffles, the noise and k-means."""
    resources: Resources = Resources(workers=0)
    """`workers` tasks run at a time, one for each shard, then for each (set, k)."""

    def __post_init__(self) -> None:
        for key in ("sets", "ks"):
            values = getattr(self, key)
            if not values or len(set(values)) < len(values):
                raise ValueError(f"`{key}` needs at least one value and each once, got {values}")

    @property
    def all_k(self) -> tuple[int, ...]:
        """Every number of centroids, ascending."""
        if self.between:
            return tuple(range(min(self.ks), max(self.ks) + 1))
        return tuple(sorted(self.ks))
