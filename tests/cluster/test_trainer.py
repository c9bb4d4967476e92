"""What a training starts beside its workers: the controller's imports, Ray Train's helpers."""

from __future__ import annotations

import os
import subprocess
import sys
from types import SimpleNamespace
from typing import Any

import pytest
from ray.train import RunConfig, ScalingConfig
from ray.train.torch import TorchTrainer

from selfsup_ray.cluster import trainer as module
from selfsup_ray.cluster.ahead import IMPORTS_AT_START

CONTROLLER = """
import pickle, sys
from selfsup_ray.cluster.notice import Notice
from selfsup_ray.cluster.patience import Patience
from selfsup_ray.cluster.process_group import ProcessGroup
given = pickle.loads(pickle.dumps([Patience(3), Notice(), ProcessGroup("gloo")]))
print("torch" in sys.modules, given[2].backend, type(given[2].backend_cls()).__name__)
"""


def test_the_controller_takes_what_it_is_given_without_torch() -> None:
    told = subprocess.run(
        [sys.executable, "-c", CONTROLLER], capture_output=True, text=True, check=True
    )
    assert told.stdout.split() == ["False", "gloo", "_Connection"]


@pytest.mark.parametrize("is_own", [True, False])
def test_helpers_without_work_are_left_out(is_own: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "started_here", lambda: is_own)
    made = module.Trainer(print)._create_default_callbacks()
    names = {type(callback).__name__ for callback in made}
    assert "DatasetsCallback" not in names
    assert ("PlacementGroupCleanerCallback" in names) == (not is_own), "a cluster may outlive us"
    assert {"BackendSetupCallback", "AcceleratorSetupCallback"} <= names


@pytest.mark.parametrize(
    ("environment", "of_job", "workers", "started"),
    [
        (IMPORTS_AT_START, {}, 2, [2]),
        (IMPORTS_AT_START, {}, (1, 3), [1]),  # elastic: as many as there are for certain
        ({}, {}, 2, []),  # on GPUs
        (IMPORTS_AT_START, {"env_vars": {"MINE": "1"}}, 2, []),
    ],
)
def test_processes_are_started_ahead_where_they_will_fit(
    environment: dict[str, str],
    of_job: dict[str, Any],
    workers: Any,
    started: list[int],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    asked = list[int]()
    context = SimpleNamespace(runtime_env=of_job)
    monkeypatch.setattr(module, "started_here", lambda: True)
    monkeypatch.setattr(module.ray, "get_runtime_context", lambda: context)
    monkeypatch.setattr(module, "start_ahead", lambda count, _: asked.append(count))
    monkeypatch.setattr(TorchTrainer, "fit", lambda trainer: None)
    run = RunConfig(worker_runtime_env={"env_vars": environment})
    scaling = ScalingConfig(num_workers=workers)
    module.Trainer(print, run_config=run, scaling_config=scaling).fit()
    assert asked == started


@pytest.mark.parametrize("is_own", [True, False])
@pytest.mark.parametrize("given", [None, "1"])
def test_only_nodes_of_others_are_watched(
    is_own: bool, given: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen = list[str | None]()
    context = SimpleNamespace(runtime_env={})
    monkeypatch.setattr(module, "started_here", lambda: is_own)
    monkeypatch.setattr(module.ray, "get_runtime_context", lambda: context)
    monkeypatch.delenv(module.WATCHER, raising=False)
    if given is not None:
        monkeypatch.setenv(module.WATCHER, given)
    monkeypatch.setattr(
        TorchTrainer, "fit", lambda trainer: seen.append(os.environ.get(module.WATCHER))
    )
    module.Trainer(print).fit()
    assert seen == [given or ("0" if is_own else None)], "what the user has set wins"
    assert os.environ.get(module.WATCHER) == given
