"""StoredPath: a place on an object store that is used like a local path.

Every read asks the store which version it holds and opens a whole copy in this node's cache;
writes go through `artifacts.whole_file`, which uploads before it returns. Local paths never come
here: `located` hands them back as they are.
"""

from __future__ import annotations

import errno
import fnmatch
import os
import platform
import posixpath
import shutil
import stat
import time
from collections.abc import Generator, Iterator
from pathlib import Path, PosixPath
from typing import IO, Annotated, Any
from weakref import WeakSet

from pydantic import AfterValidator

from selfsup_ray import object_store
from selfsup_ray.object_store import SCHEMES, Entry, Version
from selfsup_ray.storage_cache import admit, cache_root, copy_of, touched

UPLOAD_EVERY_S = 10.0
"""Seconds between two uploads of a file that grows, unless it is published."""


class StoredPath(PosixPath):
    """A URL such as s3://bucket/runs/x with the methods of a Path; `/` and `.parent` keep the type.

    Its text is the URL, on every node; `os.fspath` is the local copy of what the store holds now.
    There are no folders but by the objects in them.
    """

    __slots__ = ()

    @property
    def url(self) -> str:
        """The URL without `..` in it."""
        scheme, *parts = self.parts
        return f"{scheme}//{posixpath.normpath('/'.join(parts))}"

    def __str__(self) -> str:
        text = super().__str__()
        scheme, colon, rest = text.partition(":/")
        return f"{scheme}://{rest.lstrip('/')}" if colon and scheme in SCHEMES else text

    def __reduce__(self) -> tuple[type[StoredPath], tuple[str]]:
        return (type(self), (str(self),))

    def __fspath__(self) -> str:
        version = object_store.version_of(self.url)
        return str(self.scratch if version is None else copy_of(self.url, version))

    @property
    def scratch(self) -> Path:
        """The local place of what is being made on this node for this URL; nothing reads it."""
        return cache_root() / "making" / self.url.replace("://", "/")

    def is_absolute(self) -> bool:
        """Return True: a URL means the same everywhere."""
        return True

    def absolute(self) -> StoredPath:
        """Return the same place without `..`."""
        return type(self)(self.url)

    def resolve(self, strict: bool = False) -> StoredPath:
        """Return the same place without `..`."""
        return self.absolute()

    def expanduser(self) -> StoredPath:
        """Return the same place."""
        return self

    def stat(self, *, follow_symlinks: bool = True) -> os.stat_result:
        """Return kind, size and time; the object itself is not fetched."""
        version = object_store.version_of(self.url)
        if version is not None:
            return _stat(stat.S_IFREG | 0o644, version)
        if object_store.is_folder(self.url):
            return _stat(stat.S_IFDIR | 0o755, Version("", 0, 0.0))
        raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), self.url)

    def exists(self, *, follow_symlinks: bool = True) -> bool:
        """Return whether the store holds this object, or any below it."""
        return self.is_file() or self.is_dir()

    def is_file(self, *, follow_symlinks: bool = True) -> bool:
        """Return whether the store holds this object."""
        return object_store.version_of(self.url) is not None

    def is_dir(self, *, follow_symlinks: bool = True) -> bool:
        """Return whether the store holds any object below this place."""
        return object_store.is_folder(self.url)

    def open(  # type: ignore[override]  # Path has eight overloads
        self,
        mode: str = "r",
        buffering: int = -1,
        encoding: str | None = None,
        errors: str | None = None,
        newline: str | None = None,
    ) -> IO[Any]:
        """Open the object for reading."""
        assert not set("wax+") & set(mode), f"{self}: objects are written through whole_file"
        return open(self, mode, buffering, encoding, errors, newline)

    def read_bytes(self) -> bytes:
        """Return the object's bytes."""
        with self.open("rb") as file:
            return bytes(file.read())

    def mkdir(self, mode: int = 0o777, parents: bool = False, exist_ok: bool = False) -> None:
        """Do nothing: a folder appears with its first object."""

    def unlink(self, missing_ok: bool = False) -> None:
        """Delete the object."""
        try:
            object_store.delete(self.url)
        except FileNotFoundError:
            if not missing_ok:
                raise

    def entries(self, *, recursive: bool = False) -> list[Entry]:
        """Return what lies below, with sizes, in the order of names."""
        return list(object_store.listed(self.url, recursive=recursive))

    def iterdir(self) -> Generator[StoredPath, None, None]:
        """Yield what lies directly below, in the order of names."""
        for entry in self.entries():
            yield self / entry.name

    def glob(self, pattern: str, **options: Any) -> Iterator[StoredPath]:  # type: ignore[override]
        """Yield what matches, in the order of names; one folder is listed at a time."""
        first, _, rest = pattern.partition("/")
        assert first != "**", f"{self}: ** is not looked for on an object store"
        if not set("*?[") & set(first):
            below = self / first
            if rest:
                yield from below.glob(rest)
            elif below.exists():
                yield below
            return
        for entry in self.entries():
            if not fnmatch.fnmatchcase(entry.name, first):
                continue
            if not rest:
                yield self / entry.name
            elif entry.is_folder:
                yield from (self / entry.name).glob(rest)


def _stat(mode: int, version: Version) -> os.stat_result:
    seconds = int(version.modified)
    return os.stat_result((mode, 0, 0, 1, 0, 0, version.size_bytes, seconds, seconds, seconds))


