"""The images of a labelled network: who trains, validates and tests; views with their codes."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from selfsup_ray.artifacts import Array, whole_file
from selfsup_ray.data.corpus import Corpus
from selfsup_ray.data.shifted import ShiftedViews
from selfsup_ray.errors import ConfigError
from selfsup_ray.ops.crop_flip import center_windows
from selfsup_ray.ops.rng import permuted, uniforms
from selfsup_ray.stages.classify_config import ClassifyConfig
from selfsup_ray.stages.code_cache import CodeCache
from selfsup_ray.stages.lowshot_data import held_out

VALIDATION_STREAM = 1_101  # random numbers of its own, apart from those that choose test images
BUDGET_EPOCH = 1_102


@dataclass(frozen=True)
class Split:
    """Ascending ids of the labelled images, by use; `validation` is empty unless asked for."""

    train: Array
    validation: Array
    test: Array

    def write(self, folder: Path) -> None:
        """Write the ids into a folder, one file each."""
        for name in ("train", "validation", "test"):
            path = folder / f"{name}_ids.npy"
            with whole_file(path) as temporary, open(temporary, "wb") as file:
                np.save(file, getattr(self, name))

    @classmethod
    def read(cls, folder: Path) -> Split:
        """Return the split that was written into a folder."""
        names = ("train", "validation", "test")
        return cls(*(np.load(folder / f"{name}_ids.npy") for name in names))


def split_images(corpus: Corpus, config: ClassifyConfig) -> Split:
    """Return the split of a corpus's labelled images; the label budget is drawn last.

    Raises ConfigError when nothing is left to train or test on, or the budget is too large.
    """
    labels = corpus.labels()
    is_test = held_out(labels, config, corpus.sources, stage="classify") & (labels >= 0)
    others = np.flatnonzero((labels >= 0) & ~is_test)
    draws = uniforms(
        seed=config.seed, epoch=0, ids=torch.from_numpy(others), draws=1, stream=VALIDATION_STREAM
    )[:, 0].numpy()
    is_validation = draws < config.validation_share
    train, test = others[~is_validation], np.flatnonzero(is_test)
    if len(np.unique(labels[train])) < 2 or not len(test):
        raise ConfigError(
            f"classify needs labelled images of two classes to train on and some to test on, but "
            f"of {len(corpus):,} images {len(train):,} are for training and {len(test):,} for "
            f"testing. Give labels to ingest, or change classify.test."
        )
    return Split(_within_budget(train, config), others[is_validation], test)


def _within_budget(train: Array, config: ClassifyConfig) -> Array:
    budget = config.label_budget
    if budget is None:
        return train
    if budget > len(train):
        raise ConfigError(
            f"classify.label_budget={budget:,}, but only {len(train):,} labelled images are for "
            f"training. Lower it, or leave it out to use all."
        )
    places = permuted(np.arange(budget), n=len(train), seed=config.seed, epoch=BUDGET_EPOCH)
    return np.asarray(train[np.sort(places)])


class TrainingImages:
    """The images that are trained on, by position; with a cache the codes of their views too.

    A batch is [images (B, 3, S, S) uint8] or [images, codes (B, h, w * bytes) uint8]: three axes,
    so that nobody takes codes for images.
    """

    def __init__(
        self, corpus: Corpus, ids: Array, views: ShiftedViews, codes: CodeCache | None = None
    ) -> None:
        self.corpus, self.ids, self.views, self.codes = corpus, ids, views, codes

    def __len__(self) -> int:
        return len(self.ids)

    def batch(self, ids: Array, *, epoch: int) -> list[Tensor]:
        """Return the images at these positions, and the codes of the views of this epoch."""
        images = [self.corpus.images(self.ids[ids])]
        if self.codes is not None:
            windows = self.views.windows(torch.from_numpy(ids), epoch)
            images.append(self.codes.windows(self.ids[ids], windows).flatten(2))
        return images


class MeasuredImages:
    """Labelled images in their evaluation view, to measure the accuracy on."""

    def __init__(
        self, corpus: Corpus, ids: Array, views: ShiftedViews, codes: CodeCache | None = None
    ) -> None:
        self.corpus, self.ids, self.views, self.codes = corpus, ids, views, codes
        self.labels = corpus.labels(ids)

    def __len__(self) -> int:
        return len(self.ids)

    def batch(self, positions: Array) -> list[Tensor]:
        """Return [images (B, 3, S, S) float32] at these positions, and their codes if known."""
        ids = self.ids[positions]
        made = [self.views.evaluation(self.corpus.images(ids), torch.from_numpy(ids))]
        if self.codes is not None:
            windows = center_windows(len(ids), padding=self.views.config.padding)
            made.append(self.codes.windows(ids, windows).flatten(2))
        return made
