"""The stage `graph`: the k nearest neighbors of every image, with the recall that was measured."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Annotated, Any, Protocol

import numpy as np
from pydantic import Field

from selfsup_ray.artifacts import (
    Array,
    ShardedArray,
    begin,
    finish,
    read_claim,
    read_config,
    read_done,
    require_disk,
)
from selfsup_ray.cluster.methods import ExactConfig, HNSWConfig, IVFConfig
from selfsup_ray.cluster.neighbors import Search
from selfsup_ray.config import NonNegative, Positive, Resources, Share, build, config
from selfsup_ray.errors import ArtifactError, ConfigError
from selfsup_ray.ops.metrics import Tally, neighbor_agreement, wilson
from selfsup_ray.ops.neighbors import best_products, pair_similarity, recall
from selfsup_ray.ops.rng import permuted
from selfsup_ray.progress import track
from selfsup_ray.stages.cell_files import remove_work
from selfsup_ray.stages.cell_graph import CellsConfig, cell_graph
from selfsup_ray.storage import located, reached, relative
from selfsup_ray.tracking import Tracker

log = logging.getLogger(__name__)

Labels = Array | Sequence[int] | Callable[[], Array]
"""(N,) class of every image, -1 unknown, or a function that returns it, such as `corpus.labels`."""


class Features(Protocol):
    """An array of unit rows with the hash of what made it; `Embeddings` is one."""

    @property
    def array(self) -> ShardedArray: ...

    @property
    def fingerprint(self) -> str: ...


@dataclass(frozen=True)
class _Rows:
    array: ShardedArray
    fingerprint: str


def place_of(features: Features, out: Path) -> dict[str, str]:
    """Return the fact where the rows of a graph lie, seen from its folder; none if in no folder."""
    path = getattr(features, "path", None)
    return {} if path is None else {"features": relative(located(path), out)}


GraphMethod = Annotated[
    ExactConfig | CellsConfig | IVFConfig | HNSWConfig, Field(discriminator="name")
]


@config
class GraphConfig:
    """How the kNN graph is built."""

    k: Positive = 20
    """Neighbors kept per image, the image itself excluded; all others, where there are fewer."""
    method: GraphMethod = ExactConfig()
    """`exact` compares every pair of images; `cells` is the fast way above about 50,000; `ivf`
    and `hnsw` search a faiss index that also serves later queries."""
    recall_sample: Positive = 1000
    """Images whose lists are checked against a separate float64 search."""
    min_recall: Share = 0.95
    """The stage stops with an error when the recall measured on the sample is lower."""
    seed: NonNegative = 0
    """Chooses the images of the recall sample."""
    resources: Resources = Resources()
    """`workers` actors (tasks, for `cells`) share the work; 0 stays in this process, without Ray.
    With `gpus`, `cells` (by cell), `exact` and `ivf` work on the GPU."""

    def __post_init__(self) -> None:
        method = self.method
        by_row = isinstance(method, CellsConfig) and method.by == "row"
        if self.resources.gpus and (by_row or method.name == "hnsw"):
            what = "method.by='row'" if by_row else "method.name='hnsw'"
            raise ValueError(
                f"`resources.gpus` is {self.resources.gpus}, but {what} works on CPUs; set it to 0"
                + (", or by to cell" if by_row else "")
            )


class Graph:
    """Handle on a graph folder: k neighbors per image, best first, the image itself excluded."""

    def __init__(self, path: Path) -> None:
        self.path = located(path)
        self.ids = ShardedArray.open(self.path / "ids")
        self.similarity = ShardedArray.open(self.path / "similarity")

    @classmethod
    def open(cls, path: Path | str) -> Graph:
        """Return the finished graph in a folder.

        Raises ArtifactError when the stage has not finished there.
        """
        read_done(located(path))
        return cls(located(path))

    def __len__(self) -> int:
        return len(self.ids)

    @property
    def k(self) -> int:
        """Neighbors per image; N - 1 where the config asks for more, 0 for a single image."""
        return self.ids.shape[1]

    @property
    def order(self) -> ShardedArray | None:
        """(N,) the image at each place of an order in which neighbors lie close; None without."""
        return ShardedArray.open(self.path / "order") if (self.path / "order").exists() else None

    @cached_property
    def facts(self) -> dict[str, Any]:
        """What the stage measured: recall, recall_interval, recall_sample, neighbor_accuracy."""
        return read_done(self.path).facts

    @property
    def fingerprint(self) -> str:
        """Hash of the config and the inputs that made the graph."""
        return read_done(self.path).fingerprint

    @property
    def recall(self) -> float | None:
        """Share of the true k nearest neighbors that the lists hold, on a sample of images.

        None for a graph that was imported without the features to measure it on.
        """
        value = self.facts.get("recall")
        return None if value is None else float(value)

    def search(
        self, resources: Resources | None = None, *, features: Features | None = None
    ) -> Search:
        """Return the search that answers for new rows by the index the graph was built with.

        `with graph.search() as search: found = search.search(rows, k)`, rows (n, d) float32 unit
        rows. `ivf` and `hnsw` load their stored pieces; after `exact` and `cells` every row is
        compared. By default in this process; `workers` are actors, as for the graph. features:
        those the graph was made from, where it does not say where they are: imported without them,
        or made by an earlier version. Raises ArtifactError when rows or pieces are missing.
        """
        array = (features or self._features()).array
        if len(array) != len(self):
            raise ArtifactError(
                f"{self.path} has {len(self):,} images, {array.path} {len(array):,}."
            )
        stored = read_config(self.path).get("method", {"name": "exact"})
        kinds: dict[str, type[IVFConfig | HNSWConfig]] = {"ivf": IVFConfig, "hnsw": HNSWConfig}
        ask, kind = resources or Resources(workers=0), kinds.get(stored["name"])
        if kind is None or not self.k:
            return Search(array, ask, stage="search")
        folder = self.path / "index"
        if not (folder / "index.json").exists():
            raise ArtifactError(f"{folder} holds no index. Delete {self.path} to build it again.")
        made = Search(array, ask, stage="search", method=build(kind, stored), folder=folder)
        assert made.files is not None
        if made.files.missing or not made.files.is_trained:
            made.close()
            raise ArtifactError(f"{folder} lacks pieces. Delete {self.path} to build it again.")
        return made

    def _features(self) -> _Rows:
        """Return the rows the graph was made from, where its stamp says they are."""
        wanted = read_claim(self.path / "config.yaml")["inputs"].get("features")
        if "features" not in self.facts:
            raise ArtifactError(
                f"{self.path} does not say where the rows are that it was made from. Give them as "
                f"`features`."
            )
        path = reached(self.path, self.facts["features"])
        if read_done(path).fingerprint != wanted:
            raise ArtifactError(
                f"{path} holds other rows than {self.path} was made from. Build the graph again."
            )
        return _Rows(ShardedArray.open(path / "rows"), wanted)

    @property
    def neighbor_accuracy(self) -> float | None:
        """Share of neighbors with their image's class where both are known; None without labels."""
        value = self.facts.get("neighbor_accuracy")
        return None if value is None else float(value)


