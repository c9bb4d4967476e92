"""A cluster of nodes that are processes of this machine, for scripts that kill some of them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

from ray.cluster_utils import Cluster

STORE = 150 * 2**20
TRIES = 8
SEES_A_DEAD_NODE_SOON = {  # a killed one refuses at once; a busy one may take its time
    "health_check_initial_delay_ms": 5000,
    "health_check_period_ms": 500,
    "health_check_timeout_ms": 20_000,
    "health_check_failure_threshold": 4,
}


def started(cpus: Sequence[int]) -> tuple[Any, list[Any]]:
    """Return a cluster whose head takes no work, and its other nodes, with so many CPUs each."""
    head: dict[str, Any] = {"num_cpus": 0, "include_dashboard": False, "object_store_memory": STORE}
    head["_system_config"] = SEES_A_DEAD_NODE_SOON
    cluster = patiently(partial(Cluster, initialize_head=True, head_node_args=head))
    return cluster, [added(cluster, cpus=n) for n in cpus]


def added(cluster: Any, *, cpus: int) -> Any:
    """Return a new node of a cluster."""
    return patiently(partial(cluster.add_node, num_cpus=cpus, object_store_memory=STORE))


def patiently(start: Callable[[], Any]) -> Any:
    """Start a node; on a busy machine its agent may not be up in the 15 s that Ray gives it."""
    for _ in range(TRIES - 1):
        try:
            return start()
        except Exception as error:
            if "timed out during startup" not in str(error):
                raise
    return start()
