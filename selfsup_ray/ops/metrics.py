"""Scores of a clustering: against classes from a table of counts, and without any labels.

Everything that needs labels works on one (K, C) table of counts, which shards can be summed into;
nothing here ever makes an N x N array. Label-free scores take a bounded sample of rows, or sums.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np
from scipy.optimize import linear_sum_assignment

from selfsup_ray.artifacts import Array

UNKNOWN = -1  # the label of an image whose class nobody gave


@dataclass(frozen=True)
class Tally:
    """`hits` out of `of`; tallies of shards add up."""

    hits: int = 0
    of: int = 0

    def __add__(self, other: Tally) -> Tally:
        return Tally(self.hits + other.hits, self.of + other.of)

    @property
    def share(self) -> float | None:
        """hits / of in [0, 1]; None when there is nothing to count."""
        return self.hits / self.of if self.of else None

    def interval(self, *, z: float = 1.96) -> tuple[float, float]:
        """Return Wilson's score interval for the share (Wilson 1927), 95 % by default.

        It stays inside [0, 1] and is not empty when every trial is a hit.
        """
        if not self.of:
            return 0.0, 1.0
        p, n = self.hits / self.of, self.of
        return wilson(p, n, z=z)


def wilson(p: float, n: int, *, z: float = 1.96) -> tuple[float, float]:
    """Return Wilson's score interval of a share p seen in n > 0 independent trials."""
    center = p + z * z / (2 * n)
    spread = z * float(np.sqrt(p * (1 - p) / n + z * z / (4 * n * n)))
    low, high = (center - spread) / (1 + z * z / n), (center + spread) / (1 + z * z / n)
    return max(0.0, low), min(1.0, high)


@dataclass(frozen=True)
class ClusterAccuracy:
    """Accuracy after naming every cluster by a class, one to one and many to one."""

    one_to_one: float
    """Best matching of clusters to distinct classes (Hungarian); unmatched clusters are wrong."""
    many_to_one: float
    """Every cluster takes its majority class: the score for over-clustering. Equals purity."""
    class_of: Array
    """(K,) int64: the class matched to each cluster, -1 for a cluster without one."""
    majority_of: Array
    """(K,) int64: each cluster's majority class, the lowest on ties, -1 for an empty cluster."""


def contingency(clusters: Array, labels: Array, *, num_clusters: int, num_classes: int) -> Array:
    """Return (K, C) int64 counts of images by cluster and class; images of shards add up.

    clusters, labels: (n,) integers; rows with a cluster or a label of -1 (unknown) are left out.
    """
    clusters, labels = np.asarray(clusters, np.int64), np.asarray(labels, np.int64)
    assert clusters.shape == labels.shape, f"{clusters.shape} clusters, {labels.shape} labels"
    assert clusters.max(initial=-1) < num_clusters, f"cluster ids must be below {num_clusters}"
    assert labels.max(initial=-1) < num_classes, f"labels must be below {num_classes}"
    known = (labels >= 0) & (clusters >= 0)
    cells = clusters[known] * num_classes + labels[known]
    counts = np.bincount(cells, minlength=num_clusters * num_classes)
    return counts.reshape(num_clusters, num_classes)


def cluster_accuracy(counts: Array) -> ClusterAccuracy:
    """Return the accuracy of a clustering against classes, from its (K, C) counts.

    K and C may differ (the reference code of SCAN counts cluster ids >= C as class 0, which is
    wrong). Raises no error on an empty table: both accuracies are then 0.
    """
    total = max(int(counts.sum()), 1)
    rows, columns = linear_sum_assignment(counts, maximize=True)
    class_of = np.full(len(counts), UNKNOWN, dtype=np.int64)
    class_of[rows] = columns
    majority = np.where(counts.sum(axis=1) > 0, counts.argmax(axis=1), UNKNOWN)
    matched = int(counts[rows, columns].sum())
    return ClusterAccuracy(matched / total, purity(counts), class_of, majority)


