"""The stage `evaluate`: scores of a clustering, with labels as far as there are any, or without."""

from __future__ import annotations

import csv
import hashlib
import logging
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np

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
from selfsup_ray.config import (
    NonNegative,
    Positive,
    PositiveFloat,
    Resources,
    config,
    flatten,
)
from selfsup_ray.data.corpus import Corpus
from selfsup_ray.errors import ConfigError
from selfsup_ray.ops.metrics import cluster_accuracy
from selfsup_ray.stages.graph import Features, Graph, Labels, as_integers, label_array
from selfsup_ray.stages.scores import (
    Baseline,
    Clusters,
    Evidence,
    baseline_scores,
    embedding_scores,
    label_free_scores,
    label_scores,
)
from selfsup_ray.storage import located
from selfsup_ray.tracking import Tracker

log = logging.getLogger(__name__)

MOST_CELLS = 2**28
"""Of the table of clusters by classes: 2 GB."""


@config
class EvaluateConfig:
    """How clusters and embeddings are judged. Labels, where there are any, are only read here."""

    top: Positive = 5
    """Clusters that may hold the right class in the accuracy of the most probable ones."""
    knn_temperature: PositiveFloat = 0.1
    """A graph neighbor votes with weight exp(similarity / temperature)."""
    sample: Positive = 5000
    """Images that silhouette, SCAN score, effective rank and uniformity are measured on."""
    baselines: tuple[Baseline, ...] = ()
    """k-means to compare with, on raw `pixels` or on `embeddings`; needs labels."""
    baseline_sample: Positive = 10_000
    """Labelled images that k-means gets at most; the clustering is scored on the same ones too."""
    baseline_starts: Positive = 10
    """Random starts of k-means; the one with the lowest inertia counts."""
    seed: NonNegative = 0
    """Chooses the samples and the starts of k-means."""
    resources: Resources = Resources(workers=0)
    """Ray workers that count; 0 counts in this process, which is enough below some 10 M images."""


class Clustering(Protocol):
    """Clusters of a corpus on disk; `Clusterer` is one."""

    @property
    def num_clusters(self) -> int: ...

    @property
    def assignments(self) -> ShardedArray: ...

    @property
    def probabilities(self) -> ShardedArray: ...

    @property
    def fingerprint(self) -> str: ...


@dataclass(frozen=True)
class Evaluation:
    """The scores by name, nested; with labels also the (K, C) counts of clusters by classes."""

    metrics: dict[str, Any]
    confusion: Array | None = None
    path: Path | None = None

    @classmethod
    def open(cls, path: Path | str) -> Evaluation:
        """Return the finished evaluation in a folder.

        Raises ArtifactError when the stage has not finished there.
        """
        path = located(path)
        read_done(path)
        counts = path / "confusion.npy"
        confusion = np.load(counts) if counts.exists() else None
        return cls(read_json(path / "metrics.json"), confusion, path)

    @property
    def fingerprint(self) -> str:
        """Hash of the config and the inputs; only of an evaluation that was given a folder."""
        assert self.path is not None, "this evaluation was not written to a folder"
        return read_done(self.path).fingerprint

    @property
    def accuracy(self) -> float | None:
        """Share of labelled images in the cluster matched to their class; None without labels."""
        return self.metrics.get("accuracy")

    def __str__(self) -> str:
        numbers = (int, float, str)
        values = {k: v for k, v in flatten(self.metrics).items() if isinstance(v, numbers)}
        width = max(len(key) for key in values)
        lines = [
            f"{k:<{width}}  {v:.4f}" if isinstance(v, float) else f"{k:<{width}}  {v}"
            for k, v in values.items()
        ]
        return "\n".join([*lines, *self.metrics["notes"]])


