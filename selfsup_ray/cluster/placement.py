"""Where a stage's workers will be: on the nodes of a cluster that there are, and that may come."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from selfsup_ray.cluster.session import (
    HEAD,
    alive,
    launch_config,
    require_room,
    session,
    workers_that_fit,
)
from selfsup_ray.config import Resources, read_yaml
from selfsup_ray.errors import ConfigError

THERE = "node"
"""Name of the nodes of a cluster whose launcher's file says nothing about them."""


@dataclass(frozen=True)
class NodeType:
    """Nodes that are alike. most: how many there may be at once, those that are there included."""

    name: str
    cpus: float
    gpus: float
    now: int
    most: int
    is_head: bool = False
    instance: str | None = None
    """The provider's name of the machine."""
    memory_bytes: int | None = None
    disk_bytes: int | None = None

    def fit(self, asked: Resources) -> int:
        """Return how many of a stage's workers one node holds."""
        return workers_that_fit({"CPU": self.cpus, "GPU": self.gpus}, asked)


@dataclass(frozen=True)
class Cluster:
    """The nodes of a cluster. max_added: how many may come; launched: the launcher's file."""

    name: str
    types: tuple[NodeType, ...]
    max_added: int
    launched: Mapping[str, Any] | None

    @property
    def nodes(self) -> list[dict[str, float]]:
        """Resources of every node that is there, as Ray names them."""
        return [
            {"CPU": kind.cpus, "GPU": kind.gpus} | ({HEAD: 1.0} if kind.is_head else {})
            for kind in self.types
            for _ in range(kind.now)
        ]

    @property
    def head(self) -> NodeType | None:
        """The head's type, where the launcher's file tells it."""
        return next((kind for kind in self.types if kind.is_head), None)

    def slots(self, asked: Resources) -> int:
        """Return how many of a stage's workers there is room for once all nodes have come."""
        return sum(share.workers for share in _filled(self, asked, wanted=None))


@dataclass(frozen=True)
class Share:
    """A stage's workers on nodes of one type; `added` of the nodes are not there yet."""

    type: str
    workers: int
    nodes: int
    added: int
    on_one: int
    """Workers on the fullest node."""


def place(cluster: Cluster, asked: Resources, *, stage: str, at_most: bool) -> tuple[Share, ...]:
    """Return where the workers of a stage will be: on as few nodes as hold them.

    Nodes that are there come first, those without GPUs for work without, and those that the workers
    fill best, as Ray's autoscaler has it. at_most: `workers` is an upper bound, so one is enough.
    Raises ResourceError when the cluster can never hold them, in the words in which a run would be
    refused.
    """
    if asked.workers == 0:
        return ()
    least = Resources(workers=1, cpus=asked.cpus, gpus=asked.gpus) if at_most else asked
    launched = dict(cluster.launched) if cluster.launched is not None else None
    require_room(least, stage=stage, nodes=cluster.nodes, launched=lambda: launched)
    return tuple(_filled(cluster, asked, wanted=asked.workers))


