"""Codes of patches and the gated linear layer against what the published form takes.

    python experiments/benchmarks/patch_codes.py                              # N 1024, k 256
    python experiments/benchmarks/patch_codes.py --sizes 1024 2048 --parts codes
    python experiments/benchmarks/patch_codes.py --images train.parquet       # images of your own

One process, one thread, all ways in turn, `--rounds` times; figures are medians of core-seconds
(user and system time) as images per second and core, and ratios of the same run.

codes: 32 x 32 images to masks of the k nearest of N dictionary entries at all 784 positions.
`published` is conv2d + kthvalue over channels + comparison, float masks; `partition` conv2d in
channels_last + numpy's partition, bool masks; `ours` and `ours, float32` give packed bits. `share`
is how much of the selection by float64 distances a way finds, `set` how many bits it sets.
layer: AvgPool(mask * (V x + b)), forward and backward for V and b, at known masks: torch's layers
in float32 and in bfloat16 autocast against ours.
memory: peak resident memory of coding 64 and 512 images in batches of 64, above the start.

Bars: codes >= 10 x published and >= 2 x partition, share >= 0.998, exactly k set. The dictionary:
256 patches an entry, whitened by PCA with 1e-3 added to the roots, 5 iterations of k-means.
"""

from __future__ import annotations

import argparse
import io
import json
import os
import resource
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from kmeans import leaves
from processor import cpu_path
from torch import Tensor

from selfsup_ray.ops.gated_linear import gated_pool, plain_gated_pool
from selfsup_ray.ops.kmeans import kmeans
from selfsup_ray.ops.patch_codes import distances, patch_bits, unpack_bits
from selfsup_ray.ops.whitening import code_kernel, whitened, whitening_matrix

PATCH, POOL, ITERATIONS = 5, 4, 5
FEW = 8  # images of one call of the ways that hold all distances


def read_images(path: Path | None, n: int) -> Tensor:
    """Return n images (n, 3, 32, 32) float32 in [0, 1]: of a Parquet file, or made."""
    if path is None:
        return torch.from_numpy(leaves(n, seed=0))
    import pyarrow.parquet as pq
    from PIL import Image

    column = pq.read_table(path, columns=["image"]).slice(0, n)["image"].to_pylist()
    pixels = np.stack([np.asarray(Image.open(io.BytesIO(b)).convert("RGB")) for b in column])
    return torch.from_numpy(pixels).permute(0, 3, 1, 2).float() / 255


def made_dictionary(images: Tensor, size: int) -> tuple[Tensor, Tensor]:
    """Return kernel (N, 75) and bias (N,) of a dictionary clustered from the images' patches."""
    patches = F.unfold(images, PATCH).transpose(1, 2).reshape(-1, 3 * PATCH**2)
    matrix = whitening_matrix(np.cov(patches.T.numpy().astype(np.float64)))
    chosen = np.random.default_rng(0).permutation(len(patches))[: 256 * size]
    points = whitened(patches.numpy()[chosen], matrix)
    centroids = kmeans(points, size, iterations=ITERATIONS).centroids
    kernel, bias = code_kernel(centroids, matrix)
    return torch.from_numpy(kernel), torch.from_numpy(bias)


def published(images: Tensor, kernel: Tensor, bias: Tensor, k: int) -> Tensor:
    """Return float masks (B, N, h, w) as the released code makes them."""
    found = distances(images, kernel, bias, patch_size=PATCH)
    return (found <= found.kthvalue(k, dim=1, keepdim=True).values).float()


def partition(images: Tensor, kernel: Tensor, bias: Tensor, k: int) -> np.ndarray:
    """Return bool masks (B, h, w, N) by a channels_last convolution and numpy's partition."""
    filters = kernel.view(-1, 3, PATCH, PATCH).contiguous(memory_format=torch.channels_last)
    images = images.contiguous(memory_format=torch.channels_last)
    found = F.conv2d(images, filters, bias).permute(0, 2, 3, 1).numpy()
    return found <= np.partition(found, k - 1, axis=-1)[..., k - 1 : k]


def core_seconds(call: Callable[[], Any]) -> float:
    """Return the CPU seconds of one call."""
    before = time.process_time()
    call()
    return time.process_time() - before


def medians(ways: dict[str, Callable[[], int]], rounds: int) -> dict[str, float]:
    """Return images per core-second of each way; each call returns how many images it did."""
    done = {name: call() for name, call in ways.items()}  # kernels are made, caches filled
    seconds: dict[str, list[float]] = {name: [] for name in ways}
    for _ in range(rounds):
        for name, call in ways.items():
            seconds[name].append(core_seconds(call))
    return {name: done[name] / statistics.median(seconds[name]) for name in ways}


