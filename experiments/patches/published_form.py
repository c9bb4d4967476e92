"""Phi_hard or Phi_full as the study describes them, in torch, numpy and faiss: a second opinion.

    python experiments/patches/published_form.py cifar10/{train,test}.parquet --epochs 3

Nothing of the package is imported, so where the accuracy differs from the published one here too,
it is not the package's doing. The files are Parquet with `image` and `label`, one to learn from and
one to test on. A float mask of every batch is held and its threshold found by partition: an epoch
of CIFAR-10 takes about ten minutes of one core (Phi_hard; the package's 20 to 25 seconds), longer
with Phi_full. The package's answer at the same constant rate:

    selfsup-ray run experiments/patches/table1-phi-hard.yaml 'ingest.source=[…]' \\
        classify.epochs=3 'classify.schedule.milestones=[1, 2]' classify.schedule.rate=1.0

Prints one JSON line: test accuracy after each epoch, settings and seconds; each as it comes on the
way.
"""

from __future__ import annotations

import argparse
import io
import json
import sys
import time
from pathlib import Path

import faiss
import numpy as np
import pyarrow.parquet as pq
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor, nn

PATCH, POOL, BOTTLENECK, PADDING = 5, 4, 32, 4
FEW = 500  # images whose patches are held at once


def read(path: Path) -> tuple[Tensor, Tensor]:
    """Return the images of a file (n, 3, S, S) uint8, and their labels."""
    table = pq.read_table(path, columns=["image", "label"])
    pixels = [
        np.asarray(Image.open(io.BytesIO(b)).convert("RGB")) for b in table["image"].to_pylist()
    ]
    return torch.from_numpy(np.stack(pixels)).permute(0, 3, 1, 2), torch.tensor(
        table["label"].to_pylist()
    )


def patches_of(images: Tensor) -> Tensor:
    """Return all patches of images in [0, 1], (n positions, 3 s s)."""
    return F.unfold(images.float() / 255, PATCH).transpose(1, 2).flatten(0, 1)


def whitening(images: Tensor) -> np.ndarray:
    """Return the PCA whitening matrix of all patches, 1e-3 added to the roots of the variances."""
    count, total, products = 0, 0.0, 0.0
    for some in images.split(FEW):
        patches = patches_of(some).double()
        count, total, products = (
            count + len(patches),
            total + patches.sum(0),
            products + patches.T @ patches,
        )
    mean = total / count
    vectors, variances, _ = np.linalg.svd((products / count - torch.outer(mean, mean)).numpy())
    return vectors / (np.sqrt(variances) + 1e-3)


def dictionary(
    images: Tensor, matrix: np.ndarray, *, size: int, per_entry: int, seed: int
) -> np.ndarray:
    """Return centroids (size, 3 s s) of whitened patches, drawn uniformly over all positions."""
    side = images.shape[-1] - PATCH + 1
    drawn = np.random.default_rng(seed).choice(
        len(images) * side**2, size * per_entry, replace=False
    )
    image, place = drawn // side**2, drawn % side**2
    rows, columns = place // side, place % side
    offsets = np.arange(PATCH)
    found = images.numpy()[
        image[:, None, None, None],
        np.arange(3)[:, None, None],
        (rows[:, None] + offsets)[:, None, :, None],
        (columns[:, None] + offsets)[:, None, None, :],
    ].reshape(len(drawn), -1) / np.float32(255)
    found = found[np.linalg.norm(found, axis=1) >= 1e-2]
    points = (found @ matrix).astype(np.float32)
    kmeans = faiss.Kmeans(points.shape[1], size, niter=25, seed=seed)
    kmeans.train(points)
    return kmeans.centroids


