"""The exact neighbors of all rows among all rows, each pair multiplied once.

Groups of rows are joined two by two. Tiles of rough scores, bfloat16 where the CPU multiplies it,
show which pairs can be neighbors: a rough score is off by no more than a bound that holds for any
rounding, so what lies below a row's k-th rough score by twice the bound is no neighbor of it. The
others, a little more than k a row, are settled as `ops.neighbors` defines similarity. The result
is that of `exact_topk`, bit for bit.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from selfsup_ray.artifacts import Array
from selfsup_ray.ops.neighbors import Neighbors, exact_topk, pair_similarity

if TYPE_CHECKING:  # the search imports this module in every worker, and few of them need torch
    import torch

TILE_ROWS, TILE_COLUMNS = 512, 1024  # bfloat16 scores of a tile: 1 MB, half of an L2 cache
_OPEN_SHARE = 0.1  # of a group's rows; when more cannot be told apart, float32 scores are formed


@dataclass(frozen=True)
class Candidates:
    """Rows that can be among the k nearest of each of n queries, with their rough similarity.

    ids: (m,) int32, those of query q at [starts[q], starts[q + 1]); low and high: (m,) float32
    bounds of the true similarity.
    """

    starts: Array
    ids: Array
    low: Array
    high: Array


def multiplies_bfloat16() -> bool:
    """Return whether this CPU has instructions for products of bfloat16 numbers."""
    import torch

    names = ("_is_avx512_bf16_supported", "_is_amx_tile_supported")
    return any(getattr(torch.cpu, name, bool)() for name in names)


class Rows:
    """A group of rows as the join needs them: float32, and rounded with the size of the error."""

    def __init__(self, rows: Array) -> None:
        self.rows = rows  # (n, d) float32, contiguous
        self.norm = float(np.sqrt(np.einsum("nd,nd->n", rows, rows, dtype=np.float64)).max())
        self._rounded: tuple[torch.Tensor, float] | None = None

    def __len__(self) -> int:
        return len(self.rows)

    @property
    def rounded(self) -> tuple[torch.Tensor, float]:
        """The rows in bfloat16, and the largest distance between a row and its rounding."""
        if self._rounded is None:
            import torch

            exact = torch.from_numpy(self.rows)
            near = exact.bfloat16()
            worst = 0.0
            for i in range(0, len(near), 8192):
                apart = (near[i : i + 8192].float() - exact[i : i + 8192]).double()
                worst = max(worst, float(apart.norm(dim=1).max()))
            self._rounded = near, worst
        return self._rounded


def join(
    a: Rows,
    b: Rows,
    k: int,
    *,
    bfloat16: bool,
    floors: tuple[Array | None, Array | None] = (None, None),
) -> tuple[Candidates, Candidates]:
    """Return the candidates of a's rows among b's and of b's among a's, by position in the group.

    Each list holds those of the k nearest that are not below the floor, or all rows when there are
    fewer. Pass the same object twice for the rows of one group among themselves, each its own
    neighbor too; both results are then the same.
    floors: (n,) similarity that the k nearest of each row of a, and of b, reach for sure, known
    from other rows; what lies below it is left out. Uses one thread.
    """
    use = [True, False] if bfloat16 else [False]
    for rounded in use:
        rows, columns, how = _rough(a, b, k, floors, bfloat16=rounded)
        if max(rows.open_share, columns.open_share) <= _OPEN_SHARE:
            break
    found = _packed(rows, a, b, k, how)
    return found, found if a is b else _packed(columns, b, a, k, how)


def _rough(
    a: Rows, b: Rows, k: int, floors: tuple[Array | None, Array | None], *, bfloat16: bool
) -> tuple[_Kept, _Kept, _Scores]:
    """Return the candidates of both sides by rough scores, and how rough those are."""
    from selfsup_ray.ops.pair_kernels import take_tile

    same, scores = a is b, _Scores(a, b, bfloat16=bfloat16)
    rows = _Kept(len(a), k, scores, floors[0])
    columns = rows if same else _Kept(len(b), k, scores, floors[1])
    for c in range(0, len(b), TILE_COLUMNS):
        width = min(TILE_COLUMNS, len(b) - c)
        for r in range(0, min(len(a), c + width) if same else len(a), TILE_ROWS):
            height = min(TILE_ROWS, len(a) - r)
            # A square on the diagonal has each pair in both orders: its rows are enough.
            both = not same or r < c
            how = (k, scores.shift, scores.error, scores.share)
            tile = scores.tile(r, c, height, width)
            states = (*rows.state, *columns.state)
            take_tile(tile, r, c, both, *how, *states)
    return rows, columns, scores


class _Scores:
    """Tiles of rough scores of two groups of rows, and the bound of their error.

    A score s of two rows lies within error + share |s| of the true inner product.
    """

    def __init__(self, a: Rows, b: Rows, *, bfloat16: bool) -> None:
        import torch

        dim, norms = a.rows.shape[1], a.norm * b.norm
        # A float32 sum of d products in any order (Higham 2002, sec. 3.1), twice for good measure.
        self.error = 2 * (dim + 2) * 2.0**-24 * norms
        self.shift, self.share = 0, 0.0
        self.dtype: type[np.int16] | type[np.int32] = np.int32
        if bfloat16:
            (x, x_error), (y, y_error) = a.rounded, b.rounded
            # <x + dx, y + dy> - <x, y> by Cauchy-Schwarz.
            self.error = 1.01 * (
                self.error + x_error * b.norm + y_error * a.norm + x_error * y_error
            )
            self.shift, self.dtype, self.share = 16, np.int16, 2.0**-8  # the score is rounded too
            self.x, self.y = x, y
        else:
            self.x, self.y = torch.from_numpy(a.rows), torch.from_numpy(b.rows)
        self.out = torch.empty(TILE_ROWS, TILE_COLUMNS, dtype=self.x.dtype)

    def keys_below(self, similarity: Array) -> Array:
        """Return (n,) keys: a pair whose key is no higher is surely less similar than this."""
        wide = np.maximum(similarity.astype(np.float64), -1e30)  # -inf: nothing is known
        limit = wide - self.error - 1.01 * self.share * (np.abs(wide) + self.error)
        bits = limit.astype(np.float32).view(np.int32).astype(np.int64)
        ordered = (bits ^ ((bits >> 31) & 0x7FFFFFFF)) >> self.shift
        return np.asarray(np.maximum(ordered - 1, np.iinfo(self.dtype).min).astype(self.dtype))

    def tile(self, r: int, c: int, height: int, width: int) -> Array:
        """Return the scores of rows [r, r + height) and columns [c, c + width) as integers."""
        import torch

        full = height == TILE_ROWS and width == TILE_COLUMNS
        out = self.out if full else torch.empty(height, width, dtype=self.x.dtype)
        torch.mm(self.x[r : r + height], self.y[c : c + width].T, out=out)
        bits = torch.int16 if self.shift else torch.int32
        return np.asarray(out.view(bits).numpy())


class _Kept:
    """The running candidates of n queries: (key << 32 | id), keys ordering as their scores."""

    def __init__(self, n: int, k: int, scores: _Scores, floor: Array | None) -> None:
        self.entries = np.empty((n, 3 * k + 32), np.int64)
        self.used = np.zeros(n, np.int32)
        self.bound = np.full(n, np.iinfo(scores.dtype).min, scores.dtype)
        if floor is not None:
            self.bound = scores.keys_below(floor)

    @property
    def state(self) -> tuple[Array, Array, Array]:
        """The arrays as the kernels take them."""
        return self.entries, self.used, self.bound

    @property
    def open_share(self) -> float:
        """Share of queries with too many candidates too near to tell apart."""
        return float((self.used < 0).mean())


def _packed(kept: _Kept, queries: Rows, rows: Rows, k: int, scores: _Scores) -> Candidates:
    """Return the candidates with their bounds; queries left open are searched in float64."""
    from selfsup_ray.ops.pair_kernels import finish

    open_ = np.flatnonzero(kept.used < 0)
    ids, rough = finish(k, scores.shift, scores.error, scores.share, kept.entries, kept.used)
    used = np.maximum(kept.used, 0).astype(np.int64)
    wide = rough.astype(np.float64)
    error = scores.error + scores.share * np.abs(wide)
    found = _bounded(_starts(used), ids, wide, error)
    if not len(open_):
        return found
    exact = exact_topk(queries.rows[open_], rows.rows, k=min(k, len(rows)))
    wide = exact.similarity.ravel().astype(np.float64)
    error = 2.0**-23 * np.abs(wide)  # of rounding to float32
    starts = np.zeros(len(queries) + 1, np.int64)
    np.cumsum(np.bincount(open_, minlength=len(queries)) * exact.k, out=starts[1:])
    return together([found, _bounded(starts, exact.ids.ravel().astype(np.int32), wide, error)])


def _bounded(starts: Array, ids: Array, similarity: Array, error: Array) -> Candidates:
    """Return candidates with their bounds, rounded outward to float32."""
    low = np.nextafter((similarity - error).astype(np.float32), np.float32(-np.inf))
    high = np.nextafter((similarity + error).astype(np.float32), np.float32(np.inf))
    return Candidates(starts, ids, low, high)


def together(parts: list[Candidates]) -> Candidates:
    """Return the candidates of the same queries among several groups as one."""
    if len(parts) == 1:
        return parts[0]
    counts = np.stack([np.diff(part.starts) for part in parts])
    starts = _starts(counts.sum(axis=0))
    ids = np.empty(starts[-1], np.int32)
    low, high = np.empty(starts[-1], np.float32), np.empty(starts[-1], np.float32)
    before = np.cumsum(counts, axis=0) - counts
    for part, count, shift in zip(parts, counts, before, strict=True):
        to = np.repeat(starts[:-1] + shift - part.starts[:-1], count) + np.arange(len(part.ids))
        ids[to], low[to], high[to] = part.ids, part.low, part.high
    return Candidates(starts, ids, low, high)


def only_possible(found: Candidates, k: int) -> Candidates:
    """Return the candidates without those that k others surely exceed."""
    from selfsup_ray.ops.pair_kernels import may_be_nearest

    keep = np.empty(len(found.ids), bool)
    may_be_nearest(found.starts, found.high, sure_similarity(found, k), keep)
    counts = np.add.reduceat(np.append(keep, False), found.starts[:-1], dtype=np.int64)
    counts[np.diff(found.starts) == 0] = 0
    return Candidates(_starts(counts), found.ids[keep], found.low[keep], found.high[keep])


def sure_similarity(found: Candidates, k: int) -> Array:
    """Return (n,) float32 that the k nearest of each query reach for sure; -inf if not known."""
    from selfsup_ray.ops.pair_kernels import kth_low

    out = np.empty(len(found.starts) - 1, np.float32)
    kth_low(found.starts, found.low, k, out)
    return out


def pair_similarities(queries: Rows, rows: Rows, i: Array, j: Array) -> Array:
    """Return (m,) float32: the similarity of queries i and rows j, as `pair_similarity` has it."""
    from selfsup_ray.ops.pair_kernels import pair_products

    wide = np.empty(len(i))
    pair_products(queries.rows, rows.rows, i, j, wide)

    def exact(at: Array) -> Array:
        return pair_similarity(queries.rows[i[at]], rows.rows[j[at]][:, None])[:, 0]

    return rounded(wide, dim=queries.rows.shape[1], norms=queries.norm * rows.norm, exact=exact)


def rounded(wide: Array, *, dim: int, norms: float, exact: Callable[[Array], Array]) -> Array:
    """Return float64 products (m,), summed in any order, as the float32 of the defined order.

    norms: no product of two lengths is greater. A sum on the border of two float32 numbers is
    taken from exact(places), as `pair_similarity` defines it; there are few.
    """
    error = 4 * dim * np.finfo(np.float64).eps * norms
    similarity = wide.astype(np.float32)
    border = np.flatnonzero((wide - error).astype(np.float32) != (wide + error).astype(np.float32))
    for t in range(0, len(border), 65536):
        similarity[border[t : t + 65536]] = exact(border[t : t + 65536])
    return similarity


def ranked(starts: Array, ids: Array, similarity: Array, k: int) -> Neighbors:
    """Return the k best entries of each query, ties by lower id; each has at least k."""
    from selfsup_ray.ops.pair_kernels import rank

    out = Neighbors(
        np.empty((len(starts) - 1, k), np.int64), np.empty((len(starts) - 1, k), np.float32)
    )
    rank(starts, ids, similarity, out.ids, out.similarity)
    return out


def all_pairs_topk(rows: Array, *, k: int, bfloat16: bool | None = None) -> Neighbors:
    """Return the k nearest of rows (n, d) for each of them, itself included, k <= n.

    The same bits as `exact_topk(rows, rows, k=k)`. bfloat16: form rough scores in it; None does
    where this CPU multiplies it.
    """
    group = Rows(np.ascontiguousarray(rows, np.float32))
    bfloat16 = multiplies_bfloat16() if bfloat16 is None else bfloat16
    found, _ = join(group, group, k, bfloat16=bfloat16)
    own = np.repeat(np.arange(len(rows)), np.diff(found.starts))
    similarity = pair_similarities(group, group, own, found.ids)
    return ranked(found.starts, found.ids, similarity, k)


def _starts(counts: Array) -> Array:
    starts = np.zeros(len(counts) + 1, np.int64)
    np.cumsum(counts, out=starts[1:])
    return starts
