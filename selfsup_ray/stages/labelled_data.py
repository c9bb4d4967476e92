"""The images that a labelled training reads: who trains, chooses and tests, and in which view."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

from selfsup_ray.artifacts import Array, ShardedArray
from selfsup_ray.data.corpus import Corpus
from selfsup_ray.data.views import StandardViews, Views
from selfsup_ray.errors import ConfigError
from selfsup_ray.models.encoder import evaluation_view
from selfsup_ray.models.inputs import ImageInput
from selfsup_ray.ops.augment import ten_crops
from selfsup_ray.ops.rng import uniforms
from selfsup_ray.stages.labelled_config import (
    AllLabels,
    CountOfLabels,
    LabelBudget,
    LabelledConfig,
    LayersLinear,
    ShareOfLabels,
)
from selfsup_ray.stages.lowshot_data import held_out

LABEL_STREAM = 1_201  # random numbers of its own, apart from those that choose test images
VALIDATION_STREAM = 1_202


@dataclass(frozen=True)
class LabelledIds:
    """Ascending ids of the labelled images, by use; `validation` is empty unless asked for."""

    train: Array
    validation: Array
    test: Array


def labelled_ids(corpus: Corpus, config: LabelledConfig, *, stage: str) -> LabelledIds:
    """Return who trains, chooses and tests.

    Raises ConfigError when no image has a label, or nothing is left to train or test on.
    """
    if not corpus.has_labels:
        raise ConfigError(f"{stage} learns from labels, but no image has one. Give them to ingest.")
    labels = corpus.labels()
    is_test = held_out(labels, config, corpus.sources, stage=stage) & (labels >= 0)
    others, test = np.flatnonzero((labels >= 0) & ~is_test), np.flatnonzero(is_test)
    is_validation = draws_of(others, config.seed, VALIDATION_STREAM) < config.validation_share
    train, validation = others[~is_validation], others[is_validation]
    train = within_budget(train, labels[train], config.labels, seed=config.seed, stage=stage)
    if len(np.unique(labels[train])) < 2 or not len(test):
        raise ConfigError(
            f"{stage} needs labelled images of two classes to train on and some to test on, but of "
            f"{len(corpus):,} images {len(train):,} are for training and {len(test):,} for "
            f"testing. Give labels to ingest, or change {stage}.test."
        )
    if config.batch_size > len(train):
        raise ConfigError(
            f"{stage}.batch_size={config.batch_size}, but only {len(train):,} labelled images are "
            f"for training. Lower it to {len(train)} or less."
        )
    return LabelledIds(train, validation, test)


def draws_of(ids: Array, seed: int, stream: int) -> Array:
    """Return one number in [0, 1) for each id."""
    drawn = uniforms(seed=seed, epoch=0, ids=torch.from_numpy(ids), draws=1, stream=stream)
    return np.asarray(drawn[:, 0].numpy())


def within_budget(
    ids: Array, classes: Array, budget: LabelBudget, *, seed: int, stage: str
) -> Array:
    """Return the ids (n,) that a budget leaves, ascending; classes: (n,) their labels.

    Of a class those with the lowest draws, so that a smaller budget is a part of a larger one.
    Raises ConfigError when a class has fewer images than asked for.
    """
    if isinstance(budget, AllLabels):
        return ids
    draws, kept = draws_of(ids, seed, LABEL_STREAM), []
    present, sizes = np.unique(classes, return_counts=True)
    for label, wanted in zip(present, _wanted(sizes, budget), strict=True):
        own = np.flatnonzero(classes == label)
        if wanted > len(own):
            raise ConfigError(
                f"{stage}.labels asks for {wanted} images of class {label}, but only {len(own)} of "
                f"it are for training. Lower the count."
            )
        kept.append(own[np.argsort(draws[own], kind="stable")[:wanted]])
    return ids[np.sort(np.concatenate(kept))] if kept else ids


def _wanted(sizes: Array, budget: ShareOfLabels | CountOfLabels) -> list[int]:
    """Return the images of each class; what does not divide goes to the first classes."""
    match budget:
        case ShareOfLabels(share=share):
            return [max(1, round(share * int(n))) for n in sizes]
        case CountOfLabels(count=count):
            each, more = divmod(count, len(sizes))
            return [each + (i < more) for i in range(len(sizes))]


class Rows(Protocol):
    """What labelled images are read as: images that are augmented, or stored rows."""

    def read(self, ids: Array) -> Tensor:
        """Return the images (n, 3, S, S) uint8, or the rows (n, d), of these ids."""
        ...

    def views(self, batch: Tensor) -> Iterable[Tensor]:
        """Return what the network takes, one after the other, when it is tested."""
        ...

    def make_views(self, batches: list[Tensor], ids: Tensor, epoch: int) -> list[Tensor]:
        """Return what the network takes when it is trained."""
        ...


@dataclass(frozen=True)
class AugmentedImages:
    """The images of a corpus, cropped and flipped at random to train on."""

    corpus: Corpus
    images: ImageInput
    config: LabelledConfig

    def read(self, ids: Array) -> Tensor:
        """Return the stored images."""
        return self.corpus.images(ids)

    def views(self, batch: Tensor) -> Iterable[Tensor]:
        """Return the evaluation view, or ten."""
        if not (isinstance(self.config, LayersLinear) and self.config.ten_crop):
            return [evaluation_view(batch, self.images)]
        images = self.images
        return ten_crops(
            batch,
            size=images.view_size or images.image_size,
            mean=images.mean,
            std=images.std,
            share=images.share,
        )

    def make_views(self, batches: list[Tensor], ids: Tensor, epoch: int) -> list[Tensor]:
        """Return one random view."""
        made, whole = self.config, self.config.crop is None
        views = StandardViews(
            size=self.images.view_size,
            mean=self.images.mean,
            std=self.images.std,
            flip_p=made.flip_p,
            scale=made.crop or (1.0, 1.0),
            ratio=(1.0, 1.0) if whole else (3 / 4, 4 / 3),
        )
        side = self.images.image_size
        return Views(views, image_size=side, seed=made.seed, num_views=1)(batches, ids, epoch)


@dataclass(frozen=True)
class StoredRows:
    """Unit rows as vectors of length sqrt(d): entries of about 1, in every dimension."""

    array: ShardedArray

    def read(self, ids: Array) -> Tensor:
        """Return the scaled rows."""
        scale = np.float32(np.sqrt(self.array.shape[1]))
        return torch.from_numpy(np.asarray(self.array.rows(ids), np.float32) * scale)

    def views(self, batch: Tensor) -> Iterable[Tensor]:
        """Return them as they are."""
        return [batch]

    def make_views(self, batches: list[Tensor], ids: Tensor, epoch: int) -> list[Tensor]:
        """Return them as they are."""
        return batches


class LabelledImages:
    """Some labelled images by position: a Dataset to train on, and a set to measure on.

    ids, labels: (n,) of the images at positions 0..n-1.
    """

    def __init__(self, rows: Rows, ids: Array, labels: Array) -> None:
        self.rows, self.ids, self.labels = rows, ids, labels

    def __len__(self) -> int:
        return len(self.ids)

    def views(self, batch: Tensor) -> Iterable[Tensor]:
        """Return the network's inputs to a test."""
        return self.rows.views(batch)

    def read(self, positions: Array) -> Tensor:
        """Return images or rows at these positions."""
        return self.rows.read(self.ids[positions])

    def batch(self, ids: Array, *, epoch: int) -> list[Tensor]:
        """Return `[images]` or `[rows]` at these positions; the epoch changes nothing."""
        return [self.read(ids)]
