"""k-means of whitened 5 x 5 x 3 patches against faiss.Kmeans and scikit-learn, in core-seconds.

    python experiments/benchmarks/kmeans.py                               # 262,144 patches, K 1024
    python experiments/benchmarks/kmeans.py --points 1000000 --clusters 1024 4096 --iterations 5
    python experiments/benchmarks/kmeans.py --ways ours actors --rounds 1

One JSON line per number of clusters. All ways cluster the same points from the same initial
centroids for the same number of iterations, all points every time, on one thread; they run in turn,
`--rounds` times, and figures are medians: core-seconds are user and system time of every process
that worked. ours also assigns the points to the final centroids, one pass more than the peers. The
objective is the mean squared distance of a sample of points to the nearest of a way's final
centroids, in float32 by faiss. `actors` is ours through two Ray actors, their start and reading the
points from disk included.

The patches: occluding discs of power-law sizes with shading and noise, a model of natural images
("dead leaves"), 32 x 32 pixels, or `--patches FILE.npy` (n, d) float32 of your own; whitened by PCA
with 1e-3 added to the roots. Bars: 2.5 x faiss at an objective within 0.2 %, K 1024 to 4096.
Without bfloat16 instructions (`path` says which) ours is about as fast as faiss.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

import numpy as np

THREADS = ("OMP_NUM_THREADS", "NUMBA_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS")
SIDE, PATCH, DISCS, CHECKED = 32, 5, 60, 50_000


def leaves(n: int, *, seed: int) -> np.ndarray:
    """Return images of discs that lie over each other: (n, 3, 32, 32) float32 in [0, 1]."""
    rng = np.random.default_rng(seed)
    y, x = np.mgrid[:SIDE, :SIDE]
    out = np.empty((n, 3, SIDE, SIDE), np.float32)
    for image in out:
        image[:] = 0.5
        radius = 1.5 * (1 - rng.random(DISCS) * (1 - (1.5 / 20) ** 2)) ** -0.5  # density r^-3
        center = rng.random((DISCS, 2)) * (SIDE + 16) - 8
        tint = rng.random(3) * 0.8 + 0.1 + 0.25 * rng.standard_normal((DISCS, 1))
        tint = np.clip(tint + 0.08 * rng.standard_normal((DISCS, 3)), 0, 1)
        for j in np.argsort(-radius):
            inside = (y - center[j, 0]) ** 2 + (x - center[j, 1]) ** 2 < radius[j] ** 2
            image[:, inside] = tint[j][:, None]
        slope = 0.1 * rng.standard_normal(2)
        image += (slope[0] * (y - SIDE / 2) + slope[1] * (x - SIDE / 2)) / (SIDE / 2)
        shifts = [(0, 0), (1, 0), (0, 1), (1, 1)]
        image[:] = sum(np.roll(image, shift, (1, 2)) for shift in shifts) / 4
        image += 0.02 * rng.standard_normal(image.shape)
    return np.clip(out, 0, 1)


def made_patches(n: int, *, seed: int) -> np.ndarray:
    """Return patches of such images at random places: (n, 75) float32."""
    images, rng = leaves(max(500, n // 200), seed=seed), np.random.default_rng(seed + 1)
    windows = np.lib.stride_tricks.sliding_window_view(images, (PATCH, PATCH), axis=(2, 3))
    i = rng.integers(0, len(images), n)
    y, x = rng.integers(0, SIDE - PATCH + 1, (2, n))
    return np.ascontiguousarray(windows[i, :, y, x].reshape(n, -1))


def whitened(patches: np.ndarray) -> np.ndarray:
    """Return the patches whitened by PCA: (n, d) float32."""
    values, vectors = np.linalg.eigh(np.cov(patches.T, bias=True))
    matrix = vectors / (np.sqrt(np.maximum(values, 0)) + 1e-3)
    return (patches @ matrix.astype(np.float32)).astype(np.float32)


def ours(points: np.ndarray, start: np.ndarray, iterations: int) -> np.ndarray:
    """Return centroids by `ops.kmeans.kmeans`."""
    from selfsup_ray.ops.kmeans import kmeans

    return kmeans(points, len(start), iterations=iterations, initial=start).centroids


def ours_float32(points: np.ndarray, start: np.ndarray, iterations: int) -> np.ndarray:
    """Return centroids by `ops.kmeans.kmeans` with all products in float32."""
    from selfsup_ray.ops.kmeans import kmeans

    how: dict[str, Any] = {"initial": start, "precision": "float32"}
    return kmeans(points, len(start), iterations=iterations, **how).centroids


def faiss(points: np.ndarray, start: np.ndarray, iterations: int) -> np.ndarray:
    """Return centroids by faiss.Kmeans over all points."""
    import faiss

    faiss.omp_set_num_threads(1)
    how = {"min_points_per_centroid": 1, "max_points_per_centroid": len(points)}
    means = faiss.Kmeans(points.shape[1], len(start), niter=iterations, **how)
    means.train(points, init_centroids=start)
    return np.asarray(means.centroids)


def sklearn(points: np.ndarray, start: np.ndarray, iterations: int) -> np.ndarray:
    """Return centroids by scikit-learn's KMeans (Lloyd)."""
    from sklearn.cluster import KMeans

    how: dict[str, Any] = {"init": start, "n_init": 1, "tol": 0, "algorithm": "lloyd"}
    means = KMeans(len(start), max_iter=iterations, **how)
    return np.asarray(means.fit(points).cluster_centers_, np.float32)


