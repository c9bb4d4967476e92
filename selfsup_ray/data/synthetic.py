"""Small generated corpora: colored shapes that cluster easily, and a folder full of bad files."""

from __future__ import annotations

import hashlib
import zlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageDraw

from selfsup_ray.artifacts import Array, begin, finish
from selfsup_ray.data.corpus import Corpus
from selfsup_ray.data.images import ORIENTATION_TAG
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
    config = {"content": content, "shard_size": shard_size, "encoding": encoding, "fit": "crop"}
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


@dataclass(frozen=True)
class Planted:
    """One odd file of a bad corpus: its path below the folder, its kind, and what must happen.

    reason: the quarantine's reason code, or "" for a file that must be kept.
    """

    path: str
    kind: str
    reason: str


def write_bad_corpus(
    folder: Path, n: int = 2000, share: float = 0.05, *, seed: int = 0, size: int = 24
) -> list[Planted]:
    """Write n files in two folders: a share of bad ones, as many odd but right ones, good JPEGs.

    The kinds take turns, so a share of 0.05 of 2,000 has several files of each kind in BAD_KINDS.
    Returns what was planted; every other file is good.
    """
    generator = np.random.default_rng(seed)
    num_bad = round(n * share)
    odd = [*_turns(BAD_KINDS, num_bad), *_turns(ODD_KINDS, min(num_bad, n - num_bad))]
    places = generator.permutation(n)[: len(odd)]
    planted = {int(place): kind for place, kind in zip(places, odd, strict=True)}
    images, _ = shape_images(n, size=size, seed=seed)
    result = []
    for i, pixels in enumerate(images):
        kind = planted.get(i)
        path = Path("ab"[i % 2], f"{i:05d}{'.jpg' if kind is None else kind.suffix}")
        (folder / path).parent.mkdir(parents=True, exist_ok=True)
        image = Image.fromarray(pixels)
        data = saved(image, "JPEG", quality=90) if kind is None else kind.make(image)
        (folder / path).write_bytes(data)
        if kind is not None:
            result.append(Planted(str(path), kind.name, kind.reason))
    return result


def _turns(kinds: Sequence[Kind], n: int) -> list[Kind]:
    return [kinds[i % len(kinds)] for i in range(n)]


@dataclass(frozen=True)
class Kind:
    """One way in which a file can be bad (it has a reason) or odd (it has none)."""

    name: str
    suffix: str
    reason: str
    make: Callable[[Image.Image], bytes]


def saved(image: Image.Image, kind: str, **options: Any) -> bytes:
    """Return an image as the bytes of a file of this format."""
    file = BytesIO()
    image.save(file, kind, **options)
    return file.getvalue()