def label_array(labels: Labels) -> Array:
    """Return labels as (N,) int64. Raises ConfigError when they are not integers."""
    return as_integers(labels() if callable(labels) else labels, name="labels")


def as_integers(values: Array | Sequence[int] | ShardedArray, *, name: str) -> Array:
    """Return (N,) values as int64. Raises ConfigError when they are not integers."""
    array = np.asarray(values)
    if array.ndim != 1 or array.dtype.kind not in "iu":
        raise ConfigError(
            f"`{name}` must be one integer per image, -1 for unknown; got {array.dtype} "
            f"of shape {array.shape}."
        )
    return array.astype(np.int64)


def build_graph(
    features: Features,
    config: GraphConfig | None = None,
    *,
    out: Path | str,
    labels: Labels | None = None,
    tracker: Tracker | None = None,
) -> Graph:
    """Build the kNN graph of all images and measure its recall; return the handle.

    features: the embeddings, unit rows. labels are only used to report the neighbor accuracy.
    Shards that an interrupted run wrote are kept. With k or fewer images every list holds all
    others. Raises ConfigError when there is no image or the recall is below `min_recall`.
    """
    config, out, began = config or GraphConfig(), located(out), time.monotonic()
    array = features.array
    known = None if labels is None else label_array(labels)
    _require_inputs(len(array), known)
    inputs = {"features": features.fingerprint}
    if begin(out, stage="graph", config=config, inputs=inputs):
        log.info("graph: %s is current", out)
        return Graph.open(out)
    k = min(config.k, len(array) - 1)
    if k < config.k:
        text = "graph: %d images have %d others each, fewer than graph.k=%d: lists hold them all"
        log.warning(text, len(array), k, config.k)
    ids = _search(array, config, out, k=k)
    facts = measure_recall(array, ids, sample=config.recall_sample, seed=config.seed)
    require_recall(out, facts["recall"], config.min_recall, key="graph.min_recall")
    facts |= place_of(features, out)
    if known is not None:
        facts |= _neighbor_accuracy(ids, known)
    seconds = time.monotonic() - began
    if tracker is not None:
        tracker.log([{k: v for k, v in facts.items() if isinstance(v, int | float)}])
    finish(out, stage="graph", config=config, inputs=inputs, seconds=seconds, facts=facts)
    remove_work(out)
    n, checked = f"{len(array):,}", f"{facts['recall_sample']:,}"
    text = "graph: %s images, k=%d, recall %.4f (%s sampled), %.1f s"
    log.info(text, n, k, facts["recall"], checked, seconds)
    return Graph.open(out)


