"""The stage `export`: a folder to take away, with pseudo-labels and weights in open formats."""

from __future__ import annotations

import logging
import shutil
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from selfsup_ray.artifacts import (
    Array,
    begin,
    finish,
    read_done,
    whole_file,
    write_json,
    write_text,
)
from selfsup_ray.config import Resources, config
from selfsup_ray.data.corpus import Corpus
from selfsup_ray.models.clusterer import Clusterer
from selfsup_ray.models.encoder import Encoder
from selfsup_ray.models.portable import (
    SUFFIX,
    Format,
    portable_clusterer,
    portable_encoder,
    preprocessing,
    write_portable,
)
from selfsup_ray.progress import track
from selfsup_ray.stages.diffuse import Diffusion
from selfsup_ray.stages.patch_dictionary import FILE as DICTIONARY
from selfsup_ray.storage import located
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

LABELS = pa.schema(
    [
        ("id", pa.int64()),
        ("source", pa.string()),
        ("label", pa.int32()),
        ("class_name", pa.string()),
        ("score", pa.float32()),
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
    """Of the tables."""
    formats: tuple[Format, ...] = ()
    """The networks for other programs, beside the safetensors: torchscript, onnx. Any batch size;
    preprocessing.json, also inside each file, says what they expect of images."""
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
        return cls(located(path))

    @property
    def pseudo_labels(self) -> Path | None:
        """The Parquet file with a row per image; None without clusters."""
        path = self.path / "pseudo_labels.parquet"
        return path if path.exists() else None

    @property
    def labels(self) -> Path | None:
        """The Parquet file with the label that arrived at each image; None without a diffusion."""
        path = self.path / "labels.parquet"
        return path if path.exists() else None


def export(
    corpus: Corpus,
    encoder: Encoder,
    clusterer: Clusterer | None = None,
    config: ExportConfig | None = None,
    *,
    out: Path | str,
    diffusion: Diffusion | None = None,
    tracker: Tracker | None = None,
) -> Exported:
    """Write weights, and what is known of every image, into one folder; return the handle.

    pseudo_labels.parquet, with a clusterer, has one row per image in the order of ids: id, source,
    cluster, probability of that cluster, and margin, which is probability less that of the
    runner-up. labels.parquet, with a diffusion: id, source, label (-1: none arrived), class name,
    the label's score and its margin.
    """
    config, out, began = config or ExportConfig(), located(out), time.monotonic()
    inputs = {"corpus": corpus.fingerprint, "encoder": encoder.fingerprint}
    if clusterer is not None:
        inputs["clusterer"] = clusterer.fingerprint
    if diffusion is not None:
        inputs["diffusion"] = diffusion.fingerprint
    if begin(out, stage="export", config=config, inputs=inputs):
        log.info("export: %s is current", out)
        return Exported.open(out)
    use = USE_ENCODER
    _copy(encoder.path, out, "encoder")
    if (encoder.path / DICTIONARY).exists():  # an encoder of patches has one too
        _copy_file(encoder.path / DICTIONARY, out)
    if clusterer is not None:
        use += USE_CLUSTERER
        _copy(clusterer.path, out, "clusterer")
        _write_pseudo_labels(corpus, clusterer, out / "pseudo_labels.parquet", config)
    if config.formats:
        _write_networks(encoder, clusterer, out, config.formats)
    if diffusion is not None:
        _write_labels(corpus, diffusion, out / "labels.parquet", config)
    write_text(out / "use.py", use.format(folder=out.as_posix()))
    facts = {"images": len(corpus), "num_clusters": clusterer.num_clusters if clusterer else 0}
    seconds = time.monotonic() - began
    finish(out, stage="export", config=config, inputs=inputs, seconds=seconds, facts=facts)
    exported = Exported.open(out)
    for table in (exported.pseudo_labels, exported.labels):
        if tracker is not None and table is not None:
            tracker.artifact(table)
    return exported


def _copy(source: Path, out: Path, name: str) -> None:
    for file in (f"{name}.safetensors", f"{name}.json"):
        _copy_file(source / file, out)


def _copy_file(source: Path, out: Path) -> None:
    with whole_file(out / source.name) as temporary:
        shutil.copyfile(source, temporary)


def _write_networks(
    encoder: Encoder, clusterer: Clusterer | None, out: Path, formats: tuple[Format, ...]
) -> None:
    images = encoder.description.images
    parts = {
        "encoder": (portable_encoder(encoder), images, f"float32 (batch, {encoder.dim}) unit rows")
    }
    if clusterer is not None:
        output = f"float32 (batch, {clusterer.num_clusters}) probabilities"
        parts["clusterer"] = (portable_clusterer(clusterer), clusterer.description.images, output)
    described = {name: preprocessing(seen, output=text) for name, (_, seen, text) in parts.items()}
    write_json(out / "preprocessing.json", described)
    for name, (network, _, _) in parts.items():
        for kind in formats:
            write_portable(network, out / f"{name}{SUFFIX[kind]}", kind, described[name])


def _write_pseudo_labels(
    corpus: Corpus, clusterer: Clusterer, path: Path, config: ExportConfig
) -> None:
    assignments, probabilities = clusterer.assignments, clusterer.probabilities

    def columns(i: int, ids: Array) -> list[Any]:
        clusters = np.asarray(assignments.shard(i))
        return [clusters, *sureness(np.asarray(probabilities.shard(i)), clusters)]

    _write_table(corpus, path, SCHEMA, columns, config)


def _write_labels(corpus: Corpus, diffusion: Diffusion, path: Path, config: ExportConfig) -> None:
    names = corpus.class_names or []

    def columns(i: int, ids: Array) -> list[Any]:
        labels, scores = diffusion.predictions.rows(ids), diffusion.scores.rows(ids)
        # A labelled image keeps its label, which need not be the class of its largest score.
        is_own = diffusion.classes.rows(ids) == labels[:, None]
        score = np.where(is_own, scores, 0).max(axis=1)
        margin = score - np.where(is_own, 0, scores).max(axis=1)
        named = [names[i] if 0 <= i < len(names) else None for i in labels]
        return [labels, named, score, margin]

    _write_table(corpus, path, LABELS, columns, config)


def _write_table(
    corpus: Corpus,
    path: Path,
    schema: pa.Schema,
    columns: Callable[[int, Array], list[Any]],
    config: ExportConfig,
) -> None:
    """Write a table shard by shard: one row group each, so memory does not grow with N.

    columns: (shard, its ids) -> the columns after id and source.
    """
    with (
        track("export", len(corpus), "images") as progress,
        whole_file(path) as temporary,
        pq.ParquetWriter(temporary, schema, compression=config.compression) as writer,
    ):
        for i, rows in enumerate(corpus.shard_rows):
            ids = np.arange(corpus.offsets[i], corpus.offsets[i] + rows)
            writer.write_table(
                pa.table([ids, corpus.sources(ids), *columns(i, ids)], schema=schema)
            )
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
