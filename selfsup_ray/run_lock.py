"""Only one process at a time runs an experiment in a run folder."""

from __future__ import annotations

import os
import platform
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from filelock import FileLock, Timeout

from selfsup_ray.errors import ArtifactError
from selfsup_ray.storage import StoredPath


@contextmanager
def alone(out: Path) -> Iterator[None]:
    """Be the only process that runs stages in `out` while the block runs.

    The lock goes with the process, however that ends. On an object store it holds on this machine.
    Raises ArtifactError, naming the process, when another one runs there.
    """
    folder = out.scratch if isinstance(out, StoredPath) else out
    folder.mkdir(parents=True, exist_ok=True)
    lock, holder = FileLock(folder / ".lock", blocking=False), folder / ".running"
    try:
        lock.acquire()
    except Timeout:
        who = holder.read_text() if holder.exists() else "another process"
        raise ArtifactError(
            f"{out} is being written by {who}. Wait for it or end it, or choose another `out`."
        ) from None
    try:
        holder.write_text(f"process {os.getpid()} on {platform.node()}")
        yield
    finally:
        holder.unlink(missing_ok=True)
        lock.release()
