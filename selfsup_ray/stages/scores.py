"""What `evaluate` measures: one clustering, the embeddings, and k-means to compare with."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal

import numpy as np
import torch
import torch.nn.functional as F

from selfsup_ray.artifacts import Array, ShardedArray
from selfsup_ray.cluster.shards import map_shards
from selfsup_ray.config import Resources
from selfsup_ray.data.corpus import Corpus
from selfsup_ray.ops import metrics
from selfsup_ray.ops.neighbors import knn_vote, vote_accuracy
from selfsup_ray.ops.rng import permuted
from selfsup_ray.stages.graph import Graph

Baseline = Literal["pixels", "embeddings"]

BLOCK = 16_384
"""Images judged at once; with 1,000 classes their votes take 130 MB."""
CONFIDENT = 0.99
"""Above this probability an image counts as confident: the threshold of self-labelling."""
PIXEL_SIDE = 32
"""Larger images are averaged down to this side before k-means on pixels."""


@dataclass(frozen=True)
class Evidence:
    """What the images of a corpus are judged by; everything but `num_images` may be missing."""

    num_images: int
    labels: Array | None = None
    """(N,) int64 with at least one known class, -1 unknown."""
    features: ShardedArray | None = None
    """(N, d) float32 unit rows."""
    graph: Graph | None = None
    corpus: Corpus | None = None

    @property
    def num_classes(self) -> int:
        """C, from the largest label."""
        return 0 if self.labels is None else int(self.labels.max()) + 1

    def sample(self, size: int, *, seed: int, among: Array | None = None) -> Array:
        """Return at most `size` ids, ascending, of all images or `among` some."""
        n = self.num_images if among is None else len(among)
        chosen = np.sort(permuted(np.arange(min(size, n)), n=n, seed=seed, epoch=0))
        return chosen if among is None else among[chosen]


@dataclass(frozen=True)
class Clusters:
    """A clustering of all images: ids (N,) int, -1 for none, below K; probabilities (N, K)."""

    ids: Array
    num_clusters: int
    probabilities: Array | ShardedArray | None = None


def label_scores(
    clusters: Clusters, evidence: Evidence, *, top: int, resources: Resources
) -> tuple[dict[str, Any], Array]:
    """Return a clustering's scores against the known labels, and the (K, C) counts they rest on."""
    labels = evidence.labels
    assert labels is not None
    shape = {"num_clusters": clusters.num_clusters, "num_classes": evidence.num_classes}
    counts = np.zeros(tuple(shape.values()), np.int64)
    for a, b in blocks(len(labels)):
        counts += metrics.contingency(clusters.ids[a:b], labels[a:b], **shape)
    accuracy = metrics.cluster_accuracy(counts)
    scores: dict[str, Any] = {
        "accuracy": accuracy.one_to_one,
        "nmi": metrics.normalized_mutual_information(counts),
        "ari": metrics.adjusted_rand_index(counts),
        "ami": metrics.adjusted_mutual_information(counts),
        "accuracy_many_to_one": accuracy.many_to_one,
    }
    if clusters.probabilities is not None:
        count = partial(_count_top, clusters.probabilities, labels, accuracy.class_of, top)
        hits = _total(count, len(labels), resources)
        scores[f"accuracy_top{top}"] = hits.share
    return scores, counts


