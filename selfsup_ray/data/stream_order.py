"""The order of a stream: which images each batch of an epoch holds, known before any is read.

A corpus is cut into blocks of neighboring rows. Each epoch lays its blocks out in a new order and
cuts that line into `lanes` of equal length; every batch takes as many images from each lane, and a
lane is read from its start to its end, shuffled within a window. So each image comes exactly once
an epoch, a batch is drawn from many places of the corpus, whoever reads some rows of the batch
reads whole blocks, and nothing depends on who reads or when.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import NamedTuple

import numpy as np

from selfsup_ray.artifacts import Array
from selfsup_ray.ops.rng import permuted

BLOCK_ROWS = 256
"""Images of a block at most: a few MB, one read from object storage."""


class Piece(NamedTuple):
    """What is read at once: `rows` images of one block, from id `first` on, for one lane."""

    epoch: int
    lane: int
    place: int
    """Where in the lane the first of them lies."""
    first: int
    rows: int


@dataclass(frozen=True)
class _Line:
    """The blocks of an epoch in its order: the id each starts with, and its place in the line."""

    first_ids: Array
    starts: Array
    """(blocks + 1,): one more, the end of the last."""


class StreamOrder:
    """Ids of an epoch's batches as a function of (seed, epoch), and the reads that bring them.

    shard_rows: images of each shard; buffer: images that are shuffled together, over all lanes. The
    images left over when an epoch is cut into batches are dropped, other ones each epoch.
    """

    def __init__(
        self, shard_rows: Sequence[int], *, batch_size: int, lanes: int, buffer: int, seed: int
    ) -> None:
        assert batch_size % lanes == 0, f"batches of {batch_size} have no {lanes} equal parts"
        self.batch_size, self.lanes, self.seed = batch_size, lanes, seed
        self.from_lane = batch_size // lanes
        """Images that a batch takes from a lane."""
        self.lane_size = sum(shard_rows) // batch_size * self.from_lane
        self.window = max(1, buffer // batch_size) * self.from_lane
        """Images of a lane that are shuffled together."""
        self.blocks = _blocks(shard_rows)
        self.line = lru_cache(maxsize=2)(self._line)

    def _line(self, epoch: int) -> _Line:
        """Return the blocks in the order of an epoch."""
        first_ids, rows = self.blocks
        n = len(first_ids)
        order = permuted(np.arange(n), n=n, seed=self.seed, epoch=epoch)
        return _Line(first_ids[order], np.concatenate([[0], np.cumsum(rows[order])]))

    def places(self, positions: Array, *, epoch: int) -> tuple[Array, Array]:
        """Return lane and place in it of the images at these positions of the epoch: (n,) each."""
        step, row = np.divmod(positions, self.batch_size)
        lane, within = np.divmod(row, self.from_lane)
        place = step * self.from_lane + within
        window = place // self.window
        shuffled = np.empty_like(place)
        stream = 1 + window * self.lanes + lane  # 0 is the order of the blocks
        for one in np.unique(stream):
            here = np.flatnonzero(stream == one)
            start, stop = self.span(int(place[here[0]]))
            shuffled[here] = start + permuted(
                place[here] - start, n=stop - start, seed=self.seed, epoch=epoch, stream=int(one)
            )
        return lane, shuffled

    def span(self, place: int) -> tuple[int, int]:
        """Return [start, stop) of the window of a lane in which a place lies."""
        start = place // self.window * self.window
        return start, min(start + self.window, self.lane_size)

    def ids(self, positions: Array, *, epoch: int) -> Array:
        """Return the ids of the images at these positions of the epoch: (n,) int64."""
        lane, place = self.places(positions, epoch=epoch)
        return self.ids_at(lane, place, epoch=epoch)

    def ids_at(self, lane: Array, place: Array, *, epoch: int) -> Array:
        """Return the ids of the images at these places of these lanes: (n,) int64."""
        line = self.line(epoch)
        in_line = lane * self.lane_size + place
        block = np.searchsorted(line.starts, in_line, side="right") - 1
        ids: Array = line.first_ids[block] + in_line - line.starts[block]
        return ids

    def pieces(self, epoch: int, lane: int, place: int) -> Iterator[Piece]:
        """Yield what is to be read for a lane from a place on, in its order."""
        line = self.line(epoch)
        origin = lane * self.lane_size
        at, end = origin + place, origin + self.lane_size
        block = int(np.searchsorted(line.starts, at, side="right")) - 1
        while at < end:
            start, stop = int(line.starts[block]), min(int(line.starts[block + 1]), end)
            if at < stop:  # a shard of nothing but bad files has no block, but be safe
                first = int(line.first_ids[block]) + at - start
                yield Piece(epoch, lane, at - origin, first, stop - at)
            at, block = stop, block + 1

    def plan(self, wanted: Iterator[tuple[int, Array]]) -> Iterator[Piece]:
        """Yield the reads for a sequence of (epoch, positions), in the order they are needed."""
        reading: dict[int, tuple[int, int, Iterator[Piece]]] = {}
        for epoch, positions in wanted:
            for lane, stop, start in self.needs(positions):
                at, have, pieces = reading.get(lane, (-1, 0, iter(())))
                if at != epoch:
                    at, have, pieces = epoch, start, self.pieces(epoch, lane, start)
                while have < stop:
                    piece = next(pieces)
                    have = piece.place + piece.rows
                    yield piece
                reading[lane] = at, have, pieces

    def needs(self, positions: Array) -> Iterator[tuple[int, int, int]]:
        """Yield (lane, stop, start): the windows that hold the images of part of one batch."""
        step, row = divmod(int(positions[0]), self.batch_size)
        last = row + len(positions) - 1
        start, stop = self.span(step * self.from_lane)
        for lane in range(row // self.from_lane, last // self.from_lane + 1):
            yield lane, stop, start


def _blocks(shard_rows: Sequence[int]) -> tuple[Array, Array]:
    """Return the first id and the rows of every block of a corpus."""
    rows = np.asarray(shard_rows, dtype=np.int64)
    counts = -(-rows // BLOCK_ROWS)
    shard = np.repeat(np.arange(len(rows)), counts)
    within = np.arange(counts.sum()) - np.repeat(np.cumsum(counts) - counts, counts)
    first_of_shard = np.cumsum(rows) - rows
    first_ids = first_of_shard[shard] + within * BLOCK_ROWS
    return first_ids, np.minimum(rows[shard] - within * BLOCK_ROWS, BLOCK_ROWS)
