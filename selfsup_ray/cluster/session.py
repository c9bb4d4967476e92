"""The connection to Ray: start or join it with safe settings, and say what it lacks."""

from __future__ import annotations

import logging
import os
import secrets
import shutil
import signal
import socket
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import lru_cache, partial
from pathlib import Path
from typing import Any

import yaml

from selfsup_ray.cluster.failures import starting, supervised
from selfsup_ray.config import Resources
from selfsup_ray.errors import ClusterError, ResourceError

log = logging.getLogger(__name__)

SETTINGS = {
    "RAY_USAGE_STATS_ENABLED": "0",  # nothing is sent to anyone
    "RAY_DATA_USE_DATASOURCE_V2": "0",  # V2 starts reader actors anew for every execution
    "RAY_CHDIR_TO_TRIAL_DIR": "0",  # relative paths mean the same in a worker
    "RAY_TRAIN_HEALTH_CHECK_INTERVAL_S": "0.5",  # a dead worker is seen at once
    "RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S": "20",  # then with the nodes that are left
}
"""Environment of every Ray process we start; what the user has set wins."""

OBJECT_STORE_BYTES = 4 * 2**30
"""Upper bound: we send paths and ids, and large arrays are files."""

HEAD = "node:__internal_head__"
"""A resource that Ray gives to the head node alone."""


