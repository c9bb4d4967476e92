"""Source files wherever they are: a local path or a URL on an object store, opened the same way."""

from __future__ import annotations

import io
from typing import IO, Any

import pyarrow.parquet as pq

from selfsup_ray.data.images import ImageError, too_many_bytes
from selfsup_ray.data.kinds import HEAD_BYTES
from selfsup_ray.object_store import filesystem, is_url, place, retried, version_of

READ_BYTES = 8 * 2**20
"""Bytes asked for at once when an archive is read from its start to its end."""


class RemoteFile(io.RawIOBase):
    """An object as a file of Python's: every read is a range of it, made again when it fails.

    Raises FileNotFoundError when there is none, StorageError when the store does not answer.
    """

    def __init__(self, url: str) -> None:
        self.url = url
        self._file: Any = retried(self._opened, url=url, doing="read")
        self._size, self._at = int(self._file.size()), 0

    def _opened(self) -> Any:
        return filesystem(self.url).open_input_file(place(self.url))

    def readable(self) -> bool:
        """Return True."""
        return True

    def seekable(self) -> bool:
        """Return True."""
        return True

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        """Go to a byte; nothing is read."""
        start = {io.SEEK_SET: 0, io.SEEK_CUR: self._at, io.SEEK_END: self._size}[whence]
        self._at = max(0, start + offset)
        return self._at

    def tell(self) -> int:
        """Return the byte that is read next."""
        return self._at

    def readinto(self, buffer: Any) -> int:
        """Fill a buffer, or as much of it as there is; return the number of bytes."""
        wanted, at = min(len(buffer), max(0, self._size - self._at)), self._at

        def read() -> bytes:
            data = bytes(self._file.read_at(wanted, at))
            if len(data) != wanted:
                raise OSError(f"{len(data):,} of {wanted:,} bytes came")
            return data

        if wanted:
            buffer[:wanted] = retried(read, url=self.url, doing="read")
        self._at += wanted
        return wanted

    def close(self) -> None:
        """Close the object."""
        if not self.closed:
            self._file.close()
        super().close()


def opened(path: str) -> IO[bytes]:
    """Return a file opened for reading in pieces; raises OSError, for a URL StorageError too."""
    if not is_url(path):
        return open(path, "rb")
    return io.BufferedReader(RemoteFile(path), READ_BYTES)


def parquet_file(path: str) -> pq.ParquetFile:
    """Return an open Parquet file; of a remote one only the columns that are read are fetched."""
    if not is_url(path):
        return pq.ParquetFile(path, memory_map=True)
    return pq.ParquetFile(RemoteFile(path), pre_buffer=True)


def is_file(url: str) -> bool:
    """Return whether there is an object at a URL."""
    return version_of(url) is not None


def read_object(url: str, *, max_bytes: int) -> bytes | ImageError:
    """Return a whole object, or why not: one of more than max_bytes is not read.

    Raises FileNotFoundError when there is none, StorageError when the store does not answer.
    """

    def read() -> bytes | ImageError:
        with filesystem(url).open_input_file(place(url)) as file:
            size = int(file.size())
            if size > max_bytes:
                return too_many_bytes(size, max_bytes)
            data = bytes(file.read())
        if len(data) != size:
            raise OSError(f"{len(data):,} of {size:,} bytes came")
        return data

    return retried(read, url=url, doing="read")


def head_of(url: str) -> bytes:
    """Return the first bytes of an object."""

    def read() -> bytes:
        with filesystem(url).open_input_file(place(url)) as file:
            return bytes(file.read_at(HEAD_BYTES, 0))

    return retried(read, url=url, doing="read")
