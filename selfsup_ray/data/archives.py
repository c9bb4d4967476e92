"""Tar and zip archives: what is in them, and the bytes of one member, without extracting."""

from __future__ import annotations

import bz2
import errno
import gzip
import json
import lzma
import tarfile
import zipfile
import zlib
from collections import Counter
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from itertools import groupby
from typing import IO, Any

from selfsup_ray.data.images import ImageError, Reason, too_many_bytes
from selfsup_ray.data.kinds import HEAD_BYTES, IMAGE_SUFFIXES, folder_of, is_candidate, suffix_of
from selfsup_ray.data.listing import Item, shown
from selfsup_ray.data.remote import opened
from selfsup_ray.errors import unless_storage

TAR_SUFFIXES = (".tar", ".tar.gz", ".tgz", ".tar.bz2", ".tbz2", ".tar.xz", ".txz")
ZIP_SUFFIXES = (".zip",)
_BROKEN = (tarfile.TarError, zipfile.BadZipFile, EOFError, OSError, zlib.error, lzma.LZMAError)
_OPENERS: dict[bytes, Any] = {b"\x1f\x8b": gzip.open, b"BZ": bz2.open, b"\xfd7": lzma.open}
_BLOCK = 512
_ENCRYPTED = 0x1
_MAX_SIDECAR_BYTES = 1_000_000


def broken(source: str, path: str, error: Exception) -> Item:
    """Return the item that accounts for an archive or table whose content cannot be listed."""
    unless_storage(error, but=errno.EIO)
    detail = f"{type(error).__name__}: {error}"
    match error:
        case FileNotFoundError():
            reason: Reason = "missing"
        case PermissionError():
            reason = "permission"
        case _:
            reason = "truncated" if "end of" in str(error) else "unreadable"
    return Item(source, path, "bad", reason=reason, detail=detail)


# Tar.


def tar_items(path: str, source: str, *, label_key: str, skipped: Counter[str]) -> Iterator[Item]:
    """Yield the images of a tar file in its order, plain or compressed.

    WebDataset's samples are understood: files with one name up to the first dot belong together,
    `.cls` holds the label, `.json` may hold it under `label_key` and a `class_name`. An archive
    that ends early or is damaged inside gives one more item, of method `bad`.
    """
    parts = _parts(path, source, skipped)
    for _, sample in groupby(parts, key=lambda part: _sample_key(part[0].source)):
        yield from _labelled(list(sample), label_key)


def _parts(path: str, source: str, skipped: Counter[str]) -> Iterator[tuple[Item, bytes | None]]:
    """Yield (image, None) and (sidecar, its bytes), and last what is wrong with the archive."""
    try:
        with opened(path) as file, tarfile.open(fileobj=file, mode="r:*") as tar:
            yield from _members(tar, path, source, skipped)
            lost = _lost_tail(tar)
        if lost:
            yield Item(source, path, "bad", reason="corrupt", detail=lost), None
    except _BROKEN as error:
        yield broken(source, path, error), None


def _members(
    tar: tarfile.TarFile, path: str, source: str, skipped: Counter[str]
) -> Iterator[tuple[Item, bytes | None]]:
    # Sidecars are read while passing over them: going back would unpack a .tar.gz from its start.
    while (member := tar.next()) is not None:
        tar.members.clear()  # type: ignore[attr-defined]  # or a large archive's headers would fill the memory
        name = shown(member.name).removeprefix("./")  # as `tar cf x.tar .` writes them
        item = Item(
            f"{source}/{name}",
            path,
            "tar",
            offset=member.offset_data,
            size=member.size,
            folder=folder_of(name),
        )
        if member.isfile() and suffix_of(name) in (".cls", ".json"):
            yield item, _head(tar, member, _MAX_SIDECAR_BYTES)
        elif member.isfile():
            if is_candidate(name, partial(_head, tar, member, HEAD_BYTES), skipped):
                yield item, None
        elif suffix_of(name) in IMAGE_SUFFIXES:
            detail = "a link or special file inside a tar archive"
            yield replace(item, method="bad", reason="unsupported", detail=detail), None


def _head(tar: tarfile.TarFile, member: tarfile.TarInfo, size: int) -> bytes:
    file = tar.extractfile(member)
    return file.read(size) if file else b""


def _sample_key(source: str) -> str:
    folder, _, name = source.rpartition("/")
    return f"{folder}/{name.partition('.')[0]}"


def _labelled(sample: list[tuple[Item, bytes | None]], label_key: str) -> Iterator[Item]:
    """Yield the images of one sample with the label its sidecars give."""
    label = class_name = None
    for item, data in sample:
        if data is None:
            continue
        if suffix_of(item.source) == ".cls":
            label = data.decode("utf-8", "replace").strip() or None
            continue
        values = _json_object(data)
        found = values.get(label_key)
        label = label if found is None else str(found)
        class_name = str(values["class_name"]) if "class_name" in values else None
    for item, data in sample:
        if data is None:
            yield replace(item, label=label, class_name=class_name)