class Network(nn.Module):
    """The fixed code, the linear functions it gates (Phi_full), and the head."""

    def __init__(
        self, centroids: np.ndarray, matrix: np.ndarray, *, k: int, side: int, full: bool
    ) -> None:
        super().__init__()
        size, self.k = len(centroids), k
        self.kernel = torch.from_numpy(-centroids @ matrix.T).float().view(size, 3, PATCH, PATCH)
        self.bias = torch.from_numpy((centroids**2).sum(1) / 2).float()
        self.linear = nn.Conv2d(3, size, PATCH) if full else None
        self.pool, self.norm = nn.AvgPool2d(POOL, POOL, ceil_mode=True), nn.BatchNorm2d(size)
        self.bottleneck = nn.Conv2d(size, BOTTLENECK, 1)
        self.classifier = nn.Linear(BOTTLENECK * (-(-(side - PATCH + 1) // POOL)) ** 2, 10)

    @torch.no_grad()
    def mask(self, images: Tensor) -> Tensor:
        """Return which entries are among the k nearest at each position, (B, N, h, w) float."""
        distances = F.conv2d(
            images.contiguous(memory_format=torch.channels_last), self.kernel, self.bias
        )
        rows = distances.permute(0, 2, 3, 1).numpy()
        threshold = np.partition(rows, self.k - 1, axis=3)[..., self.k - 1 : self.k]
        return torch.from_numpy(rows <= threshold).float().permute(0, 3, 1, 2)

    def forward(self, images: Tensor) -> Tensor:
        """Return the logits of images in [-1, 1]."""
        z = self.mask(images)
        if self.linear is not None:
            z = z * self.linear(images)
        return self.classifier(self.bottleneck(self.norm(self.pool(z))).flatten(1))


def augmented(images: Tensor, rng: torch.Generator) -> Tensor:
    """Return images flipped by chance and cut from themselves with a border of black."""
    side = images.shape[-1]
    images = torch.where(
        torch.rand(len(images), 1, 1, 1, generator=rng) < 0.5, images.flip(3), images
    )
    padded = F.pad(images, [PADDING] * 4)
    corners = torch.randint(2 * PADDING + 1, (len(images), 2), generator=rng).tolist()
    return torch.stack(
        [one[:, y : y + side, x : x + side] for one, (y, x) in zip(padded, corners, strict=True)]
    )


def scaled(images: Tensor) -> Tensor:
    """Return uint8 images in [-1, 1]."""
    return images.float() / 127.5 - 1


def accuracy(network: Network, images: Tensor, labels: Tensor) -> float:
    """Return the share of images that are classified right."""
    network.eval()
    with torch.no_grad():
        found = [network(scaled(some)).argmax(1) for some in images.split(64)]
    return float((torch.cat(found) == labels).float().mean())


def main() -> None:
    """Print the JSON line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("train", type=Path)
    parser.add_argument("test", type=Path)
    parser.add_argument("--model", choices=["phi_hard", "phi_full"], default="phi_hard")
    parser.add_argument("--size", type=int, default=1024, help="entries of the dictionary")
    parser.add_argument("--k", type=int, default=256)
    parser.add_argument("--per-entry", type=int, default=256, help="patches drawn for each entry")
    parser.add_argument("--epochs", type=int, default=3)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    began = time.monotonic()
    torch.manual_seed(args.seed)
    (images, labels), test = read(args.train), read(args.test)
    matrix = whitening(images)
    how = {"size": args.size, "per_entry": args.per_entry, "seed": args.seed}
    centroids = dictionary(images, matrix, **how)
    full = args.model == "phi_full"
    network = Network(centroids, matrix, k=args.k, side=images.shape[-1], full=full)
    optimizer = torch.optim.SGD(network.parameters(), lr=0.003, momentum=0.9)
    rng, found = torch.Generator().manual_seed(args.seed), []
    for _ in range(args.epochs):
        network.train()
        for ids in torch.randperm(len(images), generator=rng).split(64):
            loss = F.cross_entropy(network(scaled(augmented(images[ids], rng))), labels[ids])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        found.append(round(accuracy(network, *test), 4))
        print(f"epoch {len(found)}: {found[-1]:.4f}", file=sys.stderr, flush=True)
    seconds = round(time.monotonic() - began, 1)
    print(
        json.dumps({"model": args.model, "k": args.k, "accuracy": found, **how, "seconds": seconds})
    )


if __name__ == "__main__":
    main()
