"""Relabeling: every image once through the network, then a balanced assignment for each head."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor, nn

from selfsup_ray import collectives
from selfsup_ray.artifacts import Array
from selfsup_ray.errors import TrainingError
from selfsup_ray.models.objective import at_least_float32
from selfsup_ray.models.sela_config import SinkhornConfig
from selfsup_ray.ops.rng import permuted
from selfsup_ray.ops.sinkhorn import Balanced, balanced_labels, sinkhorn_knopp

if TYPE_CHECKING:
    from selfsup_ray.data.datasets import Dataset

GROUPS = 24
"""Parts a batch is cut into, whole ones for each rank: blocks do not depend on the ranks."""
BLOCK_ROWS = 4096
"""Rows of a part that make a block."""


@dataclass(frozen=True)
class Block:
    """Some images of this rank: ids (n,) int64, and what is stored of them, (n, d) on the CPU."""

    ids: Array
    rows: Tensor


class Cut:
    """Which images a rank passes through the network: every image is in one batch of one rank.

    Batches are of batch_size images or somewhat more, so that none is small; each is cut into
    groups, and a rank has the same groups of every batch.
    """

    def __init__(self, num_images: int, batch_size: int) -> None:
        self.num_images, self.num_batches = num_images, max(1, num_images // batch_size)
        self.groups = max(min(GROUPS, num_images // self.num_batches), collectives.world_size())
        shares = collectives.shares(self.groups)
        self.mine = range(shares.first, shares.first + shares.mine)

    def edges(self, batch: int) -> list[int]:
        """Return where this rank's groups of a batch begin and end among all positions."""
        first = batch * self.num_images // self.num_batches
        size = (batch + 1) * self.num_images // self.num_batches - first
        return [first + g * size // self.groups for g in (*self.mine, self.mine.stop)]


def collected(
    network: Callable[[list[Tensor], Tensor], Tensor],
    dataset: Dataset,
    *,
    batch_size: int,
    seed: int,
    epoch: int,
    shuffled: bool,
    device: torch.device,
) -> list[Block]:
    """Return this rank's images with what a network makes of them, in blocks.

    network: (image batches on the device, ids) -> (n, d). Every rank calls it alike; the blocks of
    all ranks hold every image once and do not depend on their number.
    """
    cut = Cut(len(dataset), batch_size)
    open_blocks: list[list[tuple[Array, Tensor]]] = [[] for _ in cut.mine]
    done: list[list[Block]] = [[] for _ in cut.mine]

    def ids_of(batch: int) -> Array:
        edges = cut.edges(batch)
        places = np.arange(edges[0], edges[-1])
        if not shuffled:
            return places
        return permuted(places, n=len(dataset), seed=seed, epoch=epoch)

    for batch, ids, images in _read_ahead(dataset, ids_of, cut.num_batches, epoch=epoch):
        on_device = [x.to(device, non_blocking=True) for x in images]
        rows = network(on_device, torch.from_numpy(ids).to(device)).cpu()
        edges = np.array(cut.edges(batch))
        for g, (a, b) in enumerate(zip(edges - edges[0], edges[1:] - edges[0], strict=False)):
            open_blocks[g].append((ids[a:b], rows[a:b]))
            if sum(len(part) for part, _ in open_blocks[g]) >= BLOCK_ROWS:
                done[g].append(_joined(open_blocks[g]))
                open_blocks[g] = []
    for g, parts in enumerate(open_blocks):
        done[g] += [_joined(parts)] if sum(len(ids) for ids, _ in parts) else []
    return [block for blocks in done for block in blocks]


def _joined(parts: list[tuple[Array, Tensor]]) -> Block:
    return Block(np.concatenate([ids for ids, _ in parts]), torch.cat([rows for _, rows in parts]))


def _read_ahead(
    dataset: Dataset, ids_of: Callable[[int], Array], num_batches: int, *, epoch: int
) -> Iterator[tuple[int, Array, list[Tensor]]]:
    """Yield (batch, ids, images); a thread reads the next batch meanwhile."""

    def read(batch: int) -> tuple[int, Array, list[Tensor]]:
        ids = ids_of(batch)
        return batch, ids, dataset.batch(ids, epoch=epoch)

    with ThreadPoolExecutor(1, thread_name_prefix="relabel") as pool:
        ahead = pool.submit(read, 0)
        for batch in range(1, num_batches + 1):
            found = ahead.result()
            if batch < num_batches:
                ahead = pool.submit(read, batch)
            yield found


class HeadScores(Sequence[Array]):
    """Logits of one head, a block at a time, computed when a block is asked for."""

    def __init__(self, blocks: list[Block], head: nn.Module, device: torch.device) -> None:
        self.blocks, self.head, self.device = blocks, head, device

    def __len__(self) -> int:
        return len(self.blocks)

    def __getitem__(self, i: int) -> Array:  # type: ignore[override]
        """Return the logits (n, K) float32 of block i."""
        with torch.no_grad():
            logits = self.head(at_least_float32(self.blocks[i].rows.to(self.device)))
        return np.asarray(logits.float().cpu().numpy())

    def soft_counts(self, sharpness: float, all_sum: collectives.Reduce) -> Array:
        """Return mean_i softmax_k(sharpness l_i) over the images of all ranks, (K,) float64."""
        total = torch.zeros(0, dtype=torch.float64)
        for i in range(len(self)):
            shares = (torch.from_numpy(self[i]).double() * sharpness).softmax(dim=1).sum(dim=0)
            total = shares if i == 0 else total + shares
        total = all_sum(total)
        return np.asarray((total / total.sum()).numpy())


@dataclass(frozen=True)
class Relabeled:
    """New labels of this rank's blocks, (n,) int32, one after the other; their mean -log p."""

    labels: Tensor
    solved: Balanced
    cost: float


def relabeled(
    scores: HeadScores,
    config: SinkhornConfig,
    *,
    shares: Array | None,
    start: Array | None,
    place: str,
) -> Relabeled:
    """Return balanced labels of the images; every rank calls it with its own blocks.

    place: which head at which event, for the message. Raises TrainingError when a logit is not
    finite.
    """
    device = scores.device

    def all_sum(x: Tensor) -> Tensor:
        return collectives.all_sum(x.to(device)).cpu()

    scratch = tempfile.TemporaryDirectory(prefix="sinkhorn") if config.on_disk else nullcontext()
    with scratch as folder:
        try:
            solved = sinkhorn_knopp(
                scores,
                lam=config.lam,
                marginals=shares,
                start=start,
                precision=config.precision,
                tolerance=config.tolerance,
                check_every=config.check_every,
                max_iterations=config.max_iterations,
                threads=torch.get_num_threads(),
                device=str(device) if config.device == "network" else "cpu",
                folder=None if folder is None else Path(folder),
                all_sum=all_sum,
            )
        except ValueError as error:
            raise TrainingError(
                f"No labels could be found for {place}: {error}. Lower optim.lr, or set "
                f"precision=float32; the last checkpoint is from before this event."
            ) from None
    labels, cost = list[Array](), 0.0
    for i in range(len(scores)):
        found, own = balanced_labels(scores[i], solved.log_r, lam=config.lam)
        labels.append(found)
        cost += own
    table = torch.from_numpy(np.concatenate([np.empty(0, np.int32), *labels]))
    totals = all_sum(torch.tensor([cost, len(table)], dtype=torch.float64))
    return Relabeled(table, solved, float(totals[0] / totals[1]))
