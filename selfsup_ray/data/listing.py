"""The listing: every file a source offers, in a fixed order, in units that become one shard each.

It is written to disk before any image is read, one small Parquet file per unit. So the ids of a
restarted run are the same, whatever happened to the source meanwhile, and nothing of the size of
the corpus is ever in memory.
"""

from __future__ import annotations

import dataclasses
import itertools
import os
import shutil
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import pyarrow as pa
import pyarrow.parquet as pq

from selfsup_ray.artifacts import read_json, whole_file, write_json

Method = Literal["file", "tar", "zip-stored", "zip-deflate", "row", "bad"]


@dataclass(frozen=True, slots=True)
class Item:
    """One listed file: where its bytes are and what its source says about it.

    source is the name people know it by; container the file to open: the image itself, or the
    archive or table that holds it. folder is the image's folder below the source, "" at its top.
    """

    source: str
    container: str
    method: Method = "file"
    offset: int = 0
    """Bytes into the (unpacked) archive, or the row of a table."""
    size: int = -1
    """Bytes of the image when unpacked; -1: not known before it is read."""
    packed: int = -1
    """Bytes it takes in its archive."""
    crc: int = -1
    """CRC-32 of its bytes, from a zip's directory."""
    folder: str = ""
    label: str | None = None
    """From a column, a sidecar or a CSV, as text."""
    class_name: str | None = None
    """A better name of the class, from a column beside the label."""
    reason: str = ""
    """For method `bad`: why there is nothing to read, and the details."""
    detail: str = ""


SCHEMA = pa.schema(
    [
        ("source", pa.string()),
        ("container", pa.binary()),  # file names are bytes, and not always UTF-8
        ("method", pa.string()),
        ("offset", pa.int64()),
        ("size", pa.int64()),
        ("packed", pa.int64()),
        ("crc", pa.int64()),
        ("folder", pa.string()),
        ("label", pa.string()),
        ("class_name", pa.string()),
        ("reason", pa.string()),
        ("detail", pa.string()),
    ]
)
_NAMES = [field.name for field in dataclasses.fields(Item)]
assert _NAMES == SCHEMA.names, "every field of an Item is a column of the listing"


def shown(name: str) -> str:
    """Return a file name as text that can be stored: bytes that are not UTF-8 become \\xNN."""
    return name.encode("utf-8", "surrogateescape").decode("utf-8", "backslashreplace")


class Listing:
    """A finished listing in a folder: num_units units of at most shard_size items."""

    SUMMARY = "listing.json"

    def __init__(self, path: Path, summary: dict[str, Any]) -> None:
        self.path = path
        self.unit_sizes: tuple[int, ...] = tuple(summary["unit_sizes"])
        self.skipped: dict[str, int] = summary["skipped"]

    @classmethod
    def open(cls, path: Path) -> Listing:
        """Return the listing in a folder; `is_finished` says whether there is one."""
        return cls(path, read_json(path / cls.SUMMARY))

    @classmethod
    def is_finished(cls, path: Path) -> bool:
        """Return whether the folder holds a complete listing."""
        return (path / cls.SUMMARY).exists()

    @property
    def num_units(self) -> int:
        """Number of units, and so of shards."""
        return len(self.unit_sizes)

    def __len__(self) -> int:
        return sum(self.unit_sizes)

    def columns(self, names: list[str]) -> Iterator[pa.Table]:
        """Yield some columns of every unit, in order."""
        for unit in range(self.num_units):
            yield pq.read_table(_unit_path(self.path, unit), columns=names)

    def delete(self) -> None:
        """Remove the listing: a finished corpus does not need it."""
        shutil.rmtree(self.path)


def read_unit(path: Path, unit: int) -> list[Item]:
    """Return the items of one unit of the listing in a folder, in order."""
    table = pq.read_table(_unit_path(path, unit), schema=SCHEMA)
    columns = [table.column(name).to_pylist() for name in _NAMES]
    columns[1] = [os.fsdecode(container) for container in columns[1]]
    return [Item(*values) for values in zip(*columns, strict=True)]


def write_listing(
    path: Path, items: Iterable[Item], *, shard_size: int, skipped: dict[str, int]
) -> Listing:
    """Write items in units of shard_size and return the finished listing.

    skipped is filled while `items` is consumed (files that are no images, by suffix), and stored.
    """
    shutil.rmtree(path, ignore_errors=True)  # of a run that was interrupted while listing
    path.mkdir(parents=True)
    sizes: list[int] = []
    stream = iter(items)
    while unit := list(itertools.islice(stream, shard_size)):
        with whole_file(_unit_path(path, len(sizes))) as temporary:
            pq.write_table(_table(unit), temporary, compression="zstd")
        sizes.append(len(unit))
    summary = {"unit_sizes": sizes, "skipped": dict(sorted(skipped.items()))}
    write_json(path / Listing.SUMMARY, summary)
    return Listing(path, summary)


def _table(items: list[Item]) -> pa.Table:
    columns = {name: [getattr(item, name) for item in items] for name in _NAMES}
    columns["container"] = [os.fsencode(path) for path in columns["container"]]
    return pa.table(columns, schema=SCHEMA)


def _unit_path(path: Path, unit: int) -> Path:
    return path / f"{unit:05d}.parquet"
