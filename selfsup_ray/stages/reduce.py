"""The stage `reduce`: embeddings on their principal components, unit rows again."""

from __future__ import annotations

import logging
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from selfsup_ray.artifacts import (
    Array,
    ShardedArray,
    begin,
    finish,
    read_done,
    require_disk,
    whole_file,
)
from selfsup_ray.cluster.shards import map_shards
from selfsup_ray.config import NonNegative, Positive, Resources, Share, config
from selfsup_ray.data.corpus import Corpus
from selfsup_ray.errors import ArtifactError, ConfigError, ResourceError
from selfsup_ray.ops.faiss_files import read_transform, write_transform
from selfsup_ray.ops.pca import (
    BLOCK,
    LinearMap,
    Moments,
    Pca,
    block_moments,
    map_of_bias,
    merged_moments,
    principal_components,
    projection,
    random_rotation,
    unit_rows,
)
from selfsup_ray.ops.rng import permuted
from selfsup_ray.stages.graph import Features
from selfsup_ray.storage import Place, located, reached, relative, remove_tree

if TYPE_CHECKING:
    from selfsup_ray.tracking import Tracker

log = logging.getLogger(__name__)

SAMPLE_BLOCK = 65_536
"""Sampled rows whose moments one worker adds up; fixed, since the sums follow the blocks."""


@config
class ReduceConfig:
    """How embeddings are reduced: centered, projected, optionally rotated, made unit rows.

    The published 256-d features: dim=256, sample_from=first, rotate=true. Images that are to be
    compared with others need the others' map: transform.
    """

    dim: Positive = 256
    """Dimensions kept: those of largest variance."""
    sample: Positive = 1_000_000
    """Rows that the components are fitted on; all where there are fewer."""
    sample_from: Literal["random", "first"] = "random"
    """Which rows: at random, or the first ones, as published."""
    whiten_power: Share = 0.0
    """Each component is divided by its variance to this power; 0 keeps, 0.5 equals them all."""
    rotate: bool = False
    """Turn the result at random, so that every dimension carries about the same variance."""
    transform: Place | None = None
    """A map that is applied in place of a fitted one: the folder of another `reduce`, or a linear
    transform of faiss (.vt); of the fields above only `dim` then counts."""
    dtype: Literal["float32", "float16"] = "float32"
    """How rows are stored. `float16` takes half the disk; all that reads them computes in float32
    and more, on numbers off by up to 0.05 %."""
    seed: NonNegative = 0
    """Chooses the sample and the rotation."""
    resources: Resources = Resources()
    """`workers` take a piece at a time, on `cpus` threads; 0 works in this process. CPUs only."""

    def __post_init__(self) -> None:
        if self.resources.gpus:
            raise ValueError(
                f"`resources.gpus` is {self.resources.gpus}, but reduce works on CPUs; set it to 0"
            )
        if self.transform is not None and (self.rotate or self.whiten_power):
            raise ValueError(
                f"`transform` is applied as it is, but rotate={self.rotate} and "
                f"whiten_power={self.whiten_power} are asked for; leave them out"
            )


class Reduced:
    """Handle on a reduced folder: (N, dim) unit rows, cut as the embeddings are."""

    def __init__(self, path: Path) -> None:
        self.path = located(path)
        done = read_done(self.path)
        self.fingerprint = done.fingerprint
        self.facts: dict[str, Any] = done.facts
        self.array = ShardedArray.open(self.path / "rows")

    @classmethod
    def open(cls, path: Path | str) -> Reduced:
        """Return the finished reduction in a folder.

        Raises ArtifactError when the stage has not finished there.
        """
        return cls(located(path))

    def __len__(self) -> int:
        return len(self.array)

    @property
    def shape(self) -> tuple[int, ...]:
        """(N, dim)."""
        return self.array.shape

    @property
    def transform(self) -> LinearMap:
        """What was applied to every row before it was made a unit row."""
        return _read_transform(self.path)

    @property
    def corpus(self) -> Corpus:
        """The images these rows describe."""
        return Corpus.open(reached(self.path, self.facts["corpus"]))


