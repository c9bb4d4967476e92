"""Works on a cluster of two nodes, one of which is killed on the way: a graph by tasks and one by
actors, a diffusion, an ingest by Ray Data's tasks, embeddings by its actors.

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
from data_works import data_works
from nodes import added, started

from selfsup_ray.artifacts import ShardedArray
from selfsup_ray.cluster.methods import IVFConfig
from selfsup_ray.config import Resources
from selfsup_ray.stages.cell_graph import CellsConfig
from selfsup_ray.stages.diffuse import DiffuseConfig, diffuse
from selfsup_ray.stages.graph import Graph, GraphConfig, build_graph

Features = namedtuple("Features", ["array", "fingerprint"])
Work = Callable[[Path, Resources], Any]
ASK, N = Resources(workers=2), 24_000


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
    results = [p for p in out.rglob("*") if p.suffix in (".npy", ".arrow")]
    for path in sorted(p for p in results if "index" not in p.parts):
        hashed.update(path.relative_to(out).as_posix().encode() + path.read_bytes())
    return hashed.hexdigest()


def compare(
    work: Work, name: str, folder: Path, middle: str, kill: Callable[[], None]
) -> list[Any]:
    """Do the work in this process, then with a node killed when a file like `middle` appears."""
    whole, out, failed = folder / f"{name}-whole", folder / f"{name}-cut", list[str]()
    work(whole, Resources(workers=0))

    def run() -> None:
        try:
            work(out, ASK)
        except BaseException as error:
            failed.append(repr(error))

    thread = threading.Thread(target=run)
    thread.start()
    deadline = time.monotonic() + 300
    while thread.is_alive() and time.monotonic() < deadline and not list(out.glob(middle)):
        time.sleep(0.01)
    was_running = thread.is_alive()
    kill()
    thread.join(600)
    return [was_running, not failed and digest(whole) == digest(out), *failed]


def main(folder: Path) -> None:
    """Run the works one after the other and write `same.json`."""
    cluster, nodes = started([2, 2])
    ray.init(address=cluster.address, log_to_driver=False)
    features = stored_rows(folder)
    labels = np.random.default_rng(1).integers(0, 9, N)
    seeds = np.where(np.arange(N) % 50 == 0, labels, -1)

    def kill() -> None:
        cluster.remove_node(nodes.pop(0), allow_graceful=False)
        nodes.append(added(cluster, cpus=2))

    def cells(out: Path, ask: Resources) -> Any:
        method = CellsConfig(memory_mb=1)
        return build_graph(
            features, GraphConfig(k=10, method=method, min_recall=0, resources=ask), out=out
        )

    def actors(out: Path, ask: Resources) -> Any:
        method = IVFConfig(piece_rows=4000)
        return build_graph(features, GraphConfig(k=10, method=method, resources=ask), out=out)

    def rows(out: Path, ask: Resources) -> Any:
        graph = Graph.open(folder / "cells-whole")
        config = DiffuseConfig(niter=12, mode="rows", memory_gb=0.005, resources=ask)
        return diffuse(graph, seeds, config, out=out)

    works: list[tuple[str, Work, str]] = [
        ("cells", cells, "cells/list_ids-*.npy"),
        ("actors", actors, "ids/0*.npy"),
        ("diffuse", rows, "parts/step-0002/*"),
    ]
    works += data_works(folder)
    same = {name: compare(work, name, folder, middle, kill) for name, work, middle in works}
    (folder / "same.json").write_text(json.dumps(same))
    ray.shutdown()
    cluster.shutdown()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
