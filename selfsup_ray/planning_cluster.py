"""A plan on a cluster: where each stage will run, with how much memory, how long, for how much."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

from rich.table import Table

from selfsup_ray.cluster.placement import Cluster, NodeType, Share, place
from selfsup_ray.config import Resources
from selfsup_ray.costs_counts import Counts
from selfsup_ray.costs_instances import INSTANCES
from selfsup_ray.costs_training import Cost
from selfsup_ray.errors import ConfigError
from selfsup_ray.planning_text import drawn, size
from selfsup_ray.progress import clock


@dataclass(frozen=True)
class Placed:
    """A stage on a cluster; None where nothing is known.

    seconds: with as many workers as there are pieces of work and room for. node_memory_bytes: the
    peak of the workers on the fullest node. dollars: of the nodes that work, at their list prices.
    """

    shares: tuple[Share, ...]
    seconds: float | None
    dollars: float | None
    node_memory_bytes: int | None
    warnings: tuple[str, ...] = ()

    @property
    def workers(self) -> int:
        """Workers that run at the same time; 0 in the driver."""
        return sum(share.workers for share in self.shares)


def placed(
    stage: str,
    asked: Resources,
    *,
    cost: Cost,
    counts: Counts | None,
    cluster: Cluster,
    prices: Mapping[str, float],
    at_most: bool,
) -> Placed:
    """Return where a stage runs and what that costs.

    prices: dollars an hour of a node, by type. at_most: `workers` is an upper bound. Raises
    ResourceError when the cluster can never hold the workers.
    """
    pieces = counts.at_once if counts and at_most else asked.workers
    wanted = replace(asked, workers=min(asked.workers, pieces))
    shares = place(cluster, wanted, stage=stage, at_most=at_most)
    types = {kind.name: kind for kind in cluster.types}
    workers = max(1, sum(share.workers for share in shares))
    busy = min(workers, counts.at_once) if counts else workers
    seconds = cost.seconds
    if seconds is not None and not at_most:
        seconds *= max(asked.workers, 1) / max(busy, 1)
    hourly = [prices.get(share.type) for share in shares]
    known = [price for price in hourly if price is not None]
    dollars = None
    if seconds is not None and len(known) == len(shares):
        dollars = sum(p * s.nodes for p, s in zip(known, shares, strict=True)) * seconds / 3600
    each = cost.memory_bytes
    fullest = max((share.on_one for share in shares), default=1)
    warnings = [_tight(stage, share, types[share.type], each) for share in shares]
    warnings += [_small(stage, types[share.type], cost.disk_bytes) for share in shares]
    return Placed(
        shares,
        seconds,
        dollars,
        None if each is None else each * fullest,
        tuple(text for text in warnings if text),
    )


def _tight(stage: str, share: Share, kind: NodeType, each: int | None) -> str:
    """Return a sentence when the workers of a node want more memory than it has."""
    has = memory_of(kind)
    if each is None or has is None or each * share.on_one <= has:
        return ""
    return (
        f"{stage}: {share.on_one} workers of {size(each)} on one {kind.name} want "
        f"{size(each * share.on_one)}, but it has {size(has)}. Raise {stage}.resources.cpus so "
        f"that fewer share a node, or take larger nodes."
    )


def _small(stage: str, kind: NodeType, disk_bytes: int | None) -> str:
    if not disk_bytes or kind.disk_bytes is None or disk_bytes <= kind.disk_bytes:
        return ""
    return (
        f"{stage}: leaves {size(disk_bytes)}, but the disk of a {kind.name} has "
        f"{size(kind.disk_bytes)}. Set `out` to shared storage."
    )


def memory_of(kind: NodeType) -> int | None:
    """Return the memory of a node, as it says or as its machine type has; None when unknown."""
    if kind.memory_bytes is not None or kind.instance not in INSTANCES:
        return kind.memory_bytes
    return INSTANCES[kind.instance].memory_bytes


def prices_of(cluster: Cluster, given: Mapping[str, float]) -> dict[str, float]:
    """Return dollars an hour of the cluster's node types: the given ones, else list prices.

    given: by the name of the node type or of the machine. Raises ConfigError for a name that is
    neither.
    """
    names = {kind.name for kind in cluster.types} | {kind.instance for kind in cluster.types}
    for name in given:
        if name not in names:
            has = ", ".join(sorted(filter(None, names)))
            raise ConfigError(f"--price names `{name}`, but {cluster.name} has {has}.")
    found = {}
    for kind in cluster.types:
        machine = kind.instance or ""
        listed = INSTANCES[machine].dollars if machine in INSTANCES else None
        price = given.get(kind.name, given.get(machine, listed))
        if price is not None:
            found[kind.name] = price
    return found


def where_table(rows: Mapping[str, tuple[Placed, Cost]], cluster: Cluster) -> str:
    """Return a table of the stages that would run: nodes, those to come, memory, time, money."""
    table = Table(box=None, pad_edge=False, header_style="bold")
    for name in ("stage", "runs on", "to come"):
        table.add_column(name, overflow="fold")
    for name in ("a worker", "a node", "of", "time", "money"):
        table.add_column(name, justify="right", overflow="fold")
    types = {kind.name: kind for kind in cluster.types}
    for stage, (made, cost) in rows.items():
        runs = ", ".join(f"{s.workers} on {s.nodes} x {s.type}" for s in made.shares)
        come = ", ".join(f"{s.added} x {s.type}" for s in made.shares if s.added)
        has = [memory_of(types[share.type]) for share in made.shares]
        table.add_row(
            stage,
            runs or "the driver",
            come,
            size(cost.memory_bytes),
            size(made.node_memory_bytes),
            size(min((h for h in has if h), default=None)),
            "" if made.seconds is None else clock(made.seconds),
            "" if made.dollars is None or not made.shares else f"${made.dollars:,.2f}",
        )
    return drawn(table)


def counts_table(rows: Mapping[str, Counts | None]) -> str:
    """Return a table of what the stages that would run ask of Ray."""
    table = Table(box=None, pad_edge=False, header_style="bold")
    table.add_column("stage")
    for name in ("tasks", "actors", "between workers", "checkpoints", "of one"):
        table.add_column(name, justify="right")
    for stage, made in rows.items():
        if made is None:
            table.add_row(stage, "not known beforehand")
            continue
        kept = (f"{made.checkpoints:,}", size(made.checkpoint_bytes)) if made.checkpoints else ()
        table.add_row(
            stage, f"{made.tasks:,}", f"{made.actors:,}", size(made.sent_bytes), *(kept or ("", ""))
        )
    return drawn(table)


def cluster_text(cluster: Cluster) -> str:
    """Return what a cluster has and may get, in one line."""
    there = [f"{kind.now} {_named(kind)}" for kind in cluster.types if kind.now]
    may = [
        f"{kind.most - kind.now} {_named(kind)}" for kind in cluster.types if kind.most > kind.now
    ]
    text = f"{cluster.name}: {', '.join(there) or 'no node'}"
    if not may:
        return f"{text}; nothing adds nodes"
    return f"{text}; may add {cluster.max_added}, of {', '.join(may)}"


def _named(kind: NodeType) -> str:
    held = f"{kind.cpus:g} CPUs" + f", {kind.gpus:g} GPUs" * (kind.gpus > 0)
    return f"{kind.name} ({kind.instance}: {held})" if kind.instance else f"{kind.name} ({held})"


def totals_text(
    rows: Mapping[str, tuple[Placed, Cost]], cluster: Cluster, prices: Mapping[str, float]
) -> str:
    """Return time and money of all stages, the head's own included."""
    seconds = sum(made.seconds or 0 for made, _ in rows.values())
    unpriced = [s for s, (m, c) in rows.items() if m.shares and c.seconds and m.dollars is None]
    text = f"On this cluster: about {clock(seconds)}"
    if unpriced:
        return f"{text}; no price is known for {', '.join(unpriced)}: give --price TYPE=DOLLARS."
    work = sum(made.dollars or 0 for made, _ in rows.values())
    head = cluster.head.name if cluster.head else ""
    kept = prices.get(head, 0.0) * seconds / 3600
    return f"{text}, ${work + kept:,.2f} (${kept:,.2f} of it for the head)."
