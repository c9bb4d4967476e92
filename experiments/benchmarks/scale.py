"""A kNN graph much larger than one worker's memory: time, peak memory, and a kill on the way.

    python experiments/benchmarks/scale.py --images 10000000 --dim 64 --memory-mb 600

Builds the graph by the cell join through two Ray workers, twice: once undisturbed, once with the
driver and all its processes killed (SIGKILL) when `--kill-at` of the lists are found, then started
again. Prints one JSON line: wall and CPU seconds, recall, peak memory over all processes, and
whether both graphs are the same bytes. `peak_gb` is proportional set size: it counts a page of a
mapped file once, and such pages can be dropped at any time; `peak_anonymous_gb` leaves them out.
Bar: 10 M x 64 within 6 GB. The rows: classes of 5,000 images, each of 16 directions.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from processor import cpu_path

LATENT, SHARD = 16, 65_536


def write_rows(folder: Path, n: int, dim: int) -> None:
    """Store unit rows of overlapping classes, shard by shard: (n, dim) float32."""
    from selfsup_ray.artifacts import ShardedArray

    sizes = [min(SHARD, n - a) for a in range(0, n, SHARD)]
    array = ShardedArray.create(folder, shard_rows=sizes, row_shape=(dim,), dtype="float32")
    rng = np.random.default_rng(0)
    classes = max(20, n // 5000)
    centers = 0.5 * rng.normal(size=(classes, dim)).astype(np.float32)
    scale = (np.arange(1, LATENT + 1) ** -0.5).astype(np.float32)
    scale /= np.linalg.norm(scale)
    bases = rng.normal(size=(classes, LATENT, dim)).astype(np.float32)
    for i, size in enumerate(sizes):
        rng = np.random.default_rng([1, i])
        own = np.sort(rng.integers(0, classes, size))
        rows = centers[own] + 0.3 * rng.normal(size=(size, dim)).astype(np.float32)
        latent = rng.normal(size=(size, LATENT)).astype(np.float32) * scale
        for c, part in zip(*np.unique(own, return_index=True), strict=True):
            end = part + np.count_nonzero(own == c)
            rows[part:end] += latent[part:end] @ bases[c]
        rows = rows[rng.permutation(size)]
        rows /= np.linalg.norm(rows, axis=1, keepdims=True)
        array.write_shard(i, rows)


def build(args: argparse.Namespace, out: Path) -> None:
    """Build the graph; runs in a process of its own."""
    from collections import namedtuple

    from selfsup_ray.artifacts import ShardedArray
    from selfsup_ray.cluster.session import session
    from selfsup_ray.config import Resources
    from selfsup_ray.stages.cell_graph import CellsConfig
    from selfsup_ray.stages.graph import GraphConfig, build_graph

    features = namedtuple("Features", ["array", "fingerprint"])
    method = CellsConfig(memory_mb=args.memory_mb, probes=args.probes)
    config = GraphConfig(
        k=args.k, method=method, min_recall=0.5, resources=Resources(workers=args.workers)
    )
    rows = features(ShardedArray.open(args.folder / "rows"), "rows")
    with session(num_cpus=args.workers):
        began = time.perf_counter()
        graph = build_graph(rows, config, out=out)
        seconds = time.perf_counter() - began
    print(json.dumps({"wall_s": seconds, **graph.facts, "stage_s": graph_seconds(out)}))


def graph_seconds(out: Path) -> float:
    """Return what the stage's stamp says it took."""
    return float(json.loads((out / "done.json").read_text())["seconds"])


def family(pid: int) -> Iterator[int]:
    """Yield a process and its descendants."""
    children: dict[int, list[int]] = {}
    for stat in Path("/proc").glob("[0-9]*/stat"):
        try:
            parent = int(stat.read_text().rpartition(") ")[2].split()[1])
        except OSError:  # it has just ended
            continue
        children.setdefault(parent, []).append(int(stat.parent.name))
    todo = [pid]
    while todo:
        pid = todo.pop()
        yield pid
        todo += children.get(pid, [])


