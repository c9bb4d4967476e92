"""Lists of nearest neighbors: exact search, merging, dropping the image itself, votes, recall.

One definition holds everywhere, whichever code finds the lists and however the rows are cut: the
similarity of two rows is their inner product summed in float64 in a fixed order and rounded to
float32; a list is sorted by similarity, highest first, and equal similarities by lower id.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np

from selfsup_ray.artifacts import Array
from selfsup_ray.ops.metrics import Tally

_HALF_FLOAT32 = 2.0**-24  # rounding to float32 moves a value by at most this share of itself
_CHUNK = 1 << 20  # float64 products formed at once: small enough to stay in the cache


@dataclass(frozen=True)
class Neighbors:
    """Top-k lists: ids (n, k) int64 and similarity (n, k) float32, best first, ties by lower id."""

    ids: Array
    similarity: Array

    def __len__(self) -> int:
        return len(self.ids)

    @property
    def k(self) -> int:
        """Entries in each list."""
        return int(self.ids.shape[1])


def pair_similarity(queries: Array, rows: Array) -> Array:
    """Return the (n, m) float32 similarity of queries (n, d) to their own rows (n, m, d).

    The products of float32 numbers are exact in float64 and numpy sums d of them in an order
    that depends on d alone, so the result is the same bits in every batch, process and machine
    of one kind; a matrix product rounds differently by the size and place of its blocks.
    """
    n, m, d = rows.shape
    out = np.empty((n, m), np.float32)
    step = max(1, _CHUNK // max(1, m * d))
    for start in range(0, n, step):
        part = slice(start, start + step)
        products = rows[part].astype(np.float64)
        products *= queries[part, None].astype(np.float64)
        out[part] = products.sum(axis=2)
    return out


def exact_topk(queries: Array, rows: Array, *, k: int, first: int = 0) -> Neighbors:
    """Return the k most similar of rows (m, d) for each of queries (n, d), both float32.

    Row i has id first + i; m >= k. Memory beyond the arguments: about 200 MB and the result.
    """
    assert 0 < k <= len(rows), f"k={k} neighbors of {len(rows)} rows"
    parts = [_topk(queries[i : i + 1024], rows, k) for i in range(0, len(queries), 1024)]
    ids = np.concatenate([part.ids for part in parts] or [np.empty((0, k), np.int64)])
    similarity = [part.similarity for part in parts] or [np.empty((0, k), np.float32)]
    return Neighbors(ids + first, np.concatenate(similarity))


def _topk(queries: Array, rows: Array, k: int) -> Neighbors:
    best = []
    for start in range(0, len(rows), 4096):
        similarity = rounded_products(queries, rows[start : start + 4096])
        columns = top_columns(similarity, min(k, similarity.shape[1]))
        best.append(Neighbors(columns + start, np.take_along_axis(similarity, columns, axis=1)))
        best = [merge_neighbors(best, k=k)]
    return best[0]


def rounded_products(queries: Array, rows: Array) -> Array:
    """Return the (n, m) float32 similarity of all queries (n, d) to all rows (m, d).

    A float64 matrix product gives every entry within 2 d 2^-53 |q| |x| of the exact value, hence
    the right float32, unless it falls on the border of two; those few are summed as defined.
    """
    q, x = np.asarray(queries, np.float64), np.asarray(rows, np.float64)
    wide = q @ x.T
    error = 4 * q.shape[1] * np.finfo(np.float64).eps
    error *= np.linalg.norm(q, axis=1).max(initial=0) * np.linalg.norm(x, axis=1).max(initial=0)
    similarity = wide.astype(np.float32)
    low, high = (wide - error).astype(np.float32), (wide + error).astype(np.float32)
    i, j = np.nonzero(low != high)
    for start in range(0, len(i), 65536):
        a, b = i[start : start + 65536], j[start : start + 65536]
        similarity[a, b] = pair_similarity(queries[a], rows[b][:, None])[:, 0]
    return similarity


def top_columns(similarity: Array, k: int) -> Array:
    """Return the (n, k) int64 columns of the k largest of (n, m) float32, ties by lower column.

    Value and column form one 64-bit key, so that a plain partition settles ties.
    """
    assert similarity.dtype == np.float32 and 0 < k <= similarity.shape[1] < 2**32
    bits = np.ascontiguousarray(similarity + np.float32(0)).view(np.int32)  # + 0: -0.0 equals 0.0
    # A float's bits order as integers once the negative ones are flipped; then highest first.
    ordered = np.where(bits < 0, bits ^ np.int32(0x7FFFFFFF), bits)
    keys = (~ordered).astype(np.int64) << 32 | np.arange(similarity.shape[1])
    if k < keys.shape[1]:
        keys = np.partition(keys, k - 1, axis=1)[:, :k]
    return np.sort(keys, axis=1) & 0xFFFFFFFF


def merge_neighbors(parts: Sequence[Neighbors], *, k: int) -> Neighbors:
    """Return the best k entries of several lists per query, by similarity, then by lower id.

    parts: each (n, k_i) for the same n queries over different rows. Fewer than k entries in all
    give shorter lists. The order of parts does not matter.
    """
    ids = np.concatenate([part.ids for part in parts], axis=1)
    similarity = np.concatenate([part.similarity for part in parts], axis=1)
    order = np.lexsort((ids, -similarity), axis=1)[:, :k]
    return Neighbors(
        np.take_along_axis(ids, order, axis=1), np.take_along_axis(similarity, order, axis=1)
    )


def drop_self(neighbors: Neighbors, query_ids: Array) -> Neighbors:
    """Return the lists without the query image itself: (n, k + 1) becomes (n, k).

    query_ids: (n,) ids of the images that asked.
    """
    # By value, not "column 0": an exact duplicate of the image may come first in its own list.
    is_self = neighbors.ids == np.asarray(query_ids)[:, None]
    # A list that lacks the image itself (more than k duplicates with lower ids, or approximate
    # search) gives up its last, farthest entry.
    is_self[~is_self.any(axis=1), -1] = True
    shape = (len(is_self), neighbors.k - 1)
    return Neighbors(
        neighbors.ids[~is_self].reshape(shape), neighbors.similarity[~is_self].reshape(shape)
    )


def knn_vote(
    similarity: Array, neighbor_labels: Array, *, num_classes: int, temperature: float
) -> Array:
    """Return the (n, C) float64 vote of each image's neighbors (Wu et al. 2018, sec. 3.4).

    similarity: (n, k); neighbor_labels: (n, k), -1 (unknown) does not vote. A
    neighbor votes for its class with weight exp(similarity / temperature). Rows sum to 1, or to 0
    where no neighbor is labelled; ties go to the lower class under argmax.
    """
    rows = len(similarity)
    # The largest term is taken out of the exponent: exp(1 / 0.001) would overflow.
    voting = np.where(neighbor_labels >= 0, similarity.astype(np.float64), -np.inf)
    peak = np.maximum(voting.max(axis=1, keepdims=True, initial=-np.inf), -2.0)
    weights = np.exp((voting - peak) / temperature)
    cells = np.arange(rows)[:, None] * num_classes + np.maximum(neighbor_labels, 0)
    votes = np.bincount(cells.ravel(), weights.ravel(), minlength=rows * num_classes)
    votes = np.asarray(votes.reshape(rows, num_classes), np.float64)
    total: Array = votes.sum(axis=1, keepdims=True)
    return np.divide(votes, total, out=np.zeros_like(votes), where=total > 0)


def vote_accuracy(votes: Array, labels: Array) -> Tally:
    """Return how often the class with most votes is the label, where label and a vote are known.

    votes: (n, C) from `knn_vote`; labels: (n,), -1 is left out. An image without any labelled
    neighbor counts as wrong.
    """
    known = labels >= 0
    hits = known & (votes.argmax(axis=1) == labels) & (votes.max(axis=1, initial=0) > 0)
    return Tally(int(hits.sum()), int(known.sum()))


def recall(found: Array, best: Array, *, tolerance: float = 1e-6) -> Array:
    """Return (n,) float64: the share of each list that is as near as the true k-th neighbor.

    found: (n, k) exact similarity of the listed rows to the query; best: (n, k) similarities of
    the true nearest. By value: any of several rows at equal distance is right. The tolerance
    covers float32 against float64.
    """
    threshold = best.min(axis=1, keepdims=True) - tolerance
    return np.asarray((found >= threshold).mean(axis=1, dtype=np.float64))


def best_products(
    queries: Array, blocks: Iterable[tuple[int, Array]], *, k: int, own: Array
) -> Array:
    """Return the (n, k) largest float64 inner products of queries with streamed rows, best first.

    blocks: (first id, rows (m, d)); own: (n,) the id of each query, which is passed over. Shares no
    code with the search it checks: a torch product in float64 and torch.topk.
    """
    import torch

    q = torch.from_numpy(np.array(queries, np.float64))
    best = torch.full((len(q), k), -torch.inf, dtype=torch.float64)
    for first, rows in blocks:
        products = q @ torch.from_numpy(np.array(rows, np.float64)).T
        here = np.flatnonzero((own >= first) & (own < first + len(rows)))
        products[here, own[here] - first] = -torch.inf
        better = (products.amax(dim=1) > best[:, -1]).nonzero()[:, 0]  # few, after some blocks
        best[better] = torch.cat([best[better], products[better]], dim=1).topk(k, dim=1).values
    return np.asarray(best.numpy())
