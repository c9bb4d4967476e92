"""How nearest neighbors are searched: the config of each method of `cluster.neighbors.Search`."""

from __future__ import annotations

import hashlib
from math import isqrt
from pathlib import Path
from typing import Literal

import numpy as np

from selfsup_ray.artifacts import ShardedArray, read_json, write_json
from selfsup_ray.config import NonNegative, Positive, config, to_dict
from selfsup_ray.errors import ArtifactError
from selfsup_ray.ops.approximate import HNSW, IVF, require_trainable
from selfsup_ray.ops.index import require_gpu_faiss
from selfsup_ray.ops.pieces import PieceFiles


@config
class ExactConfig:
    """Every row is compared: recall 1. Costs N^2 for the graph of all N images."""

    name: Literal["exact"] = "exact"


@config
class IVFConfig:
    """k-means cells; a query looks at its nearest cells only (Johnson et al. 2017)."""

    name: Literal["ivf"] = "ivf"
    num_lists: Positive | None = None
    """Cells. Left out: 4 sqrt(N), the rule of Douze et al. 2018. Never more than the rows."""
    num_probes: Positive = 32
    """Cells a query looks at, at most 3/4 of all (the same authors' rule). More: recall, time."""
    storage: Literal["flat", "sq8", "fp16", "pq"] = "flat"
    """How a row is kept in its cell: 4 bytes a number, 1, 2, or `pq_bytes` in all."""
    pq_bytes: Positive = 64
    """Bytes of a row under `storage: pq`; divides the dimension."""
    rotate: bool = False
    """`storage: pq` only: rotate the rows first so that the code fits them better (OPQ)."""
    rerank: Positive = 2
    """Candidates per wanted neighbor that are compared exactly; 8 or more suits `pq`."""
    train_sample: Positive = 64
    """Random rows per cell that the cells (and codes) are trained on; 39 to 256 is usual."""
    iterations: Positive = 10
    """Rounds of k-means."""
    piece_rows: Positive = 1_000_000
    """Rows of one index file, the unit that is built at once and that actors share out."""
    seed: NonNegative = 0
    """Chooses the training sample and the first centers."""

    def __post_init__(self) -> None:
        if self.rotate and self.storage != "pq":
            raise ValueError(
                f"`rotate` is true, but storage={self.storage!r} has no code to fit; "
                f"set it to false, or storage to pq"
            )

    def lists(self, n: int) -> int:
        """Return the number of cells for n rows."""
        wanted = 4 * isqrt(n) if self.num_lists is None else self.num_lists
        return max(1, min(wanted, n))

    def probes(self, n: int) -> int:
        """Return how many cells a query looks at among n rows."""
        return max(1, min(self.num_probes, int(0.75 * self.lists(n))))


@config
class HNSWConfig:
    """A navigable graph over the rows of each piece (Malkov & Yashunin 2018)."""

    name: Literal["hnsw"] = "hnsw"
    links: Positive = 16
    """M: links of a row on the upper layers; twice as many on the lowest."""
    ef_construction: Positive = 40
    """Candidates kept while a row is linked."""
    ef_search: Positive = 64
    """Candidates kept while a query walks; never fewer than it asks for."""
    rerank: Positive = 1
    """Candidates per wanted neighbor that are compared exactly."""
    piece_rows: Positive = 250_000
    """Rows of one graph, built by one thread. Each query walks through every piece's graph."""


SearchConfig = ExactConfig | IVFConfig | HNSWConfig
"""The methods of `Search`, told apart by `name`."""


def index_files(
    array: ShardedArray,
    method: SearchConfig,
    *,
    only: Path | None,
    folder: Path | None,
    gpus: float,
) -> PieceFiles | None:
    """Return where an approximate index lies and how it is built; None for exact search.

    Claims the folder for this index. Raises ConfigError when the rows do not suit the method, and
    ArtifactError when the folder holds an index of another kind.
    """
    if gpus:
        require_gpu_faiss(method.name)
    if isinstance(method, ExactConfig):
        return None
    assert folder is not None, "an approximate index needs a folder"
    n = len(array) if only is None else len(np.load(only, mmap_mode="r"))
    recipe, train_rows = _recipe(method, n)
    if isinstance(recipe, IVF):
        require_trainable(recipe, dim=array.shape[1], rows=train_rows)
    _claim(folder, {"method": to_dict(method), "rows": n, "only": _digest(only)})
    return PieceFiles(
        array.path.resolve(),
        folder.resolve(),
        recipe,
        n=n,
        piece_rows=method.piece_rows,
        rerank=method.rerank,
        train_rows=train_rows,
        only=only.resolve() if only else None,
    )


def _recipe(method: IVFConfig | HNSWConfig, n: int) -> tuple[IVF | HNSW, int]:
    """Return the plain numbers of an index over n rows, and how many rows it is trained on."""
    match method:
        case HNSWConfig():
            return HNSW(method.links, method.ef_construction, method.ef_search), 0
        case IVFConfig():
            lists = method.lists(n)
            recipe = IVF(
                lists,
                method.probes(n),
                storage=method.storage,
                pq_bytes=method.pq_bytes,
                rotate=method.rotate,
                iterations=method.iterations,
                seed=method.seed,
            )
            return recipe, min(n, lists * method.train_sample)


def _claim(folder: Path, wanted: dict[str, object]) -> None:
    path = folder / "index.json"
    if not path.exists():
        return write_json(path, wanted)
    if read_json(path) != wanted:
        raise ArtifactError(
            f"{folder} holds an index built with {read_json(path)}, but this run asks for "
            f"{wanted}. Choose another folder, or delete it to build the index again."
        )


def _digest(only: Path | None) -> str | None:
    return None if only is None else hashlib.sha256(only.read_bytes()).hexdigest()
