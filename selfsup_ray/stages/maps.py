"""The stage `maps`: t-SNE and UMAP pictures of chosen layers of the encoder, for the report."""

from __future__ import annotations

import importlib.util
import logging
import time
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import numpy as np
import torch
from pydantic import Field

from selfsup_ray.artifacts import (
    Array,
    begin,
    finish,
    read_done,
    read_json,
    whole_file,
    write_json,
)
from selfsup_ray.config import NonNegative, Positive, PositiveFloat, Resources, config
from selfsup_ray.data.corpus import Corpus
from selfsup_ray.errors import ConfigError
from selfsup_ray.models.encoder import Encoder
from selfsup_ray.models.layers import Layer
from selfsup_ray.ops.plane import (
    neighbors_among,
    opentsne_positions,
    tsne_positions,
    umap_positions,
)
from selfsup_ray.ops.rng import permuted
from selfsup_ray.progress import track
from selfsup_ray.storage import located

if TYPE_CHECKING:
    from selfsup_ray.tracking import Tracker

log = logging.getLogger(__name__)

COUNTED = 15
"""Neighbors that `same_class` looks at."""
AT_ONCE = 256
"""Images of one forward pass."""


@config
class MapsConfig:
    """Which layers are drawn, and how."""

    layers: Annotated[tuple[Layer, ...], Field(min_length=1)] = ("layer2", "layer3", "pooled")
    """layer1 | layer2 | layer3 | pooled | head; `pooled` are the backbone's features."""
    methods: Annotated[tuple[Literal["tsne", "umap"], ...], Field(min_length=1)] = ("tsne", "umap")
    tsne: Literal["scikit-learn", "opentsne"] = "scikit-learn"
    """`opentsne` places by the neighbor lists alone, in a time that grows linearly: for more than
    about 5,000 images. It is an extra: pip install 'selfsup-ray[maps]'."""
    images: Positive = 2_000
    """Images drawn, the same of every layer; chosen at random."""
    perplexity: PositiveFloat = 30.0
    """Of t-SNE: about the neighbors that an image is kept close to."""
    neighbors: Annotated[int, Field(ge=2)] = 15
    """Of UMAP: neighbors of an image, itself counted."""
    seed: NonNegative = 0
    """Chooses the images."""
    resources: Resources = Resources(workers=0)
    """The sample is embedded and placed by this process, on a GPU when `gpus` is above 0."""


class Maps:
    """Handle on finished maps: positions of the same images by layer and method."""

    def __init__(self, path: Path, metrics: dict[str, Any]) -> None:
        self.path = path
        self.metrics = metrics
        """{"layers": {layer: {"dim", "same_class", "methods"}}, "images"}."""

    @classmethod
    def open(cls, path: Path | str) -> Maps:
        """Return the finished maps in a folder.

        Raises ArtifactError when the stage has not finished there.
        """
        read_done(located(path))
        return cls(located(path), dict(read_json(located(path) / "metrics.json")))

    @property
    def fingerprint(self) -> str:
        """Hash of the config and the inputs."""
        return read_done(self.path).fingerprint

    @property
    def ids(self) -> Array:
        """Ids (n,) of the images that were placed, ascending."""
        return np.asarray(np.load(self.path / "ids.npy"))

    def positions(self, layer: str, method: str) -> Array | None:
        """Return positions (n, 2); None when the layer showed no structure."""
        path = self.path / f"{layer}-{method}.npy"
        return np.asarray(np.load(path)) if path.exists() else None


