"""The stage `whiten`: patches drawn from a corpus, and the matrix that whitens them."""

from __future__ import annotations

import logging
import time
from collections.abc import Mapping
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from selfsup_ray.artifacts import (
    Array,
    ShardedArray,
    begin,
    finish,
    read_config,
    read_done,
    require_disk,
    whole_file,
)
from selfsup_ray.config import NonNegative, NonNegativeFloat, Positive, Resources, build, config
from selfsup_ray.data.corpus import Corpus
from selfsup_ray.errors import ConfigError
from selfsup_ray.ops.pca import Moments
from selfsup_ray.ops.pixel_shuffle import Shuffle
from selfsup_ray.ops.whitening import (
    Whitening,
    off_diagonal_share,
    unwhitened,
    whitened,
    whitened_covariance,
    whitening_matrix,
)
from selfsup_ray.stages.covariance_picture import write_covariances
from selfsup_ray.stages.patch_maps import CorpusMaps, Maps
from selfsup_ray.stages.patch_rows import (
    Drawing,
    remove_rounds,
    require_positions,
    sample_moments,
    write_noise,
    write_patches,
)
from selfsup_ray.stages.reduce import one_blas_thread
from selfsup_ray.storage import located

if TYPE_CHECKING:
    from selfsup_ray.tracking import Tracker

log = logging.getLogger(__name__)

PICTURE = "covariance.png"
"""Heat-maps of the covariance of raw and of whitened patches."""


@config
class WhitenConfig:
    """Which patches are drawn, and how they are whitened.

    The defaults are those of the published code: 262,144 patches of 5 x 5 pixels, levels in [0, 1],
    whitened by PCA with the covariance of every patch of every image.
    """

    patches: Positive = 262_144
    """Patches that are drawn, uniformly over all positions of all images, none twice."""
    patch_size: Positive = 5
    """Side in pixels."""
    source: Literal["images", "gaussian", "uniform"] = "images"
    """`gaussian`, `uniform`: noise N(0, 1) or [-1, 1) in place of patches, for comparison."""
    min_norm: NonNegativeFloat = 0.01
    """Patches of images with a smaller L2 norm are passed over and others drawn for them."""
    pixel_scale: Literal["zero_one", "plus_minus_one"] = "zero_one"
    """Range of the levels in patches. Codes are made from levels in [-1, 1]: the published code
    learns its dictionary in [0, 1] all the same, and so does the default; `plus_minus_one` agrees
    with the codes."""
    whitening: Whitening = "pca"
    """`pca` and `zca` give the same codes; `zca` keeps whitened patches looking like patches."""
    regularization: NonNegativeFloat = 1e-3
    """Added to the standard deviation of every direction before it is divided by."""
    covariance_from: Literal["all", "sample"] = "all"
    """`all`: the patches at every position of every image; `sample`: the drawn ones, and so it
    always is where noise stands in place of patches."""
    only: str | None = None
    """Draw from the images alone whose source matches, such as `train/*`: * stands for any text,
    slashes included."""
    without: str | None = None
    """Leave out the images whose source matches, such as the test images of `classify`."""
    shuffle: Shuffle | None = None
    """A comparison: draw from images whose pixels are in random places (`pixels`: with their colors
    together, `values`: each number alone); see `classify.views.shuffle`."""
    seed: NonNegative = 0
    """Chooses the patches, and where a shuffle puts pixels."""
    resources: Resources = Resources()
    """`workers` take a shard of images at a time; 0 works in this process. CPUs only."""

    def __post_init__(self) -> None:
        if self.resources.gpus:
            raise ValueError(
                f"`resources.gpus` is {self.resources.gpus}, but whiten works on CPUs; set it to 0"
            )


class PatchSample:
    """Handle on a whiten folder: raw patches in the order they were drawn, and what whitens them.

    Every first so many rows are a uniform sample of their own.
    """

    def __init__(self, path: Path) -> None:
        self.path = located(path)
        done = read_done(self.path)
        self.fingerprint = done.fingerprint
        self.facts: dict[str, Any] = done.facts
        self.config = build(WhitenConfig, read_config(self.path))
        self.array = ShardedArray.open(self.path.absolute() / "patches")  # workers read it too

    @classmethod
    def open(cls, path: Path | str) -> PatchSample:
        """Return the finished sample in a folder.

        Raises ArtifactError when the stage has not finished there.
        """
        return cls(located(path))

    def __len__(self) -> int:
        return len(self.array)

    @property
    def channels(self) -> int:
        """C of the images or maps."""
        return int(self.facts["channels"])

    @property
    def patch_size(self) -> int:
        """s; rows hold C s s numbers, channel first."""
        return self.config.patch_size

    @cached_property
    def _tensors(self) -> dict[str, Array]:
        from safetensors.numpy import load_file

        return dict(load_file(self.path / "whitening.safetensors"))

    @property
    def mean(self) -> Array:
        """(d,) float64, of all patches or the sample, as `covariance_from` has it."""
        return self._tensors["mean"]

    @property
    def covariance(self) -> Array:
        """(d, d) float64, over the number of patches."""
        return self._tensors["covariance"]

    @property
    def matrix(self) -> Array:
        """W (d, d) float32: a patch x is whitened as x W."""
        return self._tensors["matrix"]

    def whitened(self, rows: Array) -> Array:
        """Return raw patches (n, d) whitened, float32."""
        return whitened(rows, self.matrix)

    def unwhitened(self, rows: Array) -> Array:
        """Return whitened patches (n, d) as raw ones, float32, for pictures."""
        return unwhitened(rows, self.matrix)


