"""Cut a labelled corpus to classes of unequal size, as long-tailed CIFAR-10 is made.

    python experiments/sela/long_tail.py cifar10/train.parquet cifar10-long-tail.parquet

Class c of C keeps n (1 / ratio)^(c / (C - 1)) of its n images (n of the smallest class), drawn by
the seed: for CIFAR-10 and the ratio of 100 that is usual, 5,000 down to 50, 12,406 images.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq


def kept_rows(labels: np.ndarray, *, ratio: float, seed: int) -> np.ndarray:
    """Return the rows (ascending) that stay of labels (N,), integers of C classes."""
    rng = np.random.default_rng(seed)
    classes, counts = np.unique(labels, return_counts=True)
    shares = ratio ** -(np.arange(len(classes)) / max(len(classes) - 1, 1))
    sizes = (counts.min() * shares).astype(int)
    chosen = [
        rng.choice(np.flatnonzero(labels == c), size, replace=False)
        for c, size in zip(classes, sizes, strict=True)
    ]
    return np.sort(np.concatenate(chosen))


def main() -> None:
    """Write the file and say how large each class is."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("source", type=Path, help="Parquet with a column `label`")
    parser.add_argument("target", type=Path)
    parser.add_argument("--ratio", type=float, default=100.0, help="largest to smallest class")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    table = pq.read_table(args.source)
    labels = np.asarray(table["label"])
    rows = kept_rows(labels, ratio=args.ratio, seed=args.seed)
    pq.write_table(table.take(pa.array(rows)), args.target)
    print(f"{args.target}: {np.unique(labels[rows], return_counts=True)[1].tolist()} images")


if __name__ == "__main__":
    main()
