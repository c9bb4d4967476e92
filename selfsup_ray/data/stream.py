"""The `stream` feed: a corpus read block by block, for corpora larger than a node's disk."""

from __future__ import annotations

import itertools
from collections import deque
from collections.abc import Callable, Generator, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import closing
from typing import TYPE_CHECKING, Annotated, Literal

import numpy as np
import pyarrow as pa
import torch
from pydantic import Field
from torch import Tensor

from selfsup_ray.artifacts import Array
from selfsup_ray.config import Positive, config
from selfsup_ray.data.pixels import Pixels
from selfsup_ray.data.shard_ranges import StoredImages
from selfsup_ray.data.stream_order import Piece, StreamOrder

if TYPE_CHECKING:
    from selfsup_ray.data.corpus import Corpus

READS_AT_A_TIME = 4
"""Blocks that a worker without Ray reads at a time."""


@config
class MappedFeed:
    """Images are read at random from memory-mapped shards, in the order of one permutation."""

    name: Literal["mapped"] = "mapped"


@config
class StreamFeed:
    """Shards are streamed, once an epoch, each worker reading its own part of the corpus.

    For corpora larger than a node's disk, and methods that never look an image up by its id. The
    order differs from `mapped`'s, but likewise depends on seed and epoch alone.
    """

    name: Literal["stream"] = "stream"
    lanes: Positive = 8
    """Parts of the corpus that each batch is drawn from; a divisor of batch_size. With fewer lanes
    than workers, or a number of workers that divides them unequally, some blocks are read twice."""
    buffer: Positive = 16384
    """Images shuffled together: held by all workers together, and as many again while reading."""


Feed = Annotated[MappedFeed | StreamFeed, Field(discriminator="name")]

Arrival = tuple[Piece, pa.LargeBinaryArray]
"""Some stored images of a piece; those of a piece come in their order, in one array or several."""
Reader = Callable[[StoredImages, Iterator[Piece]], Generator[Arrival, None, None]]
"""Reads pieces in the order they are given, a few ahead of what is asked for."""


def read_here(images: StoredImages, pieces: Iterator[Piece]) -> Generator[Arrival, None, None]:
    """Read pieces in this process, by a few threads."""
    with ThreadPoolExecutor(READS_AT_A_TIME, thread_name_prefix="stream") as pool:

        def start(piece: Piece) -> tuple[Piece, Future[pa.LargeBinaryArray]]:
            return piece, pool.submit(images.read, piece.first, piece.rows)

        ahead = deque(map(start, itertools.islice(pieces, READS_AT_A_TIME)))
        while ahead:
            piece, reading = ahead.popleft()
            column = reading.result()
            ahead.extend(map(start, itertools.islice(pieces, 1)))
            yield piece, column


class Stream:
    """Every image of a corpus in the order of a `StreamOrder`, read through a bounded buffer."""

    def __init__(
        self,
        corpus: Corpus,
        feed: StreamFeed,
        *,
        batch_size: int,
        seed: int,
        reader: Reader = read_here,
    ) -> None:
        self.corpus, self.reader = corpus, reader
        self.stored = StoredImages(corpus.path, corpus.offsets, corpus.fingerprint)
        self.order = StreamOrder(
            corpus.shard_rows,
            batch_size=batch_size,
            lanes=feed.lanes,
            buffer=feed.buffer,
            seed=seed,
        )

    def __len__(self) -> int:
        return len(self.corpus)

    def batch(self, ids: Array, *, epoch: int) -> list[Tensor]:
        """Return `[images]` of any ids, as `Images` does; training itself uses `batches`."""
        return [self.corpus.images(ids)]

    def batches(
        self, wanted: Iterator[tuple[int, Array]]
    ) -> Generator[tuple[Tensor, Array], None, None]:
        """Yield (images, ids) for each (epoch, positions): (n, 3, S, S) uint8 and (n,) int64.

        positions: neighbors in one batch of the epoch's order, always the same rows of a batch.
        """
        wanted, planned = itertools.tee(wanted)
        with closing(self.reader(self.stored, self.order.plan(planned))) as arriving:
            lanes: dict[int, _Lane] = {}
            for epoch, positions in wanted:
                lane, place = self.order.places(positions, epoch=epoch)
                out = self._empty(len(positions))
                for one, stop, start in self.order.needs(positions):
                    held = lanes.setdefault(one, _Lane())
                    held.forget(epoch, start)
                    while held.stop < stop:
                        piece, column = next(arriving)
                        assert piece.lane == one, f"{piece} came while lane {one} was waiting"
                        held.add(piece, self._pixels(column))
                    rows = np.flatnonzero(lane == one)
                    held.read(place[rows], out, rows)
                ids = self.order.ids_at(lane, place, epoch=epoch)
                yield torch.from_numpy(out).permute(0, 3, 1, 2), ids

    def _empty(self, count: int) -> Array:
        size = self.corpus.image_size
        return np.empty((count, size, size, 3), np.uint8)

    def _pixels(self, column: pa.LargeBinaryArray) -> Pixels:
        return Pixels(column, encoding=self.corpus.encoding, image_size=self.corpus.image_size)


class _Lane:
    """The images of a lane that are in memory: neighbors, from `places[0]` up to `stop`."""

    def __init__(self) -> None:
        self.epoch, self.stop = -1, 0
        self.places: list[int] = []
        self.pieces: list[Pixels] = []

    def forget(self, epoch: int, start: int) -> None:
        """Drop what lies before a place; everything when another epoch begins."""
        if epoch != self.epoch:
            self.epoch, self.stop, self.places, self.pieces = epoch, start, [], []
        while self.pieces and self.places[0] + len(self.pieces[0]) <= start:
            del self.places[0], self.pieces[0]

    def add(self, piece: Piece, pixels: Pixels) -> None:
        """Append what was read next."""
        assert piece.epoch == self.epoch and piece.place <= self.stop, f"{piece} is out of turn"
        self.places.append(self.stop)
        self.pieces.append(pixels)
        self.stop += len(pixels)

    def read(self, places: Array, out: Array, rows: Array) -> None:
        """Decode the images at some places into out[rows]."""
        owner = np.searchsorted(self.places, places, side="right") - 1
        for i in np.unique(owner):
            here = np.flatnonzero(owner == i)
            self.pieces[i].read(places[here] - self.places[i], out, rows[here])