def evaluate(
    assignments: Array | Sequence[int] | ShardedArray,
    labels: Labels | None = None,
    config: EvaluateConfig | None = None,
    *,
    out: Path | str | None = None,
    probabilities: Array | ShardedArray | None = None,
    features: Features | None = None,
    graph: Graph | None = None,
    corpus: Corpus | None = None,
    tracker: Tracker | None = None,
) -> Evaluation:
    """Return the scores of a clustering; written to `out` when given.

    assignments: (N,) cluster of every image, -1 for none. labels: -1 is unknown; only labelled
    images count, and without any the scores are those that need none. What else is given adds its
    scores: probabilities (N, K), embeddings, graph, corpus (class names, k-means on pixels).
    """
    config = config or EvaluateConfig()
    ids = as_integers(assignments, name="assignments")
    num_clusters = int(ids.max(initial=0)) + 1
    if probabilities is not None:
        if num_clusters > probabilities.shape[1]:
            raise ConfigError(
                f"evaluate: cluster {num_clusters - 1} is assigned, but the probabilities are of "
                f"{probabilities.shape[1]} clusters. Give both from the same clustering."
            )
        num_clusters = int(probabilities.shape[1])
    clusters = {"clusters": Clusters(ids, num_clusters, probabilities)}
    known = None if labels is None else label_array(labels)
    inputs = {"assignments": _digest(ids), "labels": _digest(known)}
    if probabilities is not None:
        inputs["probabilities"] = _digest(probabilities)
    evidence = _evidence(len(ids), known, features, graph, corpus)
    return _evaluate(clusters, evidence, config, out, inputs | _given(evidence, features), tracker)


def evaluate_run(
    clusterings: Mapping[str, Clustering],
    corpus: Corpus,
    config: EvaluateConfig | None = None,
    *,
    out: Path | str,
    features: Features | None = None,
    graph: Graph | None = None,
    tracker: Tracker | None = None,
) -> Evaluation:
    """Return the scores of a run's clusterings, e.g. {"scan": …, "selflabel": …}, and embeddings.

    The last clustering is the result; the scores of the others stand under their names.
    """
    config = config or EvaluateConfig()
    clusters = {
        name: Clusters(np.asarray(c.assignments), c.num_clusters, c.probabilities)
        for name, c in clusterings.items()
    }
    labels = corpus.labels() if corpus.has_labels else None
    evidence = _evidence(len(corpus), labels, features, graph, corpus)
    inputs = {name: c.fingerprint for name, c in clusterings.items()}
    return _evaluate(clusters, evidence, config, out, inputs | _given(evidence, features), tracker)


def _evaluate(
    clusters: Mapping[str, Clusters],
    evidence: Evidence,
    config: EvaluateConfig,
    out: Path | str | None,
    inputs: Mapping[str, str],
    tracker: Tracker | None,
) -> Evaluation:
    _require_inputs(config, evidence)
    _require_small_table(clusters, evidence)
    if out is None:
        return Evaluation(*_scores(clusters, evidence, config))
    out, began = located(out), time.monotonic()
    if begin(out, stage="evaluate", config=config, inputs=inputs):
        log.info("evaluate: %s is current", out)
        return Evaluation.open(out)
    metrics, counts = _scores(clusters, evidence, config)
    if counts is not None:
        _write_confusion(out, counts, evidence.corpus)
    write_json(out / "metrics.json", metrics)
    numbers = {k: v for k, v in flatten(metrics).items() if isinstance(v, int | float)}
    if tracker is not None:
        tracker.log([numbers])
    facts = {k: v for k, v in metrics.items() if isinstance(v, int | float)}
    seconds = time.monotonic() - began
    finish(out, stage="evaluate", config=config, inputs=inputs, seconds=seconds, facts=facts)
    for note in metrics["notes"]:
        log.info("evaluate: %s", note)
    return Evaluation(metrics, counts, out)


def _scores(
    clusters: Mapping[str, Clusters], evidence: Evidence, config: EvaluateConfig
) -> tuple[dict[str, Any], Array | None]:
    """Return all scores, those of the last clustering on top, and its counts."""
    counts: Array | None = None
    by_name: dict[str, dict[str, Any]] = {}
    for name, one in clusters.items():
        scores: dict[str, Any] = {}
        if evidence.labels is not None:
            scores, counts = label_scores(one, evidence, top=config.top, resources=config.resources)
        free = label_free_scores(
            one, evidence, sample=config.sample, seed=config.seed, resources=config.resources
        )
        by_name[name] = scores | {"label_free": free}
    last, result = by_name.popitem() if by_name else ("", {})
    if len(clusters) > 1:
        result["clustering"] = last
    result["embeddings"] = embedding_scores(
        evidence,
        sample=config.sample,
        temperature=config.knn_temperature,
        seed=config.seed,
        resources=config.resources,
    )
    result["baselines"] = _baselines(clusters.get(last), evidence, config)
    known = 0 if evidence.labels is None else int((evidence.labels >= 0).sum())
    result |= by_name | {"num_images": evidence.num_images, "num_labelled": known}
    result["notes"] = _notes(known, evidence.num_images, config)
    return result, counts


