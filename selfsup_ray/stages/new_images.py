"""Neighbors of new images among those of a finished run: its encoder, its reduction, its index."""

from __future__ import annotations

import csv
import io
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from selfsup_ray.artifacts import Array, read_claim
from selfsup_ray.config import Resources
from selfsup_ray.errors import ArtifactError, ConfigError
from selfsup_ray.models.encoder import Encoder
from selfsup_ray.ops.neighbors import Neighbors
from selfsup_ray.ops.pca import unit_rows
from selfsup_ray.stages.embed import Embeddings
from selfsup_ray.stages.graph import Graph
from selfsup_ray.stages.reduce import Reduced
from selfsup_ray.storage import located


@dataclass(frozen=True)
class NewImages:
    """New images, the ids and similarity (n, k) of their neighbors, and where those came from.

    sources: (n, k) strings, as the corpus names its images.
    """

    images: tuple[Path, ...]
    neighbors: Neighbors
    sources: Array


def nearest_images(
    run: Path | str,
    images: Sequence[Path | str],
    *,
    k: int = 10,
    resources: Resources | None = None,
) -> NewImages:
    """Return the k images of a finished run that are nearest to each of some image files.

    The index is the one that the run's graph was built with; k is cut to the number of images.
    Raises ArtifactError when the run lacks its encoder, embeddings or graph, ImageError naming a
    file that is no readable image, ConfigError for k below 1.
    """
    run, paths = located(run), tuple(Path(image) for image in images)
    if k < 1:
        raise ConfigError(f"k={k}, but every image has at least one neighbor. Give 1 or more.")
    graph, corpus = Graph.open(run / "graph"), Embeddings.open(run / "embed").corpus
    rows = embedded(run, paths)
    with graph.search(resources) as search:
        found = search.search(rows, min(k, len(graph)))
    named = corpus.sources(found.ids.ravel())
    return NewImages(paths, found, np.asarray(named, object).reshape(found.ids.shape))


def embedded(run: Path, images: Sequence[Path]) -> Array:
    """Return unit rows (n, d) of image files as the run's graph has them: embedded, and reduced."""
    made = read_claim(run / "embed" / "config.yaml")
    encoder = _encoder(run, made["inputs"].get("encoder", ""))
    rows = encoder.embed(list(images), layer=made["config"].get("layer"))
    if (run / "reduce").exists():
        return unit_rows(Reduced.open(run / "reduce").transform(rows))
    return rows


def _encoder(run: Path, fingerprint: str) -> Encoder:
    """Return the encoder that the run's embeddings were made with."""
    for file in sorted(run.glob("*/encoder.json")):
        encoder = Encoder.open(file.parent)
        if encoder.fingerprint == fingerprint:
            return encoder
    raise ArtifactError(
        f"{run} does not hold the encoder that its embeddings were made with, so new images cannot "
        f"be embedded like them. Give the folder of a whole run, not of imported features."
    )


def as_csv(found: NewImages) -> str:
    """Return a table: image, rank from 1, id, similarity and source of each neighbor."""
    buffer = io.StringIO()
    writer = csv.writer(buffer, lineterminator="\n")
    writer.writerow(("image", "rank", "id", "similarity", "source"))
    for i, image in enumerate(found.images):
        lists = zip(
            found.neighbors.ids[i], found.neighbors.similarity[i], found.sources[i], strict=True
        )
        for rank, (id_, similarity, source) in enumerate(lists, start=1):
            writer.writerow((image, rank, id_, f"{similarity:.6f}", source))
    return buffer.getvalue()
