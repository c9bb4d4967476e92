"""AllPairs: the exact graph of a stored array in steps that may run anywhere, in any order, twice.

Distinct rows are cut into groups that fit in memory. `join` finds the candidates of two groups
among each other, `settle` the lists of one group, `write` those of the images of one shard. Each
step reads files and writes a file whole; the lists are exact, so the cuts do not change them.
"""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import numpy as np

from selfsup_ray.artifacts import (
    Array,
    ShardedArray,
    read_json,
    require_disk,
    whole_file,
    write_json,
)
from selfsup_ray.ops.exact_graph import (
    Candidates,
    Rows,
    join,
    multiplies_bfloat16,
    only_possible,
    pair_similarities,
    ranked,
    sure_similarity,
    together,
)
from selfsup_ray.ops.index import EqualRows, finite_norms, group_by_hash, row_hashes
from selfsup_ray.ops.neighbors import Neighbors, drop_self
from selfsup_ray.storage import remove_tree

GROUP_BYTES = 300 * 2**20
"""Memory of one group's rows and candidates while it is joined; two are in memory at once."""

_READ_ROWS = 16384
_ENTRY_BYTES = 50  # on disk for a neighbor: three to four candidates, and the settled list
Pair = tuple[int, int]


@dataclass(frozen=True)
class AllPairs:
    """The k nearest other rows of every row of the array at `path`; files between in `folder`.

    cuts: where the groups of distinct rows begin, and their number at the end.
    """

    path: Path
    folder: Path
    k: int
    cuts: tuple[int, ...]

    @classmethod
    def begin(cls, array: ShardedArray, folder: Path, *, k: int, parts: int) -> AllPairs:
        """Return the plan for `parts` workers; a folder that holds one is continued as it is.

        Raises ArtifactError when a row is not finite, or the disk too small.
        """
        path, plan = array.path.resolve(), folder.resolve() / "plan.json"
        if not plan.exists():
            require_disk(folder, size_bytes=_ENTRY_BYTES * len(array) * (k + 1))
            order, starts = group_by_hash(_hashes(array), array.rows)
            if len(starts) - 1 < len(array):
                _save(folder / "members.npy", order)
                _save(folder / "starts.npy", starts)
            cuts = _cuts(len(starts) - 1, array.shape[1], k, parts)
            write_json(plan, {"k": k, "cuts": cuts})
        stored = read_json(plan)
        assert stored["k"] == k, f"{folder} holds lists of {stored['k']} neighbors, not {k}"
        return cls(path, folder.resolve(), k, tuple(stored["cuts"]))

    @property
    def num_groups(self) -> int:
        """Groups of rows."""
        return len(self.cuts) - 1

    @property
    def missing_joins(self) -> list[Pair]:
        """Pairs of groups whose candidates are still needed.

        Groups among themselves first: the others then know how near a neighbor must be.
        """
        n = self.num_groups
        pairs = [(g, h) for g in range(n) for h in range(g, n)]
        needed = [
            pair for pair in pairs if not all(self._lists(group)[1].exists() for group in pair)
        ]
        missing = [pair for pair in needed if n > 1 and not self._candidates(*pair).exists()]
        return sorted(missing, key=lambda pair: pair[0] != pair[1])

    @property
    def missing_lists(self) -> list[int]:
        """Groups whose lists are still to be settled."""
        return [g for g in range(self.num_groups) if not self._lists(g)[1].exists()]

    def join(self, g: int, h: int) -> None:
        """Write the candidates of two groups among each other."""
        _one_thread()
        a, k = self._rows(g), min(self.k + 1, self.cuts[-1])
        fast = multiplies_bfloat16()
        if g == h:
            found, _ = join(a, a, k, bfloat16=fast)
            self._write(g, h, _fields(found, 0) | {"floor": sure_similarity(found, k)})
            return
        floors = (self._floor(g), self._floor(h))
        first, second = join(a, self._rows(h), k, bfloat16=fast, floors=floors)
        self._write(g, h, _fields(first, 0) | _fields(second, 1))

    def _floor(self, g: int) -> Array | None:
        """Return what the nearest of group g's rows reach among themselves, if that is known."""
        path = self._candidates(g, g)
        if not path.exists():
            return None
        with np.load(path) as stored:
            return np.asarray(stored["floor"])

    def _write(self, g: int, h: int, fields: dict[str, Array]) -> None:
        with whole_file(self._candidates(g, h)) as temporary, open(temporary, "wb") as file:
            np.savez(file, **fields)  # type: ignore[arg-type]

    def settle(self, g: int) -> None:
        """Write the lists of one group's rows: ids of distinct rows, and similarities."""
        _one_thread()
        k = min(self.k + 1, self.cuts[-1])
        own = self._rows(g)
        if self.num_groups == 1:
            found, _ = join(own, own, k, bfloat16=multiplies_bfloat16())
        else:
            found = together([self._read(g, h) for h in range(self.num_groups)])
        found = only_possible(found, k)
        queries = np.repeat(np.arange(len(own)), np.diff(found.starts))
        similarity = np.empty(len(queries), np.float32)
        for h in range(self.num_groups):
            low, high = self.cuts[h], self.cuts[h + 1]
            here = np.flatnonzero((found.ids >= low) & (found.ids < high))
            rows = own if h == g else self._rows(h)
            similarity[here] = pair_similarities(own, rows, queries[here], found.ids[here] - low)
        lists = ranked(found.starts, found.ids, similarity, k)
        _save(self._lists(g)[0], lists.ids.astype(np.int32))
        _save(self._lists(g)[1], lists.similarity)

    def write(self, i: int, ids: ShardedArray, similarity: ShardedArray) -> None:
        """Write shard i of the lists of images, each without itself."""
        first, last = int(ids.offsets[i]), int(ids.offsets[i + 1])
        equal, group_of = self._equal()
        lists = [[np.load(path, mmap_mode="r") for path in self._lists(g)]
                 for g in range(self.num_groups)]  # fmt: skip
        out = Neighbors(
            np.empty((last - first, self.k), np.int64), np.empty((last - first, self.k), np.float32)
        )
        for a in range(first, last, _READ_ROWS):
            images = np.arange(a, min(a + _READ_ROWS, last))
            places = images if group_of is None else group_of[images]
            found = self._gather(lists, places)
            if equal is not None:
                found = equal.expand(found, self.k + 1)
            found = drop_self(found, images)
            here = slice(a - first, a - first + len(images))
            out.ids[here], out.similarity[here] = found.ids, found.similarity
        similarity.write_shard(i, out.similarity)
        ids.write_shard(i, out.ids)

    def remove(self) -> None:
        """Delete the files between; the lists are written."""
        _group_rows.cache_clear()
        remove_tree(self.folder)

    def _gather(self, lists: list[list[Array]], places: Array) -> Neighbors:
        """Return the lists of distinct rows at these places."""
        size = lists[0][0].shape[1]
        ids, values = np.empty((len(places), size), np.int64), np.empty((len(places), size), "f4")
        owner = np.searchsorted(self.cuts, places, side="right") - 1
        for g in np.unique(owner):
            here = np.flatnonzero(owner == g)
            at = places[here] - self.cuts[g]
            ids[here], values[here] = lists[g][0][at], lists[g][1][at]
        return Neighbors(ids, values)

    def _equal(self) -> tuple[EqualRows | None, Array | None]:
        """Return the groups of equal rows and the group of every image; None if all differ."""
        if not (self.folder / "members.npy").exists():
            return None, None
        equal = EqualRows(np.load(self.folder / "members.npy"), np.load(self.folder / "starts.npy"))
        group_of = np.empty(len(equal.members), np.int64)
        group_of[equal.members] = np.repeat(np.arange(len(equal)), np.diff(equal.starts))
        return equal, group_of

    def _rows(self, g: int) -> Rows:
        return _group_rows(self.path, self.folder, self.cuts[g], self.cuts[g + 1])

    def _candidates(self, g: int, h: int) -> Path:
        return self.folder / f"pair-{g:04d}-{h:04d}.npz"

    def _read(self, g: int, h: int) -> Candidates:
        """Return the candidates of group g's rows among group h's, by distinct row."""
        with np.load(self._candidates(min(g, h), max(g, h))) as stored:
            starts, ids, low, high = (stored[f"{name}{int(g > h)}"] for name in _FIELDS)
        return Candidates(starts, ids + np.int32(self.cuts[h]), low, high)

    def _lists(self, g: int) -> tuple[Path, Path]:
        return self.folder / f"ids-{g:04d}.npy", self.folder / f"similarity-{g:04d}.npy"


