"""One unit of a listing becomes one shard: read, validate, decode, square, encode, write."""

from __future__ import annotations

import csv
import hashlib
import json
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from selfsup_ray.artifacts import Array, whole_file
from selfsup_ray.data.decode import Decoded, Fit, decode_square
from selfsup_ray.data.images import ImageError
from selfsup_ray.data.labels import LabelTable
from selfsup_ray.data.listing import Item, read_unit
from selfsup_ray.data.shard_files import (
    Encoding,
    Rows,
    digest,
    encoded,
    read_facts,
    shard_path,
    write_shard,
)
from selfsup_ray.data.sources import read_items
from selfsup_ray.storage import names_in

QUARANTINE_COLUMNS = ("source", "reason", "detail", "size_bytes")
NOTES_COLUMNS = ("source", "note")
# What every corpus has plenty of is counted only; these are listed by name too.
LISTED_NOTES = frozenset(("mislabelled", "animated", "rescaled", "damaged"))
BYTES_PER_PIXEL = 16  # no file needs more: four 32-bit channels, uncompressed


@dataclass
class ShardFacts:
    """What became of the items of one unit; kept in the shard's metadata."""

    kept: int = 0
    labelled: int = 0
    reasons: dict[str, int] = field(default_factory=dict)
    """Quarantined files by reason code."""
    notes: dict[str, int] = field(default_factory=dict)
    content: str = ""
    """Hash over digests and labels."""

    @property
    def quarantined(self) -> int:
        """Files that did not become an image."""
        return sum(self.reasons.values())


@dataclass(frozen=True)
class ShardWriter:
    """Writes shard i of a corpus from unit i of its listing; picklable, and safe to run twice."""

    out: Path
    labels: LabelTable
    image_size: int
    fit: Fit
    encoding: Encoding
    quality: int
    max_pixels: int
    image_column: str

    @property
    def listing_path(self) -> Path:
        """Folder of the listing."""
        return self.out / "listing"

    def is_written(self, unit: int) -> bool:
        """Return whether the shard is complete."""
        return shard_path(self.out, unit).exists()

    def unwritten(self, num_units: int) -> list[int]:
        """Return the units whose shards are still to be written, found by one listing."""
        there = names_in(self.out / "shards")
        return [i for i in range(num_units) if shard_path(self.out, i).name not in there]

    def facts(self, unit: int) -> ShardFacts:
        """Return the facts of a written shard."""
        return ShardFacts(**json.loads(read_facts(self.out, unit)["facts"]))

    def __call__(self, unit: int) -> dict[str, Any]:
        """Write the unit's shard and tables and return its facts as plain values."""
        return asdict(self.write(unit))

    def write(self, unit: int) -> ShardFacts:
        """Write the unit's shard, its quarantine and its notes, and return what was found."""
        found = _Found(self, read_unit(self.listing_path, unit))
        self._write_tables(unit, found)
        labels = np.array([self.labels.label_of(item) for item in found.kept], np.int64)
        digests = b"".join(found.digests)
        facts = ShardFacts(
            kept=len(found.kept),
            labelled=int((labels >= 0).sum()),
            reasons=dict(sorted(Counter(row[1] for row in found.bad).items())),
            notes=dict(sorted(Counter(note for _, note in found.notes).items())),
            content=hashlib.sha256(digests + labels.tobytes()).hexdigest(),
        )
        rows = Rows(
            images=found.images(),
            labels=labels,
            sources=[item.source for item in found.kept],
            digests=np.frombuffer(digests, np.uint8).reshape(-1, 16),
        )
        write_shard(self.out, unit, rows, {"facts": json.dumps(asdict(facts))})
        return facts

    def square(self, data: bytes, name: str) -> Decoded:
        """Return an image as it is stored, before encoding. Raises ImageError."""
        return decode_square(
            data, name=name, size=self.image_size, fit=self.fit, max_pixels=self.max_pixels
        )

    def _write_tables(self, unit: int, found: _Found) -> None:
        """Write the side tables before the shard: a shard that exists has them."""
        if found.bad:
            write_csv(self.out / "quarantine" / f"{unit:05d}.csv", QUARANTINE_COLUMNS, found.bad)
        listed = [row for row in found.notes if row[1] in LISTED_NOTES]
        if listed:
            write_csv(self.out / "notes" / f"{unit:05d}.csv", NOTES_COLUMNS, listed)


class _Found:
    """The images of one unit, in order, and what is to be said about the rest."""

    def __init__(self, writer: ShardWriter, items: list[Item]) -> None:
        self.writer = writer
        self.kept: list[Item] = []
        self.digests: list[bytes] = []
        self.bad: list[tuple[str, str, str, int]] = []
        self.notes: list[tuple[str, str]] = []
        # Raw images go into the buffer that is written; encoded ones never are there together.
        is_raw, side = writer.encoding == "raw", writer.image_size
        self._pixels = np.empty((len(items) if is_raw else 0, side, side, 3), np.uint8)
        self._encoded: list[bytes] = []
        max_bytes = writer.max_pixels * BYTES_PER_PIXEL
        for item, data in read_items(items, image_column=writer.image_column, max_bytes=max_bytes):
            self._add(item, data)

    def _add(self, item: Item, data: bytes | ImageError) -> None:
        try:
            if isinstance(data, ImageError):
                raise data
            image = self.writer.square(data, item.source)
        except ImageError as error:
            size_bytes = len(data) if isinstance(data, bytes) else item.size
            self.bad.append((item.source, error.reason, error.detail, size_bytes))
            return
        if self.writer.encoding == "raw":
            self._pixels[len(self.kept)] = image.pixels
        else:
            one = image.pixels[None]
            self._encoded += encoded(
                one, encoding=self.writer.encoding, quality=self.writer.quality
            )
        self.kept.append(item)
        self.digests.append(digest(data))
        self.notes += ((item.source, note) for note in image.notes)

    def images(self) -> Array | list[bytes]:
        """Return the kept images as `write_shard` takes them."""
        return self._pixels[: len(self.kept)] if self.writer.encoding == "raw" else self._encoded


def write_csv(path: Path, columns: Sequence[str], rows: Iterable[Sequence[object]]) -> None:
    """Write a table with a header line, whole or not at all."""
    with whole_file(path) as temporary, open(temporary, "w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(columns)
        writer.writerows(rows)


def merge_csv(parts: Sequence[Path], path: Path, columns: Sequence[str]) -> None:
    """Write the rows of several tables into one, in order; a part that does not exist has none."""

    def rows() -> Iterable[list[str]]:
        for part in parts:
            if part.exists():
                with open(part, newline="", encoding="utf-8") as file:
                    reader = csv.reader(file)
                    next(reader)
                    yield from reader

    write_csv(path, columns, rows())