def label_free_scores(
    clusters: Clusters, evidence: Evidence, *, sample: int, seed: int, resources: Resources
) -> dict[str, Any]:
    """Return what can be said of a clustering without any label."""
    n, given = evidence.num_images, clusters.ids[clusters.ids >= 0]
    sizes = np.bincount(given, minlength=clusters.num_clusters)
    scores: dict[str, Any] = {
        "num_clusters": clusters.num_clusters,
        "empty_clusters": int((sizes == 0).sum()),
        "size_balance": metrics.size_balance(sizes),
        "largest_cluster": int(sizes.max(initial=0)) / max(1, len(given)),
    }
    if clusters.probabilities is not None:
        confidence = np.concatenate(
            [_rows(clusters.probabilities, a, b).max(axis=1) for a, b in blocks(n)]
        )
        scores["mean_confidence"] = float(confidence.mean(dtype=np.float64))
        scores["confident_share"] = float((confidence > CONFIDENT).mean())
    ids = evidence.sample(sample, seed=seed)
    if evidence.features is not None:
        rows, own = evidence.features.rows(ids), clusters.ids[ids]
        scores["silhouette"] = metrics.silhouette(rows[own >= 0], own[own >= 0])
    if evidence.graph is not None:
        count = partial(_count_same, clusters.ids, evidence.graph.ids)
        scores["neighbor_agreement"] = _total(count, n, resources).share
        if clusters.probabilities is not None:
            score = metrics.scan_score(_pairs(clusters.probabilities, evidence.graph, ids))
            scores |= {"scan_score": score.total, "scan_consistency": score.consistency}
    return scores


def embedding_scores(
    evidence: Evidence, *, sample: int, temperature: float, seed: int, resources: Resources
) -> dict[str, Any]:
    """Return scores of the embeddings and the graph; those that need labels where there are any."""
    scores: dict[str, Any] = {}
    n, graph, labels = evidence.num_images, evidence.graph, evidence.labels
    if graph is not None and labels is not None:
        same = partial(_count_same, labels, graph.ids)
        vote = partial(_count_votes, graph, labels, evidence.num_classes, temperature)
        scores["knn_accuracy"] = _total(vote, n, resources).share
        scores["neighbor_accuracy"] = _total(same, n, resources).share
        scores["knn_neighbors"] = graph.k
    if evidence.features is not None:
        rows = evidence.features.rows(evidence.sample(sample, seed=seed))
        scores["effective_rank"] = metrics.effective_rank(rows)
        scores["embedding_std"] = metrics.embedding_std(rows)
        scores["uniformity"] = metrics.uniformity(rows[:2000])
    return scores


def baseline_scores(
    kind: Baseline,
    clusters: Clusters | None,
    evidence: Evidence,
    *,
    sample: int,
    starts: int,
    seed: int,
) -> dict[str, Any]:
    """Return the scores of k-means with as many clusters, on at most `sample` labelled images.

    The start with the lowest inertia counts; `accuracy_mean` and `accuracy_std` are over all.
    `accuracy_here` is the evaluated clustering's own accuracy on the same images. Without a
    clustering k-means gets as many clusters as there are classes.
    """
    assert evidence.labels is not None
    ids = evidence.sample(sample, seed=seed, among=np.flatnonzero(evidence.labels >= 0))
    rows = _baseline_rows(kind, evidence, ids)
    labels, num_classes = evidence.labels[ids], evidence.num_classes
    num_clusters = num_classes if clusters is None else clusters.num_clusters
    shape = {"num_clusters": num_clusters, "num_classes": num_classes}
    tables = [
        metrics.contingency(found, labels, **shape)
        for found in kmeans(rows, num_clusters=num_clusters, starts=starts, seed=seed)
    ]
    accuracies = [metrics.cluster_accuracy(counts).one_to_one for counts in tables]
    scores: dict[str, Any] = {"accuracy": accuracies[0]}
    if clusters is not None:
        here = metrics.contingency(clusters.ids[ids], labels, **shape)
        scores["accuracy_here"] = metrics.cluster_accuracy(here).one_to_one
    return scores | {
        "nmi": metrics.normalized_mutual_information(tables[0]),
        "ari": metrics.adjusted_rand_index(tables[0]),
        "accuracy_many_to_one": metrics.purity(tables[0]),
        "accuracy_mean": float(np.mean(accuracies)),
        "accuracy_std": float(np.std(accuracies)),
        "images": len(ids),
        "n_init": starts,
        "seed": seed,
    }


def _baseline_rows(kind: Baseline, evidence: Evidence, ids: Array) -> Array:
    if kind == "pixels":
        assert evidence.corpus is not None
        return pixel_rows(evidence.corpus, ids)
    assert evidence.features is not None
    return evidence.features.rows(ids)


