"""Images of an Arrow column, decoded at random into arrays."""

from __future__ import annotations

import functools
import os
from concurrent.futures import ThreadPoolExecutor
from io import BytesIO

import numpy as np
import pyarrow as pa
import simplejpeg
import torch
from PIL import Image

from selfsup_ray.artifacts import Array
from selfsup_ray.data.shard_files import Encoding


class Pixels:
    """The stored images of one column: a view of its memory, nothing is copied before `read`."""

    def __init__(self, column: pa.LargeBinaryArray, *, encoding: Encoding, image_size: int) -> None:
        _, offsets, values = column.buffers()
        count = len(column)
        starts = np.frombuffer(offsets, np.int64) if count else np.zeros(1, np.int64)
        self.starts = starts[column.offset : column.offset + count + 1] if count else starts
        has_bytes = count and values is not None and len(values)
        self.values = np.frombuffer(values, np.uint8) if has_bytes else np.empty(0, np.uint8)
        self.squares: Array | None = None
        """(n, S, S, 3) when the images are stored raw."""
        if encoding == "raw":
            flat = self.values[self.starts[0] : self.starts[-1]]
            self.squares = flat.reshape(-1, image_size, image_size, 3)

    def __len__(self) -> int:
        return len(self.starts) - 1

    def read(self, local: Array, out: Array, rows: Array) -> None:
        """Decode images `local` of the column into out[rows], out being (n, S, S, 3) uint8."""
        if self.squares is not None:
            out[rows] = self.squares[local]
            return
        num_threads = min(torch.get_num_threads(), len(rows))
        if num_threads == 1:
            return self._decode(local, out, rows)
        # One piece per thread: a future for each image would cost as much as a small JPEG.
        parts = [np.arange(t, len(rows), num_threads) for t in range(num_threads)]
        tasks = [_threads(os.getpid()).submit(self._decode, local[p], out, rows[p]) for p in parts]
        for task in tasks:
            task.result()

    def _decode(self, local: Array, out: Array, rows: Array) -> None:
        for at, row in zip(local.tolist(), rows.tolist(), strict=True):
            data = self.values[self.starts[at] : self.starts[at + 1]]
            if data[0] == 0xFF:
                simplejpeg.decode_jpeg(data, fastdct=False, fastupsample=False, buffer=out[row])
                continue
            with Image.open(BytesIO(data.tobytes())) as image:
                out[row] = np.asarray(image.convert("RGB"))


@functools.cache
def _threads(pid: int) -> ThreadPoolExecutor:
    """Return this process's decoding threads; by pid, since threads do not survive a fork.

    As many as torch may use: Ray sets that number from the CPUs a worker asked for.
    """
    return ThreadPoolExecutor(torch.get_num_threads(), thread_name_prefix=f"decode-{pid}")
