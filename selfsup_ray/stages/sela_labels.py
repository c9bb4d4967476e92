"""Pseudo-labels of SeLa on disk: by shard, as Parquet, and in the original's tensor form."""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from torch import Tensor

from selfsup_ray.artifacts import Array, ShardedArray, whole_file, write_json
from selfsup_ray.data.corpus import Corpus
from selfsup_ray.errors import ConfigError
from selfsup_ray.models.sela import MEASURED, agreement
from selfsup_ray.models.weights import load_plain
from selfsup_ray.storage import located

if TYPE_CHECKING:
    from selfsup_ray.models.clusterer import Clusterer
    from selfsup_ray.models.sela import SeLa


def write_labels(
    out: Path, corpus: Corpus, clusterer: Clusterer, objective: SeLa, *, head: int
) -> dict[str, float]:
    """Write the labels of all heads, and those of one as the clusters; return its agreement.

    labels/: (N, T) int32 by shard; pseudo_labels.parquet: id, path, head_0, head_1, ...;
    pseudo_labels.pt: {"L": (T, N) int64}, which loads with weights_only; events.json: what was
    noted of each event and head.
    """
    labels = objective.labels.cpu()
    table, rows = np.asarray(labels.numpy()), corpus.shard_rows
    stored = ShardedArray.create(
        out / "labels", shard_rows=rows, row_shape=(len(table),), dtype="int32"
    )
    for i, n in enumerate(rows):
        part = table[:, int(corpus.offsets[i]) :][:, :n]
        stored.write_shard(i, part.T)
        clusterer.assignments.write_shard(i, part[head])
    _write_parquet(out / "pseudo_labels.parquet", corpus, table)
    with whole_file(out / "pseudo_labels.pt") as temporary:
        torch.save({"L": labels.long()}, temporary)
    write_json(out / "events.json", noted(objective.events.cpu()))
    if not corpus.has_labels:
        return {}
    k = objective.method.num_clusters
    return agreement(table[head], corpus.labels(), num_clusters=k)


def noted(events: Tensor) -> list[dict[str, float]]:
    """Return one mapping for each event and head that happened, from the (E, T, F) table."""
    return [
        {"event": event, "head": head}
        | {name: x for name, x in zip(MEASURED, row, strict=True) if not math.isnan(x)}
        for event, by_head in enumerate(events.tolist())
        for head, row in enumerate(by_head)
        if not math.isnan(row[0])
    ]


def _write_parquet(path: Path, corpus: Corpus, table: Array) -> None:
    """Write a row group a shard, so that memory does not grow with N but for the labels."""
    heads = [(f"head_{head}", pa.int32()) for head in range(len(table))]
    schema = pa.schema([("id", pa.int64()), ("path", pa.string()), *heads])
    with whole_file(path) as temporary, pq.ParquetWriter(temporary, schema) as writer:
        for i, n in enumerate(corpus.shard_rows):
            ids = np.arange(corpus.offsets[i], corpus.offsets[i] + n)
            columns = [ids, corpus.sources(ids), *table[:, ids]]
            writer.write_table(pa.table(columns, schema=schema))


def read_labels(path: Path, *, num_heads: int, num_images: int, num_clusters: int) -> Array:
    """Return the labels (T, N) int32 of an exported file.

    Raises ConfigError unless there is one below num_clusters for each head and image.
    """
    path = located(path)
    table = _from_parquet(path) if path.suffix == ".parquet" else _from_tensors(path)
    if table.shape != (num_heads, num_images):
        raise ConfigError(
            f"{path} has labels of {table.shape[0]} heads and {table.shape[1]:,} images, but "
            f"sela.num_heads={num_heads} and the corpus has {num_images:,} images. "
            f"Set sela.num_heads={table.shape[0]}, or give the labels of this corpus."
        )
    if table.min() < 0 or table.max() >= num_clusters:
        raise ConfigError(
            f"{path} has labels from {table.min()} to {table.max()}, which do not fit "
            f"sela.num_clusters={num_clusters}. Set it to {table.max() + 1}."
        )
    return np.asarray(table.astype(np.int32))


def _from_parquet(path: Path) -> Array:
    if not path.exists():
        raise ConfigError(f"{path} does not exist. Give the pseudo_labels.parquet of a sela run.")
    with open(path, "rb") as file:
        table = pq.read_table(file)
    names = [
        f"head_{i}" for i in range(len(table.column_names)) if f"head_{i}" in table.schema.names
    ]
    if "id" not in table.column_names or not names:
        raise ConfigError(
            f"{path} has the columns {', '.join(table.column_names)}, but labels need `id` and "
            f"`head_0`, `head_1`, ... Give the pseudo_labels.parquet of a sela run."
        )
    ids = table["id"].to_numpy()
    if not np.array_equal(np.sort(ids), np.arange(len(ids))):
        raise ConfigError(f"{path} must have each id from 0 to {len(ids) - 1} once.")
    heads = np.stack([table[name].to_numpy() for name in names])
    out = np.empty_like(heads)
    out[:, ids] = heads
    return out


def _from_tensors(path: Path) -> Array:
    loaded = load_plain(path, do="Give the pseudo_labels.pt of a sela run, or a checkpoint of it.")
    found = tensor_labels(loaded)
    if found is None:
        keys = sorted(map(str, loaded)) if isinstance(loaded, Mapping) else type(loaded).__name__
        raise ConfigError(f"{path} has no labels (T, N) under `L` or `labels`, only {keys}.")
    return found


def tensor_labels(loaded: Any) -> Array | None:
    """Return the labels (T, N) of a checkpoint in SeLa's layout, None when it has none."""
    if isinstance(loaded, Mapping):
        loaded = loaded.get("L", loaded.get("labels"))
    if not isinstance(loaded, Tensor) or loaded.ndim not in (1, 2) or loaded.is_floating_point():
        return None
    return np.atleast_2d(loaded.numpy())
