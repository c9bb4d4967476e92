"""Records on their way from rank 0 to the driver: through a file, or through an actor."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from selfsup_ray.storage import StoredPath
from selfsup_ray.training import Record


class Channel(Protocol):
    """One end in a worker, the other in the driver; picklable."""

    def write(self, record: Record) -> None:
        """Send a record; called by rank 0."""

    def read_new(self, place: int) -> tuple[list[Record], int]:
        """Return the records after `place`, and the place behind them; called by the driver."""


def channel_for(out: Path) -> Channel:
    """Return how the records of a training into `out` travel: by a file where nodes share it."""
    if not isinstance(out, StoredPath):
        return RecordsFile(records_file(out))
    import ray

    return RecordsActor(ray.remote(num_cpus=0, max_restarts=-1)(_Mailbox).remote())


def temporary_folder(out: Path) -> Path:
    """Return the local folder in which Ray Train keeps its own state while a training runs."""
    return (out.scratch if isinstance(out, StoredPath) else out) / "ray_train"


def records_file(out: Path) -> Path:
    """Return the file through which rank 0 sends its records to the driver."""
    return temporary_folder(out) / "records.jsonl"


@dataclass(frozen=True)
class RecordsFile:
    """A file that driver and workers see."""

    path: Path

    def write(self, record: Record) -> None:
        """Append a record, after what a killed worker left of a line."""
        with open(self.path, "a") as file:
            file.write(f"\n{json.dumps(record)}\n")

    def read_new(self, place: int) -> tuple[list[Record], int]:
        """Return the records of the whole lines after byte `place`, and the place behind them."""
        return read_new(self.path, place)


def read_new(path: Path, place: int) -> tuple[list[Record], int]:
    """Return the records of the whole lines after byte `place`, and the place behind them.

    A line that a killed worker left unfinished is no record; the restarted one writes it again.
    """
    if not path.exists():
        return [], place
    with open(path, "rb") as file:
        file.seek(place)
        text = file.read()
    whole = text.rfind(b"\n") + 1
    lines = text[:whole].splitlines()
    return [json.loads(line) for line in lines if line.endswith(b"}")], place + whole


class _Mailbox:
    """The actor's body: records in the order they came."""

    def __init__(self) -> None:
        self.records: list[Record] = []

    def add(self, record: Record) -> None:
        self.records.append(record)

    def since(self, place: int) -> tuple[list[Record], int]:
        """Return what came after `place`; all that there is when the actor began anew."""
        start = place if place <= len(self.records) else 0
        return self.records[start:], len(self.records)


@dataclass(frozen=True)
class RecordsActor:
    """An actor without a CPU, for nodes that share no disk.

    What a lost node takes along with it is in the history of the next checkpoint.
    """

    mailbox: Any

    def write(self, record: Record) -> None:
        """Send a record without waiting."""
        self.mailbox.add.remote(record)

    def read_new(self, place: int) -> tuple[list[Record], int]:
        """Return the records after the first `place`, and how many there are; none for a while
        when the actor's node is lost.
        """
        import ray

        try:
            found: tuple[list[Record], int] = ray.get(
                self.mailbox.since.remote(place), timeout=30.0
            )
        except (ray.exceptions.GetTimeoutError, ray.exceptions.ActorUnavailableError):
            return [], place
        return found
