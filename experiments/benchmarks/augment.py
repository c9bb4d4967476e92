"""Two SimCLR views per image: ours against lightly and torchvision v2, core-seconds in one run.

    python experiments/benchmarks/augment.py --size 32 --recipe simclr
    python experiments/benchmarks/augment.py --size 32 --recipe simclr --loaders 2

Prints one JSON line. All three get the same random images, already in memory (uint8 for us and
torchvision, PIL for lightly), run on one thread, and take turns; times are medians of the rounds in
CPU microseconds per image (two views), ratios are medians of the rounds' ratios. With --loaders the
figures are images/s of wall time: torchvision v2 in a DataLoader of so many worker processes, ours
in as many threads, each with batches of its own. Bar: ours >= 1.5 x torchvision with 2, at 32 and
96 px.
"""

from __future__ import annotations

import argparse
import json
import os
import time
from collections import deque
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from statistics import median

import torch
from lightly.transforms import SimCLRTransform
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader, Dataset
from torchvision.transforms import v2

from selfsup_ray.data.views import IMAGENET_MEAN, IMAGENET_STD, SimCLRViews, Views

STRENGTH = 0.5  # SimCLR's for CIFAR; jitter 0.4, 0.4, 0.4, 0.1
BLUR_P = {"simclr": 0.5, "simclr-noblur": 0.0}


def ours(images: Tensor, size: int, blur_p: float) -> Callable[[int], object]:
    """Return a call that makes two views of the whole batch in epoch `round`."""
    config = SimCLRViews(size=size, strength=STRENGTH, blur_p=blur_p, interpolation="bilinear")
    views = Views(config, image_size=images.shape[-1], seed=0)
    ids = torch.arange(len(images))
    return lambda round: views([images], ids, round)


def lightly(images: Tensor, size: int, blur_p: float) -> Callable[[int], object]:
    """Return a call that runs lightly's transform on every image, as its dataset does."""
    transform = SimCLRTransform(input_size=size, cj_strength=STRENGTH, gaussian_blur=blur_p)
    pictures = [Image.fromarray(image.permute(1, 2, 0).numpy()) for image in images]
    return lambda round: [transform(picture) for picture in pictures]


def torchvision(images: Tensor, size: int, blur_p: float) -> Callable[[int], object]:
    """Return a call that runs torchvision v2 on every uint8 tensor, two times."""
    transform = torchvision_v2(size, blur_p)
    return lambda round: [(transform(image), transform(image)) for image in images]


