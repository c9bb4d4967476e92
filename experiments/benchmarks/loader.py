"""From JPEG to two augmented views: our corpus and views against torchvision in a DataLoader.

    python experiments/benchmarks/loader.py --images 4096 --side 128 --size 64

Both start from the same JPEG bytes of 128 px and end with two normalised float views of 64 px in
batches (SimCLR's recipe without blur: crop, flip, jitter, grey). torchvision's pipeline is v1's, on
Pillow images, in a DataLoader with as many processes as we have threads, each of which makes
batches of its own, as each Ray Train worker does. The two take turns;
figures are medians of the rounds. Prints one JSON line with images/s of wall time, CPU microseconds
per image (start of the processes included in neither), and both ratios. Bar: ratio >= 2.5; on a
machine with other work read cpu_ratio.
"""

from __future__ import annotations

import argparse
import json
import os
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import torch
from photos import write_jpegs
from PIL import Image
from torch.utils.data import DataLoader, Dataset
from torchvision import transforms

from selfsup_ray.config import Resources
from selfsup_ray.data.corpus import Corpus
from selfsup_ray.data.views import IMAGENET_MEAN, IMAGENET_STD, SimCLRViews, Views
from selfsup_ray.stages.ingest import IngestConfig, ingest


class TwoViews(Dataset[tuple[torch.Tensor, torch.Tensor]]):
    """torchvision's two views of every file."""

    def __init__(self, paths: list[Path], size: int) -> None:
        self.paths = paths
        self.transform = transforms.Compose(
            [
                transforms.RandomResizedCrop(size),
                transforms.RandomHorizontalFlip(),
                transforms.RandomApply([transforms.ColorJitter(0.4, 0.4, 0.4, 0.1)], p=0.8),
                transforms.RandomGrayscale(p=0.2),
                transforms.ToTensor(),
                transforms.Normalize(IMAGENET_MEAN, IMAGENET_STD),
            ]
        )

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, i: int) -> tuple[torch.Tensor, torch.Tensor]:
        with Image.open(self.paths[i]) as image:
            rgb = image.convert("RGB")
        return self.transform(rgb), self.transform(rgb)


def cpu_seconds() -> float:
    """Return the CPU seconds of this process and its ended children."""
    return sum(os.times()[:4])


def by_torchvision(
    paths: list[Path], *, size: int, threads: int, batch: int
) -> tuple[float, float]:
    """Return seconds and CPU seconds per image; the time until the first batch is left out."""
    began, seen, cpu = 0.0, 0, cpu_seconds()
    for first, _second in DataLoader(TwoViews(paths, size), batch_size=batch, num_workers=threads):
        if began:
            seen += len(first)
        began = began or time.perf_counter()
    seconds = time.perf_counter() - began
    return seconds / seen, (cpu_seconds() - cpu) / len(paths)


def by_ours(
    corpus: Corpus, *, size: int, threads: int, batch: int, epoch: int
) -> tuple[float, float]:
    """Return seconds and CPU seconds per image of reading, decoding and augmenting all images."""
    config = SimCLRViews(size=size, strength=0.5, blur_p=0.0)
    views = Views(config, image_size=corpus.image_size, seed=0)
    order = np.random.default_rng(epoch).permutation(len(corpus))

    def make(start: int) -> None:
        ids = order[start : start + batch]
        made = views([corpus.images(ids)], torch.from_numpy(ids), epoch)
        assert made[0].shape == made[1].shape == (len(ids), 3, size, size)

    began, cpu = time.perf_counter(), cpu_seconds()
    with ThreadPoolExecutor(threads, initializer=torch.set_num_threads, initargs=(1,)) as pool:
        for _ in pool.map(make, range(0, len(order), batch)):
            pass
    return (time.perf_counter() - began) / len(order), (cpu_seconds() - cpu) / len(order)


def main() -> None:
    """Print the JSON line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--images", type=int, default=8192)
    parser.add_argument("--side", type=int, default=128)
    parser.add_argument("--size", type=int, default=64)
    parser.add_argument("--threads", type=int, default=os.cpu_count() or 1)
    parser.add_argument("--batch", type=int, default=256)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--source", help="Parquet with images; the bundled ones by default")
    given = parser.parse_args()
    here = IngestConfig(image_size=given.side, encoding="jpeg", resources=Resources(workers=0))
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary, "files")
        size_bytes = write_jpegs(folder, given.images, side=given.side, source=given.source)
        corpus = ingest(folder, here, out=Path(temporary, "corpus"))
        paths = sorted(folder.rglob("*.jpg"))
        how = {"size": given.size, "threads": given.threads, "batch": given.batch}
        by_ours(corpus, epoch=0, **how)  # the first pass opens the shards
        rounds = [
            (*by_torchvision(paths, **how), *by_ours(corpus, epoch=i, **how))
            for i in range(1, given.rounds + 1)
        ]
    theirs, their_cpu, ours, our_cpu = np.median(np.array(rounds), axis=0)
    result = {
        "benchmark": "loader",
        "images": given.images,
        "side": given.side,
        "kilobytes_per_image": round(size_bytes / given.images / 1e3, 1),
        **how,
        "load": round(os.getloadavg()[0], 1),
        "torchvision_images_per_s": round(1 / theirs),
        "ours_images_per_s": round(1 / ours),
        "torchvision_cpu_us": round(1e6 * their_cpu),
        "ours_cpu_us": round(1e6 * our_cpu),
        "ratio": round(theirs / ours, 2),
        "cpu_ratio": round(their_cpu / our_cpu, 2),
    }
    print(json.dumps(result))


if __name__ == "__main__":
    main()
