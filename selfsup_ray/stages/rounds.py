"""Rounds of tasks: one thread each, several side by side, by Ray or in this process."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import torch

from selfsup_ray.cluster.shards import map_shards
from selfsup_ray.config import Resources
from selfsup_ray.memory import kept
from selfsup_ray.progress import track


def one_round(fn: Callable[[int], None], label: str, todo: list[int], ask: Resources) -> None:
    """Run one round of tasks by Ray, or here on as many threads as `cpus`, in no fixed order."""
    if ask.workers or ask.cpus < 2:
        for _ in map_shards(_OneThread(fn), todo, ask, label=label):
            pass
        return
    pool = ThreadPoolExecutor(int(ask.cpus), initializer=torch.set_num_threads, initargs=(1,))
    with kept(torch.device("cpu")), pool, track(label, len(todo), "shards") as progress:
        for _ in pool.map(fn, todo):
            progress.advance()


@dataclass(frozen=True)
class _OneThread:
    """A task on one thread: sums have the same order everywhere, and tasks run side by side."""

    fn: Callable[[int], None]

    def __call__(self, i: int) -> None:
        threads = torch.get_num_threads()
        torch.set_num_threads(1)
        try:
            with kept(torch.device("cpu")):
                self.fn(i)
        finally:
            torch.set_num_threads(threads)