def draw_maps(
    corpus: Corpus,
    encoder: Encoder,
    config: MapsConfig | None = None,
    *,
    out: Path | str,
    tracker: Tracker | None = None,
) -> Maps:
    """Place a sample of the images in the plane by the features of each chosen layer.

    Labels, where there are any, are only counted: `same_class` is the share of an image's 15
    nearest images in a layer that have its class. Raises ConfigError when the encoder has no such
    layer, or openTSNE is not installed.
    """
    config, out, began = config or MapsConfig(), located(out), time.monotonic()
    if "tsne" in config.methods and config.tsne == "opentsne":
        require_opentsne()
    for layer in config.layers:
        encoder.layer_dim(layer)
    inputs = {"corpus": corpus.fingerprint, "encoder": encoder.fingerprint}
    if begin(out, stage="maps", config=config, inputs=inputs):
        log.info("maps: %s is current", out)
        return Maps.open(out)
    n = min(config.images, len(corpus))
    ids = np.sort(permuted(np.arange(n), n=len(corpus), seed=config.seed, epoch=0))
    _write(out / "ids.npy", ids)
    labels, found = corpus.labels(ids), {}
    with track("maps", len(config.layers), "layers") as progress:
        for layer in config.layers:
            found[layer] = _place(corpus, encoder, layer, ids, labels, config, out)
            progress.advance(1)
    write_json(out / "metrics.json", {"images": n, "layers": found})
    facts = {"images": n} | {
        f"{layer}.same_class": one["same_class"]
        for layer, one in found.items()
        if one["same_class"] is not None
    }
    seconds = time.monotonic() - began
    finish(out, stage="maps", config=config, inputs=inputs, seconds=seconds, facts=facts)
    if tracker is not None:
        tracker.log([facts])
    log.info("maps: %d images by %s, %.1f s", n, ", ".join(config.layers), seconds)
    return Maps.open(out)


def require_opentsne() -> None:
    """Raise ConfigError unless openTSNE is installed."""
    if importlib.util.find_spec("openTSNE") is None:
        raise ConfigError(
            "maps.tsne=opentsne needs the package openTSNE: pip install 'selfsup-ray[maps]', or "
            "set maps.tsne=scikit-learn."
        )


def _place(
    corpus: Corpus,
    encoder: Encoder,
    layer: Layer,
    ids: Array,
    labels: Array,
    config: MapsConfig,
    out: Path,
) -> dict[str, Any]:
    """Write the positions by one layer; return its numbers."""
    rows = layer_rows(corpus, encoder, layer, ids, gpus=config.resources.gpus)
    wanted = max(COUNTED, config.neighbors - 1, int(3 * config.perplexity))
    listed, similarity = neighbors_among(rows, min(wanted, len(rows) - 1))
    placed = []
    for method in config.methods:
        match (method, config.tsne):
            case ("umap", _):
                k = config.neighbors - 1
                xy = umap_positions(rows, listed[:, :k], similarity[:, :k])
            case ("tsne", "opentsne"):
                xy = opentsne_positions(rows, listed, similarity, perplexity=config.perplexity)
            case _:
                xy = tsne_positions(rows, perplexity=config.perplexity)
        if xy is not None:
            _write(out / f"{layer}-{method}.npy", xy.astype(np.float32))
            placed.append(method)
    known = labels >= 0
    near = labels[listed[:, :COUNTED]]
    same = (near == labels[:, None])[known[:, None] & (near >= 0)]
    return {
        "dim": rows.shape[1],
        "same_class": float(same.mean()) if same.size else None,
        "methods": placed,
    }


def layer_rows(
    corpus: Corpus, encoder: Encoder, layer: Layer, ids: Array, *, gpus: float = 0
) -> Array:
    """Return the unit rows (n, d) float32 of some images at a layer."""
    device = "cuda" if gpus else "cpu"
    network = encoder.module(device, layer=layer)
    parts = [
        network(corpus.images(ids[i : i + AT_ONCE]).to(device)).cpu()
        for i in range(0, len(ids), AT_ONCE)
    ]
    return np.asarray(torch.cat(parts).numpy())


def _write(path: Path, values: Array) -> None:
    with whole_file(path) as temporary, open(temporary, "wb") as file:
        np.save(file, values)
