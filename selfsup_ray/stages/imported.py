"""Published features and graphs brought into folders that the stages read, shard by shard."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any, Literal

import numpy as np

from selfsup_ray.artifacts import Array, ShardedArray, begin, finish, require_disk
from selfsup_ray.cluster.shards import map_shards
from selfsup_ray.config import NonNegative, Positive, Resources, Share, config
from selfsup_ray.data.published import FeatureBlocks, open_rows, sampled_digest
from selfsup_ray.data.published_graph import (
    StoredGraph,
    checked_rows,
    open_graph,
    self_column,
    without_column,
)
from selfsup_ray.errors import ArtifactError, ConfigError
from selfsup_ray.ops.pca import unit_rows
from selfsup_ray.stages.embed import Embeddings
from selfsup_ray.stages.graph import (
    Features,
    Graph,
    measure_recall,
    place_of,
    require_recall,
)
from selfsup_ray.storage import located

log = logging.getLogger(__name__)

HIGHEST_FLOAT16 = 65504.0


@config
class ImportFeaturesConfig:
    """How a matrix of features becomes an embeddings folder."""

    dim: Positive | None = None
    """Numbers in a row; only a raw matrix needs it."""
    rows: Positive | None = None
    """Only the first that many rows."""
    normalize: bool = True
    """Divide each row by its length, as the graph wants it; published features are not unit rows.
    False keeps them as they are, for `reduce` to center first."""
    dtype: Literal["float32", "float16"] = "float32"
    """How rows are stored. `float16` takes half the disk; all that reads them computes in float32
    and more, on numbers off by up to 0.05 %."""
    shard_rows: Positive = 65_536
    """Rows of a shard: what a worker holds."""
    resources: Resources = Resources(workers=0)
    """Workers that convert one shard at a time each; 0 converts in this process."""


@config
class ImportGraphConfig:
    """How a published graph becomes a graph folder."""

    k: Positive | None = None
    """Entries of a row in the file, the image itself included; None reads it from the name."""
    columns: Positive | None = None
    """Only the first that many entries of each row, the nearest; at least 2."""
    shard_rows: Positive = 65_536
    """Rows of a shard, unless `features` gives its own."""
    recall_sample: Positive = 1000
    """Images whose lists are checked exactly, where the features are given too."""
    min_recall: Share | None = None
    """The import stops with an error when the recall is lower; needs the features."""
    seed: NonNegative = 0
    """Chooses those images."""
    resources: Resources = Resources(workers=0)
    """Workers that convert one shard at a time each; 0 converts in this process."""


def import_features(
    paths: Path | Sequence[Path],
    config: ImportFeaturesConfig | None = None,
    *,
    out: Path | str,
) -> Embeddings:
    """Return a raw float32 matrix, HDF5 blocks or a faiss index as embeddings, copied once.

    Labels of HDF5 blocks come along as the array `labels` (N,). Shards that an interrupted import
    wrote are kept. Raises ArtifactError when a file does not fit or a number is not finite.
    """
    config, out, began = config or ImportFeaturesConfig(), located(out), time.monotonic()
    files = [Path(paths)] if isinstance(paths, str | Path) else [located(path) for path in paths]
    inputs = {"source": sampled_digest(files)}
    if begin(out, stage="embed", config=config, inputs=inputs):
        return Embeddings.open(out)
    facts = copy_features(files, config, out)
    seconds = time.monotonic() - began
    finish(out, stage="embed", config=config, inputs=inputs, seconds=seconds, facts=facts)
    log.info("import: %s rows, d=%d, %.1f s", f"{facts['images']:,}", facts["dim"], seconds)
    return Embeddings.open(out)


def copy_features(files: Sequence[Path], config: ImportFeaturesConfig, out: Path) -> dict[str, Any]:
    """Write the arrays `rows`, and `labels` where HDF5 blocks have them; return their facts."""
    n, dim = open_rows(files, dim=config.dim, num_rows=config.rows).shape
    require_disk(out, size_bytes=n * dim * np.dtype(config.dtype).itemsize)
    rows = _created(out / "rows", n, (dim,), config.dtype, config.shard_rows)
    missing = rows.unwritten()
    work = partial(_copy_rows, [path.absolute() for path in files], rows.path.absolute(), config)
    for _ in map_shards(work, missing, config.resources, label="import"):
        pass
    facts: dict[str, Any] = {"images": n, "dim": dim, "files": [path.name for path in files]}
    facts["labels"] = _import_labels(files, out / "labels", rows)
    return facts


def _created(
    path: Path, n: int, row_shape: tuple[int, ...], dtype: str, rows: int | Sequence[int]
) -> ShardedArray:
    sizes = _cut(n, rows) if isinstance(rows, int) else list(rows)
    return ShardedArray.create(path, shard_rows=sizes, row_shape=row_shape, dtype=dtype)


def _cut(n: int, rows: int) -> list[int]:
    return [min(rows, n - start) for start in range(0, n, rows)]


def _copy_rows(files: list[Path], out: Path, config: ImportFeaturesConfig, shard: int) -> None:
    """Write one shard of rows."""
    array = ShardedArray.open(out)
    start, stop = int(array.offsets[shard]), int(array.offsets[shard + 1])
    rows = open_rows(files, dim=config.dim, num_rows=config.rows).read(start, stop)
    finite = np.isfinite(rows).all(axis=1)
    if not finite.all():
        raise ArtifactError(
            f"{files[0]}: row {start + int(finite.argmin()):,} holds a number that is not finite. "
            f"It is damaged, or no float32 matrix of {array.shape[1]} numbers a row."
        )
    rows = unit_rows(rows) if config.normalize else rows
    if config.dtype == "float16" and np.abs(rows).max(initial=0) > HIGHEST_FLOAT16:
        raise ArtifactError(
            f"{files[0]} holds numbers up to {np.abs(rows).max():,.0f}, but float16 ends at "
            f"{HIGHEST_FLOAT16:,.0f}. Import it with dtype float32, or as unit rows."
        )
    array.write_shard(shard, rows)


def _import_labels(files: Sequence[Path], out: Path, rows: ShardedArray) -> bool:
    """Write the labels of HDF5 blocks, cut as the rows are; return whether there were any."""
    if files[0].suffix not in (".h5", ".hdf5"):
        return False
    blocks = FeatureBlocks(files)
    labels = _created(out, len(rows), (), "int64", rows.shard_rows)
    for i in range(labels.num_shards):
        labels.write_shard(i, blocks.labels(int(labels.offsets[i]), int(labels.offsets[i + 1])))
    return True


def import_graph(
    path: Path | str,
    config: ImportGraphConfig | None = None,
    *,
    out: Path | str,
    similarity: Path | None = None,
    features: Features | None = None,
) -> Graph:
    """Return a published graph as a graph folder: k - 1 neighbors, the image itself left out.

    The image is found by value, since an exact duplicate may stand before it; a row without it
    gives up its last entry. What is left out is kept in `dropped`, so that the export gives the
    same bytes back. features: the unit rows of the same images; with them the recall is measured.
    Raises ConfigError when it is below `min_recall`, or that is asked for without features.
    """
    config, out, began = config or ImportGraphConfig(), located(out), time.monotonic()
    path = located(path)
    # A worker opens the files again: a memory map sent to it would be read and sent whole.
    opened = partial(
        open_graph, path.absolute(), k=config.k, similarity=similarity, columns=config.columns
    )
    stored = opened()
    n, k = stored.shape
    if config.min_recall is not None and features is None:
        raise ConfigError(
            f"{path}: min_recall={config.min_recall} is asked for, but recall is measured on the "
            f"features. Give the features of the same images, or leave min_recall out."
        )
    if k < 2:
        raise ArtifactError(f"{path} lists {k} image a row, itself included: no neighbor is left.")
    if features is not None and len(features.array) != n:
        raise ArtifactError(f"{path} has {n:,} rows, the features {len(features.array):,}.")
    inputs = {"source": sampled_digest([stored.path, stored.similarity_path])}
    if features is not None:
        inputs["features"] = features.fingerprint
    if begin(out, stage="graph", config=config, inputs=inputs):
        return Graph.open(out)
    require_disk(out, size_bytes=n * (8 * k + 8))
    ids = _import_lists(opened, config, out, features)
    facts: dict[str, Any] = {"file": path.name, "stored_k": k}
    if features is not None:
        facts |= measure_recall(features.array, ids, sample=config.recall_sample, seed=config.seed)
        facts |= place_of(features, out)
        require_recall(out, facts["recall"], config.min_recall or 0, key="min_recall")
    seconds = time.monotonic() - began
    finish(out, stage="graph", config=config, inputs=inputs, seconds=seconds, facts=facts)
    return Graph.open(out)


def _import_lists(
    opened: Callable[[], StoredGraph],
    config: ImportGraphConfig,
    out: Path,
    features: Features | None,
) -> ShardedArray:
    """Write the shards that are missing; return the ids."""
    n, k = opened().shape
    rows = config.shard_rows if features is None else features.array.shard_rows
    arrays = {
        "dropped": _created(out / "dropped", n, (2,), "int32", rows),
        "dropped_similarity": _created(out / "dropped_similarity", n, (), "float32", rows),
        "similarity": _created(out / "similarity", n, (k - 1,), "float32", rows),
        "ids": _created(out / "ids", n, (k - 1,), "int32", rows),
    }
    ids = arrays["ids"]
    missing = sorted({i for array in arrays.values() for i in array.unwritten()})
    work = partial(_copy_lists, opened, out.absolute())
    for _ in map_shards(work, missing, config.resources, label="import"):
        pass
    return ids


def _copy_lists(opened: Callable[[], StoredGraph], out: Path, shard: int) -> None:
    """Write one shard of a graph."""
    array = ShardedArray.open(out / "ids")
    start, stop = int(array.offsets[shard]), int(array.offsets[shard + 1])
    ids, similarity = checked_rows(opened(), start, stop)
    column = self_column(ids, start)
    at = np.arange(len(ids)), column
    parts: dict[str, Array] = {
        "dropped": np.stack([ids[at], column.astype(np.int32)], axis=1),
        "dropped_similarity": similarity[at],
        "similarity": without_column(similarity, column),
        "ids": without_column(ids, column),
    }
    for name, values in parts.items():
        ShardedArray.open(out / name).write_shard(shard, values)