def reduce(
    features: Features,
    config: ReduceConfig | None = None,
    *,
    out: Path | str,
    tracker: Tracker | None = None,
) -> Reduced:
    """Project unit rows (N, d) onto `dim` principal components; return the handle.

    The rows do not depend on the number of workers or threads, nor on interruptions. Raises
    ConfigError when `dim` is above d or there are fewer than two rows.
    """
    config, out, began = config or ReduceConfig(), located(out), time.monotonic()
    array = features.array
    _require_inputs(config, array)
    given = None if config.transform is None else _given_map(config, config.transform, array, out)
    inputs = {"features": features.fingerprint}
    if begin(out, stage="reduce", config=config, inputs=inputs):
        log.info("reduce: %s is current", out)
        return Reduced.open(out)
    require_disk(out, size_bytes=_disk_bytes(config, array))
    if not (out / "transform.safetensors").exists():
        _fit(array, config, out) if given is None else _write_transform(out, given)
    rows = ShardedArray.create(
        out / "rows", shard_rows=array.shard_rows, row_shape=(config.dim,), dtype=config.dtype
    )
    missing = rows.unwritten()
    work = partial(_reduce_shard, array.path.absolute(), out.absolute(), _threads(config))
    for _ in map_shards(work, missing, config.resources, label="reduce"):
        pass
    facts = _facts(features, out)
    seconds = time.monotonic() - began
    if tracker is not None:
        tracker.log([{k: v for k, v in facts.items() if isinstance(v, int | float)}])
    finish(out, stage="reduce", config=config, inputs=inputs, seconds=seconds, facts=facts)
    kept = f", {facts['explained_variance']:.1%} of the variance" if given is None else ""
    text = "reduce: %s rows, d=%d to %d%s, %.1f s"
    log.info(text, f"{len(array):,}", array.shape[1], config.dim, kept, seconds)
    return Reduced.open(out)


def _require_inputs(config: ReduceConfig, array: ShardedArray) -> None:
    n, d = array.shape
    if config.dim > d:
        raise ConfigError(
            f"reduce.dim={config.dim}, but the rows in {array.path} have {d} dimensions. Set it to "
            f"{d} or less, or leave the stage out."
        )
    if n < 2 and config.transform is None:
        raise ConfigError(
            f"reduce needs at least 2 rows to see directions of variance; {array.path} has {n}. "
            f"Add images, or leave the stage out."
        )
    if config.sample < 2:
        raise ConfigError("reduce.sample=1, but a single row has no variance. Set it to 2 or more.")


def _given_map(config: ReduceConfig, path: Path, array: ShardedArray, out: Path) -> LinearMap:
    """Return the map to apply; raise unless it fits the rows and is the one `out` was made with."""
    if path.suffix == ".vt":
        made = map_of_bias(*read_transform(path))
    else:
        made = Reduced.open(path).transform
    dim, d = made.matrix.shape
    if (dim, d) != (config.dim, array.shape[1]):
        raise ConfigError(
            f"reduce.transform={path} maps {d} dimensions to {dim}, but the rows have "
            f"{array.shape[1]} and reduce.dim={config.dim}. Give the map of the same encoder, and "
            f"set reduce.dim to {dim}."
        )
    if (out / "transform.safetensors").exists():
        used = _read_transform(out)
        same = np.array_equal(used.matrix, made.matrix) and np.array_equal(used.mean, made.mean)
        if not same:
            raise ArtifactError(
                f"{out} was built with another map than {path} holds now. Choose another `out`, "
                f"or delete the folder to rebuild it."
            )
    return made


