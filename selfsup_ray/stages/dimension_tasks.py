"""The tasks of the stage `dimension`: patches of a shard, a set of points, k-means for one k.

Each writes its file whole and may run twice; a file that exists is kept.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path

import numpy as np

from selfsup_ray.artifacts import Array, ShardedArray, whole_file, write_json
from selfsup_ray.cluster.shards import map_shards
from selfsup_ray.data.corpus import Corpus
from selfsup_ray.errors import ConfigError
from selfsup_ray.ops.intrinsic_dimension import (
    PointSet,
    centroid_distance,
    distinct,
    levina_bickel,
    neighbor_distances,
    point_set,
    unit_points,
)
from selfsup_ray.ops.patch_sampling import (
    PatchSums,
    Positions,
    drawn_positions,
    num_positions,
    patch_sums,
    patches_at,
)
from selfsup_ray.ops.whitening import whitening_matrix
from selfsup_ray.stages.dimension_config import DimensionConfig

DRAWS = 65_536
"""Draws whose places are computed at a time."""
IMAGES = 256
"""Images read at a time."""


@dataclass(frozen=True)
class Work:
    """What the tasks share: the corpus, the config, the folder their files are in."""

    corpus: Corpus
    config: DimensionConfig
    out: Path

    @property
    def dim(self) -> int:
        """Values of a patch, d."""
        return 3 * self.config.patch_size**2

    @property
    def per_image(self) -> int:
        """Positions of a patch in an image."""
        side = self.corpus.image_size
        return num_positions(side, side, patch_size=self.config.patch_size)

    @property
    def num_points(self) -> int:
        """Patches that are drawn, n."""
        return min(self.config.points, len(self.corpus) * self.per_image)

    @property
    def units(self) -> list[tuple[PointSet, int]]:
        """Every (set, k); the largest k first, so that no long task is left for the end."""
        return [(name, k) for k in reversed(self.config.all_k) for name in self.config.sets]

    def draws(self) -> Iterator[tuple[slice, Positions]]:
        """Yield (draws, their positions) in order, DRAWS at a time."""
        side, config = self.corpus.image_size, self.config
        for start in range(0, self.num_points, DRAWS):
            stop = min(start + DRAWS, self.num_points)
            at = drawn_positions(
                start,
                stop,
                num_images=len(self.corpus),
                height=side,
                width=side,
                patch_size=config.patch_size,
                seed=config.seed,
            )
            yield slice(start, stop), at

    def owner(self, image: Array) -> Array:
        """Return the shard of each image id."""
        return np.asarray(np.searchsorted(self.corpus.offsets, image, side="right") - 1)

    def distance_path(self, name: str, k: int) -> Path:
        """Return the file of one k-means."""
        return self.out / "distances" / name / f"{k:06d}.json"

    def estimate_path(self, name: str) -> Path:
        """Return the file of Levina and Bickel's estimate of a set."""
        return self.out / "estimates" / f"{name}.json"

    def points_path(self, name: str) -> Path:
        """Return the file of a set's unit vectors."""
        return self.out / "points" / f"{name}.npy"

    def points(self, name: str) -> Array:
        """Return a set's unit vectors as a memory map."""
        return np.load(self.points_path(name), mmap_mode="r")  # type: ignore[no-any-return]


def compute(work: Work) -> None:
    """Write the file of every unit and of every set's estimate that is not there yet."""
    config = work.config
    units = [i for i, unit in enumerate(work.units) if not work.distance_path(*unit).exists()]
    estimates = [i for i, s in enumerate(config.sets) if not work.estimate_path(s).exists()]
    wanted = {work.units[i][0] for i in units} | {config.sets[i] for i in estimates}
    absent = [
        i for i, s in enumerate(config.sets) if s in wanted and not work.points_path(s).exists()
    ]
    if absent:
        _draw(work)
        _run(_write_points, work, absent, label="dimension: sets")
    _run(_write_distance, work, units, label="dimension: k-means")
    _run(_write_estimate, work, estimates, label="dimension: neighbors")


def _run(
    task: Callable[[Work, int], None], work: Work, missing: Sequence[int], *, label: str
) -> None:
    for _ in map_shards(partial(task, work), missing, work.config.resources, label=label):
        pass


def _draw(work: Work) -> None:
    """Write the drawn patches and the sums over all patches, shard by shard of the corpus."""
    n, d = work.corpus.num_shards, work.dim
    rows = np.zeros(n, np.int64)
    for _, at in work.draws():
        rows += np.bincount(work.owner(at.image), minlength=n)
    drawn = ShardedArray.create(
        work.out / "drawn", shard_rows=rows.tolist(), row_shape=(d,), dtype="uint8"
    )
    sums = ShardedArray.create(
        work.out / "sums", shard_rows=[d + 1] * n, row_shape=(d,), dtype="int64"
    )
    missing = sorted({*drawn.unwritten(), *sums.unwritten()})
    _run(_draw_shard, work, missing, label="dimension: patches")