def purity(counts: Array) -> float:
    """Return the share of images that belong to their cluster's majority class."""
    return float(counts.max(axis=1).sum() / max(int(counts.sum()), 1))


def entropy(masses: Array) -> float:
    """Return the Shannon entropy in nats of non-negative masses, which need not sum to 1."""
    masses = np.asarray(masses, np.float64)
    p = masses[masses > 0] / max(masses.sum(), np.finfo(np.float64).tiny)
    return float(-(p * np.log(p)).sum())


def mutual_information(counts: Array) -> float:
    """Return the mutual information in nats between clusters and classes."""
    joint = entropy(counts.ravel())
    return max(0.0, entropy(counts.sum(axis=1)) + entropy(counts.sum(axis=0)) - joint)


def normalized_mutual_information(counts: Array) -> float:
    """Return NMI with the arithmetic mean of both entropies, as scikit-learn does, in [0, 1].

    One cluster and one class agree perfectly: 1.
    """
    mean = (entropy(counts.sum(axis=1)) + entropy(counts.sum(axis=0))) / 2
    return float(min(1.0, mutual_information(counts) / mean)) if mean > 0 else 1.0


def adjusted_mutual_information(counts: Array) -> float:
    """Return AMI (Vinh et al. 2010), arithmetic mean, at most 1: MI corrected for chance."""
    from sklearn.metrics.cluster import expected_mutual_information

    used = counts[counts.sum(axis=1) > 0][:, counts.sum(axis=0) > 0]
    if used.shape in ((1, 1), (0, 0)):
        return 1.0
    by_chance = float(expected_mutual_information(used, int(used.sum())))
    mean = (entropy(used.sum(axis=1)) + entropy(used.sum(axis=0))) / 2
    gap = mean - by_chance
    # All singletons on one side: nothing can beat chance, and both differences are rounding.
    tiny = np.finfo(np.float64).eps
    gap = min(gap, -tiny) if gap < 0 else max(gap, tiny)
    return float((mutual_information(used) - by_chance) / gap)


def adjusted_rand_index(counts: Array) -> float:
    """Return ARI (Hubert and Arabie 1985): pair agreement corrected for chance, at most 1."""
    same, total = _pairs(counts), _pairs(counts.sum())
    rows, columns = _pairs(counts.sum(axis=1)), _pairs(counts.sum(axis=0))
    if rows == columns == same:  # the two partitions are the same
        return 1.0
    by_chance = rows * columns / total
    return float((same - by_chance) / ((rows + columns) / 2 - by_chance))