def _disk_bytes(config: ReduceConfig, array: ShardedArray) -> int:
    """Return what is on disk at most: the rows, the map, and the moments while it is fitted."""
    n, d = array.shape
    blocks = -(-min(config.sample, n) // SAMPLE_BLOCK)
    return (
        n * config.dim * np.dtype(config.dtype).itemsize
        + 2 * config.dim * d * 4
        + blocks * (d + 1) * d * 8
    )


def _threads(config: ReduceConfig) -> int:
    return max(1, int(config.resources.cpus))


@contextmanager
def one_blas_thread() -> Iterator[None]:
    """Keep matrix products on one thread: how BLAS shares one out decides its last bits.

    Several cores are used by several products at a time.
    """
    from threadpoolctl import threadpool_limits

    with threadpool_limits(limits=1):
        yield


def _fit(array: ShardedArray, config: ReduceConfig, out: Path) -> None:
    """Write the map, from the moments of the sampled rows."""
    n, d = array.shape
    m = min(config.sample, n)
    counts = [min(SAMPLE_BLOCK, m - start) for start in range(0, m, SAMPLE_BLOCK)]
    stored = ShardedArray.create(
        out / "moments", shard_rows=[d + 1] * len(counts), row_shape=(d,), dtype="float64"
    )
    missing = stored.unwritten()
    work = partial(_write_moments, array.path.absolute(), stored.path.absolute(), config)
    for _ in map_shards(work, missing, config.resources, label="reduce: fit"):
        pass
    with one_blas_thread():
        parts = (Moments(c, stored.shard(i)[0], stored.shard(i)[1:]) for i, c in enumerate(counts))
        pca = principal_components(merged_moments(parts), dim=config.dim)
        _require_variance(pca, config)
        rotation = random_rotation(config.dim, seed=config.seed) if config.rotate else None
        made = projection(pca, whiten_power=config.whiten_power, rotation=rotation)
    _write_transform(out, made, pca)
    remove_tree(stored.path)


def sampled_ids(n: int, config: ReduceConfig) -> Array:
    """Return the ids of the rows that the components are fitted on, ascending."""
    if config.sample >= n or config.sample_from == "first":
        return np.arange(min(n, config.sample))
    return np.sort(permuted(np.arange(config.sample), n=n, seed=config.seed, epoch=0))


def _write_moments(source: Path, stored: Path, config: ReduceConfig, block: int) -> None:
    """Write mean and scatter of one block of the sample; the rows are read BLOCK at a time."""
    array, found = ShardedArray.open(source), ShardedArray.open(stored)
    ids = sampled_ids(len(array), config)[block * SAMPLE_BLOCK : (block + 1) * SAMPLE_BLOCK]

    def part(start: int) -> Moments:
        return block_moments(array.rows(ids[start : start + BLOCK]))

    with one_blas_thread(), ThreadPoolExecutor(_threads(config)) as pool:
        whole = merged_moments(pool.map(part, range(0, len(ids), BLOCK)))
    if not np.isfinite(whole.scatter).all():
        raise ArtifactError(
            f"{source} holds a number that is not finite. Look at the encoder's training for "
            f"divergence, then embed again."
        )
    found.write_shard(block, np.concatenate([whole.mean[None], whole.scatter]))


def _require_variance(pca: Pca, config: ReduceConfig) -> None:
    """Raise ConfigError when a direction without variance would be blown up to have some."""
    rank = int((pca.variance > 1e-12 * max(pca.total_variance, 1e-300)).sum())
    if config.whiten_power and rank < config.dim:
        raise ConfigError(
            f"reduce.whiten_power={config.whiten_power}, but only {rank} of the {config.dim} "
            f"components have any variance. Set reduce.dim to {rank} or less, or whiten_power to 0."
        )


def _write_transform(out: Path, made: LinearMap, pca: Pca | None = None) -> None:
    from safetensors.numpy import save_file

    try:
        write_transform(out / "transform.vt", made.matrix, made.bias)
    except ResourceError as error:
        log.warning("reduce: transform.vt is not written: %s", error)
    tensors = {"matrix": made.matrix, "mean": made.mean}
    if pca is not None:
        tensors["explained_variance"] = pca.explained
    with whole_file(out / "transform.safetensors") as temporary:
        save_file({k: np.ascontiguousarray(v) for k, v in tensors.items()}, temporary)


def _read_transform(out: Path) -> LinearMap:
    from safetensors.numpy import load_file

    tensors = load_file(out / "transform.safetensors")
    return LinearMap(tensors["matrix"], tensors["mean"])


def _reduce_shard(source: Path, out: Path, threads: int, shard: int) -> None:
    """Write one shard of unit rows."""
    made, rows = _read_transform(out), ShardedArray.open(source).shard(shard)
    result = ShardedArray.open(out / "rows")
    reduced = np.empty((len(rows), result.shape[1]), np.float32)

    def write(start: int) -> None:
        reduced[start : start + BLOCK] = unit_rows(made(rows[start : start + BLOCK]))

    with one_blas_thread(), ThreadPoolExecutor(threads) as pool:
        list(pool.map(write, range(0, len(rows), BLOCK)))
    finite = np.isfinite(reduced).all(axis=1)
    if not finite.all():
        row = int(result.offsets[shard]) + int(finite.argmin())
        raise ArtifactError(f"{source}: row {row} holds a number that is not finite. Embed again.")
    result.write_shard(shard, reduced)


def _facts(features: Features, out: Path) -> dict[str, Any]:
    from safetensors.numpy import load_file

    tensors = load_file(out / "transform.safetensors")
    n, d = features.array.shape
    facts: dict[str, Any] = {"images": n, "dim": len(tensors["matrix"]), "input_dim": d}
    if (shares := tensors.get("explained_variance")) is not None:
        facts["explained_variance"] = float(shares.sum())
        facts["explained_variance_by_component"] = [float(f"{share:.6g}") for share in shares]
    path, known = getattr(features, "path", None), getattr(features, "facts", {})
    if path is not None and "corpus" in known:
        facts["corpus"] = relative(reached(located(path), known["corpus"]), out)
    return facts
