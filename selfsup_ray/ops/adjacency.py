"""Adjacency: the symmetrised kNN graph as rows of neighbors, without values, on disk or in memory.

B = A + A^T has entries 1 and 2 only, so a row is stored as its neighbors, those of weight 2 first,
and their number: 4 bytes a link and 12 a node.
"""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cached_property
from importlib.util import find_spec
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from selfsup_ray.artifacts import Array, ShardedArray
    from selfsup_ray.ops.completion import Patched

_CHUNK_ROWS = 65536
_SORTED_BYTES = 16 * 2**30
"""Of memory for the pairs that torch sorts at once."""
_BLOCK_LINKS = (1 << 10, 1 << 18)
"""Least and most links of a block of rows: what threads share, and one float64 partial sum."""
_BLOCKS = 64
"""Blocks of a graph between these two."""


@dataclass(frozen=True)
class Adjacency:
    """Rows of B: neighbors ids[indptr[p]:indptr[p + 1]] of the node at place p.

    indptr: (N + 1,) int64; ids: (links,) int32 places; twice: (N,) int32, the first `twice` of a
    row weigh 2, the others 1; values: (links,) float32 where weights are not 1 and 2. order: (N,)
    int64, the image at each place, or None when places are image ids.
    """

    indptr: Array
    ids: Array
    twice: Array
    values: Array | None = None
    order: Array | None = None

    def __len__(self) -> int:
        return len(self.twice)

    @cached_property
    def place(self) -> Array | None:
        """(N,) int32: the place of each image; None when it is the image's id."""
        return None if self.order is None else inverse(self.order)

    @cached_property
    def longest(self) -> int:
        """Neighbors of the node that has most."""
        return int(np.diff(self.indptr).max(initial=0))

    def blocks(self, start: int = 0, stop: int | None = None) -> list[tuple[int, int]]:
        """Return row ranges with about equally many links; they depend on the graph alone.

        start, stop: only the blocks between these two block borders.
        """
        links = int(self.indptr[-1])
        cuts = np.arange(0, links, int(np.clip(links // _BLOCKS, *_BLOCK_LINKS)))
        borders = np.unique(np.append(np.searchsorted(self.indptr, cuts, side="left"), len(self)))
        stop = len(self) if stop is None else stop
        pairs = zip(borders[:-1].tolist(), borders[1:].tolist(), strict=True)
        return [(a, b) for a, b in pairs if start <= a and b <= stop]

    @classmethod
    def open(cls, folder: Path) -> Adjacency:
        """Return the arrays of a folder as memory maps, which processes of a node share."""

        def mapped(name: str) -> Any:
            path = folder / f"{name}.npy"
            if not path.exists():
                return None
            # Copy on write, so that the kernels need not be compiled for read-only arrays too.
            is_empty = path.stat().st_size <= 128
            return np.asarray(np.load(path, mmap_mode=None if is_empty else "c"))

        return cls(*(mapped(name) for name in ("indptr", "ids", "twice", "values", "order")))


def inverse(order: Array) -> Array:
    """Return (N,) int32 `place` with place[order[p]] = p."""
    place = np.empty(len(order), np.int32)
    place[order] = np.arange(len(order), dtype=np.int32)
    return place


@dataclass(frozen=True)
class Links:
    """Neighbor lists to build from: ids (N, k), -1 = none; links less similar than `least` go."""

    ids: Array | ShardedArray | Patched
    similarity: Array | ShardedArray | Patched | None = None
    least: float | None = None

    def __len__(self) -> int:
        return len(self.ids)

    @property
    def k(self) -> int:
        """Entries of each list."""
        return int(self.ids.shape[1])

    def blocks(self, order: Array | None) -> Iterator[tuple[Array, Array]]:
        """Yield (images (n,) int32, their lists (n, k) int32) over all images.

        Lists in memory come in the order that is asked for, which keeps what follows close
        together; lists in files come as they are there.
        """
        order = order if isinstance(self.ids, np.ndarray) else None
        for first, ids, similarity in self._shards():
            for start in range(0, len(ids), _CHUNK_ROWS):
                stop = min(start + _CHUNK_ROWS, len(ids))
                rows = np.arange(start, stop) if order is None else order[start:stop]
                part = slice(start, stop) if order is None else rows
                lists = np.array(ids[part], np.int32, order="C")
                if similarity is not None:
                    lists[similarity[part] < self.least] = -1
                yield (rows + first).astype(np.int32), lists

    def _shards(self) -> Iterator[tuple[int, Array, Array | None]]:
        values = None if self.least is None else self.similarity
        assert values is not None or self.least is None, "a least similarity needs similarities"
        if isinstance(self.ids, np.ndarray):
            yield 0, self.ids, None if values is None else np.asarray(values)
            return
        for i in range(self.ids.num_shards):
            shard = None if values is None or isinstance(values, np.ndarray) else values.shard(i)
            yield int(self.ids.offsets[i]), self.ids.shard(i), shard


def traversal_order(ids: Array, *, least: int = 100_000) -> Array | None:
    """Return an order (N,) of images in which neighbors lie close, or None where it would not pay.

    For graphs that came without the order of their cells, which is better. It costs a tenth of a
    step of 128 classes and saves a third of each. Below `least` images everything is in the cache.
    """
    if len(ids) < least or not has_numba():
        return None
    from selfsup_ray.ops import symmetrize

    order = np.empty(len(ids), np.int64)
    lists = np.ascontiguousarray(ids, np.int32)
    symmetrize.traverse(lists, 4096, min(16, lists.shape[1]), order)
    return order


@dataclass(frozen=True)
class Rows:
    """Consecutive rows of an Adjacency: ids (links,) int32; lengths, twice (n,) int32 per row."""

    ids: Array
    lengths: Array
    twice: Array


def build_adjacency(
    links: Links,
    *,
    order: Array | None = None,
    self_link: bool = True,
    reciprocal: bool = False,
    threads: int = 1,
    device: str = "cpu",
) -> Adjacency:
    """Return the rows of A + A^T (A o A^T with `reciprocal`) of neighbor lists.

    A list counts an id once, and the node itself as `self_link` says. order: (N,) image at each
    place, for gathers that stay close. Peak memory: about 24 k bytes a node.
    Without numba torch makes the rows, on `device`.
    """
    how = _How(self_link, reciprocal, threads, "cpu" if has_numba() else device)
    rows = len(links) if has_numba() else _SORTED_BYTES // (160 * max(links.k, 1))
    parts = list(_all_rows(links, order, how, rows))
    empty = np.empty(0, np.int32)
    ids, lengths, twice = (
        np.concatenate([getattr(part, name) for part in parts] or [empty])
        for name in ("ids", "lengths", "twice")
    )
    return Adjacency(_indptr(lengths), ids, twice, order=order)


def write_adjacency(
    folder: Path,
    links: Links,
    *,
    order: Array | None = None,
    reciprocal: bool = False,
    threads: int = 1,
    memory_bytes: int = 4 * 2**30,
) -> Adjacency:
    """Write the rows of `build_adjacency` to a folder, unless they are there, and map them.

    The lists are read twice for each part of the rows that `memory_bytes` holds.
    """
    from selfsup_ray.artifacts import whole_file

    if not (folder / "ids.npy").exists():
        how = _How(True, reciprocal, threads, "cpu")
        rows = max(1, memory_bytes // (24 * links.k + 32))
        counts: list[Rows] = []
        with whole_file(folder / "ids.npy") as path:
            with open(path, "wb") as file:
                _write_header(file, 0)  # the length is known in the end
                for part in _all_rows(links, order, how, rows):
                    part.ids.tofile(file)
                    counts.append(Rows(part.ids[:0], part.lengths, part.twice))
                lengths = np.concatenate([part.lengths for part in counts])
                file.seek(0)
                _write_header(file, int(lengths.sum(dtype=np.int64)))
            twice = np.concatenate([part.twice for part in counts])
            _save(folder, indptr=_indptr(lengths), twice=twice, order=order)
    return Adjacency.open(folder)


def save_adjacency(folder: Path, made: Adjacency) -> None:
    """Write the arrays as .npy files, `ids` last: a folder that has it is complete."""
    names = ("indptr", "twice", "values", "order", "ids")
    _save(folder, **{name: getattr(made, name) for name in names})


def _save(folder: Path, **arrays: Array | None) -> None:
    from selfsup_ray.artifacts import whole_file

    for name, value in arrays.items():
        if value is not None:
            with whole_file(folder / f"{name}.npy") as path, open(path, "wb") as file:
                np.save(file, value)


def _write_header(file: IO[bytes], length: int) -> None:
    """Write the header of a one-dimensional int32 .npy file; numpy leaves room for any length."""
    header = {"descr": "<i4", "fortran_order": False, "shape": (length,)}
    np.lib.format.write_array_header_1_0(file, header)


def _indptr(lengths: Array) -> Array:
    return np.concatenate([[0], np.cumsum(lengths, dtype=np.int64)]).astype(np.int64)


@dataclass(frozen=True)
class _How:
    self_link: bool
    reciprocal: bool
    threads: int
    device: str


def _all_rows(links: Links, order: Array | None, how: _How, rows: int) -> Iterator[Rows]:
    """Yield all rows in their order, made in ranges of so many."""
    n = len(links)
    place = np.arange(n, dtype=np.int32) if order is None else inverse(order)
    make = _numba_rows if has_numba() else _torch_rows
    for low in range(0, n, max(rows, 1)):
        yield from make(links, order, place, low, min(low + rows, n), how)


def has_numba() -> bool:
    """Whether numba is installed; without it torch does the work, slower on a CPU."""
    return find_spec("numba") is not None


def _numba_rows(
    links: Links, order: Array | None, place: Array, low: int, high: int, how: _How
) -> Iterator[Rows]:
    from selfsup_ray.ops import symmetrize

    counts = np.zeros(high - low, np.int64)
    for images, lists in links.blocks(order):
        symmetrize.count_links(images, lists, place, low, high, counts)
    starts = _indptr(counts)
    ends, incoming = starts[:-1].copy(), np.empty(starts[-1], np.int32)
    own = np.empty((high - low, links.k), np.int32)
    for images, lists in links.blocks(order):
        symmetrize.sort_links(images, lists, place, low, high, own, ends, incoming)

    def merged(start: int) -> Rows:
        stop = min(start + _CHUNK_ROWS, high - low)
        n = stop - start
        size = int(starts[stop] - starts[start]) + n * (2 * links.k + 4)
        ids, lengths, twice = (np.empty(m, np.int32) for m in (size, n, n))
        flags = (how.self_link, how.reciprocal)
        used = symmetrize.merge_links(
            own, starts, incoming, start, stop, low, *flags, ids, lengths, twice
        )
        return Rows(ids[:used].copy(), lengths, twice)

    with ThreadPoolExecutor(how.threads) as pool:
        yield from pool.map(merged, range(0, high - low, _CHUNK_ROWS))


def _torch_rows(
    links: Links, order: Array | None, place: Array, low: int, high: int, how: _How
) -> Iterator[Rows]:
    """The same rows by sorting pairs of places as one 64-bit key each."""
    import torch

    n, at, keys = len(links), torch.from_numpy(place).to(how.device).long(), []
    for images, lists in links.blocks(None):
        other = torch.from_numpy(lists).to(how.device).long()
        image = torch.from_numpy(images).to(how.device).long()[:, None].expand_as(other)
        is_link = (other >= 0) & (other != image)
        p, q = at[image[is_link]], at[other[is_link]]
        own = torch.unique(p * n + q)  # a list that holds an id twice
        p, q = own // n, own % n
        for a, b in ((p, q), (q, p)):
            here = (a >= low) & (a < high)
            keys.append(a[here] * n + b[here])
    if how.self_link:
        itself = torch.arange(low, high, device=how.device)
        keys += [itself * n + itself] * 2
    links_, counts = torch.unique(torch.cat(keys), return_counts=True)
    if how.reciprocal:
        links_, counts = links_[counts == 2], counts[counts == 2]
    row, column = links_ // n - low, links_ % n
    by_weight = torch.sort(row * 2 + (counts < 2).long(), stable=True).indices
    lengths = torch.bincount(row, minlength=high - low)
    twice = torch.bincount(row[counts == 2], minlength=high - low)
    yield Rows(*(t.int().cpu().numpy() for t in (column[by_weight], lengths, twice)))
