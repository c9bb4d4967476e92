"""Requests to an object store (S3, GCS): what an object is, reading, writing, listing; retried."""

from __future__ import annotations

import errno
import hashlib
import logging
import os
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any, TypeVar
from urllib.parse import urlsplit

from selfsup_ray.credentials import masked
from selfsup_ray.errors import ConfigError, StorageError

log = logging.getLogger(__name__)

T = TypeVar("T")

SCHEMES = ("s3", "gs")
"""Beginnings of a URL that names an object store: S3 and what speaks its protocol, GCS."""
ATTEMPTS = 7
"""Times a request is made before the store counts as away."""
FIRST_WAIT_S = 0.5
"""Seconds before the second attempt; each later wait is twice as long: half a minute in all."""
CONNECT_S = 10.0
"""Seconds until a connection that nobody accepts has failed."""
PIECE_BYTES = 16 * 2**20
"""Bytes of one read; a larger object is read in several pieces at a time."""
PIECES_AT_A_TIME = 8
REFUSED = (
    "ACCESS_DENIED",
    "INVALID_ACCESS_KEY",
    "SIGNATURE_DOES_NOT_MATCH",
    "EXPIRED_TOKEN",
    "INVALID_CLIENT_TOKEN",
    "HTTP response code 401",
    "HTTP response code 403",
    "Permission denied",
)
"""Words of an answer that no further attempt will change."""
SLOW_S = 0.1
"""Seconds of a small request from which on, in the mean, the store is called slow: S3 in the same
region takes 0.01 to 0.03."""
SLOW_REQUESTS = 25
"""Requests over which that mean is taken."""
SAY_EVERY_S = 120.0
"""Seconds between two warnings that the store is slow."""


@dataclass(frozen=True)
class Version:
    """One content of an object; tag differs when the content was written anew."""

    tag: str
    size_bytes: int
    modified: float
    """Seconds since 1970."""


@dataclass(frozen=True)
class Entry:
    """One line of a listing."""

    name: str
    """Path below the listed folder."""
    is_folder: bool
    size_bytes: int
    modified: float


def is_url(text: str) -> bool:
    """Return whether a text names something on an object store."""
    return text.partition("://")[0] in SCHEMES and "://" in text


def place(url: str) -> str:
    """Return `bucket/key` of a URL, as a filesystem of pyarrow takes it.

    Raises ConfigError for a URL without a bucket, with a query or with credentials.
    """
    parts = urlsplit(url.replace("#", "%23"))
    if "@" in parts.netloc or parts.query:
        raise ConfigError(
            f"{masked(url)} must be {parts.scheme}://bucket/folder alone. Give credentials and the "
            f"server's address in the environment: AWS_ACCESS_KEY_ID, AWS_SECRET_ACCESS_KEY, "
            f"AWS_ENDPOINT_URL, AWS_REGION; GOOGLE_APPLICATION_CREDENTIALS for gs://."
        )
    if parts.scheme not in SCHEMES or not parts.netloc:
        raise ConfigError(f"{url} names no bucket. Give s3://bucket/folder or gs://bucket/folder.")
    return f"{parts.netloc}{parts.path}".replace("%23", "#").rstrip("/")


def filesystem(url: str) -> Any:
    """Return pyarrow's filesystem for a URL; its paths are `place(url)`.

    Credentials come from the environment or the machine's role, never from the URL.
    """
    scheme, bucket = url.partition("://")[0], place(url).partition("/")[0]
    endpoint = os.environ.get("AWS_ENDPOINT_URL_S3") or os.environ.get("AWS_ENDPOINT_URL")
    region = os.environ.get("AWS_REGION") or os.environ.get("AWS_DEFAULT_REGION")
    if scheme == "gs":
        return _filesystem(scheme, "", None, None)
    # Only AWS's own service knows in which region a bucket lies.
    return _filesystem(scheme, "" if endpoint or region else bucket, endpoint, region)


