"""The stage `patches`: an encoder without training, codes on a dictionary of whitened patches."""

from __future__ import annotations

import logging
import math
import time
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from selfsup_ray.artifacts import begin, finish, read_config
from selfsup_ray.cluster.kmeans import kmeans_sharded
from selfsup_ray.cluster.shards import map_shards
from selfsup_ray.config import NonNegative, Positive, Resources, config
from selfsup_ray.data.corpus import Corpus
from selfsup_ray.errors import ConfigError
from selfsup_ray.models.backbone import PatchBackboneConfig
from selfsup_ray.models.encoder import Encoder, save_encoder
from selfsup_ray.models.inputs import ImageInput
from selfsup_ray.models.patch_backbone import PIXEL_MEAN, PIXEL_STD, PatchBackbone
from selfsup_ray.models.patch_layers import EntriesK, entries
from selfsup_ray.ops.faiss_kmeans import faiss_kmeans
from selfsup_ray.ops.kmeans import Clustering, farthest_points
from selfsup_ray.stages.patch_dictionary import (
    PatchDictionary,
    Select,
    first_whitened,
    unit_entries,
    with_copies,
)
from selfsup_ray.stages.patch_pictures import write_pictures
from selfsup_ray.stages.whiten import PatchSample
from selfsup_ray.storage import located, remove_tree

if TYPE_CHECKING:
    from selfsup_ray.tracking import Tracker

log = logging.getLogger(__name__)


@config
class PatchesConfig:
    """How a dictionary is made of whitened patches, and what code images get on it.

    The defaults are those of the published code: 1,024 centroids of 262,144 patches, of which the
    256 nearest to a patch are set. Images are coded with levels in [-1, 1].
    """

    size: Positive = 1024
    """Entries that are chosen, N."""
    select: Select = "kmeans"
    """`kmeans`: centroids; `farthest`: patches far from each other, one after the other (the
    paper's theory); `sample`: patches as they were drawn."""
    patches_per_entry: Positive = 256
    """Patches that `kmeans` and `farthest` choose from, for each entry: the first of the sample."""
    iterations: Positive = 25
    """Rounds of k-means."""
    backend: Literal["own", "faiss"] = "own"
    """Of k-means: `faiss` in one worker, on CPUs, or on its GPUs when `resources.gpus` asks for
    them."""
    precision: Literal["bfloat16", "float32"] = "bfloat16"
    """Of the distances that k-means and codes compare; ties of codes are settled in float32."""
    unit_norm: bool = False
    """Scale the whitened entries to length 1."""
    flips: bool = False
    """Add the mirror image of every entry."""
    negatives: bool = False
    """Add the negative of every whitened entry."""
    k: EntriesK = 0.25
    """Nearest entries that are set: a number, or a share of all entries."""
    code: Literal["hard", "kth", "triangle"] = "hard"
    """`hard`: the k nearest entries are 1, the others 0; `kth`: the k-th alone; `triangle`: how
    much nearer than the average an entry is."""
    grid: Positive = 2
    """Codes are averaged over grid x grid parts of the image: N grid^2 numbers for each."""
    seed: NonNegative = 0
    """Of k-means."""
    resources: Resources = Resources()
    """`workers` hold the patches of k-means, `cpus` threads each; 0 works in this process."""

    @property
    def patches(self) -> int:
        """Patches of the sample that are looked at."""
        return self.size if self.select == "sample" else self.size * self.patches_per_entry

    @property
    def entries(self) -> int:
        """Entries of the dictionary, copies included."""
        return self.size * (2 if self.flips else 1) * (2 if self.negatives else 1)

    @property
    def backbone_k(self) -> int:
        """Entries that are set, as a number."""
        return entries(self.k, self.entries)

    def __post_init__(self) -> None:
        if self.backend == "faiss" and self.resources.workers > 1:
            raise ValueError(
                f"backend=faiss works in one worker, but resources.workers is "
                f"{self.resources.workers}; set it to 1, or to 0 for this process, or leave "
                f"backend out"
            )
        if self.backbone_k > self.entries:
            raise ValueError(f"k={self.k} is more than the {self.entries} entries there are")


def fit_patches(
    corpus: Corpus,
    sample: PatchSample,
    config: PatchesConfig | None = None,
    *,
    out: Path | str,
    tracker: Tracker | None = None,
) -> Encoder:
    """Return the encoder that codes images on a dictionary of the sample's patches; no labels.

    The folder holds the dictionary too (`PatchDictionary.open`) and pictures of it. It does not
    depend on the number of workers, nor on interruptions. Raises ConfigError when the sample has
    too few patches.
    """
    config, out, began = config or PatchesConfig(), located(out), time.monotonic()
    require_sample(sample, config)
    inputs = {"corpus": corpus.fingerprint, "sample": sample.fingerprint}
    if begin(out, stage="patches", config=config, inputs=inputs):
        log.info("patches: %s is current", out)
        remove_tree(out / "kmeans")
        return Encoder.open(out)
    made, clustering = make_dictionary(sample, config, out=out)
    made.save(out)
    encoder = _save_encoder(corpus, made, config, out)
    pictures = write_pictures(made, out)
    facts = _facts(config, clustering)
    seconds = time.monotonic() - began
    if tracker is not None:
        tracker.log(_records(clustering, facts))
        for picture in pictures:
            tracker.artifact(picture)
    finish(out, stage="patches", config=config, inputs=inputs, seconds=seconds, facts=facts)
    remove_tree(out / "kmeans")
    text = "patches: %s entries, k=%d, d=%d, %.1f s"
    log.info(text, f"{config.entries:,}", config.backbone_k, encoder.dim, seconds)
    return encoder


