"""Exact kNN graph of all pairs against faiss.knn, in core-seconds at the same ids.

    OMP_NUM_THREADS=1 python experiments/benchmarks/exact_knn.py --images 100000 --workers 0 1 2

One JSON line per way: core-seconds (user + system time of every process that worked; the median
of `--rounds`), wall seconds, the ratio to faiss.knn, how many ids are faiss's, and whether the
lists of a sample are those of a float64 search. The ways run in turn; compiling, starting actors
and reading the rows once come before. Expected with bfloat16 instructions: 3 x faiss.knn and more;
without them (the `path` says which ran): 1.5 x. workers 0 is this process.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np


def made_rows(n: int, dim: int, *, seed: int) -> np.ndarray:
    """Return unit rows of a mixture of 200 overlapping classes: (n, dim) float32."""
    rng = np.random.default_rng(seed)
    centers = rng.normal(size=(200, dim)).astype(np.float32)
    rows = centers[rng.integers(0, 200, n)] + rng.normal(size=(n, dim)).astype(np.float32)
    return rows / np.linalg.norm(rows, axis=1, keepdims=True)


class Faiss:
    """faiss.knn over rows in memory, each row itself left out."""

    def __init__(self, rows: np.ndarray, k: int) -> None:
        self.rows, self.k = rows, k

    def lists(self) -> np.ndarray:
        """Return the ids (n, k)."""
        import faiss

        metric = faiss.METRIC_INNER_PRODUCT
        _, ids = faiss.knn(self.rows, self.rows, self.k + 1, metric=metric)
        keep = ids != np.arange(len(ids))[:, None]
        keep[keep.all(axis=1), -1] = False
        return ids[keep].reshape(len(ids), self.k)

    def cpu_seconds(self) -> float:
        """Return the CPU time used so far."""
        return time.process_time()


def compiled(_actor: Any = None) -> None:
    """Compile the kernels, or load them, in this process."""
    from selfsup_ray.ops.exact_graph import all_pairs_topk

    all_pairs_topk(made_rows(2000, 64, seed=1), k=5)


class Ours:
    """`Search.write_lists` over a stored array: files in, files out."""

    def __init__(
        self, folder: Path, rows: np.ndarray, *, k: int, workers: int, threads: int = 1
    ) -> None:
        from selfsup_ray.artifacts import ShardedArray
        from selfsup_ray.cluster.neighbors import Search
        from selfsup_ray.config import Resources

        self.folder, self.k = folder, k
        cuts = list(range(0, len(rows), 10_000))
        self.array = ShardedArray.create(
            folder / "rows",
            shard_rows=[len(rows[a : a + 10_000]) for a in cuts],
            row_shape=rows.shape[1:],
            dtype="float32",
        )
        for i, a in enumerate(cuts):
            self.array.write_shard(i, rows[a : a + 10_000])
        self.search = Search(self.array, Resources(workers=workers, cpus=threads))
        if workers:
            import ray

            ray.get([actor.__ray_call__.remote(compiled) for actor in self.search.actors])
        compiled()

    def lists(self) -> np.ndarray:
        """Return the ids (n, k), written to new files and read back."""
        from selfsup_ray.artifacts import ShardedArray

        out = self.folder / "lists"
        shutil.rmtree(out, ignore_errors=True)
        make = {"shard_rows": self.array.shard_rows, "row_shape": (self.k,)}
        ids = ShardedArray.create(out / "ids", dtype="int32", **make)
        similarity = ShardedArray.create(out / "similarity", dtype="float32", **make)
        for _ in self.search.write_lists(ids, similarity):
            pass
        return np.asarray(ids)

    def cpu_seconds(self) -> float:
        """Return the CPU time used so far, by this process and its actors."""
        total = time.process_time()
        if self.search.actors:
            import ray

            calls = [
                a.__ray_call__.remote(lambda _: time.process_time()) for a in self.search.actors
            ]
            total += sum(ray.get(calls))
        return total


def measured(way: Any) -> tuple[float, float, np.ndarray]:
    """Return core-seconds, wall seconds and the ids of one run."""
    cpu, wall = way.cpu_seconds(), time.perf_counter()
    ids = way.lists()
    wall = time.perf_counter() - wall
    return way.cpu_seconds() - cpu, wall, ids


def is_exact(rows: np.ndarray, ids: np.ndarray, *, sample: int = 200) -> bool:
    """Return whether a sample of lists equals a float64 search, ties by lower id."""
    from selfsup_ray.ops.neighbors import drop_self, exact_topk

    chosen = np.linspace(0, len(rows) - 1, sample).astype(np.int64)
    found = drop_self(exact_topk(rows[chosen], rows, k=ids.shape[1] + 1), chosen)
    return bool((found.ids == ids[chosen]).all())


def main() -> None:
    """Time the ways in turn and print them."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--images", type=int, default=20_000)
    parser.add_argument("--dim", type=int, default=256)
    parser.add_argument("--k", type=int, default=32)
    parser.add_argument("--workers", type=int, nargs="+", default=[0])
    parser.add_argument(
        "--threads",
        type=int,
        nargs="*",
        default=[],
        help="one process on so many, as that many actors",
    )
    parser.add_argument("--rounds", type=int, default=3)
    args = parser.parse_args()
    import faiss
    import torch

    from selfsup_ray.cluster import pairs
    from selfsup_ray.cluster.session import session

    pairs.FROM_ROWS = 0  # the path that large arrays take, whatever --images
    faiss.omp_set_num_threads(1)
    torch.set_num_threads(1)
    rows = made_rows(args.images, args.dim, seed=0)
    with tempfile.TemporaryDirectory() as folder, session(num_cpus=max(1, sum(args.workers))):
        ways: dict[str, Any] = {"faiss.knn": Faiss(rows, args.k)}
        for workers in args.workers:
            name = f"{workers} actors" if workers else "one process"
            ways[name] = Ours(Path(folder, str(workers)), rows, k=args.k, workers=workers)
        for n in args.threads:
            own = Ours(Path(folder, f"threads{n}"), rows, k=args.k, workers=0, threads=n)
            ways[f"one process, {n} threads"] = own
        runs: dict[str, list[tuple[float, float]]] = {name: [] for name in ways}
        lists = {}
        for _ in range(args.rounds):
            for name, way in ways.items():
                cpu, wall, lists[name] = measured(way)
                runs[name].append((cpu, wall))
        for way in ways.values():
            if isinstance(way, Ours):
                way.search.close()
    report(args, rows, runs, lists)


