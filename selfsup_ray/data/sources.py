"""What ingest can read: one string becomes a sorted stream of items, an item becomes bytes."""

from __future__ import annotations

import errno
import fnmatch
import glob
import itertools
import os
import re
import stat
import time
from collections import Counter, deque
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import replace
from functools import partial
from itertools import groupby
from pathlib import Path
from typing import cast

import pyarrow as pa

from selfsup_ray.data.archives import (
    TAR_SUFFIXES,
    ZIP_SUFFIXES,
    broken,
    read_members,
    tar_items,
    zip_items,
)
from selfsup_ray.data.bundled import PREFIX, bundled_path
from selfsup_ray.data.images import ImageError, Reason, too_many_bytes
from selfsup_ray.data.kinds import HEAD_BYTES, is_candidate, is_hidden, suffix_of
from selfsup_ray.data.listing import Item, shown
from selfsup_ray.data.remote import head_of, is_file, read_object
from selfsup_ray.data.tables import Columns, csv_manifest, holds_images, parquet_items, read_rows
from selfsup_ray.errors import ArtifactError, unless_storage
from selfsup_ray.object_store import is_folder, is_url, listed
from selfsup_ray.storage import located

READ_AGAIN_S = (0.1, 0.5, 2.0)
"""Pauses before a file is read again after an input/output error."""
OBJECTS_AT_A_TIME = 16
"""Images on an object store that a task asks for at a time, and holds."""
MANIFEST_SUFFIXES = (".csv", ".tsv")
_TAR_ENDS = frozenset(f".{suffix.rpartition('.')[2]}" for suffix in TAR_SUFFIXES)


