"""Completing a kNN graph: exact neighbor lists after labelled or test images were added (spec 2.4).

Rows are numbered in the order they came, new ones after old ones. A list is sorted by similarity
and equal similarities by lower id (`ops.neighbors`), so at a tie the entry that was there first,
the background's, stays. A place without neighbor has id -1 and similarity -inf; nothing is ever
recognised by the sign of a similarity.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import numpy as np

from selfsup_ray.artifacts import Array, ShardedArray
from selfsup_ray.ops.neighbors import Neighbors, drop_self, exact_topk, pair_similarity

TILE = 4096
"""Rows and columns of the products formed at once: 64 MB of float32."""
_PAIRS = 1 << 16


def empty_lists(n: int, k: int) -> Neighbors:
    """Return n lists of k places without neighbor."""
    return Neighbors(np.full((n, k), -1, np.int64), np.full((n, k), -np.inf, np.float32))


def own_lists(rows: Array, *, k: int, first: int = 0) -> Neighbors:
    """Return the k nearest others of each of rows (n, d) among themselves; ids count from first.

    Fewer than k others leave places empty.
    """
    n = len(rows)
    lists = empty_lists(n, k)
    if n < 2:
        return lists
    wide = exact_topk(rows, rows, k=min(k + 1, n), first=first)
    found = drop_self(wide, np.arange(first, first + n))
    lists.ids[:, : found.k], lists.similarity[:, : found.k] = found.ids, found.similarity
    return lists


def with_rows(lists: Neighbors, queries: Array, rows: Array, *, first: int) -> Neighbors:
    """Return the lists (n, k) of queries (n, d) after rows (m, d), ids from first, were added."""
    lists = _copied(lists)
    for i, j in _tiles(len(queries), len(rows)):
        product = queries[i] @ rows[j].T
        slack = _slack(queries[i], rows[j])
        _improve(lists, i, product, queries[i], rows[j], first=first + j.start, slack=slack)
    return lists


def with_rows_both(
    old_lists: Neighbors,
    old: Array,
    new_lists: Neighbors,
    new: Array,
    *,
    first_old: int,
    first_new: int,
) -> tuple[Neighbors, Neighbors]:
    """Return the lists of old (n, d) and of new rows (m, d), each after the other's were added.

    One product serves both directions (spec 10.3). Ids of old rows count from first_old, those of
    new ones from first_new. The float32 product only says which pairs can enter a list; these
    are summed as `ops.neighbors` defines, so the result does not depend on the cut into tiles.
    """
    old_lists, new_lists = _copied(old_lists), _copied(new_lists)
    for i, j in _tiles(len(old), len(new)):
        a, b = np.asarray(old[i]), np.asarray(new[j])
        product, slack = a @ b.T, _slack(a, b)
        _improve(old_lists, i, product, a, b, first=first_new + j.start, slack=slack)
        _improve(new_lists, j, product.T, b, a, first=first_old + i.start, slack=slack)
    return old_lists, new_lists


def completed(
    shards: Iterable[tuple[Neighbors, Array]], new: Array, *, k: int, num_old: int
) -> Iterator[Neighbors]:
    """Yield the lists of every shard of the old rows after `new` (m, d) were added; last the new's.

    shards: (lists (n, k), rows (n, d)) of the num_old old rows in order, complete among
    themselves; one is held at a time. The work is the product of old and new rows: what all runs
    share is in the shards' lists.
    """
    new_lists, first = own_lists(new, k=k, first=num_old), 0
    for lists, rows in shards:
        lists, new_lists = with_rows_both(
            lists, rows, new_lists, new, first_old=first, first_new=num_old
        )
        first += len(rows)
        yield lists
    assert first == num_old, f"{first} old rows came, {num_old} were announced"
    yield new_lists


@dataclass(frozen=True)
class Patched:
    """Stored rows (N, >= width) with some replaced and others after them; read like a ShardedArray.

    rows: (r,) the replaced ones, ascending; values: (r, width) in their place; added: (m, width),
    the last shard. The stored rows stay where they are, mapped.
    """

    stored: ShardedArray
    rows: Array
    values: Array
    added: Array

    def __len__(self) -> int:
        return len(self.stored) + len(self.added)

    @property
    def shape(self) -> tuple[int, ...]:
        """(N + m, width)."""
        return len(self), int(self.added.shape[1])

    @property
    def num_shards(self) -> int:
        """Shards, the added rows among them."""
        return self.stored.num_shards + 1

    @property
    def offsets(self) -> Array:
        """First row of each shard, and the number of rows."""
        return np.append(self.stored.offsets, len(self))

    def shard(self, i: int) -> Array:
        """Return the rows of one shard: a new array, or a view where nothing is replaced."""
        if i == self.stored.num_shards:
            return self.added
        first, stop = self.stored.offsets[i], self.stored.offsets[i + 1]
        a, b = np.searchsorted(self.rows, [first, stop])
        kept: Array = self.stored.shard(i)[:, : self.added.shape[1]]
        if a == b:
            return kept
        made = np.array(kept)
        made[self.rows[a:b] - first] = self.values[a:b]
        return made

    def whole(self) -> Array:
        """Return all rows in memory."""
        return np.concatenate([self.shard(i) for i in range(self.num_shards)])


def _copied(lists: Neighbors) -> Neighbors:
    return Neighbors(lists.ids.astype(np.int64), lists.similarity.astype(np.float32))


def _tiles(n: int, m: int) -> Iterator[tuple[slice, slice]]:
    for a in range(0, n, TILE):
        for b in range(0, m, TILE):
            yield slice(a, min(a + TILE, n)), slice(b, min(b + TILE, m))


def _slack(a: Array, b: Array) -> np.float32:
    """Return how far below a threshold a float32 product may lie whose exact value reaches it.

    Twice the error of a float32 sum of d products in any order (Higham 2002, sec. 3.1) and of
    rounding the exact value: once for the entry, once for the one that set the threshold.
    """
    unit = a.shape[1] * 2.0**-24
    norms = _largest_norm(a) * _largest_norm(b)
    return np.float32(2 * (unit / (1 - unit) + 2.0**-23) * norms)


def _largest_norm(rows: Array) -> float:
    return float(np.sqrt(np.einsum("nd,nd->n", rows, rows, dtype=np.float64).max(initial=0.0)))


def _improve(
    lists: Neighbors,
    part: slice,
    product: Array,
    queries: Array,
    rows: Array,
    *,
    first: int,
    slack: np.float32,
) -> None:
    """Put what belongs there of a float32 product (n, m) into the lists of `part`, in place."""
    k = lists.k
    threshold = lists.similarity[part, -1].copy()
    open_ = np.flatnonzero(threshold == -np.inf)
    if len(open_) and product.shape[1] > k:
        threshold[open_] = np.partition(product[open_], -k, axis=1)[:, -k]
    i, j = _where(product >= (threshold - slack)[:, None])
    if not len(i):
        return
    exact = np.empty(len(i), np.float32)
    for a in range(0, len(i), _PAIRS):
        here = slice(a, a + _PAIRS)
        exact[here] = pair_similarity(queries[i[here]], rows[j[here]][:, None])[:, 0]
    _merge_flat(lists, i + part.start, j + first, exact)


def _where(mask: Array) -> tuple[Array, Array]:
    """Return np.nonzero(mask), in any order: one pass over the mask as it lies in memory."""
    if mask.flags.c_contiguous:
        i, j = np.divmod(np.flatnonzero(mask), mask.shape[1])
        return i, j
    j, i = np.divmod(np.flatnonzero(mask.T), mask.shape[0])
    return i, j


def _merge_flat(lists: Neighbors, rows: Array, ids: Array, similarity: Array) -> None:
    """Merge entries (row, id, similarity) into the lists of these rows, in place."""
    touched, place = np.unique(rows, return_inverse=True)
    k = lists.k
    owner = np.concatenate([np.repeat(np.arange(len(touched)), k), place])
    all_ids = np.concatenate([lists.ids[touched].ravel(), ids])
    values = np.concatenate([lists.similarity[touched].ravel(), similarity])
    # Empty places are last by their similarity; among them the id does not matter.
    order = np.lexsort((all_ids, -values, owner))
    starts = np.searchsorted(owner[order], np.arange(len(touched)))
    keep = order[(starts[:, None] + np.arange(k)).ravel()]
    lists.ids[touched] = all_ids[keep].reshape(-1, k)
    lists.similarity[touched] = values[keep].reshape(-1, k)