@lru_cache(maxsize=16)
def _filesystem(scheme: str, bucket: str, endpoint: str | None, region: str | None) -> Any:
    from pyarrow import fs

    if scheme == "gs":
        return fs.GcsFileSystem()
    server = urlsplit(endpoint) if endpoint else None
    return fs.S3FileSystem(
        region=region or (fs.resolve_s3_region(bucket) if bucket else "us-east-1"),
        endpoint_override=server.netloc if server else None,
        scheme=server.scheme if server else "https",
        connect_timeout=CONNECT_S,
        request_timeout=60.0,
        retry_strategy=fs.AwsStandardS3RetryStrategy(max_attempts=1),  # we count, wait and say so
        allow_delayed_open=True,  # a small object in one request
    )


def retried(action: Callable[[], T], *, url: str, doing: str) -> T:
    """Return action(), made again with growing waits while the object store fails.

    doing: read, written, listed or deleted, for the messages. A file that is missing stays
    FileNotFoundError. Raises StorageError when the store refuses, or after the last attempt.
    """
    began = time.monotonic()
    for attempt in range(1, ATTEMPTS + 1):
        try:
            return action()
        except FileNotFoundError:
            raise
        except OSError as error:
            reason = masked(" ".join(str(error).split()))[:300]
            if error.errno in (errno.ENOSPC, errno.EDQUOT):
                raise
            if any(word in reason for word in REFUSED):
                raise StorageError(
                    f"{url} cannot be {doing}: the object store refuses ({reason}). Set "
                    f"AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY on every node, or give the "
                    f"nodes' role the right to read and write there."
                ) from None
            if attempt == ATTEMPTS:
                raise StorageError(
                    f"{url} cannot be {doing}: {ATTEMPTS} attempts in "
                    f"{time.monotonic() - began:.0f} s failed ({reason}). Check that the store "
                    f"answers (AWS_ENDPOINT_URL, AWS_REGION) and give the same command again, "
                    f"which goes on with what is missing."
                ) from None
            wait_s = FIRST_WAIT_S * 2 ** (attempt - 1)
            log.warning(
                "%s was not %s (%s); attempt %d of %d in %.1f s",
                *(url, doing, reason, attempt + 1, ATTEMPTS, wait_s),
            )
            time.sleep(wait_s)
    raise AssertionError("the last attempt returns or raises")


