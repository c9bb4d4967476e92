"""Equal rows: one of them stands for all in a search, and its place in a list for all of theirs.

Thousands of blank images would otherwise tie with each other, and fill one cell.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from selfsup_ray.artifacts import Array
from selfsup_ray.ops.neighbors import Neighbors, merge_neighbors
from selfsup_ray.ops.selection import hash_rows

_NONE = np.iinfo(np.int64).max
_BLOCK = 8192  # rows in memory at once


@dataclass(frozen=True)
class Followers:
    """Images whose rows equal that of another image with a lower id, its leader.

    leaders: (L,) places of the leaders, ascending; ids: (F,) followers' ids, leader by leader,
    ascending; starts: (L + 1,) where each leader's begin; place: (F,) the followers' places.
    """

    leaders: Array
    starts: Array
    ids: Array
    place: Array

    @classmethod
    def of(cls, table: Array) -> Followers:
        """Make it of rows (leader's place, follower's id, follower's place)."""
        table = table[np.lexsort((table[:, 1], table[:, 0]))]
        leaders, first = np.unique(table[:, 0], return_index=True)
        return cls(leaders, np.append(first, len(table)), table[:, 1], table[:, 2])

    def count(self, places: Array) -> Array:
        """Return how many followers the image at each place has."""
        at = np.searchsorted(self.leaders, places)
        at = np.minimum(at, max(0, len(self.leaders) - 1))
        has = self.leaders[at] == places if len(self.leaders) else np.zeros(places.shape, bool)
        return np.where(has, np.diff(self.starts)[at] if len(self.leaders) else 0, 0)

    def nth(self, places: Array, j: int) -> Array:
        """Return the id of the j-th follower of each place, which must have that many."""
        return np.asarray(self.ids[self.starts[np.searchsorted(self.leaders, places)] + j])

    def leader_of(self, places: Array) -> Array:
        """Return the place of each place's leader: itself unless it is a follower's."""
        order = np.argsort(self.place)
        at = np.minimum(np.searchsorted(self.place[order], places), max(0, len(order) - 1))
        if not len(order):
            return places
        owner = np.repeat(self.leaders, np.diff(self.starts))[order]
        return np.where(self.place[order][at] == places, owner[at], places)


def leaders_first(rows: Callable[[Array], Array], ids: Array, cells: Array) -> tuple[Array, Array]:
    """Return (order, leader): rows by cell, in a cell the leaders by id and then their followers.

    rows: gives the float32 rows at some of the positions 0..n-1; ids: (n,); cells: (n,). order:
    (n,) positions; leader: (n,) for each position of the order, the position in it of the first
    equal row of the same cell.
    """
    n = len(ids)
    every = np.arange(n)
    parts = [hash_rows(rows(every[i : i + _BLOCK])) for i in range(0, n, _BLOCK)]
    hashes = np.concatenate([np.empty(0, np.uint64), *parts])
    by_hash = np.lexsort((ids, hashes, cells))
    same = (hashes[by_hash][1:] == hashes[by_hash][:-1]) & (
        cells[by_hash][1:] == cells[by_hash][:-1]
    )
    is_start = np.ones(n, bool)
    pairs = np.flatnonzero(same) + 1
    for i in range(0, len(pairs), _BLOCK):
        at = pairs[i : i + _BLOCK]
        is_start[at] = (rows(by_hash[at]) != rows(by_hash[at - 1])).any(axis=1)
    leader = np.empty(n, np.int64)
    leader[by_hash] = by_hash[is_start][np.cumsum(is_start) - 1]
    follows = leader != every
    order = np.lexsort((ids, follows, cells))
    position = np.empty(n, np.int64)
    position[order] = np.arange(n)
    return order, position[leader[order]]


def expand(
    found: Neighbors, own: Array, own_similarity: Array, order: Array, followers: Followers
) -> Neighbors:
    """Return lists of ids from lists of distinct rows, where each stands for all its equals.

    found: (n, k) by place, -1 where there was no further distinct row; own: (n,) the places that
    asked; own_similarity: (n,) of each row to itself; order: (N,) the id at each place. The image
    itself is left out, its equals are not. Best first, ties by lower id.
    """
    k, n = found.k, len(found)
    ids, similarity = _named(found, order)
    leader = followers.leader_of(own)
    entries = np.concatenate([found.ids, leader[:, None]], axis=1)
    strength = np.concatenate([found.similarity, own_similarity[:, None]], axis=1)
    entries[:, -1][(found.ids == leader[:, None]).any(axis=1)] = -1  # it stands in the list already
    counts = np.where(entries >= 0, followers.count(entries), 0)
    rows = np.flatnonzero((counts > 0).any(axis=1) | (found.ids < 0).any(axis=1))
    if len(rows):
        here = Neighbors(entries[rows], strength[rows])
        wide = _widened(here, counts[rows], np.asarray(order[own[rows]]), order, followers, k)
        ids[rows], similarity[rows] = wide.ids, wide.similarity
    assert n == 0 or ids.max() < _NONE, "fewer images than k + 1"
    return Neighbors(ids, similarity)


def _named(found: Neighbors, order: Array) -> tuple[Array, Array]:
    ids = np.asarray(order[np.maximum(found.ids, 0)], np.int64)
    ids = np.where(found.ids < 0, _NONE, ids)
    return ids, np.where(found.ids < 0, np.float32(-np.inf), found.similarity)


def _widened(
    entries: Neighbors,
    counts: Array,
    self_ids: Array,
    order: Array,
    followers: Followers,
    k: int,
) -> Neighbors:
    def without_self(ids: Array, similarity: Array) -> Neighbors:
        is_self = ids == self_ids[:, None]
        return Neighbors(
            np.where(is_self, _NONE, ids),
            np.where(is_self | (ids == _NONE), np.float32(-np.inf), similarity),
        )

    best = merge_neighbors([without_self(*_named(entries, order))], k=k + 1)
    for j in range(min(k + 1, int(counts.max(initial=0)))):
        has = counts > j
        named = np.full(counts.shape, _NONE)
        named[has] = followers.nth(entries.ids[has], j)
        best = merge_neighbors([best, without_self(named, entries.similarity)], k=k + 1)
    return Neighbors(best.ids[:, :k], best.similarity[:, :k])
