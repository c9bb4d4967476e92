"""Turns: one trial at a time builds a stage that several share."""

from __future__ import annotations

import threading
import time
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from filelock import FileLock

from selfsup_ray.errors import ResourceError
from selfsup_ray.storage import StoredPath

NAME = "selfsup-ray turns"
"""The actor that knows whose turn it is, where trials share no disk."""
LEASE_S = 60.0
"""Seconds after which a trial that is not heard of has lost its turn."""
ASK_EVERY_S = 0.5


class _Turns:
    """The actor's body: who works on which folder, and when it was last heard of."""

    def __init__(self) -> None:
        self.held: dict[str, tuple[str, float]] = {}

    def take(self, folder: str, who: str) -> bool:
        """Return whether it is this one's turn; one that has it keeps it so."""
        holder, heard = self.held.get(folder, (who, 0.0))
        if holder != who and time.monotonic() - heard < LEASE_S:
            return False
        self.held[folder] = (who, time.monotonic())
        return True

    def give(self, folder: str, who: str) -> None:
        """End a turn."""
        if self.held.get(folder, ("", 0.0))[0] == who:
            del self.held[folder]


def open_turns(folder: Path) -> Any:
    """Return what the driver holds while trials below a folder may ask for turns.

    None on a disk that all see, where files are locks; several drivers then take turns too.
    """
    if not isinstance(folder, StoredPath):
        return None
    import ray

    return ray.remote(num_cpus=0, max_restarts=-1)(_Turns).options(name=NAME).remote()


@contextmanager
def in_turn(folder: Path) -> Iterator[None]:
    """Be the only trial that works on a folder while the block runs."""
    if isinstance(folder, StoredPath):
        with _in_turn_by_actor(folder.url):
            yield
        return
    with FileLock(folder.with_name(f"{folder.name}.lock")):
        yield


@contextmanager
def _in_turn_by_actor(folder: str) -> Iterator[None]:
    import ray

    try:
        turns: Any = ray.get_actor(NAME)
    except ValueError:
        raise ResourceError(
            f"{folder} is shared by the trials of a sweep, but no sweep is open in this session of "
            f"Ray. Start it with `selfsup-ray sweep`."
        ) from None
    who, done = uuid.uuid4().hex, threading.Event()
    while not ray.get(turns.take.remote(folder, who)):
        time.sleep(ASK_EVERY_S)

    def renew() -> None:
        while not done.wait(LEASE_S / 6):
            turns.take.remote(folder, who)

    thread = threading.Thread(target=renew, name="turn", daemon=True)
    thread.start()
    try:
        yield
    finally:
        done.set()
        thread.join()
        ray.get(turns.give.remote(folder, who))
