"""Searches on a Ray whose small object store is taken, then fills the disk it spills to.

Run by test_faults_ray.py in a process of its own. Writes to `found.json` whether the search found
the same as in this process, and the error that came when the disk was full as well.
"""

import json
import sys
from pathlib import Path

import numpy as np
import ray

from selfsup_ray.artifacts import ShardedArray
from selfsup_ray.cluster.failures import supervised
from selfsup_ray.cluster.neighbors import Search
from selfsup_ray.config import Resources
from selfsup_ray.errors import ClusterError

N, D, K, STORE, PART = 6000, 32, 100, 80 * 2**20, 10 * 2**20


def stored(folder: Path) -> ShardedArray:
    """Return random unit rows on disk."""
    rows = np.random.default_rng(0).normal(size=(N, D)).astype(np.float32)
    rows /= np.linalg.norm(rows, axis=1, keepdims=True)
    array = ShardedArray.create(folder / "rows", shard_rows=[N], row_shape=(D,), dtype="float32")
    array.write_shard(0, rows)
    return array


def main(folder: Path, disk: Path) -> None:
    """Search with the store full, then with the disk full."""
    ray.init(
        address="local",
        num_cpus=3,
        object_store_memory=STORE,
        include_dashboard=False,
        log_to_driver=False,
        object_spilling_directory=str(disk),
    )
    array, facts = stored(folder), {}
    queries = np.asarray(array)
    alone = Search(array, Resources(workers=0)).search(queries, K)
    try:
        with supervised():
            held = [ray.put(np.ones(PART, np.uint8)) for _ in range(STORE // PART)]
            with Search(array, Resources(workers=2)) as search:
                found = search.search(queries, K)
            facts["same"] = bool((found.ids == alone.ids).all())
            facts["spilled"] = any(path.is_file() for path in disk.rglob("*"))
            held += [ray.put(np.ones(PART, np.uint8)) for _ in range(30)]
    except ClusterError as error:
        facts["said"] = str(error)
    (folder / "found.json").write_text(json.dumps(facts))


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
