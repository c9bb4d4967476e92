"""Sums and gathers over the ranks of a training job; the identity in one process."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

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


class _Gather(torch.autograd.Function):
    """All-gather along dim 0; the gradient is the sum over ranks, cut to this rank's rows."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        x = x.contiguous()
        parts = [torch.empty_like(x) for _ in range(dist.get_world_size())]
        dist.all_gather(parts, x)
        ctx.rows = len(x)
        return torch.cat(parts)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Tensor:
        total = grads[0].contiguous().clone()
        dist.all_reduce(total)
        return total[dist.get_rank() * ctx.rows :][: ctx.rows]


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


def gather(x: Tensor) -> Tensor:
    """Return the rows of all ranks in rank order, with gradient.

    x: (n, …), the same n on every rank; result (n * world_size, …). Under DDP, which averages
    gradients over ranks, the mean over ranks of each rank's mean loss then has the gradient of
    the global mean loss.
    """
    rows: Tensor = _Gather.apply(x) if world_size() > 1 else x
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