def connect(address: str | None = None, *, num_cpus: int | None = None) -> None:
    """Join the Ray cluster at `address` (or $RAY_ADDRESS), or start one on this machine.

    Does nothing when this process is connected already. num_cpus: CPUs a local Ray hands out.
    Raises ResourceError when there is no cluster at the address, ClusterError when none starts.
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
    try:
        with _own_handler(), starting():
            ray.init(
                address="local",
                num_cpus=num_cpus,
                include_dashboard=False,
                log_to_driver=False,
                logging_level=logging.WARNING,
                object_store_memory=object_store_bytes(),
            )
    except Exception as error:  # Ray's own: bare ones when a process is not up in time, and others
        raise ClusterError(
            f"Ray could not start on this machine ({' '.join(str(error).split())[:200]}). Perhaps "
            f"it is too busy: give the same command again when it is less so."
        ) from error


def _join(address: str) -> None:
    import ray

    try:
        _knock(address)
        with _own_handler():
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


@contextmanager
def _own_handler() -> Iterator[None]:
    """Keep this program's handler of SIGTERM: ray.init sets one that ends it without a word."""
    before = signal.getsignal(signal.SIGTERM)
    try:
        yield
    finally:
        if callable(before) and threading.current_thread() is threading.main_thread():
            signal.signal(signal.SIGTERM, before)


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
    """Return the size of a local object store.

    At most 4 GiB, 1/5 of RAM, 1/2 of /dev/shm and of the free memory: Ray refuses to start when
    what others leave is less than its store.
    """
    from ray._private.utils import estimate_available_memory

    ram = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    shared = Path("/dev/shm")
    room = shutil.disk_usage(shared).free if shared.exists() else ram
    free = int(estimate_available_memory())  # type: ignore[no-untyped-call]
    return max(min(OBJECT_STORE_BYTES, ram // 5, room // 2, free // 2), 100 * 2**20)


@contextmanager
def session(address: str | None = None, *, num_cpus: int | None = None) -> Iterator[None]:
    """Connect for a block; a connection that the block made ends with it.

    Raises ClusterError when Ray loses something that it cannot replace.
    """
    import ray

    if ray.is_initialized():
        yield
        return
    connect(address, num_cpus=num_cpus)
    with supervised():
        yield


def require_resources(resources: Resources, *, stage: str) -> None:
    """Raise ResourceError at once if Ray can never place a stage's workers, naming both amounts.

    A worker must fit on one node. What the cluster's autoscaler may still add counts as there: the
    stage then waits for it.
    """
    import ray

    if resources.workers == 0:
        return
    address = ray.get_runtime_context().gcs_address
    launched = partial(launch_config, address)
    room = require_room(resources, stage=stage, nodes=alive(), launched=launched)
    if room < resources.workers:
        adds = "it starts with these" if room >= resources.fewest else "the cluster adds nodes"
        log.info("%s: room for %d of %d workers now; %s", stage, room, resources.workers, adds)


def alive() -> list[dict[str, float]]:
    """Return the resources of every living node of the cluster that this process has joined."""
    import ray

    every = ray.nodes()  # type: ignore[no-untyped-call]
    return [node["Resources"] for node in every if node["Alive"]]


def require_room(
    resources: Resources,
    *,
    stage: str,
    nodes: Sequence[Mapping[str, float]],
    launched: Callable[[], dict[str, Any] | None],
) -> int:
    """Return how many of a stage's workers given nodes hold; `launched` is asked if not all.

    Raises ResourceError when they and what the autoscaler may add can never hold the fewest that
    the stage needs.
    """
    room = sum(workers_that_fit(node, resources) for node in nodes)
    if room >= resources.fewest:
        return min(room, resources.workers)
    count = ("at least " if resources.fewest < resources.workers else "") + str(resources.fewest)
    asks = (
        f"{stage} asks for {count} workers with {_number(resources.cpus)} CPUs and "
        f"{_number(resources.gpus)} GPUs each"
    )
    file = launched()
    if file is None:
        has = ", ".join(map(_amounts, nodes))
        raise ResourceError(
            f"{asks}, but Ray has room for {room}: {len(nodes)} nodes with ({has}). "
            f"Lower {stage}.resources, or join a larger cluster with --address."
        )
    head = [node for node in nodes if HEAD in node]
    most = sum(workers_that_fit(node, resources) for node in head) + most_added(file, resources)
    if most < resources.fewest:
        raise ResourceError(
            f"{asks}, but the cluster can only grow to room for {most}: {_growth(file)}. "
            f"Lower {stage}.resources, or change the node types in the cluster's file."
        )
    return room


def workers_that_fit(node: Mapping[str, Any], resources: Resources) -> int:
    """Return how many of the stage's workers one node holds."""
    asked = {"CPU": resources.cpus, "GPU": resources.gpus}
    return min(int(node.get(kind, 0) // amount) for kind, amount in asked.items() if amount > 0)


@lru_cache(maxsize=1)
def launch_config(gcs_address: str) -> dict[str, Any] | None:
    """Return the file that the cluster's autoscaler works from; None when nothing scales it.

    Only the head has it, and Ray reports no node types, so a task reads it there.
    """
    import ray

    read = ray.remote(num_cpus=0, resources={HEAD: 0.001})(read_launch_config)
    found: dict[str, Any] | None = ray.get(read.remote(gcs_address.rpartition(":")[2]), timeout=120)
    return found


def read_launch_config(gcs_port: str) -> dict[str, Any] | None:
    """Return the `--autoscaling-config` of this machine's autoscaler of the Ray at a port."""
    import psutil  # type: ignore[import-untyped]  # comes with ray

    for process in psutil.process_iter(["cmdline"]):
        words = process.info["cmdline"] or []  # None: another user's process
        options = dict(
            word.split("=", 1) for word in words if word.startswith("--") and "=" in word
        )
        file, address = options.get("--autoscaling-config"), options.get("--gcs-address", "")
        if file and address.endswith(f":{gcs_port}"):
            found: dict[str, Any] = yaml.safe_load(Path(file).expanduser().read_text())
            return found
    return None


def most_added(launched: Mapping[str, Any], resources: Resources) -> int:
    """Return how many of the stage's workers an autoscaler's nodes hold when it adds all it may.

    launched: of Ray's cluster launcher; `max_workers` is a bound on each type and on their sum.
    """
    limit = int(launched["max_workers"])
    kinds = [
        (
            workers_that_fit(kind["resources"], resources),
            int(kind.get("min_workers", 0)),
            int(kind.get("max_workers", limit)),
        )
        for kind in _worker_types(launched).values()
    ]
    left, room = limit - sum(fewest for _, fewest, _ in kinds), 0
    for fit, fewest, most in sorted(kinds, reverse=True):
        more = max(0, min(most - fewest, left))
        room += fit * (fewest + more)
        left -= more
    return room


def _worker_types(launched: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    kinds = launched["available_node_types"].items()
    return {name: kind for name, kind in kinds if name != launched["head_node_type"]}


def _growth(launched: Mapping[str, Any]) -> str:
    limit = launched["max_workers"]
    kinds = [
        f"{kind.get('max_workers', limit)} {name} ({_amounts(kind['resources'])})"
        for name, kind in _worker_types(launched).items()
    ]
    return f"at most {limit} nodes, of {', '.join(kinds)}"


def _amounts(node: Mapping[str, Any]) -> str:
    return f"{_number(node.get('CPU', 0))} CPUs, {_number(node.get('GPU', 0))} GPUs"


def _number(value: float) -> str:
    return f"{value:g}"
