"""The images of the low-shot protocol: who is tested, who is labelled, who is background."""

from __future__ import annotations

import fnmatch
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import torch

from selfsup_ray.artifacts import Array
from selfsup_ray.config import read_yaml
from selfsup_ray.data.published import read_class_split
from selfsup_ray.errors import ConfigError
from selfsup_ray.ops.lowshot import (
    Draw,
    Setup,
    base_block,
    choose_novel,
    derived_split,
    read_split,
    setups,
)
from selfsup_ray.ops.rng import uniforms
from selfsup_ray.stages.lowshot_config import (
    BackgroundConfig,
    ClassesConfig,
    HeldOutConfig,
    HeldOutRows,
    HeldOutShare,
    HeldOutSources,
    LowShotConfig,
)

Sources = Callable[[Array], list[str]]
"""Ids -> where each image came from, such as `corpus.sources`."""

_SOURCES = 65_536
"""Sources compared with the pattern at a time."""


@dataclass(frozen=True)
class SetupImages:
    """The images of one set-up, by image id; classes are the set-up's own, 0..C-1."""

    name: str
    setup: Setup
    train_ids: Array
    """Ascending: the training images of the set-up's classes."""
    train_classes: Array
    test_ids: Array
    test_classes: Array

    @property
    def base(self) -> Array:
        """Places in `train_ids` of the base images, by ascending class, then in file order."""
        return base_block(self.train_classes, self.setup.is_novel)

    def novel(self, *, n: int, seed: int, draw: Draw) -> Array:
        """Return the places in `train_ids` of n images of each novel class, by ascending class."""
        chosen = choose_novel(self.train_classes, self.setup.is_novel, n=n, seed=seed, draw=draw)
        return np.concatenate([np.empty(0, np.int64), *chosen])

    def background(self, config: BackgroundConfig, labels: Array, is_test: Array) -> Array:
        """Return the ids of the corpus's background images, ascending.

        labels: (N,) of the corpus; is_test: (N,) bool.
        """
        own = self.setup.relabelled(labels)
        wanted = np.zeros(len(labels), bool)
        if config.unlabelled:
            wanted |= labels < 0
        if config.other_classes:
            wanted |= (labels >= 0) & (own < 0)
        if config.in_domain:
            wanted |= (own >= 0) & self.setup.is_novel[np.maximum(own, 0)]
        return np.flatnonzero(wanted & ~is_test)


def images_of_setups(
    labels: Array, is_test: Array, config: LowShotConfig, *, class_names: list[str] | None
) -> dict[str, SetupImages]:
    """Return the images of `val` and `test`. Raises ConfigError naming what is missing."""
    split = split_of(config.classes, labels, class_names)
    made = {}
    for name, setup in setups(split).items():
        own = setup.relabelled(labels)
        train, test = np.flatnonzero((own >= 0) & ~is_test), np.flatnonzero((own >= 0) & is_test)
        made[name] = SetupImages(name, setup, train, own[train], test, own[test])
        _require_images(made[name], config, class_names)
    return made


def split_of(
    config: ClassesConfig, labels: Array, class_names: list[str] | None
) -> Mapping[str, Array]:
    """Return the four lists of classes, from the file or by ascending label."""
    if config.file is not None:
        lists = read_yaml(config.file)
        if "base_classes_1" in lists:  # the published label_idx.json: 1 validates, 2 tests
            found = read_class_split(config.file)
            return {
                f"{kind}_{name}": found[f"{kind}_classes_{number}"]
                for kind in ("base", "novel")
                for name, number in (("val", 1), ("test", 2))
            }
        return read_split(lists, where=str(config.file), names=class_names)
    assert config.num_base is not None
    return derived_split(
        labels, num_base=config.num_base, base_val=config.val_base, novel_val=config.val_novel
    )


def _require_images(
    images: SetupImages, config: LowShotConfig, class_names: list[str] | None
) -> None:
    setup, most = images.setup, max(config.shots)
    tested = np.bincount(images.test_classes, minlength=setup.num_classes)
    if not tested.all():
        missing = int(setup.classes[tested.argmin()])
        raise ConfigError(
            f"lowshot.test leaves no test image of class {_named(missing, class_names)}, which the "
            f"set-up `{images.name}` uses. Change lowshot.test, or leave the class out."
        )
    trained = np.bincount(images.train_classes, minlength=setup.num_classes)
    wanted = np.where(setup.is_novel, most, 1)
    if (short := np.flatnonzero(trained < wanted)).size:
        c = int(short[0])
        kind = "Novel" if setup.is_novel[c] else "Base"
        raise ConfigError(
            f"{kind} class {_named(int(setup.classes[c]), class_names)} has {trained[c]} training "
            f"images, but lowshot.shots={list(config.shots)} asks for {wanted[c]}. Lower "
            f"lowshot.shots, or keep fewer images for testing."
        )
    if len(images.base) < config.widest:
        raise ConfigError(
            f"The set-up `{images.name}` has {len(images.base)} base images, fewer than the "
            f"{config.widest} neighbors asked for by lowshot.k and lowshot.knn.k. Lower them."
        )


def _named(label: int, class_names: list[str] | None) -> str:
    known = class_names is not None and label < len(class_names)
    return f"{label} ({class_names[label]})" if known and class_names is not None else str(label)


class HoldsOut(Protocol):
    """A stage's config that says which images are kept for testing."""

    @property
    def test(self) -> HeldOutConfig: ...

    @property
    def seed(self) -> int: ...


def held_out(
    labels: Array, config: HoldsOut, sources: Sources | None, *, stage: str = "lowshot"
) -> Array:
    """Return which images are for testing: (N,) bool.

    By share: of every class that share, rounded, at least one where the class has two images.
    Raises ConfigError when nothing is left for testing.
    """
    match config.test:
        case HeldOutShare(share=share):
            return _share_of_each_class(labels, share, seed=config.seed)
        case HeldOutRows(first=first):
            is_test = np.arange(len(labels)) >= first
            if not is_test.any():
                raise ConfigError(
                    f"{stage}.test.first={first} leaves no test image: there are {len(labels):,} "
                    f"images. Lower it."
                )
            return is_test
        case HeldOutSources(pattern=pattern):
            if sources is None:
                raise ConfigError(
                    f"{stage}.test.pattern={pattern!r} needs the sources of the images, which were "
                    f"not given. Use {stage}.test.name=share or rows."
                )
            return _matching(len(labels), pattern, sources, stage)


def _share_of_each_class(labels: Array, share: float, *, seed: int) -> Array:
    draws = uniforms(seed=seed, epoch=0, ids=torch.arange(len(labels)), draws=1).numpy()[:, 0]
    is_test = np.zeros(len(labels), bool)
    for label in np.unique(labels[labels >= 0]):
        images = np.flatnonzero(labels == label)
        count = min(max(1, round(share * len(images))), len(images) - 1)
        is_test[images[np.argsort(draws[images], kind="stable")[:count]]] = True
    return is_test


def _matching(n: int, pattern: str, sources: Sources, stage: str) -> Array:
    fits = re.compile(fnmatch.translate(pattern)).match
    is_test = np.zeros(n, bool)
    for start in range(0, n, _SOURCES):
        ids = np.arange(start, min(start + _SOURCES, n))
        is_test[ids] = [fits(source) is not None for source in sources(ids)]
    if not is_test.any():
        example = sources(np.array([0]))[0] if n else "nothing"
        raise ConfigError(
            f"{stage}.test.pattern={pattern!r} matches no image's source, such as {example!r}. "
            f"A pattern is compared with the whole source; * stands for any text."
        )
    return is_test
