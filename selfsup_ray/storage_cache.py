"""The node's cache of objects: whole copies by URL and version, the least recently used go first.

A copy's name holds the version it was made of, so none is ever stale: a newer object has another
name, and the old copy is left to the bound. All processes of a node share the folder.
"""

from __future__ import annotations

import errno
import fcntl
import hashlib
import logging
import os
import shutil
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from selfsup_ray.errors import ConfigError, StorageError
from selfsup_ray.object_store import Version, download

log = logging.getLogger(__name__)

FOLDER = "SELFSUP_RAY_CACHE"
"""Environment variable: the folder of a node's cache."""
BOUND = "SELFSUP_RAY_CACHE_GB"
"""Environment variable: the most that copies may take, in 10^9 bytes."""
DEFAULT_GB = 50.0
IN_USE_S = 5.0
"""Seconds a copy stays after it was asked for: until then its reader may not have opened it."""
PATIENCE_S = 60.0
"""Seconds to wait for copies that are in use before there is no room."""
HALF_AFTER_S = 3600.0
"""Seconds after which a file that nothing was added to is the half of a killed download."""
FILLED_TO = 0.9
"""Share of the bound that stays after old copies were dropped, so that it is done rarely."""


def cache_root() -> Path:
    """Return the folder of this node's cache."""
    given = os.environ.get(FOLDER)
    if given:
        return Path(given).expanduser().absolute()
    base = os.environ.get("XDG_CACHE_HOME") or "~/.cache"
    return Path(base).expanduser().absolute() / "selfsup-ray"


def bound_bytes() -> int:
    """Return the most that the copies on this node may take.

    Without the variable: 50 GB, but no more than half of the disk. Raises ConfigError.
    """
    given = os.environ.get(BOUND)
    if not given:
        root = next(p for p in [cache_root(), *cache_root().parents] if p.exists())
        return int(min(DEFAULT_GB * 1e9, shutil.disk_usage(root).total / 2))
    try:
        gigabytes = float(given)
    except ValueError:
        gigabytes = 0.0
    if not 0 < gigabytes < float("inf"):
        raise ConfigError(f"{BOUND} must be a positive number of gigabytes, got {given!r}.")
    return int(gigabytes * 1e9)


def copy_of(url: str, version: Version) -> Path:
    """Return a local file with this content of the URL, fetched if it is not here yet.

    The file is complete, read-only, and may be dropped once the caller has opened it. Raises
    FileNotFoundError when the object is gone, StorageError when it finds no room.
    """
    while True:
        path = _path(url, version)
        if touched(path):
            return path
        path.parent.mkdir(parents=True, exist_ok=True)
        with _locked(path.parent / "lock"):  # the other workers of the node wait for one fetch
            if touched(path):
                return path
            make_room(version.size_bytes, url)
            half = path.with_name(f"{path.name}.{os.getpid()}.half")
            try:
                with _full_disk_named(url):
                    found = download(url, half)
                if found == version:
                    _place(half, path)
                    return path
                version = found  # replaced since the caller asked
                _place(half, _path(url, version))
            finally:
                half.unlink(missing_ok=True)


def derived(key: str, name: str, size_bytes: int, write: Callable[[Path], None]) -> Path:
    """Return a local file that `write` makes from copies, kept among them; made once a node.

    key: changes with whatever the file is made from.
    """
    path = _path(f"{key}/{name}", Version("made", size_bytes, 0.0))
    if touched(path):
        return path
    path.parent.mkdir(parents=True, exist_ok=True)
    with _locked(path.parent / "lock"):
        if touched(path):
            return path
        make_room(size_bytes, name)
        half = path.with_name(f"{path.name}.{os.getpid()}.half")
        try:
            with _full_disk_named(name):
                write(half)
            _place(half, path)
        finally:
            half.unlink(missing_ok=True)
    return path