def _filled(cluster: Cluster, asked: Resources, *, wanted: int | None) -> list[Share]:
    """Return the shares of `wanted` workers, or of as many as there is room for."""

    def rank(kind: NodeType) -> tuple[bool, float, int]:
        fit = kind.fit(asked)
        used = min(fit, fit if wanted is None else wanted) * asked.cpus / max(kind.cpus, 1e-9)
        return (kind.gpus > 0 and not asked.gpus, -used, -fit)

    types = sorted((kind for kind in cluster.types if kind.fit(asked)), key=rank)
    left = float("inf") if wanted is None else wanted
    may_come, taken = cluster.max_added, dict[str, list[int]]()
    for comes in (False, True):
        for kind in types:
            fit = kind.fit(asked)
            room = min(kind.most - kind.now, may_come) if comes else kind.now
            nodes = int(min(room, -(-left // fit)))
            if nodes <= 0:
                continue
            workers = int(min(left, nodes * fit))
            left, may_come = left - workers, may_come - (nodes if comes else 0)
            old = taken.get(kind.name, [0, 0, 0, 0])
            new = [workers, nodes, nodes if comes else 0, 0]
            taken[kind.name] = [a + b for a, b in zip(old, new, strict=True)]
            taken[kind.name][3] = max(old[3], min(fit, workers))
    return [Share(name, *numbers) for name, numbers in taken.items()]


def cluster_file(path: Path) -> Cluster:
    """Return the cluster that `ray up` makes of a file: its head alone, and what may come.

    Raises ConfigError for a file that is not one, or leaves out what a node has.
    """
    launched = read_yaml(path)
    for key in ("available_node_types", "head_node_type"):
        if key not in launched:
            raise ConfigError(f"{path} has no key `{key}`. Give a file as `ray up` takes it.")
    kinds, head = launched["available_node_types"], launched["head_node_type"]
    for name, kind in kinds.items():
        if not isinstance(kind, Mapping) or "resources" not in kind:
            raise ConfigError(
                f"{path}: available_node_types.{name} has no `resources`, which say what a node "
                f"holds. Add them, e.g. resources: {{CPU: 32}}."
            )
    if head not in kinds:
        raise ConfigError(f"{path}: head_node_type={head} is not one of {', '.join(kinds)}.")
    launched.setdefault("max_workers", 2)  # Ray's own
    return _cluster(str(path), launched, there={head: 1})


def live_cluster(address: str | None) -> Cluster:
    """Join a cluster and return its nodes, and what its autoscaler may add.

    Raises ResourceError when no cluster answers.
    """
    import ray

    with session(address):
        nodes = alive()
        gcs: str = ray.get_runtime_context().gcs_address
        launched = launch_config(gcs)
    if launched is None:
        return Cluster(address or gcs, _groups(nodes), 0, None)
    kinds, there, others = launched["available_node_types"], Counter[str](), list[Any]()
    for node in nodes:
        name = launched["head_node_type"] if HEAD in node else _type_of(node, kinds)
        if name is None:
            others.append(node)
        else:
            there[name] += 1
    return _cluster(address or gcs, launched, there=there, others=_groups(others))


def _type_of(node: Mapping[str, float], kinds: Mapping[str, Any]) -> str | None:
    """Return the first type of as many CPUs and GPUs: Ray does not tell a node's own."""
    for name, kind in kinds.items():
        if all(kind["resources"].get(key, 0) == node.get(key, 0) for key in ("CPU", "GPU")):
            return str(name)
    return None


def _groups(nodes: list[dict[str, float]]) -> tuple[NodeType, ...]:
    """Return nodes of no known type, those with as many CPUs, GPUs and memory together."""
    found = Counter(
        (node.get("CPU", 0.0), node.get("GPU", 0.0), int(node.get("memory", 0)), HEAD in node)
        for node in nodes
    )
    return tuple(
        NodeType(
            "head" if is_head else f"{THERE} of {cpus:g} CPUs" + f", {gpus:g} GPUs" * (gpus > 0),
            cpus,
            gpus,
            now=count,
            most=count,
            is_head=is_head,
            memory_bytes=memory,
        )
        for (cpus, gpus, memory, is_head), count in found.items()
    )


def _cluster(
    name: str,
    launched: Mapping[str, Any],
    *,
    there: Mapping[str, int],
    others: tuple[NodeType, ...] = (),
) -> Cluster:
    limit = int(launched["max_workers"])
    types = tuple(
        _node_type(key, kind, launched, now=there.get(key, 0), limit=limit)
        for key, kind in launched["available_node_types"].items()
    )
    workers = sum(kind.now for kind in (*types, *others) if not kind.is_head)
    return Cluster(name, (*types, *others), max(0, limit - workers), launched)


def _node_type(
    name: str, kind: Mapping[str, Any], launched: Mapping[str, Any], *, now: int, limit: int
) -> NodeType:
    held, node = kind["resources"], kind.get("node_config") or {}
    is_head = name == launched["head_node_type"]
    most = now if is_head else max(now, min(limit, int(kind.get("max_workers", limit))))
    memory = held.get("memory")
    return NodeType(
        name,
        float(held.get("CPU", 0)),
        float(held.get("GPU", 0)),
        now=now,
        most=most,
        is_head=is_head,
        instance=node.get("InstanceType"),
        memory_bytes=int(memory) if memory else None,
        disk_bytes=_disk(node),
    )


def _disk(node: Mapping[str, Any]) -> int | None:
    """Return the bytes of a node's volumes, as EC2 is asked for them; None when nothing is said."""
    volumes = [
        disk.get("Ebs", {}).get("VolumeSize") for disk in node.get("BlockDeviceMappings") or []
    ]
    sizes = [int(size) for size in volumes if size]
    return sum(sizes) * 2**30 if sizes else None