def _baselines(
    clusters: Clusters | None, evidence: Evidence, config: EvaluateConfig
) -> dict[str, Any]:
    if evidence.labels is None:
        return {}
    return {
        kind: baseline_scores(
            kind,
            clusters,
            evidence,
            sample=config.baseline_sample,
            starts=config.baseline_starts,
            seed=config.seed,
        )
        for kind in config.baselines
    }


def _notes(known: int, n: int, config: EvaluateConfig) -> list[str]:
    if known == n:
        return []
    if known:
        return [f"{known:,} of {n:,} images have a label: accuracy, NMI and ARI rest on those."]
    notes = [
        f"None of the {n:,} images has a label: accuracy, NMI, ARI and kNN accuracy are left out, "
        f"the other scores need no labels."
    ]
    if config.baselines:
        notes.append("k-means to compare with is left out: it can only be scored with labels.")
    return notes


def _evidence(
    n: int,
    labels: Array | None,
    features: Features | None,
    graph: Graph | None,
    corpus: Corpus | None,
) -> Evidence:
    """Return what was given after checking that it is about the same n images."""
    array = None if features is None else features.array
    sizes = {"labels": labels, "features": array, "graph": graph, "corpus": corpus}
    for name, value in sizes.items():
        if value is not None and len(value) != n:
            raise ConfigError(
                f"evaluate: there are {n:,} images to judge, but {name} has {len(value):,} rows. "
                f"Give results of the same corpus."
            )
    if labels is not None:
        labels = labels if (labels >= 0).any() else None
    return Evidence(n, labels, array, graph, corpus)


def _require_inputs(config: EvaluateConfig, evidence: Evidence) -> None:
    needed = {"pixels": ("corpus", evidence.corpus), "embeddings": ("features", evidence.features)}
    for kind in config.baselines:
        name, value = needed[kind]
        if value is None:
            raise ConfigError(
                f"`evaluate.baselines` has {kind!r}, which needs `{name}`. Give it, or take "
                f"{kind!r} out."
            )


def _require_small_table(clusters: Mapping[str, Clusters], evidence: Evidence) -> None:
    most = max((one.num_clusters for one in clusters.values()), default=1)
    if most * evidence.num_classes > MOST_CELLS:
        raise ConfigError(
            f"evaluate: {most:,} clusters by labels up to {evidence.num_classes - 1:,} make too "
            f"large a table. Number the classes from 0 on without gaps."
        )


def _given(evidence: Evidence, features: Features | None) -> dict[str, str]:
    values = {"features": features, "graph": evidence.graph, "corpus": evidence.corpus}
    return {name: value.fingerprint for name, value in values.items() if value is not None}


def _digest(values: Array | ShardedArray | None) -> str:
    """Return a hash of the numbers themselves: what was handed over may have no stamp."""
    state = hashlib.blake2b(digest_size=16)
    if isinstance(values, ShardedArray):
        for i in range(values.num_shards):
            state.update(values.shard(i).tobytes())
    elif values is not None:
        state.update(values.tobytes())
    return state.hexdigest()


def _write_confusion(out: Path, counts: Array, corpus: Corpus | None) -> None:
    """Write the (K, C) counts as confusion.npy, and with names as confusion.csv."""
    with whole_file(out / "confusion.npy") as temporary, open(temporary, "wb") as file:
        np.save(file, counts)
    names = corpus.class_names if corpus is not None else None
    names = names or [str(i) for i in range(counts.shape[1])]
    matched = cluster_accuracy(counts).class_of
    with whole_file(out / "confusion.csv") as temporary:
        with open(temporary, "w", newline="") as text:
            writer = csv.writer(text)
            writer.writerow(["cluster", "matched_class", *names[: counts.shape[1]]])
            for cluster, (row, label) in enumerate(zip(counts, matched, strict=True)):
                writer.writerow([cluster, names[label] if label >= 0 else "", *row.tolist()])
