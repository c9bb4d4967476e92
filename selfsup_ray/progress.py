"""Progress with rate and ETA: a live bar in a terminal, one log line now and then elsewhere."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import BarColumn, Progress, ProgressColumn, Task, TextColumn
from rich.text import Text

log = logging.getLogger(__name__)

LINE_EVERY_S = 30.0
"""Seconds between two log lines when the output is not a terminal."""


class Track:
    """Counts finished units of one piece of work; made by `track`."""

    def __init__(self, label: str, total: int, unit: str, *, bar: Progress | None) -> None:
        self.label, self.total, self.unit = label, total, unit
        self.done, self.first = 0, 0
        self.note = ""
        self._bar = bar
        self._began = self._spoke = time.monotonic()
        self._task = bar.add_task(label, total=total, unit=unit, note="", first=0) if bar else None

    def skip(self, n: int) -> None:
        """Count n units that were finished before, in an interrupted run: not part of the rate."""
        self.first += n
        self.done += n
        self._show()

    def advance(self, n: int = 1, note: str | None = None) -> None:
        """Count n more finished units; note, e.g. "loss 2.31", is shown behind them."""
        self.done += n
        self.note = self.note if note is None else note
        self._show()

    @property
    def rate(self) -> float:
        """Units per second since the start, those of earlier runs not counted."""
        seconds = time.monotonic() - self._began
        return (self.done - self.first) / seconds if seconds > 0 else 0.0

    def line(self) -> str:
        """Return the state in one line: done, total, rate, time left, note."""
        rate = self.rate
        parts = [f"{self.label}: {self.done:,}/{self.total:,} {self.unit}"]
        if rate > 0:
            parts += [
                f"{short(rate)} {self.unit}/s",
                f"ETA {clock((self.total - self.done) / rate)}",
            ]
        return ", ".join([*parts, self.note] if self.note else parts)

    def _show(self) -> None:
        if self._bar is not None and self._task is not None:
            self._bar.update(self._task, completed=self.done, note=self.note, first=self.first)
        elif time.monotonic() - self._spoke >= LINE_EVERY_S:
            self._spoke = time.monotonic()
            log.info("%s", self.line())

    def close(self) -> None:
        """Say the end in one log line and remove the bar."""
        if self._bar is not None and self._task is not None:
            self._bar.remove_task(self._task)
        seconds = time.monotonic() - self._began
        log.info("%s: %s %s in %s", self.label, f"{self.done:,}", self.unit, clock(seconds))


@contextmanager
def track(label: str, total: int, unit: str = "items") -> Iterator[Track]:
    """Yield a Track whose `advance(n)` counts finished units of `total`.

    In a terminal a bar with rate and ETA is drawn on standard error; elsewhere a log line appears
    every half minute. Blocks may be nested: their bars stand below each other.
    """
    bar = _Bars.acquire()
    tracked = Track(label, total, unit, bar=bar)
    try:
        yield tracked
    finally:
        tracked.close()
        _Bars.release()


class _Bars:
    """The one live display of this process; rich allows no second one at the same time."""

    lock = threading.Lock()
    users = 0
    bar: Progress | None = None

    @classmethod
    def acquire(cls) -> Progress | None:
        with cls.lock:
            cls.users += 1
            if cls.users == 1:
                console = Console(stderr=True)
                cls.bar = _bar(console) if console.is_terminal else None
                if cls.bar:
                    cls.bar.start()
            return cls.bar

    @classmethod
    def release(cls) -> None:
        with cls.lock:
            cls.users -= 1
            if cls.users == 0 and cls.bar:
                cls.bar.stop()
                cls.bar = None


class _Rate(ProgressColumn):
    """Units per second and time left, from units of this run only."""

    def render(self, task: Task) -> Text:
        done = task.completed - task.fields["first"]
        if not task.elapsed or done <= 0:
            return Text("")
        rate = done / task.elapsed
        left = clock(((task.total or 0) - task.completed) / rate)
        return Text(f"{short(rate)} {task.fields['unit']}/s, ETA {left}", style="cyan")


def _bar(console: Console) -> Progress:
    count = TextColumn("{task.completed:,.0f}/{task.total:,.0f}")
    label = TextColumn("{task.description}")
    note = TextColumn("{task.fields[note]}", style="dim")
    return Progress(label, BarColumn(), count, _Rate(), note, console=console, transient=True)


def short(rate: float) -> str:
    """Return a rate with three digits: 0.123, 12.3, 1,230."""
    return f"{rate:,.0f}" if rate >= 100 else f"{rate:.3g}"


def clock(seconds: float) -> str:
    """Return seconds as people write them: 42s, 3m 05s, 2h 07m, 5d 03h."""
    s = max(round(seconds), 0)
    if s < 60:
        return f"{s}s"
    if s < 3600:
        return f"{s // 60}m {s % 60:02d}s"
    if s < 86400:
        return f"{s // 3600}h {s % 3600 // 60:02d}m"
    return f"{s // 86400}d {s % 86400 // 3600:02d}h"
