"""Small generated corpora: colored shapes that cluster easily, and a folder full of bad files."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw

from selfsup_ray.artifacts import Array, begin, finish
from selfsup_ray.data.corpus import Corpus
from selfsup_ray.data.shard_files import (
    Encoding,
    Rows,
    digest,
    encoded,
    write_manifest,
    write_shard,
)

SHAPES = ("circle", "cross", "square", "triangle")
COLORS = {
    "circle": (200, 60, 60),
    "cross": (60, 170, 80),
    "square": (70, 90, 210),
    "triangle": (210, 180, 50),
}


def shape_images(n: int, *, size: int = 32, seed: int = 0) -> tuple[Array, Array]:
    """Return n images of four colored shapes and their labels, in turn: 0, 1, 2, 3, 0, ….

    images: (n, size, size, 3) uint8; labels: (n,) int64, an index into SHAPES. Position, scale,
    shade and the noisy background differ from image to image.
    """
    generator = np.random.default_rng(seed)
    labels = np.arange(n, dtype=np.int64) % len(SHAPES)
    images = [_shape(SHAPES[label], size, generator) for label in labels]
    return np.stack(images) if images else np.empty((0, size, size, 3), np.uint8), labels


def _shape(name: str, size: int, generator: np.random.Generator) -> Array:
    background = generator.integers(90, 130, 3) + generator.normal(0, 8, (size, size, 3))
    image = Image.fromarray(background.clip(0, 255).astype(np.uint8))
    draw = ImageDraw.Draw(image)
    radius = size * generator.uniform(0.22, 0.36)
    x, y = generator.uniform(radius, size - radius, 2)
    shade = np.array(COLORS[name]) + generator.integers(-25, 26)
    fill = (int(shade[0]), int(shade[1]), int(shade[2]))
    box = (x - radius, y - radius, x + radius, y + radius)
    match name:
        case "circle":
            draw.ellipse(box, fill=fill)
        case "square":
            draw.rectangle(box, fill=fill)
        case "triangle":
            draw.polygon(
                [(x, y - radius), (x - radius, y + radius), (x + radius, y + radius)], fill
            )
        case _:
            arm = radius / 3
            draw.rectangle((x - arm, y - radius, x + arm, y + radius), fill=fill)
            draw.rectangle((x - radius, y - arm, x + radius, y + arm), fill=fill)
    return np.asarray(image)


def write_shapes(
    folder: Path, n: int, *, size: int = 32, seed: int = 0, suffix: str = ".png"
) -> None:
    """Write n shape images as files, one folder per class: `circle/00000.png`, …."""
    images, labels = shape_images(n, size=size, seed=seed)
    for i, (pixels, label) in enumerate(zip(images, labels, strict=True)):
        path = folder / SHAPES[label] / f"{i:05d}{suffix}"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(pixels).save(path)


def corpus_of_arrays(
    out: Path,
    images: Array,
    labels: Array | None = None,
    *,
    class_names: Sequence[str] | None = None,
    shard_size: int = 2048,
    encoding: Encoding = "raw",
) -> Corpus:
    """Write images that are in memory as a corpus, without ingest, and return it.

    images: (N, S, S, 3) uint8; labels: (N,), -1 is unknown, none at all by default.
    """
    labels = np.full(len(images), -1, np.int64) if labels is None else np.asarray(labels, np.int64)
    content = hashlib.sha256(images.tobytes() + labels.tobytes()).hexdigest()
    config = {"content": content, "shard_size": shard_size, "encoding": encoding}
    if begin(out, stage="ingest", config=config, inputs={}):
        return Corpus.open(out)
    cuts = range(0, len(images), shard_size)
    for i, start in enumerate(cuts):
        part = images[start : start + shard_size]
        digests = np.frombuffer(b"".join(digest(row.tobytes()) for row in part), np.uint8)
        rows = Rows(
            images=encoded(part, encoding=encoding, quality=95),
            labels=labels[start : start + shard_size],
            sources=[f"array#{start + row}" for row in range(len(part))],
            digests=digests.reshape(-1, 16),
        )
        write_shard(out, i, rows, {})
    write_manifest(
        out,
        shard_rows=[len(images[start : start + shard_size]) for start in cuts],
        image_size=images.shape[1],
        encoding=encoding,
        class_names=class_names,
        num_labelled=int((labels >= 0).sum()),
        content=content,
        counts={"listed": len(images), "kept": len(images), "quarantined": 0},
    )
    finish(out, stage="ingest", config=config, inputs={}, seconds=0.0)
    return Corpus.open(out)
