"""Builds graphs and a diffusion on a cluster of two nodes, one of which is killed on the way.

Run by test_node_loss.py in a process of its own, since a session of Ray may exist beside it only
there. Writes for each work: whether it was still running, and whether the files are the same.
"""

import hashlib
import json
import sys
import threading
import time
from collections import namedtuple
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import ray
from ray.cluster_utils import Cluster

from selfsup_ray.artifacts import ShardedArray
from selfsup_ray.cluster.methods import IVFConfig
from selfsup_ray.config import Resources
from selfsup_ray.stages.cell_graph import CellsConfig
from selfsup_ray.stages.diffuse import DiffuseConfig, diffuse
from selfsup_ray.stages.graph import GraphConfig, build_graph

Features = namedtuple("Features", ["array", "fingerprint"])
ASK, STORE, N = Resources(workers=2), 150 * 2**20, 24_000
SEES_A_DEAD_NODE_SOON = {
    "health_check_initial_delay_ms": 0,
    "health_check_period_ms": 500,
    "health_check_timeout_ms": 2000,
    "health_check_failure_threshold": 3,
}


def stored_rows(folder: Path) -> Any:
    """Return clustered unit rows as what a graph is built on."""
    rng = np.random.default_rng(0)
    rows = rng.normal(size=(40, 32))[rng.integers(0, 40, N)] + 0.5 * rng.normal(size=(N, 32))
    rows = (rows / np.linalg.norm(rows, axis=1, keepdims=True)).astype(np.float32)
    array = ShardedArray.create(
        folder / "rows", shard_rows=[2000] * 12, row_shape=(32,), dtype="float32"
    )
    for i in range(12):
        array.write_shard(i, rows[2000 * i : 2000 * (i + 1)])
    return Features(array, "rows")


def digest(out: Path) -> str:
    """Return a hash of all results; the index itself is not one."""
    hashed = hashlib.sha256()
    for path in sorted(p for p in out.rglob("*.npy") if "index" not in p.parts):
        hashed.update(path.relative_to(out).as_posix().encode() + path.read_bytes())
    return hashed.hexdigest()


def compare(
    work: Callable[[Path], Any], name: str, folder: Path, middle: str, kill: Callable[[], None]
) -> list[Any]:
    """Do the work undisturbed, then with a node killed when a file like `middle` appears."""
    whole, out, failed = folder / f"{name}-whole", folder / f"{name}-cut", list[str]()
    work(whole)

    def run() -> None:
        try:
            work(out)
        except BaseException as error:
            failed.append(repr(error))

    thread = threading.Thread(target=run)
    thread.start()
    deadline = time.monotonic() + 90
    while thread.is_alive() and time.monotonic() < deadline and not list(out.glob(middle)):
        time.sleep(0.01)
    was_running = thread.is_alive()
    kill()
    thread.join(150)
    return [was_running, not failed and digest(whole) == digest(out), *failed]


def main(folder: Path) -> None:
    """Run the works one after the other and write `same.json`."""
    head = {"num_cpus": 0, "include_dashboard": False, "object_store_memory": STORE}
    cluster = Cluster(
        initialize_head=True, head_node_args={**head, "_system_config": SEES_A_DEAD_NODE_SOON}
    )
    nodes = [cluster.add_node(num_cpus=2, object_store_memory=STORE) for _ in range(2)]
    ray.init(address=cluster.address, log_to_driver=False)
    features = stored_rows(folder)
    labels = np.random.default_rng(1).integers(0, 9, N)
    seeds = np.where(np.arange(N) % 50 == 0, labels, -1)

    def kill() -> None:
        cluster.remove_node(nodes.pop(0), allow_graceful=False)
        nodes.append(cluster.add_node(num_cpus=2, object_store_memory=STORE))

    cells = GraphConfig(k=10, method=CellsConfig(memory_mb=1), min_recall=0, resources=ASK)
    actors = GraphConfig(k=10, method=IVFConfig(piece_rows=4000), resources=ASK)
    rows = DiffuseConfig(niter=12, mode="rows", memory_gb=0.005, resources=ASK)
    graph = build_graph(features, cells, out=folder / "graph")
    works: list[tuple[str, Callable[[Path], Any], str]] = [
        ("cells", lambda out: build_graph(features, cells, out=out), "cells/list_ids-*.npy"),
        ("actors", lambda out: build_graph(features, actors, out=out), "ids/0*.npy"),
        (
            "diffuse",
            lambda out: diffuse(graph, seeds, rows, out=out),
            "parts/step-0002/*",
        ),
    ]
    same = {name: compare(work, name, folder, middle, kill) for name, work, middle in works}
    (folder / "same.json").write_text(json.dumps(same))
    ray.shutdown()
    cluster.shutdown()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