def torchvision_v2(size: int, blur_p: float) -> v2.Transform:
    """Return torchvision's transform of a uint8 image to one normalized view."""
    kernel = max(size // 10 // 2 * 2 + 1, 3)
    blur = v2.RandomApply([v2.GaussianBlur(kernel, (0.1, 2.0))], p=blur_p)
    strengths = [STRENGTH * value for value in (0.8, 0.8, 0.8, 0.2)]
    return v2.Compose(
        [
            v2.RandomResizedCrop(size, antialias=True),
            v2.RandomHorizontalFlip(),
            v2.RandomApply([v2.ColorJitter(*strengths)], p=0.8),
            v2.RandomGrayscale(0.2),
            *([blur] if blur_p else []),
            v2.ToDtype(torch.float32, scale=True),
            v2.Normalize(IMAGENET_MEAN, IMAGENET_STD),
        ]
    )


def cpu_us(call: Callable[[int], object], round: int, images: int) -> float:
    """Return the CPU microseconds (user and system) per image of one call."""
    start = time.process_time()
    call(round)
    return (time.process_time() - start) / images * 1e6


class TwoViews(Dataset[tuple[Tensor, Tensor]]):
    """torchvision's two views of image i of a pass over `length` images."""

    def __init__(self, images: Tensor, transform: v2.Transform, length: int) -> None:
        self.images, self.transform, self.length = images, transform, length

    def __len__(self) -> int:
        return self.length

    def __getitem__(self, i: int) -> tuple[Tensor, Tensor]:
        image = self.images[i % len(self.images)]
        return self.transform(image), self.transform(image)


def loaded_per_s(images: Tensor, size: int, blur_p: float, *, loaders: int, batches: int) -> float:
    """Return images/s of torchvision in a DataLoader; until its first batch nothing counts."""
    data = TwoViews(images, torchvision_v2(size, blur_p), len(images) * (batches + 1))
    began, seen = 0.0, 0
    for first, _second in DataLoader(data, batch_size=len(images), num_workers=loaders):
        seen += len(first) if began else 0
        began = began or time.perf_counter()
    return seen / (time.perf_counter() - began)


def threaded_per_s(
    images: Tensor, size: int, blur_p: float, *, threads: int, batches: int
) -> float:
    """Return images/s of ours in threads, each with batches of its own."""
    call = ours(images, size, blur_p)
    with ThreadPoolExecutor(threads, initializer=torch.set_num_threads, initargs=(1,)) as pool:
        deque(pool.map(call, range(threads)), maxlen=0)
        began = time.perf_counter()
        deque(pool.map(call, range(threads, threads + batches)), maxlen=0)
    return len(images) * batches / (time.perf_counter() - began)


def with_loaders(images: Tensor, args: argparse.Namespace) -> dict[str, object]:
    """Return the figures of whole loaders."""
    how = (images, args.size, BLUR_P[args.recipe])
    rounds = []
    for _ in range(args.rounds):
        theirs = loaded_per_s(*how, loaders=args.loaders, batches=8)
        rounds.append((threaded_per_s(*how, threads=args.loaders, batches=64), theirs))
    return {
        "loaders": args.loaders,
        "ours_images_per_s": round(median(r[0] for r in rounds)),
        "torchvision_images_per_s": round(median(r[1] for r in rounds)),
        "ratio": round(median(r[0] / r[1] for r in rounds), 2),
    }


def in_turn(images: Tensor, args: argparse.Namespace) -> dict[str, object]:
    """Return the figures of one thread."""
    peers = [
        maker(images, args.size, BLUR_P[args.recipe]) for maker in (ours, lightly, torchvision)
    ]
    for call in peers:
        call(0)
    times = [[cpu_us(call, i, args.batch) for call in peers] for i in range(1, args.rounds + 1)]
    return {
        "ours_us": round(median(t[0] for t in times), 1),
        "lightly_us": round(median(t[1] for t in times), 1),
        "torchvision_us": round(median(t[2] for t in times), 1),
        "ratio_lightly": round(median(t[1] / t[0] for t in times), 2),
        "ratio_torchvision": round(median(t[2] / t[0] for t in times), 2),
    }


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--size", type=int, default=32, help="side of a view")
    parser.add_argument("--stored", type=int, help="side of the stored images; default: size")
    parser.add_argument("--batch", type=int, default=256, help="images per call")
    parser.add_argument("--recipe", choices=BLUR_P, default="simclr")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--loaders", type=int, default=0, help="measure whole loaders")
    args = parser.parse_args()
    torch.set_num_threads(1)
    # A block as large as a training step's: once it was freed, glibc keeps memory instead of giving
    # it back after every call, as in a training process. The peers' small blocks are not affected.
    torch.zeros(7 << 20)
    side = args.stored or args.size
    generator = torch.Generator().manual_seed(0)
    images = torch.randint(0, 256, (args.batch, 3, side, side), generator=generator).byte()
    line = {
        "benchmark": "augment",
        "recipe": args.recipe,
        "stored": side,
        "size": args.size,
        "batch": args.batch,
        **(with_loaders(images, args) if args.loaders else in_turn(images, args)),
        "torch": torch.__version__,
        "capability": torch.backends.cpu.get_cpu_capability(),
        "load": round(os.getloadavg()[0], 1),
    }
    print(json.dumps(line))


if __name__ == "__main__":
    main()
