"""Sums and gathers over the ranks of a training job; the identity in one process."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from selfsup_ray.memory import mapped

Reduce = Callable[[Tensor], Tensor]


def identity(x: Tensor) -> Tensor:
    """Return x: what every collective is when there is one process."""
    return x


def world_size() -> int:
    """Return the number of ranks, 1 outside a process group."""
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def rank() -> int:
    """Return this process's rank in [0, world_size)."""
    return dist.get_rank() if world_size() > 1 else 0


@dataclass(frozen=True)
class Shares:
    """How rows that belong together lie on the ranks: contiguous pieces in rank order."""

    rows: tuple[int, ...]
    """Rows of each rank."""

    @property
    def total(self) -> int:
        """Rows on all ranks together."""
        return sum(self.rows)

    @property
    def mine(self) -> int:
        """Rows on this rank."""
        return self.rows[rank()]

    @property
    def first(self) -> int:
        """The place of this rank's first row among all."""
        return sum(self.rows[: rank()])


def shares(total: int, *, together: int = 1) -> Shares:
    """Return how `total` rows lie on the ranks: as equal as whole multiples of `together` allow.

    The larger pieces come first: 16 rows on 3 ranks are 6, 5 and 5.
    """
    each, more = divmod(total // together, world_size())
    return Shares(tuple((each + (r < more)) * together for r in range(world_size())))


def equal_shares(rows: int) -> Shares:
    """Return the shares where every rank has as many rows as this one."""
    return Shares((rows,) * world_size())


class _Gather(torch.autograd.Function):
    """All-gather along dim 0; the gradient is the sum over ranks, cut to this rank's rows."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, shares: Shares) -> Tensor:
        x, missing = x.contiguous(), max(shares.rows) - len(x)
        if missing:  # a collective wants the same shape everywhere
            x = torch.cat([x, x.new_zeros(missing, *x.shape[1:])])
        parts = [torch.empty_like(x) for _ in shares.rows]
        dist.all_gather(parts, x)
        ctx.shares = shares
        return torch.cat([part[:n] for part, n in zip(parts, shares.rows, strict=True)])

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        total = grads[0].contiguous().clone()
        dist.all_reduce(total)
        return total[ctx.shares.first :][: ctx.shares.mine], None


class _AllSum(torch.autograd.Function):
    """Sum over ranks; the gradient is summed over ranks too."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        total = x.contiguous().clone()
        dist.all_reduce(total)
        return total

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Tensor:
        total = grads[0].contiguous().clone()
        dist.all_reduce(total)
        return total


def gather(x: Tensor, shares: Shares | None = None) -> Tensor:
    """Return the rows of all ranks in rank order, with gradient.

    x: (n, …), n as `shares` has it, or the same on every rank; result (total, …). Under DDP, which
    averages gradients over ranks, the mean over ranks of each rank's mean loss, weighted by its
    rows, then has the gradient of the global mean loss.
    """
    if world_size() == 1:
        return x
    shares = shares or equal_shares(len(x))
    assert shares.mine == len(x), f"{len(x)} rows where {shares.mine} belong"
    rows: Tensor = _Gather.apply(x, shares)
    return rows


def all_sum(x: Tensor) -> Tensor:
    """Return the sum of x over all ranks, with gradient; every rank must call it."""
    total: Tensor = _AllSum.apply(x) if world_size() > 1 else x
    return total


def broadcast(x: Tensor) -> Tensor:
    """Return rank 0's x on every rank, without gradient; x gives shape and dtype elsewhere."""
    if world_size() > 1:
        x = x.contiguous().clone()
        dist.broadcast(x, src=0)
    return x


@torch.no_grad()
def exchange(x: Tensor, sent: list[int], arriving: list[int]) -> Tensor:
    """Return the rows that the ranks send to this one, in rank order; every rank must call it.

    x: (n, …), sent[r] rows for each rank r, one rank's after the other's; arriving[r] rows come
    from rank r.
    """
    if world_size() == 1:
        return x
    out = x.new_empty((sum(arriving), *x.shape[1:]))
    dist.all_to_all_single(out, x.contiguous(), arriving, sent)
    return out


@torch.no_grad()
def on_first(x: Tensor, shares: Shares, *, at_once: int, on_disk: bool = False) -> Tensor:
    """Return the rows of all ranks on rank 0, and no row elsewhere; every rank must call it.

    x: (n, …), n as `shares` has it. The result of several ranks lies in main memory, or in a
    temporary file that is mapped, whatever the device of x, and travels `at_once` rows at a time;
    one process gets x itself.
    """
    if world_size() == 1:
        return x
    if rank() > 0:
        for part in torch.split(x.contiguous(), at_once):
            dist.send(part, dst=0)
        return x.new_empty((0, *x.shape[1:]), device="cpu")
    shape = (shares.total, *x.shape[1:])
    whole = mapped(shape, x.dtype) if on_disk else x.new_empty(shape, device="cpu")
    whole[: len(x)] = x
    rest = whole[len(x) :]
    for source, n in enumerate(shares.rows[1:], start=1):
        for part in torch.split(rest[:n], at_once):
            arrived = torch.empty_like(part, device=x.device)
            dist.recv(arrived, src=source)
            part.copy_(arrived)
        rest = rest[n:]
    return whole
