"""Label diffusion: our kernels, scipy and MKL, on the graph as it came and in the order of cells.

    python experiments/benchmarks/diffusion.py --images 1000000 --threads 1
    python experiments/benchmarks/diffusion.py --graph runs/million/graph

One JSON line per way, in core-seconds (user and system time of this process). `total` is what the
bars are about: for us everything, from neighbor lists to the last step: symmetrising, reordering,
normalising; for scipy and MKL the products alone, on a matrix that is ready. `ours, as it came`
makes its order from the graph itself, and that is counted. `steps` has each step: our first ones
are short because rows that no label has reached are passed over.
Bars: total of ours in cell order at least 6 x below scipy's and 3.5 x below MKL's as it came; its
steps not above MKL's in that order. MKL comes with `pip install selfsup-ray[bench]`.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

CELL, NEAR = 256, 20


def made_lists(n: int, k: int, *, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Return (lists (n, k) int32 in shuffled numbering, order (n,) int64 of cells).

    Three quarters of the neighbors come from the image's cell of 256, most others from the 20 cells
    of its class, 3 % from anywhere; some images are listed more often than others.
    """
    rng = np.random.default_rng(seed)
    cells = -(-n // CELL)
    lists = np.empty((n, k), np.int32)
    order = rng.permutation(n).astype(np.int32)
    for start in range(0, n, 65536):
        places = np.arange(start, min(start + 65536, n))
        own = places[:, None] // CELL
        draw = rng.random((len(places), k))
        near = np.minimum(own // NEAR * NEAR + rng.integers(0, NEAR, draw.shape), cells - 1)
        cell = np.where(draw < 0.75, own, near)
        cell = np.where(draw < 0.97, cell, rng.integers(0, cells, draw.shape))
        inside = (CELL * rng.random(draw.shape) ** 1.25).astype(np.int64)
        lists[order[places]] = order[np.minimum(cell * CELL + inside, n - 1)]
    return lists, order.astype(np.int64)


@dataclass
class Data:
    """Lists (N, k), the order of cells or None, and the class of each image or -1."""

    lists: np.ndarray
    order: np.ndarray | None
    seeds: np.ndarray


def made_data(args: argparse.Namespace) -> Data:
    """Return the graph asked for and ten labelled images of each class."""
    if args.graph:
        from selfsup_ray.stages.graph import Graph

        graph = Graph.open(args.graph)
        lists = np.asarray(graph.ids)
        order = None if graph.order is None else np.asarray(graph.order)
    else:
        lists, order = made_lists(args.images, args.k, seed=0)
    seeds = np.full(len(lists), -1)
    chosen = np.random.default_rng(1).permutation(len(lists))[: args.labels * args.classes]
    seeds[chosen] = np.arange(len(chosen)) % args.classes
    return Data(lists, order, seeds)


def core_seconds(call: Callable[[], Any]) -> tuple[float, Any]:
    """Return user and system seconds of this process, and the result."""
    began = time.process_time()
    result = call()
    return time.process_time() - began, result


def ours(
    data: Data, wanted: np.ndarray | None, args: argparse.Namespace, *, dtype: str
) -> dict[str, Any]:
    """Return seconds of building the rows and of each step, and the last scores.

    wanted: an order of cells; without, the order is made from the graph and counted too.
    """
    from selfsup_ray.ops.adjacency import Links, build_adjacency, traversal_order
    from selfsup_ray.ops.diffusion import spread

    def build() -> Any:
        order = traversal_order(data.lists) if wanted is None else wanted
        graph = build_adjacency(Links(data.lists), order=order, threads=args.threads)
        seeds = data.seeds if order is None else data.seeds[order]
        how: Any = {"threads": args.threads, "dtype": dtype}
        return graph, spread(graph, seeds, first=0, stop=args.classes, **how)

    before, (graph, state) = core_seconds(build)
    steps = [core_seconds(state.step)[0] for _ in range(args.steps)]
    sample = np.arange(0, len(data.lists), max(1, len(data.lists) // 1000))
    places = sample if graph.place is None else graph.place[sample]
    return {"before": before, "steps": steps, "scores": state.sums(places[:, None])}


def matrix_of(data: Data, order: np.ndarray | None) -> Any:
    """Return W as a float32 scipy CSR matrix in this order, its rows sorted."""
    import scipy.sparse as sparse

    from selfsup_ray.ops.adjacency import Links, build_adjacency

    graph = build_adjacency(Links(data.lists), order=order)
    lengths = np.diff(graph.indptr)
    inside = np.arange(len(graph.ids)) - np.repeat(graph.indptr[:-1], lengths)
    weights = 1 + (inside < np.repeat(graph.twice, lengths)).astype(np.float32)
    weights /= np.repeat(lengths + graph.twice, lengths).astype(np.float32)
    shape, indptr = (len(graph), len(graph)), graph.indptr.astype(np.int32)
    made = sparse.csr_matrix((weights, graph.ids, indptr), shape=shape)
    made.sort_indices()
    return made


def peer(
    product: Callable[[Any, np.ndarray], np.ndarray],
    matrix: Any,
    data: Data,
    order: np.ndarray | None,
    args: argparse.Namespace,
) -> dict[str, Any]:
    """Return seconds of each product, and the last scores; normalising is not counted."""
    n = len(data.lists)
    seeds = data.seeds if order is None else data.seeds[order]
    label = np.zeros((n, args.classes), np.float32)
    labelled = np.flatnonzero(seeds >= 0)
    label[labelled, seeds[labelled]] = 1
    label /= label.sum(axis=0)
    steps = []
    for _ in range(args.steps):
        took, label = core_seconds(lambda: product(matrix, label))  # noqa: B023  called at once
        steps.append(took)
        label /= label.sum(axis=0, dtype=np.float64).astype(np.float32)
    sample = np.arange(0, n, max(1, n // 1000))
    places = sample if order is None else np.argsort(order)[sample]
    return {"before": 0.0, "steps": steps, "scores": label[places]}


def mkl_product() -> tuple[Callable[[Any, np.ndarray], np.ndarray] | None, str]:
    """Return MKL's product, or None and why there is none."""
    found = sorted(Path(sys.prefix, "lib").glob("libmkl_rt.so*"))
    if found:
        os.environ.setdefault("MKL_RT", str(found[0]))
    try:
        import sparse_dot_mkl
    except ImportError as error:
        return None, str(error).splitlines()[0]
    sparse_dot_mkl.mkl_set_num_threads(1)
    return sparse_dot_mkl.dot_product_mkl, ""


def ways_of(data: Data, args: argparse.Namespace) -> dict[str, Callable[[], dict[str, Any]]]:
    """Return every way by name, in the order they take turns in."""
    ways: dict[str, Callable[[], dict[str, Any]]] = {}
    matrices = {"as it came": (matrix_of(data, None), None)}
    if data.order is not None:
        matrices["cell order"] = (matrix_of(data, data.order), data.order)
    mkl, why = mkl_product()
    if mkl is None:
        print(json.dumps({"way": "MKL", "skipped": why}))
    for name, (matrix, order) in matrices.items():
        peers = {"scipy": lambda w, x: w @ x} | ({"MKL": mkl} if mkl else {})
        for who, product in peers.items():
            ways[f"{who}, {name}"] = lambda p=product, m=matrix, o=order: peer(p, m, data, o, args)
        for dtype in ("float32", "bfloat16"):
            ways[f"ours {dtype}, {name}"] = lambda d=dtype, o=order: ours(data, o, args, dtype=d)
    return ways


def main() -> None:
    """Time all ways in turn and print them."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--images", type=int, default=1_000_000)
    parser.add_argument("--k", type=int, default=30)
    parser.add_argument("--classes", type=int, default=128)
    parser.add_argument("--labels", type=int, default=10, help="labelled images of a class")
    parser.add_argument("--steps", type=int, default=5)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--graph", type=Path, help="folder of a finished graph stage")
    args = parser.parse_args()
    data = made_data(args)
    small = Data(data.lists[:1000] % 1000, np.arange(1000), data.seeds[:1000])
    for dtype in ("float32", "bfloat16"):
        for order in (None, small.order):
            ours(small, order, args, dtype=dtype)  # compile
    ways = ways_of(data, args)
    runs: dict[str, list[dict[str, Any]]] = {name: [] for name in ways}
    for _ in range(args.repeats):
        for name, call in ways.items():
            runs[name].append(call())
    report(args, data, runs)


def report(args: argparse.Namespace, data: Data, runs: dict[str, list[dict[str, Any]]]) -> None:
    """Print one JSON line per way: medians, and ratios to scipy and MKL on the graph as it came."""
    from llvmlite import binding

    features = "AVX-512" if binding.get_host_cpu_features().get("avx512f") else "AVX2 or less"
    cpu = f"numba, {binding.get_host_cpu_name()}, {features}"

    def total(run: dict[str, Any]) -> float:
        return float(run["before"] + sum(run["steps"]))

    totals = {name: statistics.median(map(total, found)) for name, found in runs.items()}
    first = next(iter(runs.values()))[0]["scores"]
    for name, found in runs.items():
        middle = sorted(found, key=total)[len(found) // 2]
        error = np.abs(middle["scores"] - first).max(axis=0) / first.max(axis=0)
        line = {
            "way": name,
            "total": round(totals[name], 2),
            "all": [round(total(run), 2) for run in found],
            "before": round(middle["before"], 2),
            "steps": [round(s, 3) for s in middle["steps"]],
            "error_of_largest": float(f"{error.max():.1e}"),
            **{
                f"times_{who}": round(totals[f"{who}, as it came"] / totals[name], 2)
                for who in ("scipy", "MKL")
                if f"{who}, as it came" in totals
            },
            "images": len(data.lists),
            "k": data.lists.shape[1],
            "classes": args.classes,
            "threads": args.threads if name.startswith("ours") else 1,
            "path": cpu if name.startswith("ours") else name.split(",")[0],
            "load": round(os.getloadavg()[0], 1),
        }
        print(json.dumps(line))


if __name__ == "__main__":
    main()
