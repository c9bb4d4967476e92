"""Numba kernels that turn lists of neighbors into the rows of A + A^T, a range of rows at a time.

Nodes are numbered by their place in an order; `place[i]` is the place of image i.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numba import njit

LAST = np.iinfo(np.int32).max
"""Above every place."""


@njit(nogil=True, cache=True)
def count_links(images: Any, lists: Any, place: Any, low: int, high: int, counts: Any) -> None:
    """Add to counts[p - low] the links that end at place p in [low, high).

    lists: (n, k) neighbors of these images, -1 = none; an image's own id is no link.
    """
    for i in range(len(lists)):
        for j in range(lists.shape[1]):
            other = lists[i, j]
            if other >= 0 and other != images[i]:
                p = place[other]
                if low <= p < high:
                    counts[p - low] += 1


@njit(nogil=True, cache=True)
def sort_links(
    images: Any,
    lists: Any,
    place: Any,
    low: int,
    high: int,
    own: Any,
    ends: Any,
    incoming: Any,
) -> None:
    """Put the links of these images into own, (high - low, k), and incoming, grouped by end.

    own[p - low] becomes the list of the image at p, as places. ends[p - low] is where the next link
    that ends at p goes in `incoming`, and moves on.
    """
    for i in range(len(lists)):
        p = place[images[i]]
        here = low <= p < high
        for j in range(lists.shape[1]):
            other = lists[i, j]
            is_link = other >= 0 and other != images[i]
            q = place[other] if is_link else -1
            if here:
                own[p - low, j] = q
            if is_link and low <= q < high:
                incoming[ends[q - low]] = p
                ends[q - low] += 1


@njit(nogil=True)
def _sorted_unique(values: Any, num: int) -> int:
    """Sort values[:num] and move distinct ones to the front; return how many there are."""
    if num <= 64:
        for i in range(1, num):
            value, j = values[i], i
            while j > 0 and values[j - 1] > value:
                values[j] = values[j - 1]
                j -= 1
            values[j] = value
    else:
        values[:num] = np.sort(values[:num])
    kept = 0
    for i in range(num):
        if kept == 0 or values[i] != values[kept - 1]:
            values[kept] = values[i]
            kept += 1
    return kept


@njit(nogil=True, cache=True)
def merge_links(
    own: Any,
    starts: Any,
    incoming: Any,
    start: int,
    stop: int,
    low: int,
    self_link: bool,
    reciprocal: bool,
    ids: Any,
    lengths: Any,
    twice: Any,
) -> int:
    """Write rows [start, stop) of a range that begins at place `low`; return the entries written.

    A row of `ids` holds first the places that link both ways, the node itself among them with
    `self_link`, then, unless `reciprocal`, those that link one way; both parts ascend. lengths and
    twice (stop - start) get the length of the row and of its first part.
    """
    k, used = own.shape[1], 0
    mine = np.empty(k + 1, np.int32)
    for r in range(start, stop):
        num = 0
        for j in range(k):
            if own[r, j] >= 0:
                mine[num] = own[r, j]
                num += 1
        num = _sorted_unique(mine, num)
        others = incoming[starts[r] : starts[r + 1]]
        num_others = _sorted_unique(others, len(others))
        began, rest = used, used + num + 2  # num and the node itself link both ways at most
        a, b, itself = 0, 0, low + r if self_link else LAST
        while a < num or b < num_others or itself < LAST:
            # Without branches on the values: they would be guessed wrong every second time.
            mine_next = mine[a] if a < num else LAST
            other_next = others[b] if b < num_others else LAST
            value = min(mine_next, other_next, itself)
            from_mine, from_other = mine_next == value, other_next == value
            is_self = itself == value
            both = (from_mine and from_other) or is_self
            a += from_mine
            b += from_other
            itself = LAST if is_self else itself
            ids[used] = value
            ids[rest] = value
            used += both
            rest += (not both) and (not reciprocal)
        twice[r - start] = used - began
        for j in range(began + num + 2, rest):
            ids[used] = ids[j]
            used += 1
        lengths[r - start] = used - began
    return used


@njit(nogil=True, cache=True)
def traverse(lists: Any, most: int, near: int, order: Any) -> None:
    """Write to `order` all images, those that lie close in the graph close together.

    Breadth first over the first `near` of each list, `most` images at a time: a traversal of the
    whole graph has fronts as wide as the graph. The next start is the image seen first of those
    that were left over.
    """
    n, used, fresh, first, last = len(lists), 0, 0, 0, 0
    state = np.zeros(n, np.uint8)  # 1: waiting to be a start, 2: in the order
    waiting = np.empty(n, np.int32)
    while used < n:
        start = -1
        while start < 0 and first < last:
            if state[waiting[first]] != 2:
                start = waiting[first]
            first += 1
        if start < 0:
            while state[fresh] == 2:
                fresh += 1
            start = fresh
        head, end = used, min(used + most, n)
        state[start], order[used] = 2, start
        used += 1
        while head < used:
            image = order[head]
            head += 1
            for j in range(near):
                other = lists[image, j]
                if other < 0 or state[other] == 2:
                    continue
                if used < end:
                    state[other], order[used] = 2, other
                    used += 1
                elif state[other] == 0:
                    state[other], waiting[last] = 1, other
                    last += 1
