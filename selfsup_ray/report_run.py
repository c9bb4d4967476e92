"""What the report knows of a run: its stages, handles and bounded samples, all from the folder."""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections.abc import Callable, Iterator
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import yaml

from selfsup_ray.artifacts import Done, ShardedArray, read_done, read_json
from selfsup_ray.data.corpus import Corpus
from selfsup_ray.errors import ArtifactError
from selfsup_ray.models.clusterer import Clusterer
from selfsup_ray.ops.metrics import cluster_accuracy, contingency
from selfsup_ray.ops.rng import permuted
from selfsup_ray.stages.embed import Embeddings
from selfsup_ray.stages.graph import Graph
from selfsup_ray.stages.reduce import Reduced
from selfsup_ray.storage import located
from selfsup_ray.tracking import read_records

Array = np.ndarray[Any, np.dtype[Any]]

ORDER = (
    *(
        "ingest",
        "dimension",
        "pretext",
        "sela",
        "whiten",
        "patches",
        "classify",
        "embed",
        "maps",
        "reduce",
        "graph",
        "scan",
        "selflabel",
        "diffuse",
    ),
    *("probe", "linear", "finetune", "lowshot", "voc07", "evaluate", "export"),
)
"""Stages in the order of the data flow; others follow by name."""
CLUSTERERS = ("sela", "scan", "selflabel")
"""Stages that leave a Clusterer; the last one present is the run's result."""
CHUNK = 65_536
"""Rows read at a time from arrays of N rows."""
CHUNK_VALUES = 32_000_000
"""Probabilities read at a time: 128 MB of float32, however many clusters there are."""


@dataclasses.dataclass(frozen=True)
class StageFolder:
    """One stage's subfolder; `done` is None while it has not finished."""

    name: str
    path: Path
    done: Done | None
    inputs: dict[str, str]
    config: dict[str, Any]

    @cached_property
    def versions(self) -> dict[str, str]:
        """Versions of what the stage ran with; empty when it did not store them."""
        path = self.path / "versions.json"
        return dict(read_json(path)) if path.exists() else {}

    @cached_property
    def history(self) -> list[dict[str, Any]]:
        """Records of metrics.jsonl by ascending step, all numbers of a step in one."""
        by_step: dict[int, dict[str, Any]] = {}
        for record in read_records(self.path / "metrics.jsonl"):
            step = int(record["step"])
            by_step[step] = record | by_step.get(step, {})
        return [by_step[step] for step in sorted(by_step)]

    @property
    def facts(self) -> dict[str, Any]:
        """What the stage reported when it finished; empty before."""
        return {} if self.done is None else self.done.facts

    @property
    def is_trained(self) -> bool:
        """Whether the stage logged a loss."""
        return any("loss" in record for record in self.history)