class Pace:
    """How long small requests take; says so when that is what a run waits for."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._seconds, self._requests = 0.0, 0
        self._said_at = float("-inf")

    def note(self, seconds: float, url: str) -> None:
        """Count one request; warn when the last ones were slow."""
        with self._lock:
            self._seconds, self._requests = self._seconds + seconds, self._requests + 1
            if self._requests < SLOW_REQUESTS:
                return
            total, count = self._seconds, self._requests
            self._seconds, self._requests = 0.0, 0
            if total / count < SLOW_S or time.monotonic() - self._said_at < SAY_EVERY_S:
                return
            self._said_at = time.monotonic()
        log.warning(
            "The object store is slow: the last %d small requests took %.2f s each, and this run "
            "waits for them (%s). Run in the bucket's region, or choose a larger "
            "ingest.shard_size, for fewer requests.",
            *(count, total / count, url),
        )


_pace = Pace()


def version_of(url: str) -> Version | None:
    """Return what the store holds at a URL now; None when there is no such object."""

    def ask() -> Version:
        began = time.monotonic()
        try:
            with filesystem(url).open_input_file(place(url)) as file:
                return _version(file)
        finally:
            _pace.note(time.monotonic() - began, url)

    with suppress(FileNotFoundError):
        return retried(ask, url=url, doing="read")
    return None


def _version(file: Any) -> Version:
    found = {str(_text(key)).lower(): _text(value) for key, value in _metadata(file).items()}
    said = found.get("etag") or found.get("generation") or found.get("last-modified") or ""
    tag = hashlib.sha256(f"{said} {file.size()}".encode()).hexdigest()[:20]
    return Version(tag, int(file.size()), _seconds(found.get("last-modified", "")))


def _metadata(file: Any) -> dict[Any, Any]:
    return dict(file.metadata() or {})


def _text(value: Any) -> str:
    return value.decode(errors="replace") if isinstance(value, bytes) else str(value)


def _seconds(stamp: str) -> float:
    from datetime import datetime

    with suppress(ValueError):
        return datetime.fromisoformat(stamp.replace("Z", "+00:00")).timestamp()
    return 0.0


def download(url: str, to: Path) -> Version:
    """Write an object to a local file and return which version it is, never a mix of two.

    Raises FileNotFoundError when there is none, StorageError when the store does not answer.
    """

    def read() -> Version:
        while True:
            with filesystem(url).open_input_file(place(url)) as file:
                before = _version(file)
                _copy(file, before.size_bytes, to)
            if version_of(url) == before:  # else it was replaced while it was read
                return before

    return retried(read, url=url, doing="read")


def _copy(file: Any, size_bytes: int, to: Path) -> None:
    starts = range(0, size_bytes, PIECE_BYTES)
    with open(to, "wb") as out:
        out.truncate(size_bytes)  # counts in full while it comes
        if len(starts) < 2:
            _require_whole(out.write(file.read()), size_bytes)
            return

        def piece(start: int) -> None:
            wanted = min(PIECE_BYTES, size_bytes - start)
            data = file.read_at(wanted, start)
            _require_whole(os.pwrite(out.fileno(), data, start), wanted)

        with ThreadPoolExecutor(PIECES_AT_A_TIME) as pool:
            for done in [pool.submit(piece, start) for start in starts]:
                done.result()


def _require_whole(got: int, wanted: int) -> None:
    if got != wanted:
        raise OSError(f"{got:,} of {wanted:,} bytes came")


def upload(path: Path, url: str) -> Version:
    """Write a local file to the store and return its version; others see it whole or not at all.

    Raises StorageError when the store does not take it.
    """

    def write() -> Version:
        # In a thread, which no Ctrl-C interrupts: a stream that is given up half-way completes
        # the object with the half that it has.
        with ThreadPoolExecutor(1) as alone:
            alone.submit(_send, path, url).result()
        found = version_of(url)
        if found is None or found.size_bytes != path.stat().st_size:
            raise OSError("the object is not there after it was written")
        return found

    return retried(write, url=url, doing="written")


def _send(path: Path, url: str) -> None:
    import pyarrow as pa

    size_bytes = path.stat().st_size
    whole = pa.memory_map(str(path)).read_buffer() if size_bytes else pa.py_buffer(b"")
    stream = filesystem(url).open_output_stream(place(url))
    stream.write(whole)  # at once, so that no error of the disk can come in between
    stream.close()


def listed(url: str, *, recursive: bool = False) -> Iterator[Entry]:
    """Yield what lies below a URL, in the order of names; nothing when there is nothing."""
    from pyarrow import fs

    def ask() -> list[Any]:
        below = fs.FileSelector(place(url), recursive=recursive, allow_not_found=True)
        return list(filesystem(url).get_file_info(below))

    try:
        found = retried(ask, url=url, doing="listed")
    except FileNotFoundError:  # the bucket itself
        return
    for info in sorted(found, key=lambda info: str(info.path)):
        name = str(info.path).removeprefix(f"{place(url)}/").rstrip("/")
        is_folder = info.type == fs.FileType.Directory
        yield Entry(name, is_folder, 0 if is_folder else int(info.size), _modified(info))


def _modified(info: Any) -> float:
    return 0.0 if info.mtime_ns is None else info.mtime_ns / 1e9


def is_folder(url: str) -> bool:
    """Return whether any object lies below a URL."""
    from pyarrow import fs

    def ask() -> bool:
        return bool(filesystem(url).get_file_info(place(url)).type == fs.FileType.Directory)

    return retried(ask, url=url, doing="read")


def delete(url: str) -> None:
    """Delete an object. Raises FileNotFoundError when there is none."""
    retried(lambda: filesystem(url).delete_file(place(url)), url=url, doing="deleted")


def delete_tree(url: str) -> None:
    """Delete all that lies below a URL; nothing there is no mistake."""
    with suppress(FileNotFoundError):
        retried(lambda: filesystem(url).delete_dir(place(url)), url=url, doing="deleted")