WAYS: dict[str, Callable[[np.ndarray, np.ndarray, int], np.ndarray]] = {
    "ours": ours,
    "faiss": faiss,
    "sklearn": sklearn,
    "ours_float32": ours_float32,
}


class Actors:
    """ours through two Ray actors: points and state are files."""

    def __init__(self, folder: Path, points: np.ndarray, seed: int) -> None:
        from selfsup_ray.artifacts import ShardedArray

        cuts = range(0, len(points), 65_536)
        self.folder, self.seed, self.calls = folder, seed, 0
        self.array = ShardedArray.create(
            folder / "points",
            shard_rows=[len(points[a : a + 65_536]) for a in cuts],
            row_shape=points.shape[1:],
            dtype="float32",
        )
        for i, a in enumerate(cuts):
            self.array.write_shard(i, points[a : a + 65_536])

    def __call__(self, points: np.ndarray, start: np.ndarray, iterations: int) -> np.ndarray:
        """Return centroids by `cluster.kmeans.kmeans_sharded`; the start follows from the seed."""
        from selfsup_ray.cluster.kmeans import kmeans_sharded
        from selfsup_ray.config import Resources

        self.calls += 1
        out = self.folder / str(self.calls)
        how: dict[str, Any] = {"seed": self.seed, "resources": Resources(workers=2), "out": out}
        return kmeans_sharded(self.array, len(start), iterations=iterations, **how).centroids


class Clock:
    """CPU seconds of this process, and of Ray's workers, which end before they can be asked."""

    def __init__(self, *, workers: bool) -> None:
        self.workers, self.seen, self.done = workers, {}, threading.Event()
        self.thread = threading.Thread(target=self.watch, daemon=True)

    def __enter__(self) -> Clock:
        self.look()
        self.before = dict(self.seen)
        self.own, self.wall = time.process_time(), time.perf_counter()
        self.thread.start()
        return self

    def __exit__(self, *error: object) -> None:
        self.done.set()
        self.thread.join()
        others = sum(t - self.before.get(pid, 0.0) for pid, t in self.seen.items())
        self.core_s = time.process_time() - self.own + others
        self.wall_s = time.perf_counter() - self.wall

    def watch(self) -> None:
        """Note the workers' times until the block ends, four times a second."""
        while self.workers and not self.done.wait(0.25):
            self.look()

    def look(self) -> None:
        """Note the times of the workers that are alive: Ray's processes below this one."""
        parents, times, tick = {}, {}, os.sysconf("SC_CLK_TCK")
        for stat in Path("/proc").glob("[0-9]*/stat") if self.workers else ():
            try:
                name, _, rest = stat.read_text().rpartition(") ")
            except OSError:  # it has just ended
                continue
            fields, pid = rest.split(), int(stat.parent.name)
            parents[pid] = int(fields[1])
            if "(ray::" in name:
                times[pid] = sum(int(x) for x in fields[11:13]) / tick
        for pid, seconds in times.items():
            above = pid
            while above in parents and above != os.getpid():
                above = parents[above]
            if above == os.getpid():
                self.seen[pid] = seconds