def admit(path: Path, url: str, version: Version) -> None:
    """Take a local file that was just written to the URL into the cache, by renaming it.

    One that is larger than the bound is deleted instead.
    """
    target = _path(url, version)
    try:
        make_room(version.size_bytes, url)
    except StorageError:
        path.unlink()
        return
    target.parent.mkdir(parents=True, exist_ok=True)
    _place(path, target)


def _path(url: str, version: Version) -> Path:
    name = url.rpartition("/")[2]
    key = hashlib.sha256(url.encode()).hexdigest()
    # The end of the name, with its suffix, which some readers go by.
    return cache_root() / "copies" / key[:2] / f"{key[2:30]}-{version.tag}" / name[-100:]


def _place(half: Path, path: Path) -> None:
    half.chmod(0o444)
    path.parent.mkdir(parents=True, exist_ok=True)
    os.replace(half, path)
    touched(path)


def touched(path: Path) -> bool:
    """Mark a copy as used now; return whether it is there."""
    try:
        os.utime(path)
    except FileNotFoundError:
        return False
    return True


@contextmanager
def _locked(path: Path) -> Iterator[int]:
    """Hold a lock between the processes of this node, which end with it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield descriptor
    finally:
        os.close(descriptor)


@contextmanager
def _full_disk_named(url: str) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT):
            raise
        raise StorageError(
            f"{url} cannot be copied to {cache_root()}: its disk is full. Set {FOLDER} to a "
            f"folder on a larger disk, or {BOUND} to less than is free there."
        ) from None


def make_room(size_bytes: int, url: str) -> None:
    """Count a new copy in, after dropping the copies that were not used for longest.

    What a process has open stays readable: its file only loses its name. Raises StorageError
    when the copy alone is larger than the bound, or all others are in use.
    """
    bound = bound_bytes()
    if size_bytes > bound:
        raise StorageError(
            f"{url} has {size_bytes / 1e9:.3f} GB, more than the {bound / 1e9:.3f} GB that copies "
            f"may take on this node ({cache_root()}). Set {BOUND} higher on every node."
        )
    deadline = time.monotonic() + PATIENCE_S
    while not _counted_in(size_bytes, bound):
        if time.monotonic() > deadline:
            raise StorageError(
                f"{url} finds no room: the copies in use on this node take all of the "
                f"{bound / 1e9:.3f} GB that {BOUND} allows. Set it higher on every node."
            )
        time.sleep(0.5)


def _counted_in(size_bytes: int, bound: int) -> bool:
    with _locked(cache_root() / "size") as descriptor:
        known = os.pread(descriptor, 32, 0)
        total = int(known) if known.strip().isdigit() else _sweep(bound)
        if total + size_bytes > bound:
            total = _sweep(min(bound - size_bytes, int(bound * FILLED_TO)))
        fits = total + size_bytes <= bound
        text = str(total + size_bytes if fits else total).encode()
        os.ftruncate(descriptor, 0)
        os.pwrite(descriptor, text, 0)
    return fits


def _sweep(limit: int) -> int:
    """Drop the oldest copies until the rest takes at most `limit` bytes; return what it takes."""
    now, total = time.time(), 0
    copies = list[tuple[float, int, Path]]()
    for folder, _, names in os.walk(cache_root() / "copies"):
        for name in names:
            path = Path(folder, name)
            with suppress(FileNotFoundError):
                found = path.stat()
                if name == "lock":
                    continue
                old_half = name.endswith(".half") and now - found.st_mtime > HALF_AFTER_S
                used = 0.0 if old_half else found.st_mtime
                copies.append((used, found.st_size, path))
                total += found.st_size
    dropped = 0
    for used, size_bytes, path in sorted(copies):
        if (total <= limit and used) or now - used < IN_USE_S:
            break
        if path.name.endswith(".half") and used:  # being fetched
            continue
        shutil.rmtree(path.parent, ignore_errors=True)
        total, dropped = total - size_bytes, dropped + 1
    if dropped:
        log.info("cache %s: %d copies dropped, %.3f GB stay", cache_root(), dropped, total / 1e9)
    return total
