"""What the report takes from a graph: near duplicates, outliers and hubs, by passes over shards.

Nothing but the in-degrees grows with the number of images: 4 bytes each.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np

from selfsup_ray.data.corpus import Corpus
from selfsup_ray.stages.graph import Graph

Array = np.ndarray[Any, np.dtype[Any]]
SameFile = Callable[[Array, Array], Array]
"""(n,) ids and (n,) ids -> (n,) whether both come from files with the same bytes."""

PIECE = 65_536
"""Rows of the graph read at a time."""
NEAR_SHARE, NEAR_IMAGES = 0.01, 10
"""Images that are given a near duplicate: this share of all, or this many where that is more."""
NEAR_SIMILARITY = 0.9
"""Lowest similarity of a near duplicate."""
MOST_PAIRS = 200_000
"""Pairs kept; the most similar ones."""
SHOWN = 24
"""Outliers and hubs kept."""


@dataclass(frozen=True)
class NearDuplicates:
    """Pairs (n, 2) of ids, the lower first, with similarity (n,), best first, and group (n,).

    Groups are the connected ones, numbered from 0 in the order of their most similar pair. from_:
    the lowest similarity that counted; is_cut: there were more pairs than are kept.
    """

    pairs: Array
    similarity: Array
    group: Array
    from_: float
    is_cut: bool

    @property
    def num_groups(self) -> int:
        """Number of groups."""
        return int(self.group.max()) + 1 if len(self.group) else 0

    def members(self, group: int) -> Array:
        """Return the ids of the images of a group, ascending."""
        return np.unique(self.pairs[self.group == group])


@dataclass(frozen=True)
class Extremes:
    """The images with the highest score, ties by lower id: ids (n,) and scores (n,)."""

    ids: Array
    scores: Array

    def merged(self, ids: Array, scores: Array) -> Extremes:
        """Return the SHOWN best of these images and the ones kept so far."""
        ids, scores = np.concatenate([self.ids, ids]), np.concatenate([self.scores, scores])
        order = np.lexsort((ids, -scores))[:SHOWN]
        return Extremes(ids[order], scores[order])


NONE = Extremes(np.empty(0, np.int64), np.empty(0))


@dataclass(frozen=True)
class InDegrees:
    """How often images are listed as a neighbor: counts[d] images d times; the most listed ones."""

    counts: Array
    hubs: Extremes

    @property
    def mean(self) -> float:
        """Times an image is listed on average: k."""
        return float(self._moment(0.0, 1))

    @property
    def skewness(self) -> float:
        """Third standardized moment, the hubness of Radovanovic et al. (2010); 0 without spread."""
        spread = self._moment(self.mean, 2)
        return float(self._moment(self.mean, 3) / spread**1.5) if spread else 0.0

    @property
    def never(self) -> float:
        """Share of images that no other image lists."""
        return float(self.counts[0] / self.counts.sum())

    def _moment(self, center: float, power: int) -> float:
        degrees = np.arange(len(self.counts), dtype=np.float64)
        return float((self.counts * (degrees - center) ** power).sum() / self.counts.sum())


def pieces(graph: Graph) -> Iterator[tuple[int, Array, Array]]:
    """Yield (first id, ids, similarity) of the whole graph, at most PIECE rows at a time."""
    for i, rows in enumerate(graph.ids.shard_rows):
        for a in range(0, rows, PIECE):
            first = int(graph.ids.offsets[i]) + a
            ids = np.asarray(graph.ids.shard(i)[a : a + PIECE])
            yield first, ids, np.asarray(graph.similarity.shard(i)[a : a + PIECE])


def same_file(corpus: Corpus) -> SameFile:
    """Return the test whether two images come from files with the same bytes."""

    def digests(ids: Array) -> Array:
        owner = np.searchsorted(corpus.offsets, ids, side="right") - 1
        out = np.empty((len(ids), 16), np.uint8)
        for i in np.unique(owner):
            here = np.flatnonzero(owner == i)
            out[here] = corpus.digests(int(i))[ids[here] - corpus.offsets[i]]
        return out

    return lambda a, b: np.asarray((digests(a) == digests(b)).all(axis=1))


def in_degrees(graph: Graph) -> InDegrees:
    """Return how often every image is listed, and the images listed most."""
    degree = np.zeros(len(graph), np.int32)
    for _, ids, _ in pieces(graph):
        # numpy is 50 times faster with indices of its own type and no conversion of the 1.
        np.add.at(degree, ids[ids >= 0].astype(np.intp), np.int32(1))
    counts, hubs = np.zeros(int(degree.max(initial=0)) + 1, np.int64), NONE
    for start in range(0, len(degree), PIECE):
        part = degree[start : start + PIECE]
        counts += np.bincount(part, minlength=len(counts))
        hubs = hubs.merged(np.arange(start, start + len(part)), part.astype(np.float64))
    return InDegrees(counts, hubs)


def outliers(graph: Graph) -> Extremes:
    """Return the images whose last neighbor is the least similar; scores are that similarity.

    An image without any neighbor has -1.
    """
    found = NONE
    for first, ids, similarity in pieces(graph):
        last = np.where(ids >= 0, similarity, np.inf).min(axis=1, initial=np.inf)
        last = np.where(np.isfinite(last), last, -1.0)
        found = found.merged(np.arange(first, first + len(ids)), -last.astype(np.float64))
    return Extremes(found.ids, -found.scores)


def near_duplicates(graph: Graph, is_copy: SameFile | None) -> NearDuplicates:
    """Return pairs of images that are nearly the same without being copies of one file.

    Counted are pairs from the similarity on that leaves NEAR_SHARE of the images with such a
    neighbor, and from NEAR_SIMILARITY at least: what cosine means "nearly the same" depends on the
    encoder, so a fixed one would name nobody or everybody. is_copy: None counts copies too.
    """
    from_ = _threshold(graph, is_copy)
    pairs, similarity, is_cut = np.empty((0, 2), np.int64), np.empty(0, np.float32), False
    for first, ids, values in pieces(graph):
        row, column = np.nonzero((ids >= 0) & (values >= from_))
        a, b = first + row, ids[row, column].astype(np.int64)
        if is_copy is not None:
            kept = ~is_copy(a, b)
            row, column, a, b = row[kept], column[kept], a[kept], b[kept]
        new = np.stack([np.minimum(a, b), np.maximum(a, b)], axis=1)
        pairs, at = np.unique(np.concatenate([pairs, new]), axis=0, return_index=True)
        similarity = np.concatenate([similarity, values[row, column]])[at]
        order = np.lexsort((pairs[:, 1], pairs[:, 0], -similarity))
        is_cut |= len(order) > MOST_PAIRS
        pairs, similarity = pairs[order[:MOST_PAIRS]], similarity[order[:MOST_PAIRS]]
    return NearDuplicates(pairs, similarity, _groups(pairs), from_, is_cut)


def _threshold(graph: Graph, is_copy: SameFile | None) -> float:
    """Return the similarity from which a pair counts, to a hundredth of its distance from 1."""
    edges = np.concatenate([[0.0], np.geomspace(1e-7, 2.0, 2000), [np.inf]])  # of 1 - similarity
    counts = np.zeros(len(edges) - 1, np.int64)
    for first, ids, similarity in pieces(graph):
        counted = ids >= 0
        if is_copy is not None:
            # The rows of copies are equal but for rounding: no need to ask for the others.
            row, column = np.nonzero(counted & (similarity > 1 - 1e-4))
            copies = is_copy(first + row, ids[row, column].astype(np.int64))
            counted[row[copies], column[copies]] = False
        nearest = np.where(counted, similarity, -np.inf).max(axis=1, initial=-np.inf)
        nearest = np.maximum(1.0 - nearest[np.isfinite(nearest)].astype(np.float64), 0.0)
        counts += np.histogram(nearest, edges)[0]
    reached = np.flatnonzero(np.cumsum(counts) >= max(NEAR_IMAGES, NEAR_SHARE * counts.sum()))
    distance = edges[reached[0] + 1] if len(reached) else 2.0
    return float(max(1.0 - distance, NEAR_SIMILARITY))


def _groups(pairs: Array) -> Array:
    """Return the connected group of each pair, numbered in the order of the pairs."""
    from scipy.sparse import coo_array
    from scipy.sparse.csgraph import connected_components

    if not len(pairs):
        return np.empty(0, np.int64)
    images, ends = np.unique(pairs, return_inverse=True)
    ends = ends.reshape(pairs.shape)
    links = coo_array((np.ones(len(pairs)), (ends[:, 0], ends[:, 1])), shape=(len(images),) * 2)
    _, component = connected_components(links, directed=False)
    named, first, inverse = np.unique(component[ends[:, 0]], return_index=True, return_inverse=True)
    rank = np.empty(len(named), np.int64)
    rank[np.argsort(first)] = np.arange(len(named))
    return np.asarray(rank[inverse])
