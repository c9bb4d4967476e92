"""Label diffusion of many classes over a large graph: time and peak memory.

    python experiments/benchmarks/scale.py --once --folder scale-10m
    python experiments/benchmarks/scale_diffusion.py --graph scale-10m/whole --classes 1000

Spreads `--labels` random images of each class over a finished graph, in blocks of classes on two
Ray workers, and prints one JSON line: wall and CPU seconds, peak memory over all processes. The
seeds of a class lie anywhere, so that more rows are reached early than on real labels: the steps
are dearer here. 10 M images x 1,000 classes, 3 steps, stand for a tenth of the 100 M of the paper.
"""

from __future__ import annotations

import argparse
import json
import shutil
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
from processor import cpu_path
from scale import memory


def spread(args: argparse.Namespace, out: Path) -> None:
    """Run the stage; in a process of its own."""
    from selfsup_ray.cluster.session import session
    from selfsup_ray.config import Resources
    from selfsup_ray.stages.diffuse import DiffuseConfig, diffuse
    from selfsup_ray.stages.graph import Graph

    graph = Graph.open(args.graph)
    labels = np.full(len(graph), -1, np.int32)
    rng = np.random.default_rng(0)
    seeds = rng.choice(len(graph), args.classes * args.labels, replace=False)
    labels[seeds] = np.arange(len(seeds)) % args.classes
    config = DiffuseConfig(
        niter=args.steps,
        dtype=args.dtype,
        memory_gb=args.memory_gb,
        resources=Resources(workers=args.workers),
    )
    with session(num_cpus=args.workers):
        began = time.perf_counter()
        made = diffuse(graph, labels, config, out=out)
    facts = {"images": len(graph), "k": graph.ids.shape[1], "wall_s": time.perf_counter() - began}
    print(json.dumps({**facts, "coverage": made.facts.get("coverage")}))


def main() -> None:
    """Run it, watch its memory, and print the line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--graph", type=Path, required=True, help="folder of a finished graph")
    parser.add_argument("--classes", type=int, default=1000)
    parser.add_argument("--labels", type=int, default=10, help="labelled images of a class")
    parser.add_argument("--steps", type=int, default=3)
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="bfloat16")
    parser.add_argument("--memory-gb", type=float, default=4.0, help="of a worker's labels")
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--one", type=Path, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.one:
        spread(args, args.one)
        return
    out = args.graph.parent / "diffuse"
    shutil.rmtree(out, ignore_errors=True)
    command = [sys.executable, __file__, *sys.argv[1:], "--one", str(out)]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    peaks = [0.0, 0.0, 0.0]
    while process.poll() is None:
        peaks = [max(a, b) for a, b in zip(peaks, memory(process.pid), strict=True)]
        time.sleep(0.5)
    text = process.stdout.read() if process.stdout else ""
    if process.returncode:
        raise SystemExit(f"the diffusion failed:\n{text}")
    line = {"benchmark": "scale_diffusion", **json.loads(text.splitlines()[-1])}
    line |= {"classes": args.classes, "steps": args.steps, "dtype": args.dtype, "path": cpu_path()}
    line |= dict(zip(("peak_gb", "peak_anonymous_gb", "cpu_s"), peaks, strict=True))
    print(json.dumps({k: round(v, 3) if isinstance(v, float) else v for k, v in line.items()}))


if __name__ == "__main__":
    main()