def _json_object(data: bytes) -> dict[str, Any]:
    try:
        values = json.loads(data)
    except ValueError:
        return {}  # a sidecar of another purpose: the image is there all the same
    return values if isinstance(values, dict) else {}


def _lost_tail(tar: tarfile.TarFile) -> str | None:
    """Return what is wrong when the archive does not end where tarfile stopped reading.

    tarfile takes a damaged header for the end of the archive and says nothing.
    """
    assert tar.fileobj is not None
    tar.fileobj.seek(tar.offset)
    block = tar.fileobj.read(_BLOCK)
    if block in (b"", bytes(_BLOCK)):
        return None
    return f"damaged header at byte {tar.offset}: what follows in this archive is lost"


# Zip.


def zip_items(path: str, source: str, *, skipped: Counter[str]) -> Iterator[Item]:
    """Yield the images of a zip file by name; its directory is read, no member is unpacked."""
    try:
        with opened(path) as file, zipfile.ZipFile(file) as archive:
            for info in sorted(archive.infolist(), key=lambda info: info.filename):
                if info.is_dir():
                    continue
                if is_candidate(info.filename, partial(_zip_head, archive, info), skipped):
                    yield _zip_item(info, path, source)
    except _BROKEN as error:
        yield broken(source, path, error)


def _zip_item(info: zipfile.ZipInfo, path: str, source: str) -> Item:
    name = shown(info.filename)
    item = Item(
        f"{source}/{name}",
        path,
        "zip-deflate" if info.compress_type == zipfile.ZIP_DEFLATED else "zip-stored",
        offset=info.header_offset,
        size=info.file_size,
        packed=info.compress_size,
        crc=info.CRC,
        folder=folder_of(name),
    )
    if info.flag_bits & _ENCRYPTED:
        return replace(item, method="bad", reason="unsupported", detail="encrypted zip member")
    if info.compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):
        detail = f"zip compression method {info.compress_type}"
        return replace(item, method="bad", reason="unsupported", detail=detail)
    return item


def _zip_head(archive: zipfile.ZipFile, info: zipfile.ZipInfo) -> bytes:
    try:
        with archive.open(info) as file:
            return file.read(HEAD_BYTES)
    except (*_BROKEN, RuntimeError, NotImplementedError):  # encrypted, unknown compression
        return b""


# Reading.


def read_members(
    items: Iterable[Item], path: str, *, max_bytes: int
) -> Iterator[tuple[Item, bytes | ImageError]]:
    """Yield the bytes of some members of one archive, in one pass, or why there are none."""
    waiting = iter(items)
    try:
        with _unpacked(path) as file:
            for item in waiting:
                yield item, _read_member(file, item, max_bytes)
    except OSError as error:
        unless_storage(error, but=errno.EIO)
        reason: Reason = "missing" if isinstance(error, FileNotFoundError) else "unreadable"
        for item in waiting:
            yield item, ImageError(reason, f"its archive {path}: {error.strerror or error}")


@contextmanager
def _unpacked(path: str) -> Iterator[IO[bytes]]:
    """Yield an archive opened for reading, unpacked when the whole of it is compressed."""
    with opened(path) as file:
        opener = _OPENERS.get(file.read(2))
        file.seek(0)
        if opener is None:
            yield file
            return
        with opener(file, "rb") as unpacked:
            yield unpacked


def _read_member(file: IO[bytes], item: Item, max_bytes: int) -> bytes | ImageError:
    if item.size > max_bytes:
        return too_many_bytes(item.size, max_bytes)
    try:
        file.seek(item.offset)
        data = file.read(item.size) if item.method == "tar" else _unzipped(file, item)
    except _BROKEN as error:
        return ImageError("corrupt", f"{type(error).__name__}: {error}")
    if len(data) < item.size:
        return ImageError("truncated", f"its archive holds {len(data)} of {item.size} bytes")
    if item.crc >= 0 and zlib.crc32(data) != item.crc:
        return ImageError("corrupt", "its archive's CRC-32 does not match")
    return data


def _unzipped(file: IO[bytes], item: Item) -> bytes:
    header = file.read(30)
    if header[:4] != b"PK\x03\x04":
        raise zipfile.BadZipFile("no member begins where the directory says")
    file.seek(int.from_bytes(header[26:28], "little") + int.from_bytes(header[28:30], "little"), 1)
    packed = file.read(item.packed)
    if item.method == "zip-stored":
        return packed
    return zlib.decompressobj(-zlib.MAX_WBITS).decompress(packed, item.size)
