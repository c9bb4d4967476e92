"""Low-shot protocol: class splits, the labelled block, hit rates (Douze et al. 2018, sec. 4).

A set-up has base classes, of which every training image is labelled, and novel classes, of which
only n are. Two set-ups exist: `val`, on whose novel classes every hyper-parameter is chosen, and
`test`, which is reported. Their novel classes are disjoint.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np

from selfsup_ray.artifacts import Array
from selfsup_ray.errors import ConfigError

SETUPS = ("val", "test")
PARTS = ("base_val", "novel_val", "base_test", "novel_test")
"""The four lists of a class split."""
GROUPS = ("all", "novel", "base")
"""Test images that a rate is taken over: every one, or those whose class is novel or base."""
TOPS = (1, 5)

Draw = Literal["legacy", "modern"]


@dataclass(frozen=True)
class Setup:
    """The classes of one set-up; a class is numbered by its place in `classes`: 0..C-1."""

    classes: Array
    """(C,) labels of the corpus, ascending."""
    is_novel: Array
    """(C,) bool."""

    @property
    def num_classes(self) -> int:
        """C."""
        return len(self.classes)

    def relabelled(self, labels: Array) -> Array:
        """Return labels of the corpus (n,) as classes 0..C-1 in the same order; others are -1."""
        place = np.searchsorted(self.classes, labels)
        place = np.minimum(place, len(self.classes) - 1)
        return np.where(self.classes[place] == labels, place, -1).astype(np.int64)


def derived_split(
    labels: Array, *, num_base: int, base_val: int | None = None, novel_val: int | None = None
) -> dict[str, Array]:
    """Return the four lists by ascending label: the first num_base classes are base.

    labels: the labels that occur. Of the base and of the novel classes the first go to `val`:
    base_val and novel_val of them, by default ImageNet's shares, 193 of 389 and 300 of 611.
    Raises ConfigError when a list would be empty.
    """
    classes = np.unique(labels[labels >= 0])
    num_novel = len(classes) - num_base
    base_val = round(num_base * 193 / 389) if base_val is None else base_val
    novel_val = round(num_novel * 300 / 611) if novel_val is None else novel_val
    base, novel = classes[:num_base], classes[num_base:]
    split = {
        "base_val": base[:base_val],
        "novel_val": novel[:novel_val],
        "base_test": base[base_val:],
        "novel_test": novel[novel_val:],
    }
    if empty := [name for name, part in split.items() if not len(part)]:
        raise ConfigError(
            f"The class split leaves {empty[0]} without a class: {len(classes)} classes, of which "
            f"num_base={num_base}, val_base={base_val}, val_novel={novel_val}. Both set-ups need "
            f"base and novel classes."
        )
    return split


def setups(split: Mapping[str, Array]) -> dict[str, Setup]:
    """Return the set-ups `val` and `test` of a split with the four lists of `PARTS`.

    Raises ConfigError when a novel class is in another list too: what is chosen on the validation
    classes must not have seen the classes it is tested on.
    """
    for name in ("novel_val", "novel_test"):
        for other in PARTS:
            shared = np.intersect1d(split[name], split[other])
            if other != name and len(shared):
                raise ConfigError(
                    f"The class split has class {shared[0]} both in {name} and in {other}. A novel "
                    f"class may stand in one list only; take it out of the other."
                )
    return {name: _setup(split[f"base_{name}"], split[f"novel_{name}"]) for name in SETUPS}


def _setup(base: Array, novel: Array) -> Setup:
    classes = np.unique(np.concatenate([base, novel])).astype(np.int64)
    return Setup(classes, np.isin(classes, novel))


def choose_novel(
    classes: Array, is_novel: Array, *, n: int, seed: int, draw: Draw = "legacy"
) -> list[Array]:
    """Return n images of each novel class, by ascending class: positions into `classes`.

    classes: (M,) class 0..C-1 of each training image in file order, -1 for none; is_novel: (C,).
    `legacy`: one numpy.random.RandomState(seed) shuffles the images of the novel classes in turn
    and the first n are kept, as in the published runs. `modern`: every class has a generator of
    its own, so that its images do not depend on which other classes are novel. With either, the
    images for a smaller n are among those for a larger one. Raises ConfigError when a class has
    fewer than n.
    """
    legacy = np.random.RandomState(seed)
    chosen = []
    for c in np.flatnonzero(is_novel):
        images = np.flatnonzero(classes == c)
        if len(images) < n:
            raise ConfigError(
                f"Novel class {c} has {len(images)} training images, fewer than n={n}. Lower "
                f"the largest of `shots`, or keep fewer images for testing."
            )
        if draw == "legacy":
            legacy.shuffle(images)
        else:
            np.random.Generator(np.random.Philox([seed, int(c)])).shuffle(images)
        chosen.append(images[:n])
    return chosen


def base_block(classes: Array, is_novel: Array) -> Array:
    """Return the positions of all images of base classes, by ascending class, in file order."""
    base = np.flatnonzero((classes >= 0) & ~is_novel[np.maximum(classes, 0)])
    return base[np.argsort(classes[base], kind="stable")]


@dataclass(frozen=True)
class LabelledBlock:
    """The first nodes of the graph: positions of images, and their class or -1 where unlabelled."""

    images: Array
    classes: Array


def labelled_block(
    classes: Array,
    is_novel: Array,
    *,
    n: int,
    seed: int,
    draw: Draw = "legacy",
    in_domain: bool = False,
) -> LabelledBlock:
    """Return the labelled nodes: base images by ascending class in file order, then n per novel.

    in_domain: the unused training images of the novel classes follow, unlabelled, by ascending
    class in file order. Arguments as `choose_novel`.
    """
    base = base_block(classes, is_novel)
    chosen = choose_novel(classes, is_novel, n=n, seed=seed, draw=draw)
    novel = np.concatenate([np.empty(0, np.int64), *chosen])
    images = np.concatenate([base, novel])
    known = classes[images]
    if in_domain:
        unused = np.setdiff1d(_novel_images(classes, is_novel), novel)
        unused = unused[np.argsort(classes[unused], kind="stable")]
        images = np.concatenate([images, unused])
        known = np.concatenate([known, np.full(len(unused), -1, np.int64)])
    return LabelledBlock(images, known)


def _novel_images(classes: Array, is_novel: Array) -> Array:
    return np.flatnonzero((classes >= 0) & is_novel[np.maximum(classes, 0)])


def label_ranks(scores: Array, classes: Array) -> Array:
    """Return (n,) int64: how many classes come before the true one; 0 is a top-1 hit.

    scores: (n, C), higher is better; equal scores by the lower class. A row whose true class has
    no number (NaN, from a diverged classifier) ranks last.
    """
    own = scores[np.arange(len(scores)), classes][:, None]
    is_before = scores > own
    is_before |= (scores == own) & (np.arange(scores.shape[1]) < classes[:, None])
    ranks = is_before.sum(axis=1, dtype=np.int64)
    ranks[np.isnan(own[:, 0])] = scores.shape[1]
    return np.asarray(ranks)


def hit_rates(ranks: Array, classes: Array, is_novel: Array) -> dict[str, float]:
    """Return the shares of hits: `top1_all`, `top5_all`, `top1_novel` … over `TOPS` and `GROUPS`.

    ranks: (n,) from `label_ranks`; classes: (n,) true classes; a group without images gives 0.
    """
    novel = is_novel[classes]
    groups = {"all": np.ones(len(ranks), bool), "novel": novel, "base": ~novel}
    return {
        f"top{top}_{group}": float((ranks[groups[group]] < top).mean())
        if groups[group].any()
        else 0.0
        for top in TOPS
        for group in GROUPS
    }


def mean_and_std(rows: Sequence[Mapping[str, float]]) -> dict[str, dict[str, float]]:
    """Return mean and population standard deviation of each number over the rows (seeds)."""
    table = {key: np.array([row[key] for row in rows]) for key in rows[0]}
    return {
        key: {"mean": float(values.mean()), "std": float(values.std())}
        for key, values in table.items()
    }


def best_of(values: Array) -> int:
    """Return the place of the largest value, the first of equal ones; NaN is never chosen."""
    values = np.asarray(values, np.float64)
    return int(np.where(np.isnan(values), -np.inf, values).argmax())


def read_split(
    lists: Mapping[str, Any], *, where: str, names: Sequence[str] | None
) -> dict[str, Array]:
    """Return a class split from a file's content: the four lists, of labels or of class names.

    lists: `base_val`, `novel_val`, `base_test`, `novel_test`, and optionally `first_class`, the
    number the first class has in the file (0 by default; ImageNet's published lists count from
    1). names: the classes' names in the order of their labels. Raises ConfigError.
    """
    if missing := [part for part in PARTS if part not in lists]:
        raise ConfigError(f"{where} has no list `{missing[0]}`; it needs {', '.join(PARTS)}.")
    first = int(lists.get("first_class", 0))
    known = {name: label for label, name in enumerate(names or ())}
    split = {}
    for part in PARTS:
        numbers = []
        for item in lists[part]:
            if isinstance(item, str) and item not in known:
                raise ConfigError(
                    f"{where}: {part} names {item!r}, which is no class of the corpus."
                )
            numbers.append(known[item] if isinstance(item, str) else int(item) - first)
        split[part] = np.array(sorted(numbers), np.int64)
        if not len(numbers) or min(numbers) < 0 or len(set(numbers)) < len(numbers):
            raise ConfigError(
                f"{where}: {part} must list each of its classes once, from {first} up; "
                f"got {len(numbers)} entries."
            )
    return split
