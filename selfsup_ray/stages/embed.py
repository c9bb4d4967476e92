"""The stage `embed`: one unit row per image, by an encoder, in the order of image ids."""

from __future__ import annotations

import functools
import logging
import time
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch

from selfsup_ray.artifacts import Array, ShardedArray, begin, finish, read_done, require_disk
from selfsup_ray.cluster.data import stream_actors
from selfsup_ray.config import Positive, Resources, config
from selfsup_ray.data.corpus import Corpus
from selfsup_ray.errors import ArtifactError
from selfsup_ray.models.encoder import Encoder
from selfsup_ray.models.layers import Layer
from selfsup_ray.progress import track
from selfsup_ray.storage import Place, located, reached, relative
from selfsup_ray.tracking import Tracker

log = logging.getLogger(__name__)


@config
class ImportedConfig:
    """Rows of published files, in place of an encoder's."""

    files: tuple[Place, ...]
    """HDF5 feature blocks, in the order of the numbers in their names, then of the names; or one
    raw float32 matrix, or one faiss index."""
    dim: Positive | None = None
    """Numbers in a row; only a raw matrix needs it."""
    rows: Positive | None = None
    """Only the first that many rows."""
    normalize: bool = True
    """Divide each row by its length. False keeps raw features, for `reduce` to center first."""
    labels: Place | Literal["found", "none"] = "found"
    """`found` are those in HDF5 blocks, `none` leaves them out, as of background photos; or an .npy
    file with an integer for each row, -1 for unknown."""
    class_names: Place | None = None
    """A text file with the name of a class in each line, in the order of the labels."""

    def __post_init__(self) -> None:
        if not self.files:
            raise ValueError("`files` needs at least one file")


@config
class EmbedConfig:
    """How the encoder is run over the corpus."""

    imported: ImportedConfig | None = None
    """Published features in place of images and an encoder; the run then has no `ingest`."""
    batch_size: Positive = 256
    """Images in one forward pass; changes a result by rounding at most."""
    layer: Layer | None = None
    """Whose rows: layer1 | layer2 | layer3 | pooled | head; None: as `pretext.output` says."""
    precision: Literal["float32", "bfloat16"] = "float32"
    """`bfloat16`: autocast, faster where the hardware has it; how rows are stored, `dtype` says."""
    dtype: Literal["float32", "float16"] = "float32"
    """How rows are stored. `float16` takes half the disk; all that reads them computes in float32
    and more, on numbers off by up to 0.05 %."""
    resources: Resources = Resources()
    """`workers` actors hold the encoder, with `gpus` each on a GPU; 0 runs in this process."""

    def __post_init__(self) -> None:
        of_encoder = {
            "batch_size": self.batch_size != 256,
            "layer": self.layer is not None,
            "precision": self.precision != "float32",
            "resources.gpus": self.resources.gpus > 0,
        }
        given = [name for name, is_set in of_encoder.items() if is_set]
        if self.imported is not None and given:
            raise ValueError(
                f"`{given[0]}` is for an encoder, but `imported` takes the rows from files; leave "
                f"one of them out"
            )


class Embeddings:
    """Handle on an embeddings folder: (N, d) unit rows, cut at the corpus's shards."""

    def __init__(self, path: Path) -> None:
        self.path = located(path)
        done = read_done(self.path)
        self.fingerprint = done.fingerprint
        self.facts: dict[str, Any] = done.facts
        self.array = ShardedArray.open(self.path / "rows")

    @classmethod
    def open(cls, path: Path | str) -> Embeddings:
        """Return the finished embeddings in a folder.

        Raises ArtifactError when the stage has not finished there.
        """
        return cls(located(path))

    def __len__(self) -> int:
        return len(self.array)

    @property
    def shape(self) -> tuple[int, ...]:
        """(N, d)."""
        return self.array.shape

    @property
    def corpus(self) -> Corpus:
        """The images these rows embed."""
        return Corpus.open(reached(self.path, self.facts["corpus"]))


