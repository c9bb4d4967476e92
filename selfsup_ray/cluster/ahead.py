"""The processes of a training's workers, started while Ray Train's controller starts.

A worker's process imports torch and what belongs to it for 4 seconds, and Ray Train asks for it
only when its controller is up, 2 seconds after the call. On a Ray of this process's own, which is
this machine, we ask at the call, and the training is given the process that is there.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Mapping
from importlib import import_module

import grpc
import ray
from ray._private.grpc_utils import init_grpc_channel
from ray._private.ray_constants import WORKER_PROCESS_SETUP_HOOK_ENV_VAR
from ray._private.utils import get_runtime_env_info
from ray.core.generated.common_pb2 import Language  # type: ignore[attr-defined]
from ray.core.generated.node_manager_pb2 import PrestartWorkersRequest  # type: ignore[attr-defined]
from ray.core.generated.node_manager_pb2_grpc import NodeManagerServiceStub
from ray.runtime_env import RuntimeEnv

log = logging.getLogger(__name__)

UNUSED_S = 60
"""Seconds after which Ray ends such a process that nobody asked for."""

ANSWER_S = 5.0

IMPORTS_AT_START = {WORKER_PROCESS_SETUP_HOOK_ENV_VAR: f"{__name__}.import_ahead"}
"""Of a worker's environment: Ray calls the function when the process has started."""


def import_ahead() -> None:
    """Import what the worker of a training needs."""
    for name in ("torch._dynamo", "ray.train.torch", "selfsup_ray.cluster.train"):
        import_module(name)


def start_ahead(workers: int, environment: Mapping[str, str]) -> None:
    """Ask the Ray that this process started for processes with just this environment."""
    worker = ray._private.worker.global_worker
    assert worker.node is not None, "Ray was started by this process"
    info = get_runtime_env_info(RuntimeEnv(env_vars=dict(environment)))
    # Processes fit to the letter, and an actor of the controller gets it from C++, without spaces.
    info.serialized_runtime_env = json.dumps(
        json.loads(info.serialized_runtime_env), sort_keys=True, separators=(",", ":")
    )
    wanted = PrestartWorkersRequest(
        language=Language.Value("PYTHON"),
        job_id=worker.current_job_id.binary(),
        runtime_env_info=info,
        keep_alive_duration_secs=UNUSED_S,
        num_workers=workers,
    )
    address = f"{worker.node.node_ip_address}:{worker.node.node_manager_port}"
    try:
        with init_grpc_channel(address) as channel:
            stub = NodeManagerServiceStub(channel)  # type: ignore[no-untyped-call]
            stub.PrestartWorkers(wanted, timeout=ANSWER_S)
    except grpc.RpcError as error:  # the workers then start when Ray Train asks, as elsewhere
        log.info("no processes started ahead: %s", error)