def located(place: str | os.PathLike[str]) -> Path:
    """Return a place as a path: a StoredPath for a URL such as s3://bucket/x, else a Path.

    Raises ConfigError for a URL without a bucket, or with credentials or a query in it.
    """
    if isinstance(place, StoredPath):
        return place
    text = str(place)
    scheme, colon, rest = text.partition(":/")  # a Path of a URL has lost a slash
    if colon and scheme in SCHEMES:
        url = f"{scheme}://{rest.lstrip('/')}"
        object_store.place(url)
        return StoredPath(url)
    return place if isinstance(place, Path) else Path(place)


Place = Annotated[Path, AfterValidator(located)]
"""Type of a config's field that names a local folder or file, or one on an object store."""


def fetched(url: str) -> Path:
    """Return a local, whole, read-only copy of what an object store holds at a URL now.

    The copy lies in the node's cache; open it at once, since the cache drops what is not used.
    Raises FileNotFoundError when there is none, StorageError when the store does not answer.
    """
    version = object_store.version_of(url)
    if version is None:
        raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), url)
    return copy_of(url, version)


def stored(temporary: Path, path: StoredPath) -> None:
    """Upload a finished local file as `path` and move it into the node's cache."""
    admit(temporary, path.url, object_store.upload(temporary, path.url))


class Copies:
    """The local files of one artifact, each as it was when this object first asked for it.

    For files that never change once they are there, and are opened again and again: the store is
    asked once. A copy that the cache dropped in between is fetched anew.
    """

    def __init__(self) -> None:
        self._found: dict[str, str] = {}

    def of(self, path: Path) -> str:
        """Return the local file of a path. Raises FileNotFoundError when the store has none."""
        if not isinstance(path, StoredPath):
            return os.fspath(path)
        known = self._found.get(path.url)
        if known is None or not touched(Path(known)):
            known = self._found[path.url] = os.fspath(fetched(path.url))
        return known


_appended: WeakSet[AppendedFile] = WeakSet()


class AppendedFile:
    """A text file that grows line by line: appended to at once locally, uploaded now and then.

    On an object store each upload replaces the whole file; another process reads the last one.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._lines: list[str] | None = None
        self._sent_at, self._is_behind = float("-inf"), False
        _appended.add(self)

    def append(self, text: str) -> None:
        """Add whole lines; on a store they are there UPLOAD_EVERY_S later, or after `publish`."""
        if not isinstance(self.path, StoredPath):
            with open(self.path, "a") as file:
                file.write(text)
                file.flush()
                os.fsync(file.fileno())
            return
        if self._lines is None:
            self._lines = [self.path.read_text()] if self.path.is_file() else []
        self._lines.append(text)
        self._is_behind = True
        if time.monotonic() - self._sent_at > UPLOAD_EVERY_S:
            self.publish()

    def publish(self) -> None:
        """Upload what was added since the last upload."""
        if not self._is_behind or not isinstance(self.path, StoredPath):
            return
        write_object(self.path, "".join(self._lines or []))
        self._sent_at, self._is_behind = time.monotonic(), False


def publish_below(folder: Path) -> None:
    """Upload what this process added to files in a folder: before a stamp says it is finished."""
    for file in list(_appended):
        if file.path.parent == folder:
            file.publish()


def write_object(path: StoredPath, text: str) -> None:
    """Write a small text as an object."""
    here = path.scratch.with_name(f"{path.name}.{platform.node()}-{os.getpid()}.tmp")
    here.parent.mkdir(parents=True, exist_ok=True)
    try:
        here.write_text(text)
        stored(here, path)
    finally:
        here.unlink(missing_ok=True)


def remove_tree(path: Path) -> None:
    """Delete a folder and all below it, locally or on the store; none is no mistake."""
    if isinstance(path, StoredPath):
        object_store.delete_tree(path.url)
        shutil.rmtree(path.scratch, ignore_errors=True)
        return
    shutil.rmtree(path, ignore_errors=True)


def size_below(path: Path) -> int:
    """Return the bytes of all files below a folder."""
    if isinstance(path, StoredPath):
        return sum(entry.size_bytes for entry in path.entries(recursive=True))
    return sum(file.stat().st_size for file in path.rglob("*") if file.is_file())


def local_beside(folder: Path) -> Path:
    """Return a local folder that stands for one on a store: a database needs a disk."""
    if not isinstance(folder, StoredPath):
        return folder
    here = cache_root() / "local" / folder.url.replace("://", "/")
    here.mkdir(parents=True, exist_ok=True)
    return here


def names_in(path: Path) -> frozenset[str]:
    """Return the names directly in a folder, by one listing; none when there is no folder."""
    if isinstance(path, StoredPath):
        return frozenset(entry.name for entry in path.entries())
    return frozenset(os.listdir(path)) if path.is_dir() else frozenset()


def relative(path: Path, start: Path) -> str:
    """Return how to reach `path` from the folder `start`: relative, so that both can be moved.

    The whole place when one of the two is on another store.
    """
    ends = [place.url if isinstance(place, StoredPath) else None for place in (path, start)]
    if ends == [None, None]:
        return os.path.relpath(path, start)
    if None in ends or ends[0].split("/")[:3] != ends[1].split("/")[:3]:  # type: ignore[union-attr]
        return str(path.absolute())
    return posixpath.relpath(f"/{ends[0]}", f"/{ends[1]}")


def reached(start: Path, way: str) -> Path:
    """Return the place that `relative` described, seen from the folder `start`."""
    found = located(way)
    return found if found.is_absolute() else (start / way)
