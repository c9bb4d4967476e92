"""The stage `probe`: how well frozen embeddings separate known classes, by a line and by neighbors.

Protocol. The labelled images are split by a hash of their id: `test_share` of them are only scored.
Of the others `validation_share` choose the weight decay of a multinomial logistic regression, which
is then fitted again on all of them. The kNN classifier lets the k most similar training images
vote with weight exp(similarity / temperature) (Wu et al. 2018); nothing about it is tuned.
"""

from __future__ import annotations

import hashlib
import logging
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch

from selfsup_ray.artifacts import (
    Array,
    ShardedArray,
    begin,
    finish,
    read_done,
    read_json,
    whole_file,
    write_json,
)
from selfsup_ray.cluster.neighbors import Search
from selfsup_ray.config import (
    NonNegative,
    Positive,
    PositiveFloat,
    Resources,
    Share,
    config,
    flatten,
)
from selfsup_ray.errors import ConfigError
from selfsup_ray.ops.logistic import Blocks, LinearClassifier, fit_logistic
from selfsup_ray.ops.metrics import Tally
from selfsup_ray.ops.neighbors import Neighbors, knn_vote
from selfsup_ray.ops.rng import uniforms
from selfsup_ray.stages.graph import Features, Graph, Labels, label_array
from selfsup_ray.stages.lowshot_config import HeldOutConfig
from selfsup_ray.stages.lowshot_data import Sources, held_out
from selfsup_ray.storage import located
from selfsup_ray.tracking import Tracker

log = logging.getLogger(__name__)

ROWS_AT_ONCE = 8192
KEPT_BYTES = 2**31
"""Rows up to this size are read once; more are read from disk in every iteration."""


@config
class ProbeConfig:
    """How embeddings are probed."""

    test_share: Share = 0.2
    """Share of the labelled images that are only scored; chosen by a hash of the image id."""
    test: HeldOutConfig | None = None
    """In place of test_share: share (of every class) | source (a pattern) | rows (from an id on),
    as in lowshot; the published numbers are of the data set's own test images."""
    validation_share: Share = 0.1
    """Share of the other labelled images that choose the weight decay."""
    l2: tuple[PositiveFloat, ...] = (1e-6, 1e-5, 1e-4, 1e-3, 1e-2)
    """Weight decays tried, in the objective mean loss + l2 / 2 |weight|^2 on rows of length
    sqrt(d)."""
    max_iterations: Positive = 200
    """Bound on the iterations of each fit (L-BFGS)."""
    knn_k: Positive = 200
    """Training images that vote; fewer when there are fewer."""
    knn_index: Literal["exact", "graph"] = "exact"
    """What finds them: a search of every training image, or the index that the run's graph was
    built with, on the rows of the graph: reduced ones where there are any."""
    knn_temperature: PositiveFloat = 0.1
    """Their weight is exp(similarity / temperature)."""
    seed: NonNegative = 0
    """Chooses the split."""
    resources: Resources = Resources(workers=0)
    """`workers` actors search the neighbors; 0 searches in this process. The linear fit runs in
    this process, on a GPU when `gpus` is above 0."""

    def __post_init__(self) -> None:
        if not self.l2:
            raise ValueError("`l2` needs at least one value")
        if self.resources.gpus and self.resources.workers:
            raise ValueError(
                f"`resources.workers` is {self.resources.workers} and `resources.gpus` is "
                f"{self.resources.gpus}, but the workers search on CPUs; set one of them to 0"
            )


@dataclass(frozen=True)
class Probe:
    """Handle on a finished probe: the scores by name, nested."""

    metrics: dict[str, Any]
    path: Path

    @classmethod
    def open(cls, path: Path | str) -> Probe:
        """Return the finished probe in a folder.

        Raises ArtifactError when the stage has not finished there.
        """
        read_done(located(path))
        return cls(read_json(located(path) / "metrics.json"), located(path))

    @property
    def fingerprint(self) -> str:
        """Hash of the config and the inputs."""
        return read_done(self.path).fingerprint

    @property
    def linear(self) -> float:
        """Accuracy of the linear classifier on the test images, in [0, 1]."""
        return float(self.metrics["linear"]["accuracy"])

    @property
    def knn(self) -> float:
        """Accuracy of the weighted kNN classifier on the test images, in [0, 1]."""
        return float(self.metrics["knn"]["accuracy"])


@dataclass(frozen=True)
class Split:
    """Ascending ids of the labelled images, by use."""

    fit: Array
    validation: Array
    test: Array

    @property
    def train(self) -> Array:
        """The images that are not tested on: fit and validation together."""
        return np.sort(np.concatenate([self.fit, self.validation]))


