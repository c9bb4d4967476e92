"""Batches: which images each rank reads at which step, whatever the number of ranks."""

from __future__ import annotations

from collections import deque
from collections.abc import Generator
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from typing import TYPE_CHECKING, Protocol

import numpy as np
import torch
from torch import Tensor

from selfsup_ray.collectives import shares, world_size
from selfsup_ray.data.stream import Stream
from selfsup_ray.errors import ConfigError
from selfsup_ray.ops.rng import permuted

if TYPE_CHECKING:
    from selfsup_ray.data.datasets import Dataset

Batch = tuple[list[Tensor], Tensor]
"""Image batches, each (n, 3, S, S) uint8, and their ids (n,) int64: a rank's part of a step."""


class Cut(Protocol):
    """What decides the batches; a TrainConfig has it."""

    @property
    def epochs(self) -> int: ...
    @property
    def batch_size(self) -> int: ...
    @property
    def accumulate(self) -> int: ...
    @property
    def seed(self) -> int: ...


class Batches:
    """Which images this rank reads at which step, read one batch ahead by a thread.

    The global batch of a step does not depend on the number of ranks. It is cut into
    `accumulate` parts, and each part into one piece a rank, as equal as whole multiples of
    `together` images allow. A rank with n of a part's P images gives its means the weight
    n * ranks / P, so that their mean over the ranks is the mean over the images.
    Raises ConfigError for a batch that cannot be cut so.
    """

    def __init__(self, dataset: Dataset, config: Cut, *, pin: bool, together: int = 1) -> None:
        require_cut(config, together=together, workers=world_size())
        if len(dataset) < config.batch_size:
            raise ConfigError(
                f"batch_size={config.batch_size} is more than the {len(dataset)} images there are. "
                f"Choose a batch_size of at most {len(dataset)}."
            )
        self.dataset, self.config, self.pin = dataset, config, pin
        self.part_size = config.batch_size // config.accumulate
        self.shares = shares(self.part_size, together=together)
        self.weight = self.shares.mine * world_size() / self.part_size
        self.steps_per_epoch = len(dataset) // config.batch_size
        self.total_steps = self.steps_per_epoch * config.epochs

    def positions(self, step: int, part: int) -> tuple[int, np.ndarray]:
        """Return the epoch, and what this rank reads of one part of one step, as places in it.

        The global batch of step s is rows [s * B, (s + 1) * B) of the epoch's order; part p of it
        is a contiguous piece, and each rank has a contiguous piece of that.
        """
        epoch, row = divmod(step, self.steps_per_epoch)
        first = row * self.config.batch_size + part * self.part_size + self.shares.first
        return epoch, np.arange(first, first + self.shares.mine)

    def ids(self, step: int, part: int) -> np.ndarray:
        """Return the image ids of one part of one step on this rank."""
        epoch, positions = self.positions(step, part)
        if isinstance(self.dataset, Stream):
            return self.dataset.order.ids(positions, epoch=epoch)
        return permuted(positions, n=len(self.dataset), seed=self.config.seed, epoch=epoch)

    def read(self, start: int) -> Generator[Batch, None, None]:
        """Yield (image batches, ids) of every part of every step from `start` on."""
        steps, parts = range(start, self.total_steps), range(self.config.accumulate)
        if isinstance(self.dataset, Stream):
            wanted = (self.positions(step, part) for step in steps for part in parts)
            with closing(self.dataset.batches(wanted)) as read:
                yield from (self._ready([images], ids) for images, ids in read)
            return
        for step, part in ((step, part) for step in steps for part in parts):
            ids = self.ids(step, part)
            yield self._ready(self.dataset.batch(ids, epoch=step // self.steps_per_epoch), ids)

    def _ready(self, images: list[Tensor], ids: np.ndarray) -> Batch:
        tensors = [*images, torch.from_numpy(ids)]
        *images, id_tensor = [x.pin_memory() for x in tensors] if self.pin else tensors
        return images, id_tensor

    def read_ahead(self, start: int, *, depth: int = 3) -> Generator[Batch, None, None]:
        """Yield the batches from step `start` on; a thread keeps `depth` of them ready."""
        batches = self.read(start)
        with closing(batches), ThreadPoolExecutor(1, thread_name_prefix="read-ahead") as pool:
            ahead = deque(pool.submit(next, batches, None) for _ in range(depth))
            while (batch := ahead.popleft().result()) is not None:
                ahead.append(pool.submit(next, batches, None))
                yield batch


def require_cut(config: Cut, *, together: int, workers: int) -> None:
    """Raise ConfigError unless every worker gets at least `together` images of every part."""
    whole = config.accumulate * together
    groups = "" if together == 1 else f" x batch_norm.group_size={together}"
    if config.batch_size % whole:
        raise ConfigError(
            f"batch_size={config.batch_size} cannot be cut into accumulate={config.accumulate}"
            f"{groups} equal parts. Make it a multiple of {whole}."
        )
    if config.batch_size // whole < workers:
        raise ConfigError(
            f"batch_size={config.batch_size} has nothing for some of {workers} workers: with "
            f"accumulate={config.accumulate}{groups} it feeds {config.batch_size // whole}. "
            f"Lower resources.workers or accumulate, or take a larger batch."
        )
