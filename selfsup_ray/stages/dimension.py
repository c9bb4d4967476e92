"""The stage `dimension`: how many dimensions the patches of a corpus fill (Brutzkus et al. 2022).

Four steps, each kept when a run is interrupted: one pass over the shards draws the patches and adds
up their covariance; five sets of unit vectors are made of them; k-means runs for every (set, k), a
queue of tasks; Levina and Bickel's estimate is made for each set. The published figure shows the
SQUARED distance to the nearest centroid; both are written.
"""

from __future__ import annotations

import csv
import logging
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from selfsup_ray.artifacts import (
    begin,
    finish,
    read_done,
    read_json,
    require_disk,
    whole_file,
    write_json,
)
from selfsup_ray.data.corpus import Corpus
from selfsup_ray.errors import ConfigError
from selfsup_ray.ops.intrinsic_dimension import PointSet
from selfsup_ray.stages.dimension_config import DimensionConfig
from selfsup_ray.stages.dimension_tasks import Work, compute
from selfsup_ray.storage import located, remove_tree

if TYPE_CHECKING:
    from selfsup_ray.tracking import Tracker

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class PatchDimension:
    """Handle on a finished `dimension`."""

    path: Path
    table: dict[str, Any]

    @classmethod
    def open(cls, path: Path | str) -> PatchDimension:
        """Return the finished analysis in a folder.

        Raises ArtifactError when the stage has not finished there.
        """
        read_done(located(path))
        return cls(located(path), read_json(located(path) / "dimension.json"))

    @property
    def fingerprint(self) -> str:
        """Hash of the config and the inputs."""
        return read_done(self.path).fingerprint

    def distances(
        self, name: PointSet, *, number: str = "mean_squared"
    ) -> tuple[list[int], list[float]]:
        """Return the numbers of centroids, ascending, and a set's distance with each.

        number: mean_squared (the published one), median_squared, or mean of the distance itself.
        """
        by_k = self.table["distances"][name]
        ks = sorted(int(k) for k in by_k)
        return ks, [float(by_k[str(k)][number]) for k in ks]

    def dimension(self, name: PointSet) -> float:
        """Return Levina and Bickel's estimate for a set."""
        return float(self.table["levina_bickel"][name]["dimension"])


def patch_dimension(
    corpus: Corpus,
    config: DimensionConfig | None = None,
    *,
    out: Path | str,
    tracker: Tracker | None = None,
) -> PatchDimension:
    """Return the handle on distances to centroids and estimates for the patches of a corpus.

    The numbers do not depend on the number of workers or on interruptions. Raises ConfigError when
    the images are smaller than a patch, or the points too few for the centroids.
    """
    config, out, began = config or DimensionConfig(), located(out), time.monotonic()
    work = Work(corpus, config, out.absolute())
    _require_points(work)
    inputs = {"corpus": corpus.fingerprint}
    if begin(out, stage="dimension", config=config, inputs=inputs):
        log.info("dimension: %s is current", out)
        return PatchDimension.open(out)
    require_disk(out, size_bytes=work.num_points * work.dim * (4 * len(config.sets) + 1))
    compute(work)
    table = _table(work)
    _write_csv(out / "distances.csv", table)
    write_json(out / "dimension.json", table)
    for name in ("drawn", "sums", "points"):
        remove_tree(out / name)
    facts, seconds = _facts(work, table), time.monotonic() - began
    if tracker is not None:
        tracker.log(list(_records(table)))
    finish(out, stage="dimension", config=config, inputs=inputs, seconds=seconds, facts=facts)
    shown = ", ".join(f"{name} {facts['levina_bickel'][name]:.1f}" for name in config.sets)
    text = "dimension: %s patches of %s values, dimension by neighbors: %s, %.1f s"
    log.info(text, f"{work.num_points:,}", work.dim, shown, seconds)
    return PatchDimension.open(out)


def _require_points(work: Work) -> None:
    config = work.config
    if not work.per_image:
        raise ConfigError(
            f"dimension.patch_size={config.patch_size}, but the images have "
            f"{work.corpus.image_size} pixels a side. Lower it, or ingest larger images."
        )
    kept = int(work.num_points * (1 - config.smallest_share))
    wanted = max(config.all_k[-1], config.levina_bickel.last) + 1
    if kept < wanted:
        raise ConfigError(
            f"dimension has {kept:,} points (dimension.points={config.points:,}, "
            f"{len(work.corpus):,} images), but {wanted:,} are the least for "
            f"{config.all_k[-1]} centroids. Add images, raise dimension.points, or lower "
            f"dimension.ks."
        )


def _table(work: Work) -> dict[str, Any]:
    """Return all results: distances by set and k, estimates by set."""
    config = work.config
    distances: dict[str, dict[str, Any]] = {}
    for name in config.sets:
        found = {k: read_json(work.distance_path(name, k)) for k in config.all_k}
        numbers = ("mean_squared", "median_squared", "mean")
        distances[name] = {str(k): {n: one[n] for n in numbers} for k, one in found.items()}
    estimates = {name: read_json(work.estimate_path(name)) for name in config.sets}
    return {"distances": distances, "levina_bickel": estimates}


def _write_csv(path: Path, table: Mapping[str, Any]) -> None:
    with whole_file(path) as temporary, open(temporary, "w", newline="") as file:
        lines = csv.writer(file)
        lines.writerow(["set", "k", "mean_squared", "median_squared", "mean"])
        for name, by_k in table["distances"].items():
            for k, found in by_k.items():
                lines.writerow([name, k, *(repr(value) for value in found.values())])


def _records(table: Mapping[str, Any]) -> Iterator[dict[str, Any]]:
    """Yield one record for each k, whose step is k."""
    sets = table["distances"]
    for k in next(iter(sets.values())):
        yield {"step": int(k), **{name: by_k[k]["mean_squared"] for name, by_k in sets.items()}}


def _facts(work: Work, table: Mapping[str, Any]) -> dict[str, Any]:
    largest = str(work.config.all_k[-1])
    return {
        "points": work.num_points,
        "patch_dim": work.dim,
        "largest_k": int(largest),
        "levina_bickel": {n: e["dimension"] for n, e in table["levina_bickel"].items()},
        "mean_squared": {
            n: by_k[largest]["mean_squared"] for n, by_k in table["distances"].items()
        },
    }