def probe(
    features: Features,
    labels: Labels,
    config: ProbeConfig | None = None,
    *,
    out: Path | str,
    sources: Sources | None = None,
    graph: Graph | None = None,
    tracker: Tracker | None = None,
) -> Probe:
    """Return the linear and the kNN accuracy of frozen embeddings on held-out labelled images.

    labels: (N,), -1 is unknown; sources: for config.test.name=source; graph: of the same images,
    for config.knn_index=graph. Raises ConfigError when fewer than two classes are known or a part
    of the split is empty.
    """
    config, out, began = config or ProbeConfig(), located(out), time.monotonic()
    known = label_array(labels)
    split = split_labelled(known, config, sources)
    _require_labels(known, split, len(features.array))
    digest = hashlib.blake2b(known.tobytes(), digest_size=16).hexdigest()
    inputs = {"features": features.fingerprint, "labels": digest}
    if config.knn_index == "graph":
        inputs["graph"] = _require_graph(graph, features).fingerprint
    if begin(out, stage="probe", config=config, inputs=inputs):
        log.info("probe: %s is current", out)
        return Probe.open(out)
    metrics = {
        "linear": linear_probe(features.array, known, split, config),
        "knn": knn_probe(features.array, known, split, config, out=out, graph=graph),
        "num_classes": len(np.unique(known[known >= 0])),
        "num_train": len(split.train),
        "num_test": len(split.test),
    }
    write_json(out / "metrics.json", metrics)
    numbers = {k: v for k, v in flatten(metrics).items() if isinstance(v, int | float)}
    if tracker is not None:
        tracker.log([numbers])
    seconds = time.monotonic() - began
    finish(out, stage="probe", config=config, inputs=inputs, seconds=seconds, facts=numbers)
    made = Probe(metrics, out)
    text = "probe: linear %.4f, kNN %.4f on %s test images, %.1f s"
    log.info(text, made.linear, made.knn, f"{len(split.test):,}", seconds)
    return made


@dataclass(frozen=True)
class _Held:
    test: HeldOutConfig
    seed: int


def split_labelled(labels: Array, config: ProbeConfig, sources: Sources | None = None) -> Split:
    """Return the split of the labelled images; an image's part depends on its id and the seed."""
    ids = np.flatnonzero(labels >= 0)
    draws = uniforms(seed=config.seed, epoch=0, ids=torch.from_numpy(ids), draws=2).numpy()
    if config.test is None:
        is_test = draws[:, 0] < config.test_share
    else:
        is_test = held_out(labels, _Held(config.test, config.seed), sources, stage="probe")[ids]
    is_validation = ~is_test & (draws[:, 1] < config.validation_share)
    return Split(ids[~is_test & ~is_validation], ids[is_validation], ids[is_test])


def _require_labels(labels: Array, split: Split, num_images: int) -> None:
    if len(labels) != num_images:
        raise ConfigError(f"probe: {len(labels):,} labels for {num_images:,} embeddings.")
    if len(np.unique(labels[split.fit])) < 2 or not len(split.test):
        raise ConfigError(
            f"probe needs labelled images of two classes to train on and some to test on, but "
            f"{len(split.fit):,} of {num_images:,} are for training and {len(split.test):,} for "
            f"testing. Give labels to ingest, or leave the stage probe out."
        )


def _require_graph(graph: Graph | None, features: Features) -> Graph:
    if graph is None or len(graph) != len(features.array):
        has = "none was given" if graph is None else f"{graph.path} has {len(graph):,} images"
        raise ConfigError(
            f"probe.knn_index=graph needs the graph of the {len(features.array):,} embedded "
            f"images, but {has}. Add the key `graph: {{}}`, or set probe.knn_index to exact."
        )
    return graph


def linear_probe(
    array: ShardedArray, labels: Array, split: Split, config: ProbeConfig
) -> dict[str, Any]:
    """Return the test accuracy of a logistic regression whose weight decay validation chose."""
    tried: dict[float, LinearClassifier] = {}
    chosen, by_l2 = max(config.l2), {}
    if len(split.validation) and len(config.l2) > 1:
        found = None
        for l2 in sorted(config.l2, reverse=True):  # from simple to complex, each warm-started
            found = tried[l2] = _fit(array, labels, split.fit, l2, config, found)
            by_l2[l2] = _tally(*_correct(array, labels, split.validation, found))
        # The larger decay on ties: dicts keep the order, max returns the first.
        chosen = max(by_l2, key=lambda l2: by_l2[l2].hits)
    best = _fit(array, labels, split.train, chosen, config, tried.get(chosen))
    hits, of = _correct(array, labels, split.test, best)
    if not best.is_converged:
        log.warning("probe: the linear fit stopped after %d iterations", best.iterations)
    return _scored(hits, of) | {
        "l2": chosen,
        "validation_accuracy": {f"{l2:g}": tally.share for l2, tally in by_l2.items()},
        "iterations": best.iterations,
        "is_converged": best.is_converged,
    }


def _fit(
    array: ShardedArray,
    labels: Array,
    ids: Array,
    l2: float,
    config: ProbeConfig,
    start: LinearClassifier | None,
) -> LinearClassifier:
    return fit_logistic(
        _blocks(array, labels, ids),
        dim=array.shape[1],
        num_classes=int(labels.max()) + 1,
        l2=l2,
        max_iterations=config.max_iterations,
        tolerance=1e-5,
        start=start,
        device="cuda" if config.resources.gpus else "cpu",
    )