def codes(images: Tensor, size: int, k: int, rounds: int) -> dict[str, Any]:
    """Return speed and quality of all ways to the masks."""
    kernel, bias = made_dictionary(images, size)
    batch = images[-64:]

    def bits(precision: Any, some: Tensor = batch) -> Tensor:
        return patch_bits(some, kernel, bias, patch_size=PATCH, ks=[k], precision=precision)[0]

    ways = {
        "published": lambda: len(published(batch[:FEW], kernel, bias, k)),
        "partition": lambda: len(partition(batch[: 2 * FEW], kernel, bias, k)),
        "ours": lambda: len(bits("bfloat16")),
        "ours, float32": lambda: len(bits("float32")),
    }
    speed = medians(ways, rounds)
    few = batch[:FEW]
    exact = distances(few.double(), kernel.double(), bias.double(), patch_size=PATCH)
    exact = (exact <= exact.kthvalue(k, dim=1, keepdim=True).values).permute(0, 2, 3, 1)
    quality = {}
    found = {
        name: unpack_bits(bits(p, few), size)
        for name, p in (("ours", "bfloat16"), ("ours, float32", "float32"))
    }
    found["published"] = published(few, kernel, bias, k).bool().permute(0, 2, 3, 1)
    for name, code in found.items():
        share, counts = (code & exact).sum() / exact.sum(), code.sum(dim=-1)
        quality[name] = {
            "share": round(float(share), 6),
            "set": [int(counts.min()), int(counts.max())],
        }
    ratios = {f"x {peer}": speed["ours"] / speed[peer] for peer in ("published", "partition")}
    return {"size": size, "k": k, "images_per_core_s": speed, **ratios, "quality": quality}


def layer(images: Tensor, size: int, k: int, rounds: int) -> dict[str, Any]:
    """Return the speed of the gated linear layer, forward and backward, at known masks."""
    kernel, bias = made_dictionary(images, size)
    batch = images[-64:] * 2 - 1
    [bits] = patch_bits(images[-64:], kernel, bias, patch_size=PATCH, ks=[k])
    weight = (0.1 * torch.randn(size, 75)).requires_grad_()
    offset = torch.zeros(size).requires_grad_()

    def train(call: Any, precision: str, count: int) -> int:
        some = batch[:count], bits[:count]
        how = {"patch_size": PATCH, "pool": POOL, "precision": precision}
        call(*some, weight, offset, **how).square().mean().backward()
        return count

    ways = {
        "torch, float32": lambda: train(plain_gated_pool, "float32", FEW),
        "torch, bfloat16": lambda: train(plain_gated_pool, "bfloat16", FEW),
        "ours, float32": lambda: train(gated_pool, "float32", 64),
        "ours": lambda: train(gated_pool, "bfloat16", 64),
    }
    speed = medians(ways, rounds)
    ratios = {
        f"x torch, {p}": speed["ours"] / speed[f"torch, {p}"] for p in ("float32", "bfloat16")
    }
    return {"size": size, "k": k, "images_per_core_s": speed, **ratios}


def memory(images: Tensor, size: int, k: int, rounds: int) -> dict[str, Any]:
    """Return how far coding raises the peak resident memory, in MB, for 64 and 512 images."""
    kernel, bias = torch.randn(size, 75), torch.randn(size)
    start, found = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, {}
    for count in (64, 512):
        for batch in images.repeat(-(-count // len(images)), 1, 1, 1)[:count].split(64):
            patch_bits(batch, kernel, bias, patch_size=PATCH, ks=[k])
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        found[f"{count} images"] = round((peak - start) / 1024, 1)
    return {"size": size, "k": k, "peak_mb": found}


def main() -> None:
    """Print one JSON line for each part and dictionary size."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--sizes", type=int, nargs="+", default=[1024])
    parser.add_argument("--k", type=float, default=0.25, help="as a share of the size")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--images", type=Path, help="Parquet with encoded 32 px images")
    parts = {"memory": memory, "codes": codes, "layer": layer}
    parser.add_argument("--parts", nargs="+", choices=parts, default=list(parts))
    args = parser.parse_args()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    for size in args.sizes:
        images = read_images(args.images, max(512, -(-256 * size // 784)))
        for part in args.parts:
            made = parts[part](images, size, max(1, round(args.k * size)), args.rounds)
            line = {"benchmark": "patch_codes", "part": part, **rounded(made)}
            print(json.dumps({**line, "path": cpu_path(), "load": round(os.getloadavg()[0], 1)}))
            sys.stdout.flush()


def rounded(values: dict[str, Any]) -> dict[str, Any]:
    """Return values with four digits of the floats, inside dicts too."""
    made = {}
    for key, value in values.items():
        if isinstance(value, dict):
            value = rounded(value)
        made[key] = float(f"{value:.4g}") if isinstance(value, float) and value > 1 else value
    return made


if __name__ == "__main__":
    main()
