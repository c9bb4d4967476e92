"""Exact duplicates: images whose files have the same bytes, found by digest in bounded memory."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from selfsup_ray.artifacts import Array
from selfsup_ray.data.corpus import Corpus
from selfsup_ray.data.sharding import write_csv

BUCKET_ROWS = 8_000_000  # 24 bytes each: about 0.6 GB with what sorting needs
COLUMNS = ("digest", "id", "source")


def duplicate_groups(corpus: Corpus, *, bucket_rows: int = BUCKET_ROWS) -> Iterator[Array]:
    """Yield the ids, ascending, of each group of images with equal digests, in digest order.

    The digests are read once per bucket of first bytes, about bucket_rows of them at a time.
    """
    num_buckets = min(256, max(1, -(-len(corpus) // bucket_rows)))
    edges = [256 * b // num_buckets for b in range(num_buckets + 1)]
    for low, high in itertools.pairwise(edges):
        yield from _groups(*_bucket(corpus, low, high))


def _bucket(corpus: Corpus, low: int, high: int) -> tuple[Array, Array]:
    """Return (digests as two big-endian numbers, ids) of first bytes in [low, high)."""
    digests, ids = [np.empty((0, 16), np.uint8)], [np.empty(0, np.int64)]
    for i in range(corpus.num_shards):
        rows = corpus.digests(i)
        here = np.flatnonzero((rows[:, 0] >= low) & (rows[:, 0] < high))
        digests.append(rows[here])
        ids.append(here + corpus.offsets[i])
    return np.concatenate(digests).view(">u8"), np.concatenate(ids)


def _groups(digests: Array, ids: Array) -> Iterator[Array]:
    order = np.lexsort((ids, digests[:, 1], digests[:, 0]))
    digests, ids = digests[order], ids[order]
    same = (digests[1:] == digests[:-1]).all(axis=1)
    # A group begins where a row equals its follower, but not the row before it.
    edges = np.diff(np.concatenate([[False], same, [False]]).astype(np.int8))
    starts, ends = np.flatnonzero(edges == 1), np.flatnonzero(edges == -1)
    for start, end in zip(starts, ends, strict=True):
        yield ids[start : end + 1]


def write_duplicates(corpus: Corpus, path: Path) -> tuple[int, int]:
    """Write duplicates.csv (digest, id, source) and return (groups, images beyond the first)."""
    num_groups = num_extra = 0

    def rows() -> Iterator[tuple[str, int, str]]:
        nonlocal num_groups, num_extra
        for ids in duplicate_groups(corpus):
            num_groups += 1
            num_extra += len(ids) - 1
            shard = int(np.searchsorted(corpus.offsets, ids[0], side="right")) - 1
            digest = corpus.digests(shard)[ids[0] - corpus.offsets[shard]].tobytes().hex()
            for id, source in zip(ids.tolist(), corpus.sources(ids), strict=True):
                yield digest, id, source

    write_csv(path, COLUMNS, rows())
    return num_groups, num_extra
