"""CSV and Parquet: manifests that name image files, and Parquet that holds the images itself."""

from __future__ import annotations

import csv
import errno
import itertools
import math
from collections import deque
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from selfsup_ray.data.images import ImageError
from selfsup_ray.data.kinds import folder_of
from selfsup_ray.data.listing import Item
from selfsup_ray.data.remote import parquet_file
from selfsup_ray.errors import ArtifactError, unless_storage
from selfsup_ray.object_store import is_url

_BATCH_ROWS = 128  # of encoded images in memory at a time
_CLASS_NAME = "class_name"


@dataclass(frozen=True)
class Columns:
    """The names of a table's columns."""

    image: str = "image"
    path: str = "path"
    label: str = "label"


def csv_rows(path: Path, *, needs: tuple[str, ...]) -> Iterator[dict[str, str]]:
    """Yield the rows of a CSV or TSV file with a header line.

    Raises ArtifactError when it cannot be read or lacks one of the columns in `needs`.
    """
    try:
        with open(path, newline="", encoding="utf-8-sig") as file:
            first = file.readline()
            file.seek(0)
            delimiter = max("\t;,", key=first.count)
            reader = csv.DictReader(file, delimiter=delimiter, restval="")
            _require_columns(path, list(reader.fieldnames or []), needs)
            yield from reader
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise ArtifactError(f"{path} cannot be read as CSV ({error}).") from None


def _require_columns(path: Path, found: list[str], needs: tuple[str, ...]) -> None:
    for column in needs:
        if column not in found:
            raise ArtifactError(
                f"{path} has no column `{column}`; it has {', '.join(found) or 'none'}. "
                f"Name the right one with path_column, label_column or image_column."
            )


def label_text(value: Any) -> str | None:
    """Return a label as text, or None where a table says that it is unknown: empty, NaN, -1."""
    if value is None or (isinstance(value, float) and math.isnan(value)):
        return None
    if isinstance(value, float) and value.is_integer():
        value = int(value)
    text = str(value).strip()
    return None if text in ("", "-1") else text


def csv_manifest(path: Path, columns: Columns) -> Iterator[Item]:
    """Yield the files a CSV names, in its order; relative paths start at the CSV's folder.

    Raises ArtifactError when there is no path column.
    """
    for row in csv_rows(path, needs=(columns.path,)):
        yield _named_file(path, row[columns.path], row.get(columns.label), row.get(_CLASS_NAME))


def _named_file(manifest: Path, name: str, label: Any, class_name: Any) -> Item:
    return Item(
        name,
        name if is_url(name) else str(manifest.parent.absolute() / name),
        folder=folder_of(name),
        label=label_text(label),
        class_name=label_text(class_name),
    )


def holds_images(path: Path, columns: Columns) -> bool:
    """Return whether a Parquet file has a column of image bytes."""
    with parquet_file(str(path)) as file:
        schema = file.schema_arrow
    for name in {columns.image, columns.path, columns.label, _CLASS_NAME} & set(schema.names):
        _require_plain(path, schema.field(name))
    return columns.image in schema.names and _is_image_type(schema.field(columns.image).type)


def _require_plain(path: Path | str, field: pa.Field, column: str = "") -> None:
    """Raise ArtifactError for a column of an extension type, at any depth.

    Reading such a value calls code of whoever registered the type; Ray's unpickles it. Where nobody
    did, pyarrow keeps the type's name in the metadata.
    """
    column = column or field.name
    kind = (field.metadata or {}).get(b"ARROW:extension:name", b"").decode("utf-8", "replace")
    if isinstance(field.type, pa.BaseExtensionType):
        kind = field.type.extension_name
    if kind and not kind.startswith("arrow."):
        raise ArtifactError(
            f"{path}: column `{column}` is of the extension type {kind}, whose values may run code "
            f"when they are read. Store plain text, numbers or bytes instead."
        )
    for i in range(field.type.num_fields):
        _require_plain(path, field.type.field(i), column)