class Source:
    """Everything that one or more source strings offer; `items` lists it, in a fixed order.

    `skipped` counts, while listing, files that are no images, by suffix.
    """

    def __init__(self, source: str | Sequence[str], columns: Columns) -> None:
        self.given = (source,) if isinstance(source, str) else tuple(source)
        self.columns = columns
        self.skipped: Counter[str] = Counter()

    def items(self) -> Iterator[Item]:
        """Yield every image the source lists: folders and zips by name, the rest in its own order.

        Raises ArtifactError when a source does not exist or holds no image.
        """
        for given in self.given:
            for text in expand_braces(given):
                num_listed = 0
                for num_listed, item in enumerate(self._items_of(text), start=1):  # noqa: B007
                    yield item
                if num_listed == 0:
                    raise ArtifactError(self._nothing_in(text))

    def _items_of(self, text: str) -> Iterator[Item]:
        if text.startswith(PREFIX):
            yield from parquet_items(bundled_path(text), text, self.columns)
            return
        if is_url(text):
            yield from self._remote(text)
            return
        text = os.path.expanduser(text)
        if os.path.isdir(text):
            yield from self._folder(os.path.abspath(text), text.rstrip("/"), "", (), wanted=None)
        elif os.path.exists(text):
            yield from self._given_file(os.path.abspath(text), text)
        elif glob.has_magic(text):
            pattern = Pattern(text)
            if os.path.isdir(pattern.root):
                root = os.path.abspath(pattern.root)
                yield from self._folder(root, pattern.fixed, "", (), wanted=pattern)
        else:
            raise ArtifactError(
                f"There is no source {text}. Give a folder, a glob, a CSV or Parquet file, a tar "
                f"or zip archive, each here or as s3://bucket/…, or {PREFIX}fashion-mnist."
            )

    def _remote(self, text: str) -> Iterator[Item]:
        """Yield what a URL names: a folder, a file or a glob, as a local path would."""
        url = text.rstrip("/")
        if is_folder(url):
            yield from self._folder(url, url, "", (), wanted=None)
        elif is_file(url):
            yield from self._given_file(url, url)
        elif glob.has_magic(url) and is_folder((pattern := Pattern(url)).root):
            yield from self._folder(pattern.root, pattern.fixed, "", (), wanted=pattern)
        else:
            raise ArtifactError(
                f"There is no source {text}: no object has this name, and none lies below it. "
                f"Check bucket and folder, and the store's address (AWS_ENDPOINT_URL, AWS_REGION)."
            )

    def _nothing_in(self, text: str) -> str:
        others = ", ".join(f"{count} x {kind}" for kind, count in self.skipped.most_common(5))
        beside = f" (skipped: {others})" if others else ""
        return (
            f"No images found in {text}{beside}. Give a folder of images, a glob, a CSV or Parquet "
            f"file, or a tar or zip archive."
        )

    def _given_file(self, path: str, text: str) -> Iterator[Item]:
        """Yield what one named file holds: a manifest, a table, an archive, or one image."""
        if suffix_of(path) in MANIFEST_SUFFIXES:
            yield from csv_manifest(located(path), self.columns)
        elif suffix_of(path) == ".parquet":
            yield from parquet_items(located(path), text, self.columns)
        else:
            yield from self._file(path, text, "")

    def _folder(
        self, path: str, name: str, folder: str, above: tuple[str, ...], *, wanted: Pattern | None
    ) -> Iterator[Item]:
        """Yield the wanted images below a folder, sorted by name at every level.

        path: absolute, or a URL; name: as the user would write it; folder: below the source.
        """
        real = path if is_url(path) else os.path.realpath(path)
        if real in above:  # a symbolic link to a folder that it lies in
            self.skipped["looped links"] += 1
            return
        try:
            entries = _entries(path)
        except OSError as error:
            unless_storage(error)  # else a whole folder would count as one bad file
            yield broken(shown(name), path, error)
            return
        for entry, is_dir in entries:
            full, inner = f"{name}/{entry}" if name else entry, f"{path}/{entry}"
            if is_hidden(entry):
                self.skipped["hidden"] += 1
            elif is_dir and (wanted is None or wanted.may_lead_to(full)):
                below = f"{folder}/{shown(entry)}".lstrip("/")
                inside = None if wanted is None or wanted.matches(full) else wanted
                yield from self._folder(inner, full, below, (*above, real), wanted=inside)
            elif not is_dir and (wanted is None or wanted.matches(full)):
                yield from self._file(inner, full, folder)

    def _file(self, path: str, name: str, folder: str) -> Iterator[Item]:
        """Yield what a file inside a folder holds."""
        source, suffix = shown(name), suffix_of(path)
        if suffix in _TAR_ENDS and path.lower().endswith(TAR_SUFFIXES):
            items = tar_items(path, source, label_key=self.columns.label, skipped=self.skipped)
            yield from _below(items, folder)
        elif suffix in ZIP_SUFFIXES:
            yield from _below(zip_items(path, source, skipped=self.skipped), folder)
        elif suffix == ".parquet":
            yield from self._table(path, source)
        elif is_candidate(os.path.basename(path), partial(_head, path), self.skipped):
            yield Item(source, path, folder=folder)

    def _table(self, path: str, source: str) -> Iterator[Item]:
        try:
            images = holds_images(located(path), self.columns)
        except (OSError, pa.ArrowInvalid) as error:
            yield broken(source, path, error)
            return
        if images:
            yield from parquet_items(located(path), source, self.columns)
        else:
            self.skipped[".parquet without images"] += 1


class Pattern:
    """A glob: `*`, `?` and `[…]` stay inside one path component, `**` spans any number of them."""

    def __init__(self, text: str) -> None:
        self.parts = text.split("/")
        fixed = itertools.takewhile(lambda part: not glob.has_magic(part), self.parts)
        self.fixed = "/".join(fixed)
        self.root = self.fixed or ("/" if text.startswith("/") else ".")

    def matches(self, name: str) -> bool:
        """Return whether a whole path matches."""
        return _matches(self.parts, name.split("/"))

    def may_lead_to(self, folder: str) -> bool:
        """Return whether a path that matches, or lies below a match, can lie in this folder."""
        for part, component in zip(self.parts, folder.split("/"), strict=False):
            if part == "**":
                return True
            if not fnmatch.fnmatchcase(component, part):
                return False
        return True


def _matches(parts: list[str], components: list[str]) -> bool:
    if not parts:
        return not components
    if parts[0] == "**":
        return any(_matches(parts[1:], components[i:]) for i in range(len(components) + 1))
    here = bool(components) and fnmatch.fnmatchcase(components[0], parts[0])
    return here and _matches(parts[1:], components[1:])


