"""Pseudo-labels of SeLa on disk: by shard, as Parquet, and in the original's tensor form."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
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
from selfsup_ray.memory import mapped
from selfsup_ray.models.labels import Source
from selfsup_ray.models.sela import MEASURED, agreement
from selfsup_ray.models.weights import load_plain
from selfsup_ray.ops.metrics import contingency
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
    noted of each event and head. A shard of the corpus is in memory at a time.
    """
    labels, rows = objective.labels, corpus.shard_rows
    stored = ShardedArray.create(
        out / "labels", shard_rows=rows, row_shape=(labels.num_heads,), dtype="int32"
    )
    counts = _Counts(corpus, num_clusters=objective.method.num_clusters)
    tensor = mapped((labels.num_heads, len(labels)), torch.int64)
    with _parquet(out / "pseudo_labels.parquet", labels.num_heads) as write:
        for i, n in enumerate(rows):
            first = int(corpus.offsets[i])
            ids, part = np.arange(first, first + n), labels.between(first, first + n)
            stored.write_shard(i, part)
            clusterer.assignments.write_shard(i, part[:, head])
            write([ids, corpus.sources(ids), *part.T])
            tensor[:, first : first + n] = torch.from_numpy(part.T)
            counts.add(part[:, head], ids)
    with whole_file(out / "pseudo_labels.pt") as temporary:
        torch.save({"L": tensor}, temporary)
    write_json(out / "events.json", noted(objective.events.cpu()))
    return agreement(counts.table) if corpus.has_labels else {}


class _Counts:
    """Images by cluster and class, added up over the shards of a corpus."""

    def __init__(self, corpus: Corpus, *, num_clusters: int) -> None:
        self.corpus, self.num_clusters = corpus, num_clusters
        self.table = np.zeros((num_clusters, 0), np.int64)

    def add(self, clusters: Array, ids: Array) -> None:
        """Count some images; a class that was not seen before gets a column."""
        classes = self.corpus.labels(ids)
        columns = max(self.table.shape[1], int(classes.max(initial=-1)) + 1)
        grown = contingency(clusters, classes, num_clusters=self.num_clusters, num_classes=columns)
        grown[:, : self.table.shape[1]] += self.table
        self.table = grown


def noted(events: Tensor) -> list[dict[str, float]]:
    """Return one mapping for each event and head that happened, from the (E, T, F) table."""
    return [
        {"event": event, "head": head}
        | {name: x for name, x in zip(MEASURED, row, strict=True) if not math.isnan(x)}
        for event, by_head in enumerate(events.tolist())
        for head, row in enumerate(by_head)
        if not math.isnan(row[0])
    ]


@contextmanager
def _parquet(path: Path, num_heads: int) -> Iterator[Callable[[list[Any]], None]]:
    """Yield a function that writes the columns of a shard, as a row group."""
    heads = [(f"head_{head}", pa.int32()) for head in range(num_heads)]
    schema = pa.schema([("id", pa.int64()), ("path", pa.string()), *heads])
    with whole_file(path) as temporary, pq.ParquetWriter(temporary, schema) as writer:
        yield lambda columns: writer.write_table(pa.table(columns, schema=schema))


def given_labels(path: Path, *, num_heads: int, num_images: int, num_clusters: int) -> Source:
    """Return the labels of an exported file, which is read where they are asked for.

    Raises ConfigError unless they are of so many heads and images; so does what is returned, when
    an image has no label, two, or one that is not below num_clusters.
    """
    path = located(path)
    shape, read = _from_parquet(path) if path.suffix == ".parquet" else _from_tensors(path)
    if shape != (num_heads, num_images):
        raise ConfigError(
            f"{path} has labels of {shape[0]} heads and {shape[1]:,} images, but "
            f"sela.num_heads={num_heads} and the corpus has {num_images:,} images. "
            f"Set sela.num_heads={shape[0]}, or give the labels of this corpus."
        )

    def between(first: int, stop: int) -> Array:
        found = read(first, stop)
        low, high = found.min(initial=0), found.max(initial=0)
        if low < 0 or high >= num_clusters:
            raise ConfigError(
                f"{path} has labels from {low} to {high}, which do not fit "
                f"sela.num_clusters={num_clusters}. Set it to {high + 1} or more."
            )
        return np.asarray(found.astype(np.int32))

    return between


def _from_parquet(path: Path) -> tuple[tuple[int, int], Source]:
    if not path.exists():
        raise ConfigError(f"{path} does not exist. Give the pseudo_labels.parquet of a sela run.")
    with open(path, "rb") as file:
        found = pq.ParquetFile(file)
        names, num_images = found.schema_arrow.names, found.metadata.num_rows
    heads = [name for i in range(len(names)) if (name := f"head_{i}") in names]
    if "id" not in names or not heads:
        raise ConfigError(
            f"{path} has the columns {', '.join(names)}, but labels need `id` and "
            f"`head_0`, `head_1`, ... Give the pseudo_labels.parquet of a sela run."
        )

    def between(first: int, stop: int) -> Array:
        asked = [("id", ">=", first), ("id", "<", stop)]  # row groups without such ids are not read
        with open(path, "rb") as file:
            table = pq.read_table(file, columns=["id", *heads], filters=asked)
        ids = table["id"].to_numpy()
        if not np.array_equal(np.sort(ids), np.arange(first, stop)):
            raise ConfigError(f"{path} must have each id from 0 to {num_images - 1} once.")
        out = np.empty((stop - first, len(heads)), np.int64)
        out[ids - first] = np.stack([table[name].to_numpy() for name in heads], axis=1)
        return out

    return (len(heads), num_images), between


def _from_tensors(path: Path) -> tuple[tuple[int, int], Source]:
    do = "Give the pseudo_labels.pt of a sela run, or a checkpoint of it."
    loaded = load_plain(path, do=do, mapped=True)
    found = tensor_labels(loaded)
    if found is None:
        keys = sorted(map(str, loaded)) if isinstance(loaded, Mapping) else type(loaded).__name__
        raise ConfigError(f"{path} has no labels (T, N) under `L` or `labels`, only {keys}.")
    table = found
    return (table.shape[0], table.shape[1]), lambda first, stop: table[:, first:stop].T


def tensor_labels(loaded: Any) -> Array | None:
    """Return the labels (T, N) of a checkpoint in SeLa's layout, None when it has none."""
    if isinstance(loaded, Mapping):
        loaded = loaded.get("L", loaded.get("labels"))
    if not isinstance(loaded, Tensor) or loaded.ndim not in (1, 2) or loaded.is_floating_point():
        return None
    return np.atleast_2d(loaded.numpy())