def memory(pid: int) -> tuple[float, float, float]:
    """Return GB of proportional set size, of its anonymous part, and CPU seconds of a family."""
    total = anonymous = seconds = 0.0
    for member in family(pid):
        try:
            text = Path(f"/proc/{member}/smaps_rollup").read_text()
            stat = Path(f"/proc/{member}/stat").read_text().rpartition(") ")[2].split()
        except OSError:
            continue
        sizes = {line.split(":")[0]: line.split()[1] for line in text.splitlines()[1:]}
        total += int(sizes["Pss"]) / 1e6
        anonymous += (int(sizes["Pss_Anon"]) + int(sizes["Pss_Shmem"])) / 1e6
        seconds += (int(stat[11]) + int(stat[12])) / os.sysconf("SC_CLK_TCK")
    return total, anonymous, seconds


def run(args: argparse.Namespace, out: Path, *, kill_at: float | None) -> dict[str, float]:
    """Build in a process of its own and watch its memory; kill it on the way if asked to."""
    command = [sys.executable, __file__, *sys.argv[1:], "--folder", str(args.folder)]
    process = subprocess.Popen([*command, "--one", str(out)], stdout=subprocess.PIPE, text=True)
    peaks = [0.0, 0.0, 0.0]
    while process.poll() is None:
        peaks = [max(a, b) for a, b in zip(peaks, memory(process.pid), strict=True)]
        ranges = out / "cells" / "ranges.json"
        if kill_at is not None and ranges.exists():
            found = len(list((out / "cells").glob("list_ids-*.npy")))
            if found >= kill_at * (len(json.loads(ranges.read_text())) - 1):
                for member in list(family(process.pid)):
                    os.kill(member, signal.SIGKILL)
                process.wait()
                return {"killed_after_lists": found}
        time.sleep(0.5)
    text = process.stdout.read() if process.stdout else ""
    if process.returncode:
        raise SystemExit(f"the build failed:\n{text}")
    peak, anonymous, cpu = peaks
    figures = {"peak_gb": peak, "peak_anonymous_gb": anonymous, "cpu_s": cpu}
    return {**json.loads(text.splitlines()[-1]), **figures}


def digest(out: Path) -> str:
    """Return a hash of all lists."""
    hashed = hashlib.sha256()
    for name in ("ids", "similarity", "order"):
        for path in sorted((out / name).glob("*.npy")):
            hashed.update(path.read_bytes())
    return hashed.hexdigest()


def main() -> None:
    """Run both builds and print the line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--images", type=int, default=10_000_000)
    parser.add_argument("--dim", type=int, default=64)
    parser.add_argument("--k", type=int, default=32)
    parser.add_argument("--probes", type=int, default=24)
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--memory-mb", type=int, default=600)
    parser.add_argument("--kill-at", type=float, default=0.4)
    parser.add_argument("--once", action="store_true", help="the undisturbed build only")
    parser.add_argument("--folder", type=Path, help="keep rows and graphs here")
    parser.add_argument("--one", type=Path, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.one:
        build(args, args.one)
        return
    with tempfile.TemporaryDirectory() as temporary:
        args.folder = args.folder or Path(temporary)
        if not (args.folder / "rows" / "made").exists():
            write_rows(args.folder / "rows", args.images, args.dim)
            (args.folder / "rows" / "made").touch()
        whole, cut = args.folder / "whole", args.folder / "cut"
        shutil.rmtree(whole, ignore_errors=True)
        line = {"benchmark": "scale", "images": args.images, "dim": args.dim, "k": args.k}
        line["path"] = cpu_path()
        line |= run(args, whole, kill_at=None)
        if not args.once:
            shutil.rmtree(cut, ignore_errors=True)
            line |= run(args, cut, kill_at=args.kill_at)
            line["resumed"] = run(args, cut, kill_at=None)
            line["same_bytes"] = digest(whole) == digest(cut)
        print(json.dumps(line))


if __name__ == "__main__":
    main()