def expand_braces(text: str) -> list[str]:
    """Return the sources a text stands for: `{000..146}` and `{a,b}` are expanded, as in shells.

    A path that exists as it is written is left alone.
    """
    found = re.search(r"\{([^{}]*)\}", text)
    if found is None or Path(text).exists():
        return [text]
    ends = re.fullmatch(r"(\d+)\.\.(\d+)", found[1])
    if ends is not None:
        numbers = range(int(ends[1]), int(ends[2]) + 1)
        middles = [f"{number:0{len(ends[1])}d}" for number in numbers]
    elif "," in found[1]:
        middles = found[1].split(",")
    else:
        return [text]
    before, after = text[: found.start()], text[found.end() :]
    return [whole for middle in middles for whole in expand_braces(before + middle + after)]


def _below(items: Iterable[Item], folder: str) -> Iterator[Item]:
    """Yield an archive's items with its own folder before theirs."""
    if not folder:
        yield from items
        return
    for item in items:
        yield replace(item, folder=f"{folder}/{item.folder}".strip("/"))


def _entries(path: str) -> list[tuple[str, bool]]:
    """Return (name, whether it is a folder) of all in a folder, by name. Raises OSError."""
    if is_url(path):
        return [(entry.name, entry.is_folder) for entry in listed(path)]
    with os.scandir(path) as found:
        return sorted((entry.name, entry.is_dir()) for entry in found)


def _head(path: str) -> bytes:
    try:
        if is_url(path):
            return head_of(path)
        if not os.path.isfile(path):  # a pipe would never end
            return b""
        with open(path, "rb") as file:
            return file.read(HEAD_BYTES)
    except OSError:
        return b"\xff\xd8"  # listed, so that reading it says why it cannot be read


def read_items(
    items: Iterable[Item], *, image_column: str, max_bytes: int
) -> Iterator[tuple[Item, bytes | ImageError]]:
    """Yield every item, in order, with the bytes of its image or the reason why there are none.

    Archives and tables are opened once per run of their items. A file of more than max_bytes is
    not read.
    """
    for (container, method), run in groupby(items, key=_place):
        if container is None:
            yield from ((item, _read_file(item, max_bytes)) for item in run)
        elif method == "remote":
            yield from _read_objects(run, max_bytes)
        elif method == "row":
            yield from read_rows(run, container, image_column)
        else:
            yield from read_members(run, container, max_bytes=max_bytes)


def _place(item: Item) -> tuple[str | None, str]:
    """Return what items must share to be read in one pass; None: each alone."""
    if item.method == "file" and is_url(item.container):
        return "", "remote"
    alone = item.method in ("file", "bad")
    return (None, "") if alone else (item.container, item.method)


def _read_objects(
    items: Iterator[Item], max_bytes: int
) -> Iterator[tuple[Item, bytes | ImageError]]:
    """Yield images that are objects of their own, several asked for at a time: each is far away."""
    with ThreadPoolExecutor(OBJECTS_AT_A_TIME, thread_name_prefix="objects") as pool:

        def start(item: Item) -> tuple[Item, Future[bytes | ImageError]]:
            return item, pool.submit(_read_object, item, max_bytes)

        ahead = deque(map(start, itertools.islice(items, OBJECTS_AT_A_TIME)))
        while ahead:
            item, reading = ahead.popleft()
            yield item, reading.result()
            ahead.extend(map(start, itertools.islice(items, 1)))


def _read_object(item: Item, max_bytes: int) -> bytes | ImageError:
    try:
        return read_object(item.container, max_bytes=max_bytes)
    except FileNotFoundError:
        return ImageError("missing", "there is no such object")


def _read_file(item: Item, max_bytes: int) -> bytes | ImageError:
    if item.method == "bad":
        return ImageError(cast(Reason, item.reason), item.detail)
    try:
        found = os.stat(item.container)
        if not stat.S_ISREG(found.st_mode):
            return ImageError("not_an_image", "a folder, pipe or device")
        if found.st_size > max_bytes:
            return too_many_bytes(found.st_size, max_bytes)
        return _read_patiently(item.container)
    except FileNotFoundError:
        return ImageError("missing", "there is no such file")
    except PermissionError:
        return ImageError("permission", "not allowed to read it")
    except OSError as error:
        unless_storage(error, but=errno.EIO)  # one that is away says nothing of its images
        return ImageError("unreadable", str(error))


def _read_patiently(path: str) -> bytes:
    """Return a file's bytes; an input/output error may pass, or be a bad block of this file."""
    for pause_s in READ_AGAIN_S:
        try:
            return Path(path).read_bytes()
        except OSError as error:
            if error.errno != errno.EIO:
                raise
            time.sleep(pause_s)
    return Path(path).read_bytes()
