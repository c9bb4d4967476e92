"""Ray Train's TorchTrainer without the helpers that have no work in ours.

With process_group.py this cuts what a training of one worker takes beside its work from 13 CPU
seconds and 8 seconds to 7 and 5, on two CPUs (experiments/benchmarks/ray_overhead.py).
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from ray.train import Result
from ray.train.torch import TorchTrainer
from ray.train.v2._internal.callbacks import DatasetsCallback
from ray.train.v2._internal.callbacks.placement_group_callback import PlacementGroupCleanerCallback

from selfsup_ray.cluster.failures import started_here

WATCHER = "RAY_TRAIN_ENABLE_PREEMPTION_WATCHER"


class Trainer(TorchTrainer):
    """Leaves out what Ray Train starts beside controller and workers and what has no work here.

    That is its manager of Ray Data sets, since we give it none; and on a Ray of this process's own,
    which has one node and ends with the process, the watch for nodes that are taken away and the
    cleaner of what a controller leaves behind when it dies.
    """

    def fit(self) -> Result:
        """Train; see TorchTrainer."""
        with _default(WATCHER, "0" if started_here() else None):
            return super().fit()

    def _create_default_callbacks(self) -> list[Any]:
        idle: tuple[type, ...] = (DatasetsCallback,)
        if started_here():
            idle += (PlacementGroupCleanerCallback,)
        made = super()._create_default_callbacks()  # type: ignore[misc]
        return [callback for callback in made if not isinstance(callback, idle)]


@contextmanager
def _default(name: str, value: str | None) -> Iterator[None]:
    """Set a variable of the environment inside the block, unless the user has."""
    if value is None or name in os.environ:
        yield
        return
    os.environ[name] = value
    try:
        yield
    finally:
        del os.environ[name]