def _draw_shard(work: Work, shard: int) -> None:
    """Write the patches drawn from one shard in the order of their draws, and its sums."""
    corpus, s, d = work.corpus, work.config.patch_size, work.dim
    drawn, sums = (ShardedArray.open(work.out / name) for name in ("drawn", "sums"))
    at = _drawn_from(work, shard)
    patches = np.empty((len(at), d), np.uint8)
    whole = PatchSums(0, np.zeros(d, np.int64), np.zeros((d, d), np.int64))
    for start in range(0, corpus.shard_rows[shard], IMAGES):
        images = corpus.shard_images(shard, start, start + IMAGES)
        whole += patch_sums(images, patch_size=s)
        here = np.flatnonzero((at.image >= start) & (at.image < start + len(images)))
        near = Positions(at.image[here] - start, at.row[here], at.column[here])
        patches[here] = patches_at(images.numpy(), near, patch_size=s)
    drawn.write_shard(shard, patches)
    sums.write_shard(shard, np.concatenate([whole.total[None], whole.products]))


def _drawn_from(work: Work, shard: int) -> Positions:
    """Return the positions drawn from one shard, in order; images count from its first."""
    mine = [at.chosen(work.owner(at.image) == shard) for _, at in work.draws()]
    return Positions(
        np.concatenate([at.image for at in mine]) - int(work.corpus.offsets[shard]),
        np.concatenate([at.row for at in mine]),
        np.concatenate([at.column for at in mine]),
    )


def _patches(work: Work) -> Array:
    """Return the drawn patches (n, d) float32 in [0, 1], in the order of the draws."""
    drawn = ShardedArray.open(work.out / "drawn")
    out, read = np.empty((work.num_points, work.dim), np.float32), drawn.offsets[:-1].copy()
    for draws, at in work.draws():
        owner = work.owner(at.image)
        # A shard's rows are in the order of the draws: the next ones are this block's.
        order = np.argsort(owner, kind="stable")
        counts = np.bincount(owner, minlength=drawn.num_shards)
        rows = np.concatenate([np.arange(a, a + c) for a, c in zip(read, counts, strict=True)])
        out[draws][order] = drawn.rows(rows)
        read += counts
    out /= 255
    return out


def _matrix(work: Work) -> Array:
    """Return the whitening matrix of all patches of the corpus."""
    sums = ShardedArray.open(work.out / "sums")
    whole = np.zeros((work.dim + 1, work.dim), np.int64)
    for i in range(sums.num_shards):
        whole += sums.shard(i)
    count = len(work.corpus) * work.per_image
    moments = PatchSums(count, whole[0], whole[1:]).moments(scale=1 / 255, shift=0.0)
    config = work.config
    return whitening_matrix(
        moments.scatter / count, regularization=config.regularization, kind=config.whitening
    )


def _write_points(work: Work, i: int) -> None:
    """Write the unit vectors of one set."""
    config = work.config
    name = config.sets[i]
    made = point_set(name, _patches(work), _matrix(work), seed=config.seed)
    points = unit_points(made, smallest_share=config.smallest_share)
    with whole_file(work.points_path(name)) as temporary, open(temporary, "wb") as file:
        np.save(file, points)


def _write_distance(work: Work, i: int) -> None:
    """Write the distances of one (set, k)."""
    (name, k), config, began = work.units[i], work.config, time.monotonic()
    points = work.points(name)
    if k >= len(points):
        raise ConfigError(
            f"dimension: the set {name} has {len(points):,} points that are not zero, too few for "
            f"{k} centroids. Lower dimension.ks, or leave {name} out of dimension.sets."
        )
    found = centroid_distance(
        points,
        k,
        points_per_centroid=config.points_per_centroid,
        iterations=config.iterations,
        seed=config.seed,
        threads=max(1, int(config.resources.cpus)),
        precision=config.precision,
        device="cuda" if config.resources.gpus else "cpu",
    )
    seconds = round(time.monotonic() - began, 3)
    write_json(work.distance_path(name, k), {**asdict(found), "seconds": seconds})


def _write_estimate(work: Work, i: int) -> None:
    """Write Levina and Bickel's estimate of one set."""
    config, name = work.config.levina_bickel, work.config.sets[i]
    points = distinct(np.array(work.points(name)))
    near = neighbor_distances(points, points[: config.queries], k=config.last)
    found = levina_bickel(near, first=config.first, last=config.last)
    write_json(work.estimate_path(name), {**asdict(found), "distinct": len(points)})
