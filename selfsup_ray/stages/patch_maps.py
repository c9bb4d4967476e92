"""Where patches are drawn from: the images of a corpus, or a network's feature maps of them."""

from __future__ import annotations

from collections.abc import Iterator
from fnmatch import fnmatchcase
from functools import cached_property
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

from selfsup_ray.artifacts import Array
from selfsup_ray.data.corpus import Corpus
from selfsup_ray.errors import ConfigError
from selfsup_ray.ops.pixel_shuffle import Shuffle, shuffled_pixels

BATCH_BYTES = 1 << 25
"""Pixels of one batch of images that is read."""


class Maps(Protocol):
    """Maps (n, C, H, W) in shards, which a worker reads batch by batch; picklable."""

    @property
    def shape(self) -> tuple[int, int, int]:
        """(C, H, W)."""
        ...

    @property
    def shard_rows(self) -> tuple[int, ...]:
        """Maps in each shard."""
        ...

    @property
    def is_bytes(self) -> bool:
        """Whether maps are uint8 levels, as against floats."""
        ...

    def batches(self, shard: int) -> Iterator[Tensor]:
        """Yield the maps of a shard in order: (b, C, H, W), uint8 levels or floats."""
        ...


class CorpusMaps:
    """The images of a corpus, all or those whose source matches `only` and does not `without`.

    shuffle: their pixels in random places, by `seed`.

    Patterns: * stands for any text, slashes included, ? for one letter.
    """

    def __init__(
        self,
        corpus: Corpus,
        *,
        only: str | None = None,
        without: str | None = None,
        shuffle: Shuffle | None = None,
        seed: int = 0,
    ) -> None:
        self.corpus = corpus
        self.only = only
        self.without = without
        self.shuffle: Shuffle | None = shuffle
        self.seed = seed

    @property
    def shape(self) -> tuple[int, int, int]:
        """(3, S, S)."""
        return 3, self.corpus.image_size, self.corpus.image_size

    @property
    def is_bytes(self) -> bool:
        """True: images are uint8."""
        return True

    @cached_property
    def shard_rows(self) -> tuple[int, ...]:
        """Chosen images in each shard.

        Raises ConfigError when no image at all is chosen.
        """
        if self.only is None and self.without is None:
            return self.corpus.shard_rows
        counts = tuple(len(self.ids(i)) for i in range(self.corpus.num_shards))
        if not sum(counts):
            raise ConfigError(
                f"whiten.only={self.only!r} and whiten.without={self.without!r} leave none of the "
                f"{len(self.corpus):,} images; the first one's source is "
                f"{self.corpus.sources(np.array([0]))[0]!r}. Change the patterns."
            )
        return counts

    def ids(self, shard: int) -> Array:
        """Return the ids of the chosen images of a shard, ascending."""
        ids = np.arange(self.corpus.offsets[shard], self.corpus.offsets[shard + 1])
        if self.only is None and self.without is None:
            return ids
        chosen = [
            (self.only is None or fnmatchcase(source, self.only))
            and not (self.without is not None and fnmatchcase(source, self.without))
            for source in self.corpus.sources(ids)
        ]
        return np.asarray(ids[np.array(chosen, dtype=bool)])

    def batches(self, shard: int) -> Iterator[Tensor]:
        """Yield the chosen images of a shard in order: (b, 3, S, S) uint8."""
        ids = self.ids(shard)
        step = max(1, BATCH_BYTES // (3 * self.corpus.image_size**2))
        for start in range(0, len(ids), step):
            some = ids[start : start + step]
            images = self.corpus.images(some)
            if self.shuffle is not None:
                how = {"seed": self.seed, "epoch": 0}
                images = shuffled_pixels(
                    images, torch.from_numpy(some), shuffle=self.shuffle, **how
                )
            yield images