def report(
    args: argparse.Namespace,
    rows: np.ndarray,
    runs: dict[str, list[tuple[float, float]]],
    lists: dict[str, np.ndarray],
) -> None:
    """Print one JSON line per way; faiss.knn is what the others are compared with."""
    from selfsup_ray.ops.exact_graph import multiplies_bfloat16

    def middle(name: str, i: int) -> float:
        return statistics.median(run[i] for run in runs[name])

    base = middle("faiss.knn", 0)
    own_path = "bfloat16 instructions" if multiplies_bfloat16() else "float32"
    for name, ids in lists.items():
        cpu = middle(name, 0)
        line = {
            "way": name,
            "core_s": round(cpu, 2),
            "all_core_s": [round(r[0], 2) for r in runs[name]],
            "wall_s": round(middle(name, 1), 2),
            "times_faster_than_faiss": round(base / cpu, 2),
            "same_ids_as_faiss": round(float((ids == lists["faiss.knn"]).mean()), 6),
            "sample_is_exact": is_exact(rows, ids),
            "path": "faiss sgemm" if name == "faiss.knn" else own_path,
            **{key: getattr(args, key) for key in ("images", "dim", "k")},
            "load": round(os.getloadavg()[0], 1),
        }
        print(json.dumps(line), flush=True)


if __name__ == "__main__":
    main()
