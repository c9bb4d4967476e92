"""JPEG files for benchmarks: mosaics of real images, so that they compress as photographs do."""

from __future__ import annotations

from io import BytesIO
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
from PIL import Image

from selfsup_ray.data.bundled import bundled_path


def tiles(source: str | None, n: int, side: int) -> np.ndarray:
    """Return n images of a Parquet file, or of the bundled one, as (n, side, side, 3) uint8.

    Of grey images three are put into the three channels.
    """
    path = Path(source) if source else bundled_path("bundled:fashion-mnist")
    blobs = pq.read_table(path, columns=["image"])["image"].to_pylist()[: 3 * n]
    images = [Image.open(BytesIO(blob)) for blob in blobs]
    if all(image.mode == "L" for image in images):
        thirds = len(images) // 3
        images = [Image.merge("RGB", images[3 * i : 3 * i + 3]) for i in range(thirds)]
    return np.stack([np.asarray(image.convert("RGB").resize((side, side))) for image in images[:n]])


def write_jpegs(
    folder: Path, n: int, *, side: int, source: str | None = None, quality: int = 90
) -> int:
    """Write n square JPEGs, each a mosaic of random tiles of 64 px, and return their bytes."""
    generator = np.random.default_rng(0)
    choices = tiles(source, 2000, min(64, side))
    per_side = max(1, side // 64)
    size_bytes = 0
    for i in range(n):
        chosen = choices[generator.integers(0, len(choices), (per_side, per_side))]
        pixels = np.concatenate([np.concatenate(list(row), axis=1) for row in chosen], axis=0)
        path = folder / f"{i // 1000:03d}" / f"{i:06d}.jpg"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(pixels).resize((side, side)).save(path, quality=quality)
        size_bytes += path.stat().st_size
    return size_bytes