class Run:
    """A run folder as the report reads it; an artifact is None where no finished stage left it."""

    def __init__(self, path: Path, stages: list[StageFolder]) -> None:
        self.path = path
        self.stages = stages

    @classmethod
    def open(cls, path: Path) -> Run:
        """Return the run in a folder with one subfolder per stage.

        Raises ArtifactError when no subfolder is a stage's.
        """
        path = located(path)
        found = [_stage(file.parent) for file in sorted(path.glob("*/config.yaml"))]
        stages = [stage for stage in found if stage is not None]
        if not stages:
            raise ArtifactError(
                f"{path} holds no stage of a run. Give the `out` folder of an experiment, "
                f"for example the one `selfsup-ray run` names at its end."
            )
        return cls(path, sorted(stages, key=_position))

    def stage(self, name: str) -> StageFolder | None:
        """Return the finished stage of this name, or None."""
        named = (s for s in self.stages if s.name == name and s.done is not None)
        return next(named, None)

    @cached_property
    def corpus(self) -> Corpus | None:
        """The corpus the run clustered."""
        stage = self.stage("ingest")
        return None if stage is None else Corpus.open(stage.path)

    @cached_property
    def embeddings(self) -> Embeddings | None:
        """Unit rows (N, d)."""
        stage = self.stage("embed")
        return None if stage is None else Embeddings.open(stage.path)

    @cached_property
    def searched(self) -> Embeddings | Reduced | None:
        """The rows that the graph was built on."""
        stage = self.stage("reduce")
        return self.embeddings if stage is None else Reduced.open(stage.path)

    @cached_property
    def graph(self) -> Graph | None:
        """The kNN graph."""
        stage = self.stage("graph")
        return None if stage is None else Graph.open(stage.path)

    @cached_property
    def clustering(self) -> tuple[str, Clusterer] | None:
        """Name of the last stage that assigned clusters, and its handle."""
        finished = [s for name in CLUSTERERS if (s := self.stage(name)) is not None]
        return (finished[-1].name, Clusterer.open(finished[-1].path)) if finished else None

    @cached_property
    def clusters(self) -> Clusters | None:
        """Sizes, confidence and extreme images of the result's clusters."""
        if self.clustering is None:
            return None
        _, clusterer = self.clustering
        corpus = self.corpus
        labels = corpus.labels if corpus is not None and corpus.has_labels else None
        return scan_clusters(
            clusterer.assignments,
            clusterer.probabilities,
            labels,
            num_classes=len(self.class_names),
        )

    @cached_property
    def class_names(self) -> list[str]:
        """Names of the classes, or their numbers where the source gave none; [] without labels."""
        corpus = self.corpus
        if corpus is None or not corpus.has_labels:
            return []
        if corpus.class_names:
            return list(corpus.class_names)
        highest = max((int(corpus.labels(ids).max()) for ids in chunks(len(corpus))), default=-1)
        return [str(label) for label in range(highest + 1)]

    def class_of(self, label: int) -> str:
        """Return the name of a label; "" when unknown."""
        return self.class_names[label] if 0 <= label < len(self.class_names) else ""


def _stage(path: Path) -> StageFolder | None:
    stored = yaml.safe_load((path / "config.yaml").read_text())
    if not isinstance(stored, dict) or "stage" not in stored:
        return None  # a folder of something else that also keeps a config.yaml
    done = read_done(path) if (path / "done.json").exists() else None
    inputs, config = stored.get("inputs") or {}, stored.get("config") or {}
    return StageFolder(stored["stage"], path, done, dict(inputs), dict(config))


def _position(stage: StageFolder) -> tuple[int, str]:
    place = ORDER.index(stage.name) if stage.name in ORDER else len(ORDER)
    return place, stage.path.name


def chunks(n: int, size: int = CHUNK) -> Iterator[Array]:
    """Yield the ids 0..n-1 in ascending pieces of at most `size`."""
    for start in range(0, n, size):
        yield np.arange(start, min(start + size, n), dtype=np.int64)


def sample_ids(n: int, size: int) -> Array:
    """Return min(n, size) distinct ids below n, ascending; the same ones on every call."""
    if n <= size:
        return np.arange(n, dtype=np.int64)
    return np.sort(permuted(np.arange(size), n=n, seed=0, epoch=0))


@dataclasses.dataclass(frozen=True)
class Named:
    """The class of each cluster: (K,), -1 for none; with more clusters than classes many to one."""

    class_of: Array
    accuracy: float
    is_many_to_one: bool


@dataclasses.dataclass(frozen=True)
class Clusters:
    """What a pass over assignments and probabilities leaves: nothing here grows with N.

    sizes, confidence: (K,) images, and mean probability (NaN when empty); histogram: (20,) images
    by probability; most, least: (K, n) ids of the most and the least sure images, most telling
    first, -1 where there are fewer, with their probabilities; classes: (K, C) labelled images.
    """

    sizes: Array
    confidence: Array
    histogram: Array
    most: Array
    most_probability: Array
    least: Array
    least_probability: Array
    classes: Array | None

    def __len__(self) -> int:
        return len(self.sizes)

    @cached_property
    def by_size(self) -> Array:
        """Cluster numbers, largest cluster first, ties by number."""
        return np.argsort(-self.sizes, kind="stable")

    @cached_property
    def named(self) -> Named | None:
        """The class of each cluster; None when no clustered image has a label."""
        if self.classes is None or not self.classes.sum():
            return None
        found = cluster_accuracy(self.classes)
        if self.classes.shape[0] > self.classes.shape[1]:
            return Named(found.majority_of, found.many_to_one, is_many_to_one=True)
        return Named(found.class_of, found.one_to_one, is_many_to_one=False)

    def majority(self, cluster: int) -> tuple[int, float] | None:
        """Return a cluster's most frequent label and its share of the labelled images, or None."""
        if self.classes is None or not (total := self.classes[cluster].sum()):
            return None
        label = int(self.classes[cluster].argmax())
        return label, float(self.classes[cluster, label] / total)