def _fields(found: Candidates, side: int) -> dict[str, Array]:
    return {f"{name}{side}": getattr(found, name) for name in _FIELDS}


_FIELDS = ("starts", "ids", "low", "high")


def run_joins(pairs: AllPairs, units: list[Pair], threads: int) -> None:
    """Run `join` of some pairs of groups, a thread each."""
    with ThreadPoolExecutor(max(1, threads)) as pool:
        list(pool.map(lambda unit: pairs.join(*unit), units))


def run_settles(pairs: AllPairs, groups: list[int], threads: int) -> None:
    """Run `settle` of some groups, a thread each."""
    with ThreadPoolExecutor(max(1, threads)) as pool:
        list(pool.map(pairs.settle, groups))


def _cuts(n: int, dim: int, k: int, parts: int) -> list[int]:
    """Return where groups of n rows begin."""
    num = num_groups(n, dim, k, parts)
    return [i * n // num for i in range(num + 1)]


def num_groups(n: int, dim: int, k: int, parts: int) -> int:
    """Return how many groups n rows are cut into: few, but enough pairs of them for every part."""
    row_bytes = 6 * dim + 8 * (3 * k + 35)
    num = -(-n * row_bytes // GROUP_BYTES)
    while parts > 1 and num * (num + 1) < 6 * parts and n // (num + 1) >= 4096:
        num += 1
    return num


@lru_cache(maxsize=2)
def _group_rows(path: Path, folder: Path, start: int, stop: int) -> Rows:
    array, places = ShardedArray.open(path), np.arange(start, stop)
    if (folder / "members.npy").exists():
        members = np.load(folder / "members.npy", mmap_mode="r")
        places = members[np.load(folder / "starts.npy", mmap_mode="r")[start:stop]]
    return Rows(array.rows(places))


def _hashes(array: ShardedArray) -> Array:
    """Return a hash of every row (N,). Raises ArtifactError when one is not finite."""
    hashes = np.empty(len(array), np.uint64)
    for i in range(0, len(array), _READ_ROWS):
        ids = np.arange(i, min(i + _READ_ROWS, len(array)))
        rows = array.rows(ids)
        finite_norms(rows, array.path, ids)
        hashes[ids] = row_hashes(rows)
    return hashes


def _one_thread() -> None:
    """Let torch use this thread alone: several steps run beside each other."""
    import torch

    if torch.get_num_threads() != 1:
        torch.set_num_threads(1)


def _save(path: Path, rows: Array) -> None:
    with whole_file(path) as temporary, open(temporary, "wb") as file:
        np.save(file, rows)
