"""Balanced assignment by Sinkhorn-Knopp: ours beside SeLa's own form in float64, and POT.

    python experiments/benchmarks/sinkhorn.py --images 300000 --clusters 1000
    python experiments/benchmarks/sinkhorn.py --images 1000000 --clusters 3000 --ways files

Logits of a network between chance and confidence: K directions in 64 dimensions, images around
mixtures of them. They lie in a file that is mapped in blocks. Each way runs in a process of its
own on one thread (files: on two, the matrix in files); a line gives CPU seconds in all and of one
iteration, the peak memory besides the mapped scores, and the share of labels equal to float64's.
The published loop stops by its own rule (the sum of changes <= 0.1), ours and POT by theirs.
Bars: a third of numpy's time an iteration and in total, a fourth of POT's, labels >= 99.9 %, peak
memory <= 1.3 times the float32 scores; 1 M x 3,000 from files within 6 GB.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path

WAYS = ("bfloat16", "float32", "numpy", "pot", "files")
BLOCK = 16_384
LAM = 25.0


def write_scores(folder: Path, n: int, k: int) -> None:
    """Write (n, k) float32 logits in blocks."""
    import numpy as np

    rng = np.random.default_rng(0)
    directions = rng.normal(size=(64, k)).astype(np.float32) / 8
    for i, a in enumerate(range(0, n, BLOCK)):
        rng = np.random.default_rng([1, i])
        size = min(BLOCK, n - a)
        own = directions[:, rng.integers(0, k, size)].T
        images = own + 0.6 * rng.normal(size=(size, 64)).astype(np.float32)
        np.save(folder / f"{i:05d}.npy", images @ directions)


def mapped(folder: Path) -> list:
    """Return the blocks, mapped."""
    import numpy as np

    return [np.load(path, mmap_mode="r") for path in sorted(folder.glob("*.npy"))]


class Blocks:
    """The blocks, opened anew each time, so that read pages are not kept."""

    def __init__(self, folder: Path) -> None:
        self.paths = sorted(folder.glob("*.npy"))

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, i: int):
        import numpy as np

        return np.load(self.paths[i])


def ours(args: argparse.Namespace) -> tuple[dict[str, float], object]:
    """Run our own; the first, tiny run compiles or loads the kernels."""
    import numpy as np

    from selfsup_ray.ops.sinkhorn import balanced_labels, sinkhorn_knopp

    how = {"lam": LAM, "precision": "bfloat16" if args.one == "files" else args.one}
    tiny = np.random.default_rng(0).normal(size=(64, 8)).astype(np.float32)
    balanced_labels(tiny, sinkhorn_knopp([tiny], **how).log_r, lam=LAM)
    blocks = Blocks(args.folder)
    if args.one == "files":
        how |= {"folder": args.folder / "rows", "threads": 2}
    began = time.process_time()
    wall = time.perf_counter()
    one = sinkhorn_knopp(blocks, **how, max_iterations=1)
    first = time.process_time() - began
    began = time.process_time()
    wall = time.perf_counter()
    result = sinkhorn_knopp(blocks, **how)
    solved = time.process_time() - began
    labels = [balanced_labels(blocks[i], result.log_r, lam=LAM)[0] for i in range(len(blocks))]
    total = time.process_time() - began
    assert one.iterations == 1 and result.converged
    each = (solved - first) / (result.iterations - 1)
    figures = {"iterations": result.iterations, "iteration_s": each, "total_s": total}
    return figures | {"wall_s": time.perf_counter() - wall}, np.concatenate(labels)


def published(args: argparse.Namespace) -> tuple[dict[str, float], object]:
    """Run the form of SeLa's code: P^lambda in float64, two products an iteration."""
    import numpy as np

    began = time.process_time()
    parts = []
    for block in mapped(args.folder):
        x = np.asarray(block, np.float64)
        x -= x.max(axis=1, keepdims=True)
        p = np.exp(x)
        parts.append(p / p.sum(axis=1, keepdims=True))
    a = np.concatenate(parts)
    del parts
    np.power(a, LAM, out=a)
    n, k = a.shape
    c, t, error, solving = np.full(n, 1 / n), 0, 1e9, time.process_time()
    while error > 0.1:
        r = (1 / k) / (c @ a)
        after = (1 / n) / (a @ r)
        if t % 10 == 0:
            error = float(np.nansum(np.abs(c / after - 1)))
        c, t = after, t + 1
    each = (time.process_time() - solving) / t
    a *= r
    labels = a.argmax(axis=1)
    total = time.process_time() - began
    return {"iterations": t, "iteration_s": each, "total_s": total}, labels


def pot(args: argparse.Namespace) -> tuple[dict[str, float], object]:
    """Run POT's Sinkhorn-Knopp in float64 on the cost -log p, as large as memory allows."""
    import numpy as np
    import ot

    began = time.process_time()
    x = np.concatenate([np.asarray(block, np.float64) for block in mapped(args.folder)])
    x -= x.max(axis=1, keepdims=True)
    x -= np.log(np.exp(x).sum(axis=1, keepdims=True))
    np.negative(x, out=x)
    n, k = x.shape
    plan, log = ot.sinkhorn(
        np.full(n, 1 / n), np.full(k, 1 / k), x, 1 / LAM, stopThr=1e-6, log=True, warn=False
    )  # fmt: skip
    labels = plan.argmax(axis=1)
    total = time.process_time() - began
    return {"iterations": int(log["niter"]), "total_s": total}, labels


def main() -> None:
    """Run the ways in turn and print the line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--images", type=int, default=300_000)
    parser.add_argument("--clusters", type=int, default=1000)
    parser.add_argument("--ways", nargs="+", choices=WAYS, default=WAYS[:4])
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--one", choices=WAYS, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.one:
        run_one(args)
        return
    import numpy as np

    scores_gb = args.images * args.clusters * 4 / 1e9
    line = {"benchmark": "sinkhorn", "images": args.images, "clusters": args.clusters}
    line |= {"lam": LAM, "scores_gb": scores_gb}
    environment = os.environ | {"OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"}
    labels = {}
    with tempfile.TemporaryDirectory() as temporary:
        args.folder = Path(temporary)
        write_scores(args.folder, args.images, args.clusters)
        for way in args.ways:
            command = [sys.executable, __file__, *sys.argv[1:], "--folder", temporary]
            text = subprocess.run(
                [*command, "--one", way], env=environment, check=True, capture_output=True
            ).stdout
            line[way] = json.loads(text.splitlines()[-1])
            labels[way] = np.load(args.folder / f"{way}.labels")
    reference = labels.get("numpy")
    for way in labels:
        if reference is not None:
            line[way]["labels_equal"] = float((labels[way] == reference).mean())
        counts = np.bincount(labels[way], minlength=args.clusters)
        line[way]["largest_cluster"] = float(counts.max() / counts.mean())
    print(json.dumps(line))


def run_one(args: argparse.Namespace) -> None:
    """Run one way and write its labels; its figures go to standard output."""
    import numpy as np

    run = {"numpy": published, "pot": pot}.get(args.one, ours)
    figures, labels = run(args)
    with open(args.folder / f"{args.one}.labels", "wb") as file:
        np.save(file, labels)
    anonymous = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6
    print(json.dumps(figures | {"peak_gb": anonymous}))


if __name__ == "__main__":
    main()
