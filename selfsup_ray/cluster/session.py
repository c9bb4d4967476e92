"""The connection to Ray: start or join it with safe settings, and say what it lacks."""

from __future__ import annotations

import logging
import os
import secrets
import shutil
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from selfsup_ray.config import Resources
from selfsup_ray.errors import ResourceError

SETTINGS = {
    "RAY_USAGE_STATS_ENABLED": "0",  # nothing is sent to anyone
    "RAY_DATA_USE_DATASOURCE_V2": "0",  # V2 starts reader actors anew for every execution
    "RAY_CHDIR_TO_TRIAL_DIR": "0",  # relative paths mean the same in a worker
    "RAY_TRAIN_HEALTH_CHECK_INTERVAL_S": "0.5",  # a dead worker is seen at once
}
"""Environment of every Ray process we start; what the user has set wins."""

OBJECT_STORE_BYTES = 4 * 2**30
"""Upper bound: we send paths and ids, and large arrays are files."""


def connect(address: str | None = None, *, num_cpus: int | None = None) -> None:
    """Join the Ray cluster at `address` (or $RAY_ADDRESS), or start one on this machine.

    Does nothing when this process is connected already. num_cpus: CPUs a local Ray hands out.
    Raises ResourceError when there is no cluster at the address.
    """
    for name, value in SETTINGS.items():
        os.environ.setdefault(name, value)
    import ray

    if ray.is_initialized():
        return
    address = address or os.environ.get("RAY_ADDRESS") or "local"
    if address != "local":
        return _join(address)
    _own_token()
    ray.init(
        address="local",
        num_cpus=num_cpus,
        include_dashboard=False,
        log_to_driver=False,
        logging_level=logging.WARNING,
        object_store_memory=object_store_bytes(),
    )


def _join(address: str) -> None:
    import ray

    try:
        _knock(address)
        ray.init(address=address, log_to_driver=False, logging_level=logging.WARNING)
    except (OSError, RuntimeError, ValueError) as error:  # ConnectionError is an OSError
        raise ResourceError(
            f"No Ray cluster answers at {address} ({' '.join(str(error).split())[:200]}). "
            f"Start one with `ray start --head`, or leave the address out to use this machine."
        ) from None


def _knock(address: str) -> None:
    """Raise OSError unless something listens at host:port; ray.init would try for many minutes."""
    host, colon, port = address.rpartition("://")[2].rpartition(":")
    if colon and port.isdigit():
        socket.create_connection((host, int(port)), timeout=10).close()


def _own_token() -> None:
    """Let only this process's children into a local Ray, whose ports are open to the network.

    Ray would else write a lasting token to the user's home. RAY_AUTH_MODE and RAY_AUTH_TOKEN(_PATH)
    of the user win.
    """
    os.environ.setdefault("RAY_AUTH_MODE", "token")
    given = os.environ.keys() & {"RAY_AUTH_TOKEN", "RAY_AUTH_TOKEN_PATH"}
    if os.environ["RAY_AUTH_MODE"] == "token" and not given:
        os.environ["RAY_AUTH_TOKEN"] = secrets.token_hex(32)
    from ray._raylet import Config  # type: ignore[attr-defined]

    Config.initialize("")  # Ray reads the mode once, perhaps before we set it


def object_store_bytes() -> int:
    """Return the size of a local object store: at most 4 GiB, 1/5 of RAM, 1/2 of /dev/shm."""
    ram = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    shared = Path("/dev/shm")
    room = shutil.disk_usage(shared).free if shared.exists() else ram
    return max(min(OBJECT_STORE_BYTES, ram // 5, room // 2), 100 * 2**20)


@contextmanager
def session(address: str | None = None, *, num_cpus: int | None = None) -> Iterator[None]:
    """Connect for a block; a connection that the block made ends with it."""
    import ray

    mine = not ray.is_initialized()
    connect(address, num_cpus=num_cpus)
    try:
        yield
    finally:
        if mine:
            ray.shutdown()


def require_resources(resources: Resources, *, stage: str) -> None:
    """Raise ResourceError at once if Ray can never place a stage's workers, naming both amounts.

    A worker must fit on one node; what an autoscaler may add counts as there.
    """
    import ray

    if resources.workers == 0 or _growing(resources):
        return
    every = ray.nodes()  # type: ignore[no-untyped-call]
    nodes = [node["Resources"] for node in every if node["Alive"]]
    room = sum(workers_that_fit(node, resources) for node in nodes)
    if room >= resources.workers:
        return
    has = ", ".join(
        f"{_number(n.get('CPU', 0))} CPUs, {_number(n.get('GPU', 0))} GPUs" for n in nodes
    )
    raise ResourceError(
        f"{stage} asks for {resources.workers} workers with {_number(resources.cpus)} CPUs and "
        f"{_number(resources.gpus)} GPUs each, but Ray has room for {room}: {len(nodes)} nodes "
        f"with ({has}). Lower {stage}.resources, or join a larger cluster with --address."
    )


def workers_that_fit(node: dict[str, Any], resources: Resources) -> int:
    """Return how many of the stage's workers one node holds."""
    asked = {"CPU": resources.cpus, "GPU": resources.gpus}
    return min(int(node.get(kind, 0) // amount) for kind, amount in asked.items() if amount > 0)


def _growing(resources: Resources) -> bool:
    """Return whether the cluster's autoscaler may add enough nodes for the stage."""
    from ray._private.state import state

    most = state.get_max_resources_from_cluster_config() or {}
    asked = {"CPU": resources.cpus, "GPU": resources.gpus}
    wanted = {kind: amount * resources.workers for kind, amount in asked.items() if amount > 0}
    return all(most.get(kind, 0) >= amount for kind, amount in wanted.items())


def _number(value: float) -> str:
    return f"{value:g}"