def require_sample(sample: PatchSample, config: PatchesConfig) -> None:
    """Raise ConfigError unless the sample holds the patches that are asked for."""
    if config.patches > len(sample):
        each = "" if config.select == "sample" else f" of {config.patches_per_entry} patches each"
        raise ConfigError(
            f"patches.size={config.size:,} entries{each} want {config.patches:,} patches, but "
            f"{sample.path} holds {len(sample):,}. Raise whiten.patches, or lower patches.size."
        )


def make_dictionary(
    sample: PatchSample, config: PatchesConfig, *, out: Path, stage: str = "patches"
) -> tuple[PatchDictionary, Clustering | None]:
    """Return the dictionary of a sample, and the k-means it comes from, if it does.

    out: k-means keeps its state in `kmeans` there, and continues from it. stage: whose resources an
    error names.
    """
    clustering = None
    if config.select == "sample":
        chosen = first_whitened(sample, config.patches)
    elif config.select == "farthest":
        rows = first_whitened(sample, config.patches)
        chosen = rows[farthest_points(rows, config.size)]
    else:
        clustering = _clustered(sample, config, out=out, stage=stage)
        chosen = clustering.centroids
    chosen = unit_entries(chosen) if config.unit_norm else chosen
    chosen = with_copies(chosen, sample, flips=config.flips, negatives=config.negatives)
    copies = len(chosen) // config.size
    counts = None if clustering is None else np.tile(clustering.counts, copies)
    return PatchDictionary.of(chosen, sample, counts), clustering


def _clustered(sample: PatchSample, config: PatchesConfig, *, out: Path, stage: str) -> Clustering:
    ask = config.resources
    if config.backend == "faiss":
        work = partial(_by_faiss, sample.path.absolute(), config)
        [(_, made)] = map_shards(work, [0], ask, label=stage)
        return made
    return kmeans_sharded(
        sample.array,
        config.size,
        rows=config.patches,
        transform=sample.matrix,
        iterations=config.iterations,
        seed=config.seed,
        precision=config.precision,
        resources=ask,
        out=out / "kmeans",
        stage=stage,
    )


def _by_faiss(sample: Path, config: PatchesConfig, _: int) -> Clustering:
    """Return k-means of the first patches of a sample; the one piece of work of a worker."""
    return faiss_kmeans(
        first_whitened(PatchSample.open(sample), config.patches),
        config.size,
        iterations=config.iterations,
        seed=config.seed,
        threads=max(1, int(config.resources.cpus)),
        gpus=math.ceil(config.resources.gpus),
    )


def _save_encoder(
    corpus: Corpus, made: PatchDictionary, config: PatchesConfig, out: Path
) -> Encoder:
    described = PatchBackboneConfig(
        size=config.entries,
        k=config.backbone_k,
        channels=made.raw.shape[1],
        patch_size=made.raw.shape[2],
        code=config.code,
        grid=config.grid,
        precision=config.precision,
    )
    images = ImageInput(
        image_size=corpus.image_size,
        mean=PIXEL_MEAN,
        std=PIXEL_STD,
        fit=read_config(corpus.path).get("fit", "crop"),
    )
    return save_encoder(out, backbone=PatchBackbone.of(described, *made.kernel), images=images)


def _facts(config: PatchesConfig, clustering: Clustering | None) -> dict[str, Any]:
    facts: dict[str, Any] = {
        "entries": config.entries,
        "k": config.backbone_k,
        "patches": config.patches,
        "dim": config.entries * config.grid**2,
    }
    if clustering is None:
        return facts
    counts = clustering.counts
    return facts | {
        "objective": clustering.objective[-1],
        "objective_by_iteration": list(clustering.objective),
        "smallest_cluster": int(counts.min()),
        "largest_cluster": int(counts.max()),
    }


def _records(clustering: Clustering | None, facts: dict[str, Any]) -> list[dict[str, Any]]:
    """Return what is tracked: the numbers, and k-means' objective as a curve."""
    numbers = {k: v for k, v in facts.items() if isinstance(v, int | float) and k != "objective"}
    if clustering is None:
        return [numbers]
    curve = [{"step": i, "objective": v} for i, v in enumerate(clustering.objective, start=1)]
    return [numbers, *curve]