def _pairs(sizes: Array) -> int:
    """Return the pairs inside groups of these sizes; products of such numbers overflow int64."""
    sizes = np.asarray(sizes, np.int64)
    return int((sizes * (sizes - 1) // 2).sum())


def top_accuracy(probabilities: Array, labels: Array, class_of: Array, *, top: int) -> Tally:
    """Return how often the true class is matched to one of the `top` most probable clusters.

    probabilities: (n, K); labels: (n,), -1 is left out; class_of: (K,) from `cluster_accuracy`.
    With K < top all clusters count, as no user of the reference code could (its top-5 failed).
    """
    top = min(top, probabilities.shape[1])
    # Stable, so that equal probabilities go to the lower cluster id.
    best = np.argsort(-probabilities, axis=1, kind="stable")[:, :top]
    known = labels >= 0
    hits = (class_of[best] == labels[:, None]).any(axis=1) & known
    return Tally(int(hits.sum()), int(known.sum()))


def neighbor_agreement(clusters: Array, neighbors: Array) -> Tally:
    """Return how many listed neighbors share their image's value, where both are known (>= 0).

    clusters: (n,) cluster or class of each image; neighbors: (n, k), of its neighbors. With
    classes this is SCAN's neighbor accuracy, with clusters a label-free score.
    """
    known = (clusters[:, None] >= 0) & (neighbors >= 0)
    hits = (clusters[:, None] == neighbors) & known
    return Tally(int(hits.sum()), int(known.sum()))


# ------------------------------------------------------------------------------ without labels


@dataclass(frozen=True)
class ScanScore:
    """SCAN's label-free validation score (Van Gansbeke et al. 2020): consistency - entropy."""

    consistency: float
    """Mean of -log <p_i, p_j> over graph pairs, in nats."""
    entropy: float
    """Entropy of the mean prediction, in nats; at most ln K."""

    @property
    def total(self) -> float:
        """Lower is better: -ln K is the least, 0 is a uniform or a collapsed clustering."""
        return self.consistency - self.entropy


def scan_score(chunks: Iterable[tuple[Array, Array]]) -> ScanScore:
    """Return SCAN's score from chunks (p, q): p (n, K) of anchors, q (n, k, K) of their neighbors.

    The entropy weight is 1, not the 5 of training: the reference selects heads and epochs so.
    Sums are float64; the log is clamped at -100 as binary cross-entropy does there. The entropy
    needs no clamp of small means: p log p ends at 0.
    """
    loss, pairs, mass = 0.0, 0, np.zeros(1)
    for p, q in chunks:
        agreement = np.einsum("nc,nkc->nk", p, q, dtype=np.float64)
        with np.errstate(divide="ignore"):
            loss -= float(np.maximum(np.log(agreement), -100.0).sum())
        pairs += agreement.size
        mass = mass + p.sum(axis=0, dtype=np.float64)
    assert pairs, "scan_score needs at least one pair"
    return ScanScore(loss / pairs, entropy(mass))


def effective_rank(rows: Array) -> float:
    """Return RankMe (Garrido et al. 2023, eq. 1): exp of the entropy of the singular values.

    rows: (n, d), a sample of embeddings. Between 1 (collapsed to a line) and min(n, d).
    """
    values = np.linalg.svd(np.asarray(rows, np.float64), compute_uv=False)
    p = values / max(values.sum(), np.finfo(np.float64).tiny) + 1e-7
    return float(np.exp(-(p * np.log(p)).sum()))


def embedding_std(rows: Array) -> float:
    """Return the spread of unit rows (n, d): 1 when even over the sphere, 0 on collapse.

    It is the mean over dimensions of the standard deviation over rows, times sqrt(d)
    (Chen and He 2021, section 4.1): the same measure that training logs.
    """
    return float(np.asarray(rows, np.float64).std(axis=0).mean() * np.sqrt(rows.shape[1]))


def uniformity(rows: Array, *, t: float = 2.0) -> float:
    """Return log of the mean of exp(-t |x - y|^2) over pairs (Wang and Isola 2020).

    rows: (n, d) unit rows, a bounded sample: n^2 / 2 pairs are formed. Lower is more even; 0 is
    collapse.
    """
    from scipy.spatial.distance import pdist

    potentials = -t * pdist(np.asarray(rows, np.float64), "sqeuclidean")
    if not len(potentials):
        return 0.0
    peak = potentials.max()
    return float(peak + np.log(np.exp(potentials - peak).mean()))


def size_balance(sizes: Array) -> float:
    """Return the entropy of the cluster sizes over ln K, in [0, 1]; 1 is a balanced clustering.

    sizes: (K,) images per cluster, empty ones included.
    """
    return entropy(sizes) / float(np.log(len(sizes))) if len(sizes) > 1 else 1.0


def silhouette(rows: Array, clusters: Array) -> float | None:
    """Return the mean silhouette (Rousseeuw 1987) under cosine distance; None when undefined.

    rows: (n, d) unit rows, a bounded sample; clusters: (n,). Undefined with fewer than 2 clusters
    or with only single-image clusters in the sample.
    """
    from sklearn.metrics import silhouette_score

    if not 2 <= len(np.unique(clusters)) < len(clusters):
        return None
    return float(silhouette_score(np.asarray(rows, np.float64), clusters, metric="cosine"))