def scan_clusters(
    assignments: ShardedArray,
    probabilities: ShardedArray,
    labels: Callable[[Array], Array] | None,
    *,
    num_classes: int,
    extremes: int = 16,
) -> Clusters:
    """Return what the report shows of a clustering, from one pass in chunks of rows.

    assignments: (N,) cluster or -1; probabilities: (N, K); labels: ids -> (n,) int, -1 unknown.
    """
    num_clusters = probabilities.shape[1]
    sizes, total = np.zeros(num_clusters, np.int64), np.zeros(num_clusters, np.float64)
    histogram = np.zeros(20, np.int64)
    classes = np.zeros((num_clusters, num_classes), np.int64) if labels is not None else None
    most, least = _Extremes.empty(num_clusters, extremes), _Extremes.empty(num_clusters, extremes)
    rows = min(CHUNK, max(CHUNK_VALUES // num_clusters, 1))
    for ids in chunks(len(assignments), rows):
        cluster = assignments.rows(ids)
        ids, cluster = ids[cluster >= 0], cluster[cluster >= 0].astype(np.int64)
        p = probabilities.rows(ids)[np.arange(len(ids)), cluster]
        sizes += np.bincount(cluster, minlength=num_clusters)
        total += np.bincount(cluster, weights=p.astype(np.float64), minlength=num_clusters)
        histogram += np.histogram(p, bins=20, range=(0, 1))[0]
        most, least = most.merged(ids, cluster, p), least.merged(ids, cluster, -p)
        if classes is not None and labels is not None:
            shape = {"num_clusters": num_clusters, "num_classes": num_classes}
            classes += contingency(cluster, labels(ids), **shape)
    with np.errstate(invalid="ignore"):  # an empty cluster has no mean
        confidence = total / sizes
    return Clusters(
        sizes, confidence, histogram, most.ids, most.scores, least.ids, -least.scores, classes
    )


@dataclasses.dataclass(frozen=True)
class _Extremes:
    """The ids with the highest score of each cluster: (K, n), padded with -1 and -inf."""

    ids: Array
    scores: Array

    @classmethod
    def empty(cls, num_clusters: int, n: int) -> _Extremes:
        shape = (num_clusters, n)
        return cls(np.full(shape, -1, np.int64), np.full(shape, -np.inf))

    def merged(self, ids: Array, cluster: Array, scores: Array) -> _Extremes:
        """Return the extremes of these images and the ones kept so far; ties go to lower ids."""
        num_clusters, n = self.ids.shape
        kept = self.ids >= 0
        ids = np.concatenate([self.ids[kept], ids])
        scores = np.concatenate([self.scores[kept], scores])
        cluster = np.concatenate([np.nonzero(kept)[0], cluster])
        order = np.lexsort((ids, -scores, cluster))
        ids, scores, cluster = ids[order], scores[order], cluster[order]
        rank = np.arange(len(ids)) - np.searchsorted(cluster, cluster)  # place within its cluster
        top = rank < n
        result = _Extremes.empty(num_clusters, n)
        result.ids[cluster[top], rank[top]] = ids[top]
        result.scores[cluster[top], rank[top]] = scores[top]
        return result


def thinned(values: Array, points: int) -> Array:
    """Return at most `points` means of consecutive values: the same curve in fewer points."""
    if len(values) <= points:
        return values
    edges = np.linspace(0, len(values), points + 1).astype(int)
    parts = [values[a:b] for a, b in itertools.pairwise(edges)]
    return np.array([math.nan if np.isnan(p).all() else np.nanmean(p) for p in parts])
