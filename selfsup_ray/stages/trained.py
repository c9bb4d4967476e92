"""What the trained stages share: run the job, keep its network, predict the whole corpus."""

from __future__ import annotations

import logging
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from selfsup_ray.artifacts import ShardedArray, read_config
from selfsup_ray.cluster.data import stream_actors
from selfsup_ray.cluster.train import train
from selfsup_ray.data.corpus import Corpus
from selfsup_ray.data.views import ScanStrongViews, SeLaViews, ViewsConfig
from selfsup_ray.models.clusterer import Clusterer
from selfsup_ray.models.inputs import ImageInput
from selfsup_ray.progress import track
from selfsup_ray.tracking import Tracker
from selfsup_ray.training import MakeViews, State, TrainConfig, TrainJob

if TYPE_CHECKING:
    from selfsup_ray.config import Resources
    from selfsup_ray.data.datasets import Dataset
    from selfsup_ray.models.objective import Objective

log = logging.getLogger(__name__)

Build = Callable[[], "tuple[Objective, Dataset, MakeViews]"]

IMAGES_AT_ONCE = 256
"""Images of one forward pass when the corpus is predicted."""


def trained(
    build: Build, config: TrainConfig, *, stage: str, out: Path, tracker: Tracker | None
) -> tuple[Objective, State]:
    """Return the objective after training, in evaluation mode on the CPU, and the final state.

    A training that was stopped continues from `out/checkpoint.pt`. build travels to the workers:
    a functools.partial of a module's function.
    """
    job = TrainJob(build, config, "cuda" if config.resources.gpus > 0 else "cpu")
    state = train(job, out=out, tracker=tracker or Tracker(out, None), label=stage)
    objective, _, _ = job.built()
    objective.load_state_dict(state["objective"])
    return objective.eval(), state


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


def predict(corpus: Corpus, clusterer: Clusterer, *, resources: Resources) -> None:
    """Write the cluster probabilities of every image, and the most probable cluster, by shard.

    A Ray Data pool of actors holds the network; in this process when resources.workers is 0. A
    shard that exists is kept.
    """
    rows, where = corpus.shard_rows, clusterer.path
    shape = (clusterer.num_clusters,)
    probabilities = ShardedArray.create(
        where / "probabilities", shard_rows=rows, row_shape=shape, dtype="float32"
    )
    assignments = ShardedArray.create(
        where / "assignments", shard_rows=rows, row_shape=(), dtype="int32"
    )
    missing = sorted({*probabilities.unwritten(), *assignments.unwritten()})
    device = "cuda" if resources.gpus > 0 else "cpu"
    make = partial(_Predictor, corpus, clusterer, probabilities, assignments, device)
    with track(f"{where.name}: predict", len(corpus), "images") as progress:
        progress.skip(len(corpus) - sum(rows[i] for i in missing))
        for i, _ in stream_actors(make, missing, resources, stage=where.name):
            progress.advance(rows[i])


class _Predictor:
    """Predicts one shard of a corpus after the other, in an actor."""

    def __init__(
        self,
        corpus: Corpus,
        clusterer: Clusterer,
        probabilities: ShardedArray,
        assignments: ShardedArray,
        device: str,
    ) -> None:
        self.corpus, self.device = corpus, torch.device(device)
        self.network = clusterer.module(self.device)
        self.probabilities, self.assignments = probabilities, assignments

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