def _blocks(array: ShardedArray, labels: Array, ids: Array) -> Blocks:
    # Unit rows get entries of about 1, so that the same l2 means the same in every dimension.
    scale = np.float32(np.sqrt(array.shape[1]))
    parts = [ids[i : i + ROWS_AT_ONCE] for i in range(0, len(ids), ROWS_AT_ONCE)]

    def read() -> Iterator[tuple[Array, Array]]:
        return ((array.rows(part) * scale, labels[part]) for part in parts)

    if len(ids) * array.shape[1] * 4 > KEPT_BYTES:
        return read
    kept = list(read())
    return lambda: kept


def _correct(
    array: ShardedArray, labels: Array, ids: Array, found: LinearClassifier
) -> tuple[Array, Array]:
    """Return the images (C,) of each class that are recognized, and all of them."""
    hits = of = np.zeros(int(labels.max()) + 1, np.int64)
    for x, y in _blocks(array, labels, ids)():
        hits, of = hits + _count(y[found.predict(x) == y], len(of)), of + _count(y, len(of))
    return hits, of


def _count(labels: Array, num_classes: int) -> Array:
    return np.bincount(labels, minlength=num_classes)


def knn_probe(
    array: ShardedArray,
    labels: Array,
    split: Split,
    config: ProbeConfig,
    *,
    out: Path,
    graph: Graph | None = None,
) -> dict[str, Any]:
    """Return the test accuracy of the vote of the most similar training images.

    Wu et al. 2018: by cosine similarity s the `knn_k` most similar, each with weight
    exp(s / knn_temperature) for its class. graph: with config.knn_index=graph, whose index finds
    them.
    """
    train = split.train
    k, num_classes = min(config.knn_k, len(train)), int(labels.max()) + 1
    hits = of = np.zeros(num_classes, np.int64)
    by_graph = config.knn_index == "graph"
    is_train = np.zeros(len(labels), bool)
    is_train[train] = True
    with _search(array, train, config, out, graph if by_graph else None) as search:
        for i in range(0, len(split.test), ROWS_AT_ONCE):
            ids = split.test[i : i + ROWS_AT_ONCE]
            queries = search.array.rows(ids)
            found = (
                nearest_of(search, queries, is_train, k) if by_graph else search.search(queries, k)
            )
            votes = knn_vote(
                found.similarity,
                labels[found.ids],
                num_classes=num_classes,
                temperature=config.knn_temperature,
            )
            y = labels[ids]
            hits = hits + _count(y[votes.argmax(axis=1) == y], num_classes)
            of = of + _count(y, num_classes)
    return _scored(hits, of) | {"k": k, "temperature": config.knn_temperature}


def _search(
    array: ShardedArray, train: Array, config: ProbeConfig, out: Path, graph: Graph | None
) -> Search:
    """Return the search over the training images, or with a graph that over all its images."""
    if graph is not None:
        return graph.search(config.resources)
    only = out / "train_ids.npy"
    with whole_file(only) as temporary, open(temporary, "wb") as file:
        np.save(file, train)
    return Search(array, config.resources, only=only, stage="probe")


def nearest_of(
    search: Search, queries: Array, is_wanted: Array, k: int, *, wide: int | None = None
) -> Neighbors:
    """Return the k nearest of the wanted rows of an index over all rows; ids (n, k).

    is_wanted: (N,) bool, k true at least. Asks for as many neighbors as hold k wanted ones if they
    lie evenly, then for twice as many where they do not.
    """
    n = len(is_wanted)
    wide = min(n, wide or int(1.25 * k * n / max(1, is_wanted.sum())) + 10)
    found = search.search(queries, wide)
    wanted = is_wanted[found.ids]
    order = np.argsort(~wanted, axis=1, kind="stable")[:, :k]  # stable: still the nearest first
    ids = np.take_along_axis(found.ids, order, axis=1)
    similarity = np.take_along_axis(found.similarity, order, axis=1)
    short = np.flatnonzero(wanted.sum(axis=1) < k)
    if len(short):
        more = nearest_of(search, queries[short], is_wanted, k, wide=2 * wide)
        ids[short], similarity[short] = more.ids, more.similarity
    return Neighbors(ids, similarity)


def _tally(hits: Array, of: Array) -> Tally:
    return Tally(int(hits.sum()), int(of.sum()))


def _scored(hits: Array, of: Array) -> dict[str, Any]:
    """Return accuracy, interval, and the accuracy of each class, None where none is tested."""
    score = _tally(hits, of)
    per_class = [h / n if n else None for h, n in zip(hits.tolist(), of.tolist(), strict=True)]
    return {
        "accuracy": score.share,
        "interval": list(score.interval()),
        "per_class": per_class,
    }