class ShardEmbedder:
    """Embeds one shard of a corpus and writes its rows; holds the network between shards."""

    def __init__(
        self, corpus: Path, encoder: Path, rows: Path, *, config: EmbedConfig, device: str
    ) -> None:
        self.corpus = Corpus.open(corpus)
        self.network = Encoder.open(encoder).module(device, layer=config.layer)
        self.rows = ShardedArray.open(rows)
        self.config = config
        self.device = torch.device(device)

    def __call__(self, shard: int) -> dict[str, Any]:
        """Write the rows of one shard. Raises ArtifactError when one is not finite."""
        rows = self.embedded(shard)
        if not np.isfinite(rows).all():
            first = int(self.corpus.offsets[shard]) + int(np.isnan(rows).any(axis=1).argmax())
            raise ArtifactError(
                f"The encoder gives no finite embedding of image {first} "
                f"({self.corpus.sources(np.array([first]))[0]}). Pretrain it again with a lower "
                f"learning rate."
            )
        self.rows.write_shard(shard, rows)
        return {"images": len(rows)}

    @torch.inference_mode()
    def embedded(self, shard: int) -> Array:
        """Return the unit rows of one shard: (n, d) float32."""
        is_short = self.config.precision == "bfloat16"
        parts = [torch.empty((0, self.rows.shape[1]), device=self.device)]
        for start in range(0, self.corpus.shard_rows[shard], self.config.batch_size):
            images = self.corpus.shard_images(shard, start, start + self.config.batch_size)
            with torch.autocast(self.device.type, torch.bfloat16, enabled=is_short):
                rows = self.network(images.to(self.device, non_blocking=True))
            parts.append(rows)  # left on the device: the next read need not wait for this pass
        return torch.cat(parts).cpu().numpy()


def embed(
    corpus: Corpus,
    encoder: Encoder,
    config: EmbedConfig | None = None,
    *,
    out: Path | str,
    tracker: Tracker | None = None,
) -> Embeddings:
    """Run the encoder over every image of the corpus; return the handle on the unit rows.

    The rows do not depend on the number of workers, on interruptions, or, beyond rounding, on
    the batch size. Shards that an interrupted run wrote are kept.
    """
    config, out, began = config or EmbedConfig(), located(out), time.monotonic()
    inputs = {"corpus": corpus.fingerprint, "encoder": encoder.fingerprint}
    if begin(out, stage="embed", config=config, inputs=inputs):
        log.info("embed: %s is current", out)
        return Embeddings.open(out)
    dim = encoder.layer_dim(config.layer)
    require_disk(out, size_bytes=len(corpus) * dim * np.dtype(config.dtype).itemsize)
    rows = ShardedArray.create(
        out / "rows", shard_rows=corpus.shard_rows, row_shape=(dim,), dtype=config.dtype
    )
    num_new = _write_missing(corpus, encoder, rows, config)
    seconds = time.monotonic() - began
    facts = {
        "corpus": relative(corpus.path, out),
        "images": len(corpus),
        "dim": dim,
        "images_per_s": round(num_new / max(seconds, 1e-9), 1),
    }
    finish(out, stage="embed", config=config, inputs=inputs, seconds=seconds, facts=facts)
    if tracker is not None:
        tracker.log([{k: v for k, v in facts.items() if isinstance(v, int | float)}])
    log.info("embed: %s images, d=%d, %.1f s", f"{len(corpus):,}", dim, seconds)
    return Embeddings.open(out)


def _write_missing(
    corpus: Corpus, encoder: Encoder, rows: ShardedArray, config: EmbedConfig
) -> int:
    """Write the shards that are not there yet and return how many images they hold."""
    missing = rows.unwritten()
    make = functools.partial(
        ShardEmbedder,
        corpus.path.absolute(),
        encoder.path.absolute(),
        rows.path.absolute(),
        config=config,
        device="cuda" if config.resources.gpus else "cpu",
    )
    num_new = sum(corpus.shard_rows[i] for i in missing)
    with track("embed", len(corpus), "images") as progress:
        progress.skip(len(corpus) - num_new)
        for shard, _ in stream_actors(make, missing, config.resources, stage="embed"):
            progress.advance(corpus.shard_rows[shard])
    return num_new