def mean_distance(points: np.ndarray, centroids: np.ndarray) -> float:
    """Return the mean squared distance of a sample of the points to the nearest centroid."""
    import faiss

    index = faiss.IndexFlatL2(points.shape[1])
    index.add(np.ascontiguousarray(centroids))
    distances, _ = index.search(points[:: max(1, len(points) // CHECKED)], 1)
    return float(distances.mean(dtype=np.float64))


def measured(args: argparse.Namespace, points: np.ndarray, k: int, folder: Path) -> dict[str, Any]:
    """Run the ways in turn; return their seconds and objectives."""
    from selfsup_ray.ops.kmeans import first_ids

    start = points[first_ids(len(points), k, seed=args.seed)]
    ways = {name: WAYS[name] for name in args.ways if name in WAYS}
    if "actors" in args.ways:
        ways["actors"] = Actors(folder, points, args.seed)
    few = points[: max(k, 4096)]
    for name, way in ways.items():  # compiles, makes kernels
        if name not in ("actors", "sklearn"):
            way(few, start, 1)
    runs: dict[str, list[Clock]] = {name: [] for name in ways}
    found = {}
    for _ in range(args.rounds):
        for name, way in ways.items():
            with Clock(workers=name == "actors") as clock:
                found[name] = way(points, start, args.iterations)
            runs[name].append(clock)
    return {
        name: {
            "core_s": round(statistics.median(run.core_s for run in of), 2),
            "all_core_s": [round(run.core_s, 2) for run in of],
            "wall_s": round(statistics.median(run.wall_s for run in of), 2),
            "objective": mean_distance(points, found[name]),
        }
        for name, of in runs.items()
    }


def report(args: argparse.Namespace, points: np.ndarray, k: int, folder: Path) -> None:
    """Print the line of one number of clusters; faiss is what the others are compared with."""
    from selfsup_ray.ops.exact_graph import multiplies_bfloat16

    results = measured(args, points, k, folder)
    base = results.get("faiss")
    for result in results.values():
        if base is not None:
            result["times_faster_than_faiss"] = round(base["core_s"] / result["core_s"], 2)
            result["objective_over_faiss"] = round(result["objective"] / base["objective"] - 1, 6)
        result["objective"] = round(result["objective"], 5)
    line = {"benchmark": "kmeans", "points": len(points), "dim": points.shape[1], "clusters": k}
    line |= {"iterations": args.iterations, **results}
    line["path"] = "bfloat16 instructions" if multiplies_bfloat16() else "float32"
    print(json.dumps(line | {"load": round(os.getloadavg()[0], 1)}), flush=True)


def ray_session(args: argparse.Namespace) -> AbstractContextManager[None]:
    """Return a block in which Ray runs on two CPUs, if a way needs it."""
    from selfsup_ray.cluster.session import session

    return session(num_cpus=2) if "actors" in args.ways else nullcontext()


def main() -> None:
    """Time the ways in turn and print one line for each number of clusters."""
    one_thread = dict.fromkeys(THREADS, "1")
    if one_thread.items() - os.environ.items():  # BLAS and OpenMP read them when they are loaded
        os.execve(sys.executable, [sys.executable, *sys.argv], os.environ | one_thread)
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--points", type=int, default=262_144)
    parser.add_argument("--clusters", type=int, nargs="+", default=[1024])
    parser.add_argument("--iterations", type=int, default=25)
    parser.add_argument("--rounds", type=int, default=3)
    every = [*WAYS, "actors"]
    parser.add_argument("--ways", nargs="+", choices=every, default=["ours", "faiss", "sklearn"])
    parser.add_argument("--patches", type=Path, help=".npy file of (n, d) float32 patches")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    made = np.load(args.patches)[: args.points] if args.patches else None
    patches = made_patches(args.points, seed=args.seed) if made is None else made
    points = whitened(patches)
    with tempfile.TemporaryDirectory() as folder, ray_session(args):
        for num_clusters in args.clusters:
            report(args, points, num_clusters, Path(folder, str(num_clusters)))


if __name__ == "__main__":
    main()