def kmeans(rows: Array, *, num_clusters: int, starts: int, seed: int) -> list[Array]:
    """Return the clusters (n,) of scikit-learn's k-means from several starts, best inertia first.

    Start i has the random state seed + i. With fewer distinct rows than clusters some stay empty.
    """
    from sklearn.cluster import KMeans
    from sklearn.exceptions import ConvergenceWarning
    from threadpoolctl import threadpool_limits

    found = []
    # One thread: on a shared machine two spend ten times the CPU time waiting for each other.
    with threadpool_limits(limits=1), warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)  # fewer distinct rows than clusters
        for i in range(starts):
            model = KMeans(min(num_clusters, len(rows)), n_init=1, random_state=seed + i)
            clusters = np.asarray(model.fit_predict(rows), np.int64)
            found.append((float(model.inertia_), i, clusters))
    return [clusters for _, _, clusters in sorted(found, key=lambda start: start[:2])]


def pixel_rows(corpus: Corpus, ids: Array) -> Array:
    """Return (n, values) float32 pixels in [0, 1], averaged down to at most PIXEL_SIDE a side.

    Of grey images one channel is returned: k-means finds the same clusters in a third of the time.
    """
    side = min(corpus.image_size, PIXEL_SIDE)
    out = np.empty((len(ids), 3, side * side), np.float32)
    for a, b in blocks(len(ids), 512):
        images = corpus.images(ids[a:b]).to(torch.float32) / 255
        out[a:b] = F.adaptive_avg_pool2d(images, side).flatten(start_dim=2).numpy()
    is_grey = (out == out[:, :1]).all()
    return out[:, 0] if is_grey else out.reshape(len(ids), -1)


def blocks(n: int, size: int = BLOCK) -> list[tuple[int, int]]:
    """Return the ranges [a, b) that cut 0..n-1 into blocks."""
    return [(a, min(a + size, n)) for a in range(0, n, size)]


def _rows(values: Array | ShardedArray, a: int, b: int) -> Array:
    return values.rows(np.arange(a, b)) if isinstance(values, ShardedArray) else values[a:b]


def _take(values: Array | ShardedArray, ids: Array) -> Array:
    return values.rows(ids) if isinstance(values, ShardedArray) else values[ids]


def _total(count: Any, n: int, resources: Resources) -> metrics.Tally:
    """Return the sum of count(block number) over all blocks."""
    parts = map_shards(count, range(len(blocks(n))), resources, label="evaluate")
    return sum((tally for _, tally in parts), metrics.Tally())


def _count_top(
    probabilities: Array | ShardedArray, labels: Array, class_of: Array, top: int, block: int
) -> metrics.Tally:
    a, b = blocks(len(labels))[block]
    return metrics.top_accuracy(_rows(probabilities, a, b), labels[a:b], class_of, top=top)


def _count_same(values: Array, neighbors: ShardedArray, block: int) -> metrics.Tally:
    a, b = blocks(len(values))[block]
    return metrics.neighbor_agreement(values[a:b], values[_rows(neighbors, a, b)])


def _count_votes(
    graph: Graph, labels: Array, num_classes: int, temperature: float, block: int
) -> metrics.Tally:
    a, b = blocks(len(labels))[block]
    similarity, neighbors = _rows(graph.similarity, a, b), labels[_rows(graph.ids, a, b)]
    votes = knn_vote(similarity, neighbors, num_classes=num_classes, temperature=temperature)
    return vote_accuracy(votes, labels[a:b])


def _pairs(
    probabilities: Array | ShardedArray, graph: Graph, ids: Array
) -> Iterator[tuple[Array, Array]]:
    """Yield (p, q) of some images and of their neighbors, themselves included as SCAN counts."""
    for a, b in blocks(len(ids), 256):
        own = ids[a:b]
        listed = np.concatenate([own[:, None], graph.ids.rows(own)], axis=1)
        q = _take(probabilities, listed.ravel()).reshape(*listed.shape, -1)
        yield q[:, 0], q
