"""Some images of a shard, without the rest of it: a memory map here, ranges of an object there."""

from __future__ import annotations

import struct
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from selfsup_ray.artifacts import Array
from selfsup_ray.data.shard_files import SCHEMA, damage_named, open_shard, shard_path
from selfsup_ray.object_store import filesystem, place, retried
from selfsup_ray.storage import StoredPath

HEAD_BYTES = 64 * 1024
"""First read of an object: both headers, and the offsets of some thousand images."""
_MAGIC = b"ARROW1\0\0"
_CONTINUES = b"\xff\xff\xff\xff"
_RECORD_BATCH = 3


@dataclass(frozen=True)
class Layout:
    """Where in a shard file its images are: rows, and the positions of two buffers in bytes."""

    rows: int
    offsets_at: int
    values_at: int
    head: bytes
    """The first bytes of the file."""


@dataclass(frozen=True)
class StoredImages:
    """The images of a corpus as they are stored, by ranges of ids; picklable, and without torch.

    version: of the corpus; what is known about the layout of a remote shard is kept for it.
    """

    folder: Path
    offsets: Array
    """(shards + 1,): the id each shard starts with."""
    version: str

    def read(self, first: int, count: int) -> pa.LargeBinaryArray:
        """Return images [first, first + count), all of one shard.

        Local ones are a memory map; of a remote shard just these are read, and nothing is kept on
        this node. Raises ArtifactError for a damaged shard, StorageError when the store is away.
        """
        shard = int(np.searchsorted(self.offsets, first, side="right")) - 1
        local, path = first - int(self.offsets[shard]), shard_path(self.folder, shard)
        assert first + count <= self.offsets[shard + 1], f"{first} + {count} is beyond its shard"
        with damage_named(path):
            if isinstance(path, StoredPath):
                return remote_images(path.url, local, count, version=self.version)
            return _opened(path, self.version).column("image").slice(local, count)


@lru_cache(maxsize=256)
def _opened(path: Path, version: str) -> pa.RecordBatch:
    return open_shard(path)


def remote_images(url: str, first: int, count: int, *, version: str) -> pa.LargeBinaryArray:
    """Return images [first, first + count) of a shard on an object store, as they are stored.

    Raises pa.ArrowInvalid when the object is no shard, FileNotFoundError when it is missing,
    StorageError when the store does not answer.
    """
    layout = _layout(url, version)
    if first + count > layout.rows:
        raise pa.ArrowInvalid(f"it has {layout.rows} rows, not {first + count}")

    def read() -> pa.LargeBinaryArray:
        with filesystem(url).open_input_file(place(url)) as file:
            offsets = _offsets(file, layout, first, count)
            size = int(offsets[-1] - offsets[0])
            if size > file.size():
                raise pa.ArrowInvalid("its offsets are damaged")
            values = file.read_at(size, layout.values_at + int(offsets[0])) if size else b""
        if len(values) != size:
            raise OSError(f"{len(values):,} of {size:,} bytes came")
        buffers = [None, pa.py_buffer(offsets - offsets[0]), pa.py_buffer(values)]
        return pa.LargeBinaryArray.from_buffers(pa.large_binary(), count, buffers)

    return retried(read, url=url, doing="read")


def _offsets(file: Any, layout: Layout, first: int, count: int) -> Array:
    """Return where the images start in the values, and where the last ends: (count + 1,) int64."""
    start, size = layout.offsets_at + 8 * first, 8 * (count + 1)
    data = layout.head[start : start + size]
    if len(data) < size:
        data = file.read_at(size, start)
    offsets = np.frombuffer(data, "<i8")
    if len(offsets) != count + 1 or (np.diff(offsets) < 0).any() or offsets[0] < 0:
        raise pa.ArrowInvalid("its offsets are damaged")
    return offsets


@lru_cache(maxsize=4096)
def _layout(url: str, version: str) -> Layout:
    def read() -> Layout:
        with filesystem(url).open_input_file(place(url)) as file:
            size, wanted = int(file.size()), HEAD_BYTES
            while True:
                head = bytes(file.read_at(min(wanted, size), 0))
                try:
                    return parsed(head)
                except (struct.error, IndexError):
                    if wanted >= size:
                        raise pa.ArrowInvalid("its header is damaged") from None
                    wanted *= 4

    return retried(read, url=url, doing="read")


def parsed(head: bytes) -> Layout:
    """Return the layout of a shard from the first bytes of its file.

    Arrow's IPC file begins like a stream: the schema, then the one record batch, each as a length
    and a flatbuffer (Arrow columnar format, "Encapsulated message format"; Message.fbs). pyarrow
    reads the record batch with its body only, and that is what must not be read here. Raises
    struct.error when the bytes end too early, pa.ArrowInvalid when they are no shard of ours.
    """
    if head[:8] != _MAGIC:
        raise pa.ArrowInvalid("it is no Arrow file")
    _, body = _message(head, 8)
    try:
        schema = pa.ipc.read_schema(pa.py_buffer(head[8:body]))
    except (OSError, pa.ArrowException) as error:
        raise pa.ArrowInvalid(str(error)) from None
    if not schema.equals(SCHEMA):
        raise pa.ArrowInvalid(f"its columns are not {', '.join(SCHEMA.names)}")
    start, body = _message(head, body)
    batch = _record_batch(head, start)
    if _field(head, batch, 3) is not None:
        raise pa.ArrowInvalid("it is compressed")
    length, buffers = _field(head, batch, 0), _field(head, batch, 2)
    if buffers is None:
        raise pa.ArrowInvalid("its record batch has no columns")
    rows = struct.unpack_from("<q", head, length)[0] if length else 0
    vector = buffers + struct.unpack_from("<I", head, buffers)[0] + 4
    # Of the first column: whether values are missing (none is), the offsets, the values.
    offsets_at, offsets_bytes, values_at, _ = struct.unpack_from("<qqqq", head, vector + 16)
    if rows and offsets_bytes != 8 * (rows + 1):
        raise pa.ArrowInvalid("its offsets are damaged")
    return Layout(rows, body + offsets_at, body + values_at, head)


def _message(head: bytes, at: int) -> tuple[int, int]:
    """Return where the flatbuffer of the message at a position starts, and where it ends."""
    marker, length = struct.unpack_from("<4si", head, at)
    if marker != _CONTINUES or length < 0:
        raise pa.ArrowInvalid("its header is damaged")
    if at + 8 + length > len(head):
        raise struct.error("the header is longer than what was read")
    return at + 8, at + 8 + length


def _record_batch(head: bytes, start: int) -> int:
    """Return the position of the RecordBatch table in a Message."""
    message = start + struct.unpack_from("<I", head, start)[0]
    kind, header = _field(head, message, 1), _field(head, message, 2)
    if kind is None or header is None or head[kind] != _RECORD_BATCH:
        raise pa.ArrowInvalid("it has no record batch")
    position: int = header + struct.unpack_from("<I", head, header)[0]
    return position


def _field(head: bytes, table: int, number: int) -> int | None:
    """Return the position of a field of a flatbuffer's table; None when it is left out."""
    vtable = table - struct.unpack_from("<i", head, table)[0]
    [size] = struct.unpack_from("<H", head, vtable)
    if 4 + 2 * number >= size:
        return None
    [offset] = struct.unpack_from("<H", head, vtable + 4 + 2 * number)
    return table + offset if offset else None