def require_recall(out: Path, found: float, least: float, *, key: str) -> None:
    """Raise ConfigError when a graph holds too few of the true neighbors."""
    if found < least:
        raise ConfigError(
            f"{out}: the graph holds {found:.3f} of the true neighbors, below {key}={least}. "
            f"Search more widely, or lower {key}."
        )


def _require_inputs(n: int, labels: Array | None) -> None:
    if not n:
        raise ConfigError("graph: the embeddings have no row. Add images, or leave the stage out.")
    if labels is not None and len(labels) != n:
        raise ConfigError(f"graph: {len(labels):,} labels were given for {n:,} images.")


def _search(array: ShardedArray, config: GraphConfig, out: Path, *, k: int) -> ShardedArray:
    """Write the shards of ids and similarity that are missing; return the ids."""
    ids, similarity = _create(array, out, k=k)
    if not k:  # one image: nothing to search
        for i, rows in enumerate(array.shard_rows):
            similarity.write_shard(i, np.empty((rows, 0), np.float32))
            ids.write_shard(i, np.empty((rows, 0), ids.dtype))
        return ids
    if isinstance(config.method, CellsConfig):
        cell_graph(array, out, k, config.method, config.resources)
        return ids
    with track("graph", len(array), "images") as progress:
        left = {*ids.unwritten(), *similarity.unwritten()}
        written = [rows for i, rows in enumerate(array.shard_rows) if i not in left]
        progress.skip(sum(written))
        if len(written) < array.num_shards:
            with Search(
                array, config.resources, method=config.method, folder=out / "index"
            ) as search:
                for i in search.write_lists(ids, similarity):
                    progress.advance(array.shard_rows[i])
    return ids


def _create(array: ShardedArray, out: Path, *, k: int) -> tuple[ShardedArray, ShardedArray]:
    """Return the arrays of ids and similarity, cut at the rows of the embeddings."""
    dtype = np.dtype(np.int32 if len(array) < 2**31 else np.int64)
    require_disk(out, size_bytes=len(array) * k * (dtype.itemsize + 4))
    rows, shape = array.shard_rows, (k,)
    ids = ShardedArray.create(out / "ids", shard_rows=rows, row_shape=shape, dtype=dtype.name)
    similarity = ShardedArray.create(
        out / "similarity", shard_rows=rows, row_shape=shape, dtype="float32"
    )
    return ids, similarity


def measure_recall(
    array: ShardedArray, ids: ShardedArray, *, sample: int, seed: int
) -> dict[str, Any]:
    """Return the recall of the lists of `sample` images, with its 95 % interval, as facts.

    The true neighbors come from a float64 matrix product over all rows, which shares no code with
    the search. The interval is Wilson's with an image as the unit, since the k entries of one
    list are not independent; that makes it too wide rather than too narrow. Lists of a single
    image lack nothing: recall 1.
    """
    n, k, dim = len(array), ids.shape[1], array.shape[1]
    sample = min(sample, n)
    if not k:
        return {"recall": 1.0, "recall_interval": [0.0, 1.0], "recall_sample": sample}
    chosen = np.sort(permuted(np.arange(sample), n=n, seed=seed, epoch=0))
    queries, listed = array.rows(chosen), ids.rows(chosen)
    best = best_products(queries, _row_blocks(array), k=k, own=chosen)
    shares = []
    for a in range(0, sample, 64):
        rows = array.rows(listed[a : a + 64].ravel()).reshape(-1, k, dim)
        found = pair_similarity(queries[a : a + 64], rows)
        shares.append(recall(found, best[a : a + 64]))
    share = float(np.concatenate(shares).mean())
    low, high = wilson(share, sample)
    return {"recall": share, "recall_interval": [low, high], "recall_sample": sample}


def _row_blocks(array: ShardedArray) -> Iterator[tuple[int, Array]]:
    """Yield (first id, rows) over the whole array."""
    for i in range(array.num_shards):
        for a in range(0, array.shard_rows[i], 8192):
            yield int(array.offsets[i]) + a, array.shard(i)[a : a + 8192]


def _neighbor_accuracy(ids: ShardedArray, labels: Array) -> dict[str, Any]:
    """Return the share of neighbors with their image's class, over the first 1, 5 and all k."""
    places = sorted({1, min(5, ids.shape[1]), ids.shape[1]})
    tallies = dict.fromkeys(places, Tally())
    for i in range(ids.num_shards):
        own = labels[ids.offsets[i] : ids.offsets[i + 1]]
        neighbors = labels[ids.shard(i)]
        for place in places:
            tallies[place] += neighbor_agreement(own, neighbors[:, :place])
    if not tallies[places[-1]].of:
        return {}
    return {
        "neighbor_accuracy": tallies[places[-1]].share,
        "neighbor_accuracy_at": {str(place): tallies[place].share for place in places},
        "neighbor_pairs_labelled": tallies[places[-1]].of,
    }
