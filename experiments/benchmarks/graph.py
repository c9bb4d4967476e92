"""Exact kNN graph: our actors, our search in one process, and faiss.knn, on the same cores.

    python experiments/benchmarks/graph.py --images 50000 --dim 128 --workers 2

One JSON line per way: seconds of wall time for the lists alone (the median of `--repeats`), what
starting it took, and the share of faiss's lists that are the same. The ways run in turn, so that
a busy machine slows all of them. Expected on quiet cores: actors within 1.3 x of faiss.knn with as
many threads, since the same matrix products are the cost; ours settles ties exactly on top.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from processor import cpu_path


def made_rows(n: int, dim: int, *, seed: int) -> np.ndarray:
    """Return unit rows of a mixture of 200 overlapping classes: (n, dim) float32."""
    rng = np.random.default_rng(seed)
    centers = rng.normal(size=(200, dim)).astype(np.float32)
    rows = centers[rng.integers(0, 200, n)] + rng.normal(size=(n, dim)).astype(np.float32)
    return rows / np.linalg.norm(rows, axis=1, keepdims=True)


def by_faiss(rows: np.ndarray, k: int) -> np.ndarray:
    """Return faiss.knn's ids without each row itself: (n, k)."""
    import faiss

    _, ids = faiss.knn(rows, rows, k + 1, metric=faiss.METRIC_INNER_PRODUCT)
    keep = ids != np.arange(len(ids))[:, None]
    keep[keep.all(axis=1), -1] = False
    return ids[keep].reshape(len(ids), k)


def timed(call: Callable[[], Any]) -> tuple[float, Any]:
    """Return wall seconds and the result."""
    began = time.perf_counter()
    result = call()
    return time.perf_counter() - began, result


class Ours:
    """Our search over a stored array, in this process or with actors that are started once."""

    def __init__(
        self, folder: Path, rows: np.ndarray, *, k: int, workers: int, cpus: int = 1
    ) -> None:
        from selfsup_ray.artifacts import ShardedArray
        from selfsup_ray.cluster.neighbors import Search
        from selfsup_ray.config import Resources

        self.folder, self.k, self.runs = folder, k, 0
        cuts = list(range(0, len(rows), 10_000))
        sizes = [len(rows[a : a + 10_000]) for a in cuts]
        self.array = ShardedArray.create(
            folder / "rows", shard_rows=sizes, row_shape=rows.shape[1:], dtype="float32"
        )
        for i, a in enumerate(cuts):
            self.array.write_shard(i, rows[a : a + 10_000])
        self.search = Search(self.array, Resources(workers=workers, cpus=cpus))
        self.search.search(rows[:32], k)  # every actor has read its rows

    def lists(self) -> np.ndarray:
        """Return the ids (n, k), written to new files and read back."""
        from selfsup_ray.artifacts import ShardedArray

        self.runs += 1
        make = {"shard_rows": self.array.shard_rows, "row_shape": (self.k,)}
        out = self.folder / str(self.runs)
        ids = ShardedArray.create(out / "ids", dtype="int32", **make)
        similarity = ShardedArray.create(out / "similarity", dtype="float32", **make)
        for _ in self.search.write_lists(ids, similarity):
            pass
        return np.asarray(ids)


def main() -> None:
    """Time the three ways and print them."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--images", type=int, default=50_000)
    parser.add_argument("--dim", type=int, default=128)
    parser.add_argument("--k", type=int, default=20)
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--repeats", type=int, default=3)
    args = parser.parse_args()
    import faiss

    from selfsup_ray.cluster.session import session

    faiss.omp_set_num_threads(args.workers)
    rows = made_rows(args.images, args.dim, seed=0)
    with tempfile.TemporaryDirectory() as folder, session(num_cpus=args.workers):
        start_0, here = timed(
            lambda: Ours(Path(folder, "0"), rows, k=args.k, workers=0, cpus=args.workers)
        )
        start_n, actors = timed(
            lambda: Ours(Path(folder, "n"), rows, k=args.k, workers=args.workers)
        )
        ways = {
            f"faiss.knn, {args.workers} threads": (0.0, lambda: by_faiss(rows, args.k)),
            f"one process, {args.workers} threads": (start_0, here.lists),
            f"{args.workers} actors": (start_n, actors.lists),
        }
        seconds: dict[str, list[float]] = {name: [] for name in ways}
        lists = {}
        for _ in range(args.repeats):
            for name, (_, call) in ways.items():
                took, lists[name] = timed(call)
                seconds[name].append(took)
        actors.search.close()
    report(args, ways, seconds, lists)


def report(
    args: argparse.Namespace,
    ways: dict[str, tuple[float, Any]],
    seconds: dict[str, list[float]],
    lists: dict[str, np.ndarray],
) -> None:
    """Print one JSON line per way; the first is what the others are compared with."""
    first, *_ = ways
    base = statistics.median(seconds[first])
    for name, (start, _) in ways.items():
        median = statistics.median(seconds[name])
        line = {
            "way": name,
            "seconds": round(median, 2),
            "all": [round(s, 2) for s in seconds[name]],
            "ratio": round(median / base, 3),
            "start_s": round(start, 1),
            "gflops": round(2 * args.images**2 * args.dim / median / 1e9, 1),
            "same_as_faiss": round(float((lists[name] == lists[first]).mean()), 6),
            **{key: getattr(args, key) for key in ("images", "dim", "k")},
            "path": cpu_path(),
            "load": round(os.getloadavg()[0], 1),
        }
        print(json.dumps(line))


if __name__ == "__main__":
    main()