def whiten(
    corpus: Corpus,
    config: WhitenConfig | None = None,
    *,
    out: Path | str,
    tracker: Tracker | None = None,
) -> PatchSample:
    """Draw patches from a corpus and compute what whitens them; no labels are read.

    Patches and matrix do not depend on the number of workers, nor on interruptions. Raises
    ConfigError when there are fewer positions than patches asked for.
    """
    config = config or WhitenConfig()
    here = Corpus.open(corpus.path.absolute())  # a worker may have another working directory
    chosen = {"only": config.only, "without": config.without}
    maps = CorpusMaps(here, **chosen, shuffle=config.shuffle, seed=config.seed)
    inputs = {"corpus": corpus.fingerprint}
    return whiten_maps(maps, config, inputs=inputs, out=out, tracker=tracker)


def whiten_maps(
    maps: Maps,
    config: WhitenConfig,
    *,
    inputs: Mapping[str, str],
    out: Path | str,
    tracker: Tracker | None = None,
) -> PatchSample:
    """Do what `whiten` does with any maps, such as the features that a frozen layer makes.

    inputs: fingerprint of what the maps come from, by name. Levels of uint8 maps are scaled by
    `pixel_scale`, floats are taken as they are; `only` and `without` are the maps' own business.
    """
    out, began = located(out).absolute(), time.monotonic()
    drawing = _drawing(config)
    if config.source == "images":
        require_positions(maps, drawing)
    if begin(out, stage="whiten", config=config, inputs=inputs):
        log.info("whiten: %s is current", out)
        remove_rounds(out)
        return PatchSample.open(out)
    channels = maps.shape[0]
    dim = channels * config.patch_size**2
    require_disk(out, size_bytes=2 * config.patches * dim * 4)
    facts = _write(maps, config, drawing, out)
    seconds = time.monotonic() - began
    if tracker is not None:
        tracker.log([{k: v for k, v in facts.items() if isinstance(v, int | float)}])
        tracker.artifact(out / PICTURE)
    finish(out, stage="whiten", config=config, inputs=inputs, seconds=seconds, facts=facts)
    remove_rounds(out)
    text = "whiten: %s patches of %d numbers, %.1f s"
    log.info(text, f"{config.patches:,}", dim, seconds)
    return PatchSample.open(out)


def _drawing(config: WhitenConfig) -> Drawing:
    is_signed = config.pixel_scale == "plus_minus_one"
    return Drawing(
        count=config.patches,
        patch_size=config.patch_size,
        min_norm=config.min_norm,
        scale=(2 if is_signed else 1) / 255,
        shift=-1.0 if is_signed else 0.0,
        seed=config.seed,
        with_moments=config.covariance_from == "all",
        resources=config.resources,
    )


def _write(maps: Maps, config: WhitenConfig, drawing: Drawing, out: Path) -> dict[str, Any]:
    """Write patches and whitening, and return the facts."""
    dim = maps.shape[0] * config.patch_size**2
    moments, facts = None, {"patches": config.patches, "dim": dim, "channels": maps.shape[0]}
    if config.source == "images":
        moments, counts = write_patches(maps, drawing, out)
        facts |= counts
    else:
        write_noise(config.source, dim, drawing, out)
    if moments is None:
        moments = sample_moments(out / "patches", config.resources)
    return facts | _write_whitening(moments, config, out)


def _write_whitening(moments: Moments, config: WhitenConfig, out: Path) -> dict[str, Any]:
    """Write mean, covariance, its picture and W; return the shares that are off its diagonal."""
    from safetensors.numpy import save_file

    with one_blas_thread():
        covariance = moments.scatter / moments.count
        _require_variance(covariance, config)
        matrix = whitening_matrix(
            covariance, regularization=config.regularization, kind=config.whitening
        )
        after = whitened_covariance(covariance, matrix)
    write_covariances(covariance, after, out / PICTURE)
    tensors = {"mean": moments.mean, "covariance": covariance, "matrix": matrix}
    with whole_file(out / "whitening.safetensors") as temporary:
        save_file({name: values.copy(order="C") for name, values in tensors.items()}, temporary)
    return {
        "covariance_patches": moments.count,
        "off_diagonal_before": off_diagonal_share(covariance),
        "off_diagonal_after": off_diagonal_share(after),
    }


def _require_variance(covariance: Array, config: WhitenConfig) -> None:
    """Raise ConfigError when a direction without variance would be divided by zero."""
    if config.regularization > 0 or config.whitening == "none":
        return
    values = np.linalg.eigvalsh(covariance)
    rank = int((values > 1e-12 * max(values[-1], 1e-300)).sum())
    if rank < len(values):
        raise ConfigError(
            f"whiten.regularization=0, but only {rank} of the {len(values)} directions of the "
            f"patches have any variance. Set it above 0, such as 1e-3."
        )
