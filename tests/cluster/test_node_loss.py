"""A whole node is killed in the middle of a graph and of a diffusion: the files are the same."""

import json
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

SCRIPT = textwrap.dedent(
    '''
    import hashlib, itertools, json, sys, threading, time
    from collections import namedtuple
    from pathlib import Path

    import numpy as np
    import ray
    from ray.cluster_utils import Cluster

    from selfsup_ray.artifacts import ShardedArray
    from selfsup_ray.cluster.methods import IVFConfig
    from selfsup_ray.config import Resources
    from selfsup_ray.stages.cell_graph import CellsConfig
    from selfsup_ray.stages.diffuse import DiffuseConfig, diffuse
    from selfsup_ray.stages.graph import GraphConfig, build_graph

    folder = Path(sys.argv[1])
    rng = np.random.default_rng(0)
    rows = rng.normal(size=(40, 32))[rng.integers(0, 40, 24_000)] + 0.5 * rng.normal(size=(24_000, 32))
    rows = (rows / np.linalg.norm(rows, axis=1, keepdims=True)).astype(np.float32)
    array = ShardedArray.create(
        folder / "rows", shard_rows=[2000] * 12, row_shape=(32,), dtype="float32"
    )
    for i in range(12):
        array.write_shard(i, rows[2000 * i : 2000 * (i + 1)])
    features = namedtuple("Features", ["array", "fingerprint"])(array, "rows")
    seeds = np.where(np.arange(24_000) % 50 == 0, rng.integers(0, 9, 24_000), -1)
    FAST = dict(
        health_check_initial_delay_ms=0, health_check_period_ms=500,
        health_check_timeout_ms=2000, health_check_failure_threshold=3,
    )
    store = 150 * 2**20
    cluster = Cluster(
        initialize_head=True,
        head_node_args=dict(
            num_cpus=0, include_dashboard=False, object_store_memory=store, _system_config=FAST
        ),
    )
    ask = Resources(workers=2)
    works = {
        "cells": lambda out: build_graph(
            features,
            GraphConfig(k=10, method=CellsConfig(memory_mb=1), min_recall=0, resources=ask),
            out=out,
        ),
        "actors": lambda out: build_graph(
            features, GraphConfig(k=10, method=IVFConfig(piece_rows=4000), resources=ask), out=out
        ),
        "diffuse": lambda out: diffuse(
            works["graph"], seeds, DiffuseConfig(niter=12, mode="rows", memory_gb=0.005, resources=ask), out=out
        ),
    }
    middle = {"cells": "cells/list_ids-*.npy", "actors": "ids/0*.npy", "diffuse": "parts/step-0002/**/sums.npy"}


    def digest(out):
        hashed = hashlib.sha256()
        for path in sorted(p for p in out.rglob("*.npy") if "index" not in p.parts):
            hashed.update(path.relative_to(out).as_posix().encode() + path.read_bytes())
        return hashed.hexdigest()


    same = {}
    nodes = [cluster.add_node(num_cpus=2, object_store_memory=store) for _ in range(2)]
    ray.init(address=cluster.address, log_to_driver=False)
    for name in ("cells", "actors", "diffuse"):
        whole = folder / f"{name}-whole"
        made = works[name](whole)
        works.setdefault("graph", made)
        out, failed = folder / f"{name}-cut", []

        def run():
            try:
                works[name](out)
            except BaseException as error:
                failed.append(repr(error))

        thread = threading.Thread(target=run)
        thread.start()
        deadline = time.monotonic() + 90
        while not list(out.glob(middle[name])) and thread.is_alive() and time.monotonic() < deadline:
            time.sleep(0.01)
        was_running = thread.is_alive()
        cluster.remove_node(nodes.pop(0), allow_graceful=False)
        nodes.append(cluster.add_node(num_cpus=2, object_store_memory=store))
        thread.join(150)
        same[name] = [was_running, not failed and digest(whole) == digest(out), *failed]
    print(json.dumps(same))
    ray.shutdown()
    cluster.shutdown()
    '''
)


@pytest.mark.slow
@pytest.mark.timeout(420)
def test_a_node_killed_in_the_middle_of_graph_and_diffusion_changes_no_byte(tmp_path: Path):
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT, str(tmp_path)], capture_output=True, text=True, timeout=400
    )
    assert done.returncode == 0, done.stderr[-3000:]
    results = json.loads(done.stdout.splitlines()[-1])
    for name, (was_running, is_same, *failed) in results.items():
        assert is_same, f"{name}: {failed}"
        assert was_running, f"{name} had ended before the node was killed"
