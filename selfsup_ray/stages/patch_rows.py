"""Drawn patches as files: one pass over the maps, and rows put in the order they were drawn."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
from torch import Tensor

from selfsup_ray.artifacts import Array, ShardedArray
from selfsup_ray.cluster.shards import map_shards
from selfsup_ray.config import Resources
from selfsup_ray.errors import ArtifactError, ConfigError
from selfsup_ray.ops.patch_sampling import (
    PatchSums,
    Positions,
    drawn_positions,
    norms,
    num_positions,
    patch_moments,
    patch_sums,
    patches_at,
    random_patches,
)
from selfsup_ray.ops.pca import Moments, block_moments, merged_moments
from selfsup_ray.stages.patch_maps import Maps
from selfsup_ray.stages.reduce import one_blas_thread
from selfsup_ray.storage import remove_tree

ROWS = 65_536
"""Patches in one file of the sample."""
DRAWS = 1 << 20
"""Positions drawn at a time."""
SPARE = 0.01
"""Share of positions drawn beyond what is asked for, as some patches are passed over."""


@dataclass(frozen=True)
class Drawing:
    """What is drawn, in plain numbers: a patch of levels x is scale * x + shift."""

    count: int
    patch_size: int
    min_norm: float
    scale: float
    shift: float
    seed: int
    with_moments: bool
    resources: Resources


def require_positions(maps: Maps, drawing: Drawing) -> None:
    """Raise ConfigError unless the maps have room for the patches that are asked for."""
    _, height, width = maps.shape
    if drawing.patch_size > min(height, width):
        raise ConfigError(
            f"whiten.patch_size={drawing.patch_size}, but the images are {width} x {height} "
            f"pixels. Set it to {min(height, width)} or less."
        )
    total = _positions(maps, drawing)
    if drawing.count > total:
        raise ConfigError(
            f"whiten.patches={drawing.count:,}, but {sum(maps.shard_rows):,} images of {width} x "
            f"{height} pixels have only {total:,} patches. Lower it."
        )


def _positions(maps: Maps, drawing: Drawing) -> int:
    _, height, width = maps.shape
    per_image = num_positions(height, width, patch_size=drawing.patch_size)
    return sum(maps.shard_rows) * per_image


def remove_rounds(out: Path) -> None:
    """Remove what `write_patches` leaves beside the sample; only once the stage has finished."""
    for path in sorted(out.glob("round*")):
        remove_tree(path)


def write_patches(maps: Maps, drawing: Drawing, out: Path) -> tuple[Moments | None, dict[str, int]]:
    """Write `out/patches`: the first patches of the random order that are not too faint.

    Returns the moments of all patches when asked for, and counts. The maps are read once, and
    again only where so many patches are faint that more have to be drawn. What is left beside the
    sample goes with `remove_rounds`.
    """
    rounds: list[_Round] = []
    drawn = kept = 0
    while kept < drawing.count:
        rounds.append(_Round.drawn(maps, drawing, out, start=drawn, kept=kept, index=len(rounds)))
        rounds[-1].run(maps, drawing)
        drawn = rounds[-1].stop
        kept += rounds[-1].num_kept
    _assemble(rounds, drawing, out)
    moments = rounds[0].moments(maps, drawing) if drawing.with_moments else None
    return moments, {"drawn": drawn, "faint": drawn - kept}


class _Round:
    """Draws [start, stop) of the random order: where they are, and once run, their patches.

    Files, each cut by the maps' shards: `at` (m, 4) int64, draw number and position in its shard;
    `found` (m, d) float32; `kept` (m,) bool; `sums`, the moments of all patches of the shard.
    """

    def __init__(self, path: Path, start: int, stop: int) -> None:
        self.path, self.start, self.stop = path, start, stop

    @classmethod
    def drawn(
        cls, maps: Maps, drawing: Drawing, out: Path, *, start: int, kept: int, index: int
    ) -> _Round:
        """Draw as many as are expected to be enough, and write where they are.

        Raises ConfigError when no position is left to draw.
        """
        total = _positions(maps, drawing)
        if start == total:
            raise ConfigError(
                f"whiten.patches={drawing.count:,}, but only {kept:,} of the {total:,} patches "
                f"have a norm of whiten.min_norm={drawing.min_norm} or more. Lower either."
            )
        share = max(kept / start, 0.01) if start else 1.0
        wanted = -(-(drawing.count - kept) * (1 + SPARE) // share)
        made = cls(out / f"round{index}", start, min(total, start + int(wanted)))
        made._write_positions(maps, drawing)
        return made

    def _write_positions(self, maps: Maps, drawing: Drawing) -> None:
        _, height, width = maps.shape
        rows = np.asarray(maps.shard_rows, np.int64)
        offsets = np.concatenate([[0], np.cumsum(rows)])
        table = np.empty((self.stop - self.start, 4), np.int64)
        owner = np.empty(len(table), np.int32)
        for start in range(self.start, self.stop, DRAWS):
            stop = min(start + DRAWS, self.stop)
            at = drawn_positions(
                start,
                stop,
                num_images=int(offsets[-1]),
                height=height,
                width=width,
                patch_size=drawing.patch_size,
                seed=drawing.seed,
            )
            here = slice(start - self.start, stop - self.start)
            owner[here] = np.searchsorted(offsets, at.image, side="right") - 1
            inside = at.image - offsets[owner[here]]
            table[here] = np.stack([np.arange(start, stop), inside, at.row, at.column], axis=1)
        order = np.argsort(owner, kind="stable")
        counts = np.bincount(owner, minlength=len(rows))
        made = self._array("at", counts.tolist(), (4,), "int64")
        for i, some in enumerate(np.split(order, np.cumsum(counts)[:-1])):
            if not made.is_written(i):
                made.write_shard(i, table[some])

    def _array(
        self, name: str, rows: list[int], row_shape: tuple[int, ...], dtype: str
    ) -> ShardedArray:
        return ShardedArray.create(
            self.path / name, shard_rows=rows, row_shape=row_shape, dtype=dtype
        )

    def array(self, name: str) -> ShardedArray:
        """Return one of the arrays of files."""
        return ShardedArray.open(self.path / name)

    def run(self, maps: Maps, drawing: Drawing) -> None:
        """Cut out the patches and add up the moments, shard by shard."""
        at, dim = self.array("at"), maps.shape[0] * drawing.patch_size**2
        rows = list(at.shard_rows)
        self._array("found", rows, (dim,), "float32")
        kept = self._array("kept", rows, (), "bool")
        if self.with_moments(drawing):
            self._array("sums", [dim + 2] * len(rows), (dim,), "float64")
        missing = kept.unwritten()
        work = partial(_cut_shard, maps, drawing, self)
        for _ in map_shards(work, missing, drawing.resources, label="whiten"):
            pass

    def with_moments(self, drawing: Drawing) -> bool:
        """Return whether this round adds up the moments too: the first one, if any."""
        return drawing.with_moments and self.start == 0

    def write_shard(self, shard: int, found: Array, drawing: Drawing, sums: Array | None) -> None:
        """Write the patches of a shard, which of them are kept, and the moments; `kept` last."""
        if not np.isfinite(found).all():
            raise ArtifactError(
                f"Shard {shard} of the maps holds a number that is not finite. Look at the "
                f"training of the layers before for divergence."
            )
        if sums is not None:
            self.array("sums").write_shard(shard, sums)
        self.array("found").write_shard(shard, found)
        self.array("kept").write_shard(shard, norms(found) >= drawing.min_norm)

    @property
    def num_kept(self) -> int:
        """Patches of this round that are not too faint."""
        kept = self.array("kept")
        return sum(int(kept.shard(i).sum()) for i in range(kept.num_shards))

    def moments(self, maps: Maps, drawing: Drawing) -> Moments:
        """Return the moments of all patches of the maps, from the sums of the shards."""
        stored = self.array("sums")
        parts = (_Sums.of(stored.shard(i)) for i in range(stored.num_shards))
        found = [part for part in parts if part.count]
        if not maps.is_bytes:
            return merged_moments(Moments(s.count, s.first, s.second) for s in found)
        exact = [
            PatchSums(s.count, s.first.astype(np.int64), s.second.astype(np.int64)) for s in found
        ]
        return sum(exact[1:], exact[0]).moments(scale=drawing.scale, shift=drawing.shift)


@dataclass(frozen=True)
class _Sums:
    """Of a shard: count, and sums (d,) and (d, d) of levels, or mean and scatter of floats.

    On disk (d + 2, d) float64, which holds sums of whole numbers exactly below 2^53.
    """

    count: int
    first: Array
    second: Array

    @classmethod
    def of(cls, rows: Array) -> _Sums:
        return cls(int(rows[0, 0]), rows[1], rows[2:])

    def rows(self) -> Array:
        count = np.full((1, len(self.first)), self.count, np.float64)
        return np.concatenate([count, self.first[None], self.second], dtype=np.float64)


def _cut_shard(maps: Maps, drawing: Drawing, made: _Round, shard: int) -> None:
    """Read one shard of the maps once: cut out its drawn patches and add up its moments."""
    table = np.asarray(made.array("at").shard(shard))
    order = np.argsort(table[:, 1], kind="stable")  # draws by map; found keeps the draws' order
    at = Positions(table[order, 1], table[order, 2], table[order, 3])
    found = np.empty((len(table), maps.shape[0] * drawing.patch_size**2), np.float32)
    parts, first = list[PatchSums | Moments](), 0
    with_moments = made.with_moments(drawing)
    for batch in maps.batches(shard):
        if not len(batch):
            continue
        low, high = np.searchsorted(at.image, [first, first + len(batch)])
        here = at.chosen(slice(low, high))
        here = Positions(here.image - first, here.row, here.column)
        found[order[low:high]] = _cut(batch, here, maps, drawing)
        if with_moments:
            parts.append(_added_up(batch, maps, drawing))
        first += len(batch)
    assert first == maps.shard_rows[shard], f"shard {shard}: {first} maps read"
    made.write_shard(shard, found, drawing, _shard_sums(parts, found) if with_moments else None)


def _cut(batch: Tensor, at: Positions, maps: Maps, drawing: Drawing) -> Array:
    patches = patches_at(batch.cpu().numpy(), at, patch_size=drawing.patch_size)
    if not maps.is_bytes:
        return patches
    return patches * np.float32(drawing.scale) + np.float32(drawing.shift)


def _added_up(batch: Tensor, maps: Maps, drawing: Drawing) -> PatchSums | Moments:
    threads = max(1, int(drawing.resources.cpus))
    if maps.is_bytes:
        return patch_sums(batch, patch_size=drawing.patch_size, threads=threads)
    return patch_moments(batch, patch_size=drawing.patch_size, threads=threads)


def _shard_sums(parts: list[PatchSums | Moments], found: Array) -> Array:
    """Return the rows of `sums` of one shard from its batches; zeros without any."""
    exact = [part for part in parts if isinstance(part, PatchSums)]
    others = [part for part in parts if isinstance(part, Moments)]
    if exact:
        whole = sum(exact[1:], exact[0])
        return _Sums(whole.count, whole.total, whole.products).rows()
    if others:
        merged = merged_moments(others)
        return _Sums(merged.count, merged.mean, merged.scatter).rows()
    d = found.shape[1]
    return _Sums(0, np.zeros(d), np.zeros((d, d))).rows()


def _assemble(rounds: list[_Round], drawing: Drawing, out: Path) -> None:
    """Write the first kept patches, in the order they were drawn, as the sample."""
    dim = rounds[0].array("found").shape[1]
    sample = _sample_array(out, drawing.count, dim)
    sources = list(_sources(rounds, drawing.count))
    for i in range(sample.num_shards):
        if sample.is_written(i):
            continue
        low, high = int(sample.offsets[i]), int(sample.offsets[i + 1])
        rows = np.empty((high - low, dim), np.float32)
        for source in sources:
            first, last = np.searchsorted(source.to, [low, high])
            if first < last:
                patches = source.found.shard(source.shard)[source.rows[first:last]]
                rows[source.to[first:last] - low] = patches
        sample.write_shard(i, rows)


@dataclass(frozen=True)
class _Source:
    """Rows of one file of found patches, and the rows of the sample they become, ascending."""

    found: ShardedArray
    shard: int
    rows: Array
    to: Array


def _sources(rounds: list[_Round], count: int) -> Iterator[_Source]:
    before = 0
    for made in rounds:
        at, kept, found = made.array("at"), made.array("kept"), made.array("found")
        is_kept = np.zeros(made.stop - made.start, bool)
        for i in range(at.num_shards):
            is_kept[at.shard(i)[:, 0] - made.start] = kept.shard(i)
        rank = before + np.cumsum(is_kept) - 1
        for i in range(at.num_shards):
            rows = np.flatnonzero(kept.shard(i))
            to = rank[at.shard(i)[rows, 0] - made.start]
            wanted = to < count
            yield _Source(found, i, rows[wanted], to[wanted])
        before += int(is_kept.sum())


def _sample_array(out: Path, count: int, dim: int) -> ShardedArray:
    rows = [min(ROWS, count - start) for start in range(0, count, ROWS)]
    return ShardedArray.create(out / "patches", shard_rows=rows, row_shape=(dim,), dtype="float32")


def write_noise(kind: str, dim: int, drawing: Drawing, out: Path) -> None:
    """Write `out/patches`: Gaussian or uniform noise in place of patches, (count, dim)."""
    sample = _sample_array(out, drawing.count, dim)
    missing = sample.unwritten()
    work = partial(_write_noise, kind, drawing.seed, sample.path.absolute())
    for _ in map_shards(work, missing, drawing.resources, label="whiten"):
        pass


def _write_noise(kind: str, seed: int, path: Path, shard: int) -> None:
    sample = ShardedArray.open(path)
    rows, dim = sample.shard_rows[shard], sample.shape[1]
    sample.write_shard(shard, random_patches(rows, dim, kind=kind, seed=seed, block=shard))


def sample_moments(path: Path, resources: Resources) -> Moments:
    """Return the moments of the patches in a folder, merged file by file in their order."""
    sample = ShardedArray.open(path)
    found: dict[int, Moments] = {}
    work = partial(_file_moments, path.absolute())
    shards = range(sample.num_shards)
    for i, moments in map_shards(work, shards, resources, label="whiten: covariance"):
        found[i] = moments
    return merged_moments(found[i] for i in shards)


def _file_moments(path: Path, shard: int) -> Moments:
    with one_blas_thread():
        return block_moments(ShardedArray.open(path).shard(shard))
