"""The stage `export`: a folder to take away, with pseudo-labels and weights in open formats."""

from __future__ import annotations

import logging
import shutil
import time
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from selfsup_ray.artifacts import Array, begin, finish, read_done, whole_file, write_text
from selfsup_ray.config import Resources, config
from selfsup_ray.data.corpus import Corpus
from selfsup_ray.models.clusterer import Clusterer
from selfsup_ray.models.encoder import Encoder
from selfsup_ray.progress import track
from selfsup_ray.tracking import Tracker

log = logging.getLogger(__name__)

SCHEMA = pa.schema(
    [
        ("id", pa.int64()),
        ("source", pa.string()),
        ("cluster", pa.int32()),
        ("probability", pa.float32()),
        ("margin", pa.float32()),
    ]
)

USE_ENCODER = """\
import selfsup_ray as ssr

# Unit rows (n, d) of image files, with encoder.safetensors and encoder.json of this folder:
rows = ssr.Encoder.open("{folder}").embed(["photo.jpg"])
"""
USE_CLUSTERER = """
# Clusters (n,) and probabilities (n, K) of image files:
clusters = ssr.Clusterer.open("{folder}").predict(["photo.jpg"])
"""


@config
class ExportConfig:
    """How results are written for others to read."""

    compression: Literal["zstd", "snappy", "none"] = "zstd"
    """Of pseudo_labels.parquet."""
    resources: Resources = Resources(workers=0)
    """The tables are written by this process; they are read once, shard by shard."""


class Exported:
    """Handle on an exported folder."""

    def __init__(self, path: Path) -> None:
        self.path = path
        done = read_done(path)
        self.fingerprint: str = done.fingerprint
        self.facts: dict[str, Any] = done.facts

    @classmethod
    def open(cls, path: Path | str) -> Exported:
        """Return the finished export in a folder.

        Raises ArtifactError when the stage has not finished there.
        """
        return cls(Path(path))

    @property
    def pseudo_labels(self) -> Path | None:
        """The Parquet file with a row per image; None without clusters."""
        path = self.path / "pseudo_labels.parquet"
        return path if path.exists() else None


def export(
    corpus: Corpus,
    encoder: Encoder,
    clusterer: Clusterer | None = None,
    config: ExportConfig | None = None,
    *,
    out: Path | str,
    tracker: Tracker | None = None,
) -> Exported:
    """Write weights, and with a clusterer the pseudo-labels, into one folder; return the handle.

    pseudo_labels.parquet has one row per image in the order of ids: id, source, cluster,
    probability of that cluster, and margin, which is probability less that of the runner-up.
    """
    config, out, began = config or ExportConfig(), Path(out), time.monotonic()
    inputs = {"corpus": corpus.fingerprint, "encoder": encoder.fingerprint}
    if clusterer is not None:
        inputs["clusterer"] = clusterer.fingerprint
    if begin(out, stage="export", config=config, inputs=inputs):
        log.info("export: %s is current", out)
        return Exported.open(out)
    use = USE_ENCODER
    _copy(encoder.path, out, "encoder")
    if clusterer is not None:
        use += USE_CLUSTERER
        _copy(clusterer.path, out, "clusterer")
        _write_pseudo_labels(corpus, clusterer, out / "pseudo_labels.parquet", config)
    write_text(out / "use.py", use.format(folder=out.as_posix()))
    facts = {"images": len(corpus), "num_clusters": clusterer.num_clusters if clusterer else 0}
    seconds = time.monotonic() - began
    finish(out, stage="export", config=config, inputs=inputs, seconds=seconds, facts=facts)
    exported = Exported.open(out)
    if tracker is not None and exported.pseudo_labels is not None:
        tracker.artifact(exported.pseudo_labels)
    return exported


def _copy(source: Path, out: Path, name: str) -> None:
    for file in (f"{name}.safetensors", f"{name}.json"):
        with whole_file(out / file) as temporary:
            shutil.copyfile(source / file, temporary)


def _write_pseudo_labels(
    corpus: Corpus, clusterer: Clusterer, path: Path, config: ExportConfig
) -> None:
    """Write the table shard by shard: one row group each, so memory does not grow with N."""
    assignments, probabilities = clusterer.assignments, clusterer.probabilities
    with (
        track("export", len(corpus), "images") as progress,
        whole_file(path) as temporary,
        pq.ParquetWriter(temporary, SCHEMA, compression=config.compression) as writer,
    ):
        for i, rows in enumerate(corpus.shard_rows):
            ids = np.arange(corpus.offsets[i], corpus.offsets[i] + rows)
            clusters = np.asarray(assignments.shard(i))
            probability, margin = sureness(np.asarray(probabilities.shard(i)), clusters)
            columns = [ids, corpus.sources(ids), clusters, probability, margin]
            writer.write_table(pa.table(columns, schema=SCHEMA))
            progress.advance(rows)


def sureness(probabilities: Array, clusters: Array) -> tuple[Array, Array]:
    """Return the probability of each image's cluster, and its margin over the best other one.

    probabilities: (n, K) float32; clusters: (n,) ids below K; both results (n,) float32. With one
    cluster the margin is the probability.
    """
    rows = np.arange(len(clusters))
    own = probabilities[rows, clusters]
    others = probabilities.copy()
    others[rows, clusters] = -np.inf
    best_other = others.max(axis=1, initial=0.0)
    return own, own - best_other