def _is_image_type(kind: pa.DataType) -> bool:
    if pa.types.is_struct(kind):  # the form of Hugging Face's datasets: {bytes, path}
        return any(kind.field(i).name == "bytes" for i in range(kind.num_fields))
    return bool(pa.types.is_binary(kind) or pa.types.is_large_binary(kind))


def parquet_items(path: Path, source: str, columns: Columns) -> Iterator[Item]:
    """Yield one item per row of a Parquet file, in its order: its image, or the file it names.

    Raises ArtifactError when it has neither an image column nor a path column.
    """
    has_images = holds_images(path, columns)
    with parquet_file(str(path)) as file:
        names = file.schema_arrow.names
        if not has_images:
            _require_columns(path, names, (columns.path,))
        wanted = [name for name in (columns.path, columns.label, _CLASS_NAME) if name in names]
        row = 0
        for batch in _batches(file, wanted):
            values = {name: batch.column(name).to_pylist() for name in wanted}
            nothing = [None] * batch.num_rows
            paths, labels, class_names = (
                values.get(name, nothing) for name in (columns.path, columns.label, _CLASS_NAME)
            )
            for name, label, class_name in zip(paths, labels, class_names, strict=True):
                if has_images:
                    yield _row_item(str(path), source, row, name, label, class_name)
                else:
                    yield _named_file(path, str(name or ""), label, class_name)
                row += 1


def _batches(file: pq.ParquetFile, wanted: list[str]) -> Iterator[pa.RecordBatch]:
    if wanted:
        yield from file.iter_batches(batch_size=65_536, columns=wanted)
        return
    for group in range(file.metadata.num_row_groups):  # no column but the images: count rows
        rows = file.metadata.row_group(group).num_rows
        yield pa.record_batch([pa.nulls(rows)], names=["none"])


def _row_item(path: str, source: str, row: int, name: Any, label: Any, class_name: Any) -> Item:
    known_as = str(name) if name else f"{source}#{row}"
    return Item(
        known_as,
        path,
        "row",
        offset=row,
        folder=folder_of(known_as) if name else "",
        label=label_text(label),
        class_name=label_text(class_name),
    )


def read_rows(
    items: Iterable[Item], path: str, column: str
) -> Iterator[tuple[Item, bytes | ImageError]]:
    """Yield the image bytes of some rows of one Parquet file; rows ascend.

    A row group is read from its start, in small batches; columns beside the image are not read.
    """
    wanted = deque(items)
    try:
        with parquet_file(path) as file:
            if column in file.schema_arrow.names:
                _require_plain(path, file.schema_arrow.field(column))
            for row, value in _images_from(file, wanted[0].offset, wanted[-1].offset, column):
                if wanted and row == wanted[0].offset:
                    yield wanted.popleft(), _image_bytes(value.as_py())
    except (OSError, pa.ArrowInvalid) as error:
        unless_storage(error, but=errno.EIO)
        detail = f"{path}: {error}"
        yield from ((item, ImageError("unreadable", detail)) for item in wanted)


def _images_from(
    file: pq.ParquetFile, first: int, last: int, column: str
) -> Iterator[tuple[int, pa.Scalar]]:
    """Yield (row, image) from `first` to `last`, reading only the row groups between them."""
    sizes = [file.metadata.row_group(g).num_rows for g in range(file.metadata.num_row_groups)]
    stops = list(itertools.accumulate(sizes))
    groups = [g for g, stop in enumerate(stops) if first < stop and stop - sizes[g] <= last]
    row = stops[groups[0]] - sizes[groups[0]]
    for batch in file.iter_batches(batch_size=_BATCH_ROWS, row_groups=groups, columns=[column]):
        wanted = range(max(first - row, 0), min(last + 1 - row, batch.num_rows))
        yield from ((row + i, batch.column(0)[i]) for i in wanted)
        row += batch.num_rows


def _image_bytes(value: Any) -> bytes | ImageError:
    data = value.get("bytes") if isinstance(value, dict) else value
    return data if isinstance(data, bytes) else ImageError("missing", "the row holds no image")