def _cut(data: bytes) -> bytes:
    return data[: len(data) * 2 // 3]


def _cut_scan(image: Image.Image) -> bytes:
    """Return a JPEG that ends in the middle of its pixels."""
    data = _jpeg(image)
    start = data.index(b"\xff\xda")
    return data[: start + (len(data) - start) // 2]


def _jpeg(image: Image.Image) -> bytes:
    return saved(image, "JPEG", quality=90)


def _claiming(data: bytes, side: int) -> bytes:
    """Return a JPEG whose header claims side x side pixels."""
    at = data.index(b"\xff\xc0") + 5
    return data[:at] + side.to_bytes(2, "big") * 2 + data[at + 4 :]


def _png_claiming(side: int) -> bytes:
    """Return a PNG of a few bytes whose header claims side x side pixels."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        checked = kind + data
        return len(data).to_bytes(4, "big") + checked + zlib.crc32(checked).to_bytes(4, "big")

    header = side.to_bytes(4, "big") * 2 + bytes((8, 2, 0, 0, 0))
    data = chunk(b"IDAT", zlib.compress(bytes(100)))
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + data + chunk(b"IEND", b"")


def _wrong_checksum(data: bytes) -> bytes:
    at = data.index(b"IDAT") + 20
    return data[:at] + bytes((data[at] ^ 0xFF,)) + data[at + 1 :]


def _restarts_lost(image: Image.Image) -> bytes:
    """Return a JPEG with restart markers, one of which has another number."""
    data = saved(image, "JPEG", quality=90, restart_marker_blocks=1)
    at = data.index(b"\xff\xd1")
    return data[: at + 1] + b"\xd5" + data[at + 2 :]


def _float(image: Image.Image, *, broken: bool) -> bytes:
    values = np.asarray(image.convert("L"), np.float32) / 255
    if broken:
        values = np.where(values > values.mean(), np.float32("nan"), values)
    return saved(Image.fromarray(values), "TIFF")


def _deep(image: Image.Image) -> Image.Image:
    return Image.fromarray(np.asarray(image.convert("L")).astype(np.uint16) * 257)


def _turned(image: Image.Image) -> bytes:
    exif = Image.Exif()
    exif[ORIENTATION_TAG] = 6
    return saved(image.transpose(Image.Transpose.ROTATE_90), "JPEG", quality=95, exif=exif)


def _animated(image: Image.Image) -> bytes:
    second = image.transpose(Image.Transpose.ROTATE_180)
    return saved(image, "GIF", save_all=True, append_images=[second])


def _see_through(image: Image.Image) -> Image.Image:
    alpha = Image.linear_gradient("L").resize(image.size)
    return Image.merge("RGBA", (*image.split(), alpha))


BAD_KINDS = (
    Kind("no bytes", ".jpg", "empty", lambda image: b""),
    Kind("half a JPEG", ".jpg", "truncated", _cut_scan),
    Kind("half a JPEG, closed", ".jpg", "truncated", lambda image: _cut_scan(image) + b"\xff\xd9"),
    Kind("half a PNG", ".png", "truncated", lambda image: _cut(saved(image, "PNG"))),
    Kind("half a BMP", ".bmp", "truncated", lambda image: _cut(saved(image, "BMP"))),
    Kind("half a GIF", ".gif", "truncated", lambda image: saved(image, "GIF")[:-30]),
    Kind("a JPEG's header", ".jpg", "truncated", lambda image: _jpeg(image)[:200]),
    Kind("damaged JPEG", ".jpg", "corrupt", _restarts_lost),
    Kind("damaged PNG", ".png", "corrupt", lambda image: _wrong_checksum(saved(image, "PNG"))),
    Kind("half a WebP", ".webp", "truncated", lambda image: _cut(saved(image, "WEBP"))),
    Kind("no numbers", ".tiff", "corrupt", lambda image: _float(image, broken=True)),
    Kind("text", ".jpg", "not_an_image", lambda image: b"404: not found\n"),
    Kind("web page", ".png", "not_an_image", lambda image: b"<!DOCTYPE html><html></html>"),
    Kind("noise", ".jpeg", "not_an_image", lambda image: bytes(range(1, 200))),
    Kind("PDF", ".jpg", "unsupported", lambda image: b"%PDF-1.7\n%\xe2\xe3\xcf\xd3\n"),
    Kind("SVG", ".svg", "unsupported", lambda image: b'<svg xmlns="x"><circle r="9"/></svg>'),
    Kind("HEIC", ".heic", "unsupported", lambda image: b"\0\0\0\x18ftypheic\0\0\0\0mif1heic"),
    Kind("JPEG bomb", ".jpg", "too_large", lambda image: _claiming(_jpeg(image), 60_000)),
    Kind("PNG bomb", ".png", "too_large", lambda image: _png_claiming(100_000)),
)
ODD_KINDS = (
    Kind("grey JPEG", ".jpg", "", lambda image: _jpeg(image.convert("L"))),
    Kind("CMYK JPEG", ".jpg", "", lambda image: _jpeg(image.convert("CMYK"))),
    Kind("turned JPEG", ".jpg", "", _turned),
    Kind("JPEG and more", ".jpg", "", lambda image: _jpeg(image) + b"what a camera appends"),
    Kind("PNG named JPEG", ".jpg", "", lambda image: saved(image, "PNG")),
    Kind("no suffix", "", "", lambda image: saved(image, "PNG")),
    Kind("upper-case suffix", ".JPG", "", _jpeg),
    Kind("palette", ".png", "", lambda image: saved(image.quantize(16), "PNG")),
    Kind("see-through", ".png", "", lambda image: saved(_see_through(image), "PNG")),
    Kind("black and white", ".png", "", lambda image: saved(image.convert("1"), "PNG")),
    Kind("16 bit", ".png", "", lambda image: saved(_deep(image), "PNG")),
    Kind("float", ".tif", "", lambda image: _float(image, broken=False)),
    Kind("animated", ".gif", "", _animated),
    Kind("WebP", ".webp", "", lambda image: saved(image, "WEBP", lossless=True)),
)
