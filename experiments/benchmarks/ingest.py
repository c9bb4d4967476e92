"""Ingest through Ray Data against a bare torch DataLoader over the same JPEG files.

    python experiments/benchmarks/ingest.py --images 20000 --side 256 --size 64 --workers 2

The loader opens, decodes and resizes with Pillow in as many processes as Ray Data has tasks, and
does nothing else; ingest also checks every file, hashes it, and writes the corpus. They take turns;
figures are medians of the rounds. Prints one JSON line: images/s of both in total (Ray already
started) and in the steady state (after the first `workers` shards or batches), and their ratios.
Bar: steady_ratio >= 0.9.
`--source` takes a Parquet file with images, of which the files become mosaics.
"""

from __future__ import annotations

import argparse
import json
import os
import tempfile
import time
from pathlib import Path
from statistics import median

import torch
from photos import write_jpegs
from PIL import Image
from torch.utils.data import DataLoader, Dataset
from torchvision.transforms import v2

from selfsup_ray.cluster.session import session
from selfsup_ray.config import Resources
from selfsup_ray.stages.ingest import IngestConfig, ingest


class Files(Dataset[torch.Tensor]):
    """Pillow's decode and resize of every file, as (3, size, size) uint8."""

    def __init__(self, paths: list[Path], size: int) -> None:
        self.paths, self.size = paths, size
        self.transform = v2.Compose([v2.Resize(size, antialias=True), v2.CenterCrop(size)])

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, i: int) -> torch.Tensor:
        with Image.open(self.paths[i]) as image:
            return v2.functional.pil_to_tensor(self.transform(image.convert("RGB")))


def by_loader(paths: list[Path], *, size: int, workers: int, batch: int) -> dict[str, float]:
    """Return images/s of the DataLoader: total, steady."""
    began = time.perf_counter()
    ends = []
    for images in DataLoader(Files(paths, size), batch_size=batch, num_workers=workers):
        assert images.shape[1:] == (3, size, size)
        ends.append(time.perf_counter())
    steady = (len(paths) - workers * batch) / (ends[-1] - ends[workers - 1])
    return {"total": len(paths) / (ends[-1] - began), "steady": steady}


def by_ingest(folder: Path, out: Path, *, size: int, workers: int, batch: int) -> dict[str, float]:
    """Return images/s of ingest: total, steady (by the times its shards were written)."""
    config = IngestConfig(
        image_size=size, shard_size=batch, resources=Resources(workers=workers), labels="none"
    )
    began = time.perf_counter()
    corpus = ingest(folder, config, out=out)
    seconds = time.perf_counter() - began
    ends = sorted(path.stat().st_mtime for path in (out / "shards").iterdir())
    steady = (len(corpus) - workers * batch) / (ends[-1] - ends[workers - 1])
    return {"total": len(corpus) / seconds, "steady": steady}


def main() -> None:
    """Print the JSON line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--images", type=int, default=20_000)
    parser.add_argument("--side", type=int, default=256, help="of the JPEG files, px")
    parser.add_argument("--size", type=int, default=64, help="of the stored images, px")
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--batch", type=int, default=512, help="images per shard and per batch")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--source", help="Parquet with images; the bundled ones by default")
    given = parser.parse_args()
    how = {"size": given.size, "workers": given.workers, "batch": given.batch}
    with tempfile.TemporaryDirectory() as temporary, session(num_cpus=given.workers):
        folder = Path(temporary, "files")
        size_bytes = write_jpegs(folder, given.images, side=given.side, source=given.source)
        paths = sorted(folder.rglob("*.jpg"))
        rounds = [
            (by_loader(paths, **how), by_ingest(folder, Path(temporary, f"corpus{i}"), **how))
            for i in range(given.rounds)
        ]
    loader, ours = (
        {kind: median(one[who][kind] for one in rounds) for kind in ("total", "steady")}
        for who in (0, 1)
    )
    result = {
        "benchmark": "ingest",
        "images": given.images,
        "side": given.side,
        "kilobytes_per_image": round(size_bytes / given.images / 1e3, 1),
        **how,
        "cpus": os.cpu_count(),
        "load": round(os.getloadavg()[0], 1),
        "loader_images_per_s": {key: round(value) for key, value in loader.items()},
        "ingest_images_per_s": {key: round(value) for key, value in ours.items()},
        "total_ratio": round(ours["total"] / loader["total"], 3),
        "steady_ratio": round(ours["steady"] / loader["steady"], 3),
    }
    print(json.dumps(result))


if __name__ == "__main__":
    main()
