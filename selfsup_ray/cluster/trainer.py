"""Ray Train's TorchTrainer without the helpers that have no work in ours, and sooner at work.

What a training of one worker takes beside its work, with process_group.py and ahead.py and without:
experiments/benchmarks/ray_overhead.py, docs/operations.md.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import ray
from ray._common.constants import RAY_WARN_BLOCKING_GET_INSIDE_ASYNC_ENV_VAR
from ray.train import Result
from ray.train.torch import TorchTrainer
from ray.train.v2._internal.callbacks import DatasetsCallback
from ray.train.v2._internal.callbacks.placement_group_callback import PlacementGroupCleanerCallback
from ray.train.v2._internal.constants import get_env_vars_to_propagate

from selfsup_ray.cluster.ahead import IMPORTS_AT_START, start_ahead
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
        if not started_here():
            return super().fit()
        with _default(WATCHER, "0"):
            environment, of_job = self._environment(), ray.get_runtime_context().runtime_env
            # Ray would mix one that the user gave to ray.init into the workers' own.
            if IMPORTS_AT_START.items() <= environment.items() and not of_job:
                start_ahead(self._fewest_workers(), environment)
            return super().fit()

    def _fewest_workers(self) -> int:
        asked: Any = self.scaling_config.num_workers
        return asked if isinstance(asked, int) else min(asked)  # elastic: (fewest, most)

    def _environment(self) -> dict[str, str]:
        """Return the environment that Ray Train will add to that of the workers' processes."""
        of_controller = {RAY_WARN_BLOCKING_GET_INSIDE_ASYNC_ENV_VAR: "0"}  # which it passes on
        given: Any = self.run_config.worker_runtime_env  # type: ignore[attr-defined]
        own: dict[str, str] = (given or {}).get("env_vars", {})
        return of_controller | get_env_vars_to_propagate() | own

    def _create_default_callbacks(self) -> list[Any]:
        idle: tuple[type, ...] = (DatasetsCallback,)
        if started_here():
            idle += (PlacementGroupCleanerCallback,)
        made = super()._create_default_callbacks()  # type: ignore[misc]
        return [callback for callback in made if not isinstance(callback, idle)]


@contextmanager
def _default(name: str, value: str) -> Iterator[None]:
    """Set a variable of the environment inside the block, unless the user has."""
    if name in os.environ:
        yield
        return
    os.environ[name] = value
    try:
        yield
    finally:
        del os.environ[name]
