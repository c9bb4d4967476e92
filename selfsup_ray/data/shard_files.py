"""The shard file of a corpus: an Arrow table of square images, written whole and never changed.

Without torch, so that Ray's ingest workers start quickly.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from io import BytesIO
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pyarrow as pa
import simplejpeg
from PIL import Image

from selfsup_ray.artifacts import Array, whole_file, write_json
from selfsup_ray.errors import ArtifactError, unless_storage
from selfsup_ray.object_store import filesystem, place, retried
from selfsup_ray.storage import StoredPath

Encoding = Literal["raw", "jpeg", "png"]

# Large offsets: 2,048 raw images of 1,024 px pass the 2 GiB that 32-bit offsets can address.
SCHEMA = pa.schema(
    [
        ("image", pa.large_binary()),
        ("label", pa.int64()),
        ("source", pa.string()),
        ("digest", pa.binary(16)),
    ]
)


def digest(data: bytes) -> bytes:
    """Return the 16-byte BLAKE2b digest of a file's own bytes: equal digests are duplicates."""
    return hashlib.blake2b(data, digest_size=16).digest()


def shard_path(corpus: Path, i: int) -> Path:
    """Return the file of shard i."""
    return corpus / "shards" / f"{i:05d}.arrow"


@dataclass(frozen=True)
class Rows:
    """The rows of one shard before they are written.

    images: (n, S, S, 3) uint8 for encoding `raw`, else n encoded files; labels: -1 is unknown;
    digests: (n, 16) uint8.
    """

    images: Array | Sequence[bytes]
    labels: Array
    sources: Sequence[str]
    digests: Array


def write_shard(corpus: Path, i: int, rows: Rows, facts: Mapping[str, str]) -> None:
    """Write shard i whole or not at all; facts travel in the file's schema metadata."""
    columns = [
        _binary_column(rows.images),
        pa.array(rows.labels, pa.int64()),
        pa.array(list(rows.sources), pa.string()),
        pa.FixedSizeBinaryArray.from_buffers(
            pa.binary(16),
            len(rows.labels),
            [None, pa.py_buffer(np.ascontiguousarray(rows.digests))],
        ),
    ]
    schema = SCHEMA.with_metadata(dict(facts))
    with whole_file(shard_path(corpus, i)) as temporary, pa.OSFile(str(temporary), "wb") as file:
        with pa.ipc.new_file(file, schema) as writer:
            writer.write_batch(pa.record_batch(columns, schema=schema))


def encoded(images: Array, *, encoding: Encoding, quality: int) -> Array | list[bytes]:
    """Return (n, S, S, 3) images as `write_shard` takes them; quality is JPEG's, 1 to 100."""
    match encoding:
        case "raw":
            return images
        case "jpeg":
            # No chroma subsampling: the images are small, and colors matter.
            return [
                simplejpeg.encode_jpeg(image, quality, colorsubsampling="444", fastdct=False)
                for image in np.ascontiguousarray(images)
            ]
        case "png":
            return [_png(image) for image in images]


def _png(image: Array) -> bytes:
    file = BytesIO()
    Image.fromarray(image).save(file, "PNG")
    return file.getvalue()


def _binary_column(images: Array | Sequence[bytes]) -> pa.Array:
    if not isinstance(images, np.ndarray):
        return pa.array(list(images), pa.large_binary())
    row_bytes = int(np.prod(images.shape[1:], dtype=np.int64))
    offsets = np.arange(len(images) + 1, dtype=np.int64) * row_bytes
    # From the buffer itself: one copy of a shard in memory, not two.
    buffers = [None, pa.py_buffer(offsets), pa.py_buffer(np.ascontiguousarray(images))]
    return pa.LargeBinaryArray.from_buffers(pa.large_binary(), len(images), buffers)


def open_shard(path: Path) -> pa.RecordBatch:
    """Return a shard, or this node's copy of it, as a memory map.

    Raises OSError or pa.ArrowInvalid.
    """
    with pa.memory_map(os.fspath(path)) as file:  # the map outlives the closed file
        shard = pa.ipc.open_file(file)
        # Before any value is read: other column types may run code when they are.
        if not shard.schema.equals(SCHEMA):
            raise pa.ArrowInvalid(f"its columns are not {', '.join(SCHEMA.names)}")
        return shard.get_batch(0)


@contextmanager
def damage_named(path: Path) -> Iterator[None]:
    """Raise ArtifactError when the block finds that a shard cannot be read."""
    try:
        yield
    except (OSError, pa.ArrowInvalid) as error:
        unless_storage(error)
        reason = " ".join(str(error).split())
        raise ArtifactError(
            f"{path} cannot be read ({reason}). Delete the folder {path.parent.parent} and run "
            f"ingest again: it makes the same images with the same ids."
        ) from None


def read_facts(corpus: Path, i: int) -> dict[str, str]:
    """Return the facts `write_shard` stored with shard i."""
    path = shard_path(corpus, i)
    if isinstance(path, StoredPath):  # its end alone, not the images
        metadata = retried(lambda: _metadata_at(path.url), url=path.url, doing="read")
    else:
        with pa.memory_map(str(path)) as file:
            metadata = pa.ipc.open_file(file).schema.metadata or {}
    return {key.decode(): value.decode() for key, value in metadata.items()}


def _metadata_at(url: str) -> dict[bytes, bytes]:
    with filesystem(url).open_input_file(place(url)) as file:
        return dict(pa.ipc.open_file(file).schema.metadata or {})


def write_manifest(
    corpus: Path,
    *,
    shard_rows: Sequence[int],
    image_size: int,
    encoding: Encoding,
    class_names: Sequence[str] | None,
    num_labelled: int,
    content: str,
    counts: Mapping[str, Any],
) -> None:
    """Write corpus.json: what the shards hold. content: hash over all digests and labels."""
    manifest = {
        "shard_rows": list(shard_rows),
        "image_size": image_size,
        "encoding": encoding,
        "class_names": None if class_names is None else list(class_names),
        "num_labelled": num_labelled,
        "content": content,
        "counts": dict(counts),
    }
    write_json(corpus / "corpus.json", manifest)
