"""A run on published features: the stage `embed` from files, and what is known of their images."""

from __future__ import annotations

import logging
import time
from functools import cached_property
from pathlib import Path

import numpy as np

from selfsup_ray.artifacts import Array, ShardedArray, begin, finish, write_text
from selfsup_ray.data.published import FeatureBlocks, open_rows, require_file, sampled_digest
from selfsup_ray.errors import ArtifactError
from selfsup_ray.stages.embed import EmbedConfig, Embeddings, ImportedConfig
from selfsup_ray.stages.imported import ImportFeaturesConfig, copy_features
from selfsup_ray.storage import located, remove_tree

log = logging.getLogger(__name__)


def imported_shape(config: ImportedConfig) -> tuple[int, int]:
    """Return (N, d) of the files, from their headers."""
    files = [located(path) for path in config.files]
    return open_rows(files, dim=config.dim, num_rows=config.rows).shape


def imported_digest(config: ImportedConfig) -> str:
    """Return a hash of pieces of all files, labels and names included."""
    given = [path for path in (config.labels, config.class_names) if isinstance(path, Path)]
    return sampled_digest([located(path) for path in (*config.files, *given)])


def embed_imported(config: EmbedConfig, *, out: Path | str) -> Embeddings:
    """Return the rows of published files as the embeddings of a run, copied once.

    Shards that an interrupted run wrote are kept. Raises ArtifactError when a file does not fit,
    or there is not one label for each row.
    """
    made, out, began = config.imported, located(out), time.monotonic()
    assert made is not None, "the experiment checks that there are files"
    files = [located(path) for path in made.files]
    inputs = {"source": imported_digest(made)}
    if begin(out, stage="embed", config=config, inputs=inputs):
        log.info("embed: %s is current", out)
        return Embeddings.open(out)
    ask = ImportFeaturesConfig(
        dim=made.dim,
        rows=made.rows,
        normalize=made.normalize,
        dtype=config.dtype,
        resources=config.resources,
    )
    facts = copy_features(files, ask, out)
    rows = ShardedArray.open(out / "rows")
    if made.labels != "found":
        remove_tree(out / "labels")
    if isinstance(made.labels, Path):
        _write_labels(_read_labels(made.labels, len(rows)), out / "labels", rows)
    facts["labels"] = (out / "labels").exists()
    if facts["labels"] and made.class_names is not None:
        write_text(out / "class_names.txt", made.class_names.read_text())
    ends = FeatureBlocks(files) if files[0].suffix in (".h5", ".hdf5") else None
    facts["files"] = [path.name for path in (files if ends is None else ends.paths)]
    facts["first_rows"] = [0] if ends is None else ends.offsets[:-1].tolist()
    seconds = time.monotonic() - began
    finish(out, stage="embed", config=config, inputs=inputs, seconds=seconds, facts=facts)
    log.info("embed: %s rows of files, d=%d, %.1f s", f"{len(rows):,}", facts["dim"], seconds)
    return Embeddings.open(out)


def _read_labels(path: Path, n: int) -> Array:
    """Return the labels in an .npy file. Raises ArtifactError unless there are n integers."""
    require_file(path)
    try:
        labels: Array = np.load(path, mmap_mode="r", allow_pickle=False)
    except (OSError, ValueError, EOFError) as error:
        reason = " ".join(str(error).split())
        raise ArtifactError(
            f"{path} cannot be read as numbers ({reason}). Write the labels with numpy.save."
        ) from None
    if labels.shape != (n,) or labels.dtype.kind not in "iu":
        raise ArtifactError(
            f"{path} holds {labels.dtype} of shape {labels.shape}, wanted one integer for each of "
            f"the {n:,} rows, -1 for unknown."
        )
    return labels


def _write_labels(labels: Array, out: Path, rows: ShardedArray) -> None:
    array = ShardedArray.create(out, shard_rows=rows.shard_rows, row_shape=(), dtype="int64")
    for i in array.unwritten():
        array.write_shard(i, labels[array.offsets[i] : array.offsets[i + 1]])


class ImportedImages:
    """What is known of the images behind imported rows: labels, class names, file and row."""

    def __init__(self, embeddings: Embeddings) -> None:
        self._at, self._facts = embeddings.path, embeddings.facts
        self._num = len(embeddings)

    @cached_property
    def _labels(self) -> ShardedArray | None:
        path = self._at / "labels"
        return ShardedArray.open(path) if path.exists() else None

    @cached_property
    def has_labels(self) -> bool:
        """Whether at least one image has a label."""
        stored = self._labels
        return stored is not None and any(
            (stored.shard(i) >= 0).any() for i in range(stored.num_shards)
        )

    def labels(self) -> Array:
        """Return the labels of all images: (N,) int64, -1 is unknown."""
        if self._labels is None:
            return np.full(self._num, -1, np.int64)
        return np.asarray(self._labels)

    @cached_property
    def class_names(self) -> list[str] | None:
        """Name of every class, in the order of the labels, where they were given."""
        path = self._at / "class_names.txt"
        return path.read_text().splitlines() if path.exists() else None

    def sources(self, ids: Array) -> list[str]:
        """Return the file of each row and its place there, such as `val.hdf5/17`."""
        first = np.array(self._facts["first_rows"], np.int64)
        owner = np.searchsorted(first, ids, side="right") - 1
        pairs = zip(owner.tolist(), (ids - first[owner]).tolist(), strict=True)
        return [f"{self._facts['files'][i]}/{row}" for i, row in pairs]
