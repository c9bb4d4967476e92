"""What the trained stages share: run the job, keep its network, predict the whole corpus."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import torch

from selfsup_ray.artifacts import ShardedArray, read_config
from selfsup_ray.cluster.data import stream_actors
from selfsup_ray.cluster.train import train
from selfsup_ray.collectives import broadcast, rank, world_size
from selfsup_ray.data.corpus import Corpus
from selfsup_ray.data.views import ScanStrongViews, SeLaViews, ViewsConfig
from selfsup_ray.models.clusterer import Clusterer
from selfsup_ray.models.inputs import ImageInput
from selfsup_ray.progress import track
from selfsup_ray.tracking import Tracker
from selfsup_ray.training import MakeViews, Record, State, TrainConfig, TrainJob

if TYPE_CHECKING:
    from selfsup_ray.config import Resources
    from selfsup_ray.data.datasets import Dataset
    from selfsup_ray.models.objective import Objective

log = logging.getLogger(__name__)

Build = Callable[[], "tuple[Objective, Dataset, MakeViews]"]

Predict = Callable[["Objective"], Iterator[Record]]

Save = Callable[["Objective"], Clusterer]
"""Writes a trained network into the stage's folder; a partial of a module's function."""

IMAGES_AT_ONCE = 256
"""Images of one forward pass when the corpus is predicted."""


def trained(
    build: Build,
    config: TrainConfig,
    *,
    stage: str,
    out: Path,
    tracker: Tracker | None,
    predict: Predict | None = None,
) -> tuple[Objective, State]:
    """Return the objective after training, in evaluation mode on the CPU, and the final state.

    A training that was stopped continues from `out/checkpoint.pt`. build travels to the workers:
    a functools.partial of a module's function. So does predict, which they call at the end.
    """
    job = TrainJob(build, config, _device(config.resources), predict)
    state = train(job, out=out, tracker=tracker or Tracker(out, None), label=stage)
    objective, _, _ = job.built()
    objective.load_state_dict(state["objective"])
    return objective.eval(), state


def clustered(
    build: Build,
    save: Save,
    corpus: Corpus,
    config: TrainConfig,
    *,
    stage: str,
    out: Path,
    tracker: Tracker | None,
) -> tuple[Objective, State]:
    """As `trained`; then the clusters of every image are written too, with what `save` keeps."""
    predict = partial(_predictions, corpus, save, out, _device(config.resources))
    return trained(build, config, stage=stage, out=out, tracker=tracker, predict=predict)


def last_record(state: State) -> dict[str, float]:
    """Return the numbers of the last record, for the stage's stamp."""
    return dict(state["history"][-1]) if state["history"] else {}


def image_input(corpus: Corpus, views: ViewsConfig) -> ImageInput:
    """Return what a network trained on these views of this corpus expects of new images."""
    return ImageInput(
        image_size=corpus.image_size,
        view_size=views.size,
        share=views.share if isinstance(views, ScanStrongViews | SeLaViews) else 1.0,
        mean=views.mean,
        std=views.std,
        fit=read_config(corpus.path)["fit"],
    )


def _predictions(
    corpus: Corpus, save: Save, out: Path, device: str, objective: Objective
) -> Iterator[Record]:
    """Write the trained network, then the clusters of every image, a shard a rank at a time.

    A `TrainJob.predict`. Shards that exist are kept.
    """
    missing = torch.zeros(len(corpus.shard_rows), dtype=torch.uint8, device=device)
    if rank() == 0:
        missing[_unpredicted(corpus, save(objective))] = 1
    missing = broadcast(missing)  # the same on all ranks, and behind it the network is there
    shards, rows = missing.nonzero().flatten().tolist(), corpus.shard_rows
    done = len(corpus) - sum(rows[i] for i in shards)
    yield {"done": done, "of": len(corpus)}
    predict = _Predictor(corpus, Clusterer.open(out), device)
    for first in range(0, len(shards), world_size()):
        together = shards[first : first + world_size()]
        for shard in together[rank() : rank() + 1]:
            predict(shard)
        done += sum(rows[i] for i in together)
        yield {"done": done, "of": len(corpus)}


def predict_in_actors(corpus: Corpus, clusterer: Clusterer, *, resources: Resources) -> None:
    """Write the clusters of every image with a network that was not trained here, by shard.

    A Ray Data pool of actors holds the network; in this process when resources.workers is 0.
    """
    missing, rows = _unpredicted(corpus, clusterer), corpus.shard_rows
    stage = clusterer.path.name
    make = partial(_Predictor, corpus, clusterer, _device(resources))
    with track(f"{stage}: predict", len(corpus), "images") as progress:
        progress.skip(len(corpus) - sum(rows[i] for i in missing))
        for i, _ in stream_actors(make, missing, resources, stage=stage):
            progress.advance(rows[i])


def _unpredicted(corpus: Corpus, clusterer: Clusterer) -> list[int]:
    """Return the shards without probabilities or assignments, whose arrays are made if need be."""
    create = partial(ShardedArray.create, shard_rows=corpus.shard_rows)
    shape, where = (clusterer.num_clusters,), clusterer.path
    arrays = (
        create(where / "probabilities", row_shape=shape, dtype="float32"),
        create(where / "assignments", row_shape=(), dtype="int32"),
    )
    return sorted({i for array in arrays for i in array.unwritten()})


def _device(resources: Resources) -> Literal["cpu", "cuda"]:
    return "cuda" if resources.gpus > 0 else "cpu"


class _Predictor:
    """Predicts one shard of a corpus after the other."""

    def __init__(self, corpus: Corpus, clusterer: Clusterer, device: str) -> None:
        self.corpus, self.device = corpus, torch.device(device)
        self.network = clusterer.module(self.device)
        self.probabilities, self.assignments = clusterer.probabilities, clusterer.assignments

    def __call__(self, shard: int) -> dict[str, Any]:
        """Write one shard of both arrays; return nothing the driver needs."""
        n = self.corpus.shard_rows[shard]
        rows = np.empty((n, *self.probabilities.shape[1:]), dtype=np.float32)
        for start in range(0, n, IMAGES_AT_ONCE):
            stop = min(start + IMAGES_AT_ONCE, n)
            images = self.corpus.shard_images(shard, start, stop).to(self.device)
            rows[start:stop] = self.network(images).cpu().numpy()
        # The lower id wins a tie, as everywhere.
        self.assignments.write_shard(shard, rows.argmax(axis=1).astype(np.int32))
        self.probabilities.write_shard(shard, rows)
        return {}
