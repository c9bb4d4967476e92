"""Datasets: what the epoch loop reads, batches of uint8 images by position."""

from __future__ import annotations

from typing import Protocol

import numpy as np
import torch
from torch import Tensor

from selfsup_ray.artifacts import Array, ShardedArray
from selfsup_ray.data.corpus import Corpus
from selfsup_ray.errors import ConfigError
from selfsup_ray.ops.rng import uniforms

NEIGHBOR_STREAM = 1_001  # its own random numbers, apart from the views' streams 0, 1, …


class Dataset(Protocol):
    """A picklable source of image batches with positions 0..len-1."""

    def __len__(self) -> int: ...

    def batch(self, ids: Array, *, epoch: int) -> list[Tensor]:
        """Return lists of images, each (B, 3, S, S) uint8, for these positions in this epoch."""
        ...


class Images:
    """Every image of a corpus, or of a subset of its ids; a batch is `[images]`.

    subset: (n,) ids. Position p of the dataset then shows image `subset[p]`, see `corpus_ids`.
    """

    def __init__(self, corpus: Corpus, subset: Array | None = None) -> None:
        self.corpus = corpus
        self.subset = None if subset is None else np.asarray(subset, dtype=np.int64)

    def __len__(self) -> int:
        return len(self.corpus) if self.subset is None else len(self.subset)

    def corpus_ids(self, ids: Array) -> Array:
        """Return the corpus ids of these positions."""
        return ids if self.subset is None else self.subset[ids]

    def batch(self, ids: Array, *, epoch: int) -> list[Tensor]:
        """Return `[images]`, one (B, 3, S, S) uint8 tensor; the epoch changes nothing."""
        return [self.corpus.images(self.corpus_ids(ids))]


class NeighborPairs:
    """Each image with one of its mined neighbors; a batch is `[anchors, neighbors]`.

    The neighbor is drawn uniformly from the first `num_neighbors` of the image's list and, with
    `keep_self`, the image itself (so with probability 1 / (num_neighbors + 1), as in SCAN's code,
    where the list starts with the image). The draw is a function of (seed, epoch, image id).
    neighbor_ids: (N, k), an entry of -1 (no such neighbor) stands for the image itself.
    Raises ConfigError when the lists are shorter than `num_neighbors`.
    """

    def __init__(
        self,
        corpus: Corpus,
        neighbor_ids: ShardedArray,
        *,
        num_neighbors: int,
        seed: int,
        keep_self: bool = True,
    ) -> None:
        if not 1 <= num_neighbors <= neighbor_ids.shape[1]:
            raise ConfigError(
                f"num_neighbors={num_neighbors}, but the graph has k={neighbor_ids.shape[1]} "
                f"neighbors per image. Choose num_neighbors in [1, k], or build a larger graph."
            )
        assert neighbor_ids.shape[0] == len(corpus), "the graph belongs to another corpus"
        self.corpus = corpus
        self.neighbor_ids = neighbor_ids
        self.num_neighbors = num_neighbors
        self.seed = seed
        self.keep_self = keep_self

    def __len__(self) -> int:
        return len(self.corpus)

    def drawn(self, ids: Array, *, epoch: int) -> Array:
        """Return the id of the neighbor that each image meets in this epoch: (B,) int64."""
        ids = np.asarray(ids, dtype=np.int64)
        draws = uniforms(
            seed=self.seed,
            epoch=epoch,
            ids=torch.from_numpy(ids),
            draws=1,
            stream=NEIGHBOR_STREAM,
        )
        choices = self.num_neighbors + self.keep_self
        # Clipped: u * choices may round up to `choices` in float32.
        column = np.minimum((draws[:, 0].numpy() * choices).astype(np.int64), choices - 1)
        column -= self.keep_self  # -1: the image itself
        listed = self.neighbor_ids.rows(ids)[np.arange(len(ids)), np.maximum(column, 0)]
        return np.where((column < 0) | (listed < 0), ids, listed).astype(np.int64)

    def batch(self, ids: Array, *, epoch: int) -> list[Tensor]:
        """Return `[anchors, neighbors]`, each (B, 3, S, S) uint8."""
        return [self.corpus.images(ids), self.corpus.images(self.drawn(ids, epoch=epoch))]
