"""The tables of docs/sizing.md, from the figures that `selfsup-ray plan` uses.

python experiments/benchmarks/sizing.py          print them
python experiments/benchmarks/sizing.py --write  and put them into docs/sizing.md
"""

from __future__ import annotations

import argparse
import os
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest.mock import patch

from selfsup_ray.config import Resources, build
from selfsup_ray.costs import LINK_CLASSES_PER_S, LINKS_PER_NEIGHBOR, cost
from selfsup_ray.costs_graph import graph_cost
from selfsup_ray.costs_instances import INSTANCES
from selfsup_ray.costs_training import Cost
from selfsup_ray.experiment import Experiment
from selfsup_ray.ops.spreading import spread_bytes
from selfsup_ray.planning_text import size
from selfsup_ray.progress import clock
from selfsup_ray.stages.cell_graph import CellsConfig

PAGE = Path(__file__).parents[2] / "docs" / "sizing.md"
BEGIN, END = "<!-- tables: begin -->\n", "<!-- tables: end -->\n"


@dataclass(frozen=True)
class Node:
    """One type of cluster.yaml: its instance, cores (two vCPUs each), GPUs, dollars an hour."""

    name: str
    cores: int
    gpus: int
    dollars: float


def node(name: str) -> Node:
    """Return a machine as the tables count it."""
    machine = INSTANCES[name]
    return Node(name, machine.vcpus // 2, machine.gpus, machine.dollars)


CPU, GPU = node("m7i.8xlarge"), node("g6.12xlarge")


@dataclass(frozen=True)
class Scale:
    """A corpus, the nodes it is given, and how long its encoder trains."""

    images: int
    cpu_nodes: int
    gpu_nodes: int
    epochs: int


SCALES = (
    Scale(10**5, cpu_nodes=1, gpu_nodes=1, epochs=200),
    Scale(10**6, cpu_nodes=1, gpu_nodes=1, epochs=100),
    Scale(10**7, cpu_nodes=4, gpu_nodes=4, epochs=30),
    Scale(10**8, cpu_nodes=8, gpu_nodes=8, epochs=10),
)


def experiment(scale: Scale) -> Experiment:
    """Return the experiment that a table describes: MoCo, graph, a few labels spread."""
    per_core = {"workers": scale.cpu_nodes * CPU.cores, "cpus": 1}
    per_node = {"workers": scale.cpu_nodes, "cpus": CPU.cores}
    per_gpu = {"workers": scale.gpu_nodes * GPU.gpus, "cpus": GPU.cores // GPU.gpus, "gpus": 1}
    values: dict[str, Any] = {
        "out": "runs/sizing",
        "ingest": {
            "source": "photos",
            "image_size": 256,
            "encoding": "jpeg",
            "resources": per_core,
        },
        "pretext": {
            "method": {"name": "moco"},
            "backbone": {"name": "resnet50", "stem": "imagenet"},
            "views": {"name": "moco_v2", "size": 224},
            "epochs": scale.epochs,
            "batch_size": 1024,
            "resources": per_gpu,
        },
        "embed": {"resources": per_gpu},
        "reduce": {"dim": 256, "resources": per_node},
        "graph": {"k": 30, "method": {"name": "cells"}, "resources": per_node},
        "diffuse": {"labels_per_class": 10, "resources": {"workers": 1, "cpus": CPU.cores}},
        "export": {},
    }
    return build(Experiment, values)


def table(scale: Scale) -> str:
    """Return the Markdown table of one scale, with its sums."""
    made = experiment(scale)
    lines = [
        f"### {scale.images:,} images, {scale.epochs} epochs",
        "",
        "| stage | nodes | workers | memory of one | disk | time | money |",
        "|---|---|---|--:|--:|--:|--:|",
    ]
    seconds = money = disk = 0.0
    for stage in made.stages:
        ask = getattr(made, stage).resources
        node, num = nodes_of(stage, scale)
        with patch.object(os, "cpu_count", lambda: scale.cpu_nodes * CPU.cores):
            figures: Cost = cost(made, stage, scale.images, made.folder(stage))
        assert figures.seconds and figures.memory_bytes and figures.disk_bytes, stage
        dollars = figures.seconds / 3600 * num * node.dollars
        seconds, money, disk = (
            seconds + figures.seconds,
            money + dollars,
            disk + figures.disk_bytes,
        )
        lines.append(
            f"| `{stage}` | {num} {node.name} | {max(ask.workers, 1)} | "
            f"{size(figures.memory_bytes)} | {size(figures.disk_bytes)} | "
            f"{clock(figures.seconds)} | ${dollars:,.2f} |"
        )
    total = f"| **all** | | | | {size(int(disk))} | {clock(seconds)} | ${money:,.2f} |"
    return "\n".join([*lines, total, ""])


def nodes_of(stage: str, scale: Scale) -> tuple[Node, int]:
    """Return the type and number of nodes that a stage keeps busy."""
    if stage in ("pretext", "embed"):
        return GPU, scale.gpu_nodes
    return CPU, 1 if stage in ("diffuse", "export") else scale.cpu_nodes


GRAPH_DIM, GRAPH_K, CLASSES, STEPS = 64, 32, 1000, 3
GRAPHS = ((10**6, 1), (10**7, 1), (10**8, 1), (10**8, 4))
"""Rows, and nodes that build the graph; labels are spread on one of them."""


def graph_table() -> str:
    """Return the Markdown table of graphs and diffusions beyond what was measured."""
    lines = [
        f"### A graph of N x {GRAPH_DIM} rows, {GRAPH_K} neighbors; {CLASSES:,} classes spread in "
        f"{STEPS} steps",
        "",
        f"| N | nodes ({CPU.name}) | graph: time | memory of a node | disk | money | "
        "diffusion: time | memory | money |",
        "|--:|--:|--:|--:|--:|--:|--:|--:|--:|",
    ]
    method = CellsConfig(probes=16)
    for n, nodes in GRAPHS:
        ask = Resources(workers=nodes * CPU.cores, cpus=1)
        graph = graph_cost(method, n=n, dim=GRAPH_DIM, k=GRAPH_K, resources=ask)
        links = int(LINKS_PER_NEIGHBOR * GRAPH_K * n)
        spread_s = links * CLASSES * STEPS / (LINK_CLASSES_PER_S * CPU.cores)
        spread = links * 4 + CPU.cores * min(4e9, spread_bytes(n, 64, dtype="bfloat16"))
        per_s = CPU.dollars / 3600
        held = size(CPU.cores * graph.memory_bytes)
        lines.append(
            f"| {n:,} | {nodes} | {clock(graph.seconds)} | {held} | "
            f"{size(graph.disk_bytes)} | ${graph.seconds * per_s * nodes:,.2f} | "
            f"{clock(spread_s)} | {size(int(spread))} | ${spread_s * per_s:,.2f} |"
        )
    return "\n".join([*lines, ""])


def tables() -> str:
    """Return all tables as they stand in the page."""
    return "\n".join([*(table(scale) for scale in SCALES), graph_table()])


def with_tables(page: str) -> str:
    """Return the page with its tables made anew."""
    return re.sub(f"{BEGIN}.*{END}", lambda _: f"{BEGIN}\n{tables()}\n{END}", page, flags=re.S)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--write", action="store_true", help="put them into docs/sizing.md")
    print(tables())
    if parser.parse_args().write:
        PAGE.write_text(with_tables(PAGE.read_text()))
