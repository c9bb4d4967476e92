"""Batch normalisation in the modes the papers differ in: local, split, sync, shuffle."""

from __future__ import annotations

import math
from typing import Annotated, Any, Literal

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from selfsup_ray import collectives
from selfsup_ray.collectives import Shares
from selfsup_ray.config import Positive, config
from selfsup_ray.errors import ConfigError


@config
class LocalNorm:
    """Statistics over the whole batch of each rank: results depend on the number of ranks."""

    name: Literal["local"] = "local"


@config
class SplitNorm:
    """Statistics over consecutive groups of images, as if each group had a GPU of its own."""

    name: Literal["split"] = "split"
    group_size: Positive = 32
    """Images per group; must divide every rank's batch. MoCo's published runs have 32."""


@config
class SyncNorm:
    """Statistics over the batch of all ranks together."""

    name: Literal["sync"] = "sync"


@config
class ShuffleNorm:
    """MoCo's ShuffleBN: as `split`, with the keys of all ranks permuted before they are grouped."""

    name: Literal["shuffle"] = "shuffle"
    group_size: Positive = 32
    """Images per group; must divide every rank's batch. MoCo's published runs have 32."""


BatchNormMode = Annotated[
    LocalNorm | SplitNorm | SyncNorm | ShuffleNorm, Field(discriminator="name")
]


def refuse_shuffle(mode: BatchNormMode, *, method: str) -> None:
    """Raise ValueError for a mode that only makes sense for keys."""
    if isinstance(mode, ShuffleNorm):
        raise ValueError(
            f"batch_norm.name=shuffle is for moco; {method} takes one of sync, split, local"
        )


class BatchNorm(_BatchNorm):
    """Batch normalisation over every axis but 1, of (B, C) or (B, C, H, W).

    In one process, modes `local` and `sync` are exactly F.batch_norm. Parameters and buffers have
    torch's names. Without offset there is no bias; without affine neither scale nor bias.
    """

    def __init__(self, num_features: int, *, offset: bool = True, affine: bool = True) -> None:
        super().__init__(num_features)
        if not (offset and affine):
            self.register_parameter("bias", None)
        if not affine:
            del self.weight
            self.register_buffer("weight", torch.ones(num_features), persistent=False)
        self.group_size: int | None = None
        self.over_ranks = False

    def forward(self, x: Tensor) -> Tensor:
        """Return x normalised by the batch in training, by the running statistics otherwise."""
        mean, var = self.running_mean, self.running_var
        assert mean is not None and var is not None and self.num_batches_tracked is not None
        if not self.training:
            return F.batch_norm(x, mean, var, self.weight, self.bias, False, 0.0, self.eps)
        self.num_batches_tracked.add_(1)
        if self.group_size is not None and len(x) != self.group_size:
            return self._in_groups(x, self.group_size)
        if self.over_ranks and collectives.world_size() > 1:
            return self._over_ranks(x)
        assert self.momentum is not None
        return F.batch_norm(x, mean, var, self.weight, self.bias, True, self.momentum, self.eps)

    def _in_groups(self, x: Tensor, group_size: int) -> Tensor:
        if len(x) % group_size:
            raise ConfigError(
                f"batch_norm.group_size={group_size} must divide the {len(x)} images that one rank "
                f"normalises together. Choose a divisor, or change batch_size or the workers."
            )
        groups = torch.split(x, group_size)
        means = torch.zeros(len(groups), self.num_features, device=x.device, dtype=self._dtype())
        variances = torch.zeros_like(means)
        # Momentum 1 makes the "running" statistics those of the group.
        out = [
            F.batch_norm(group, mean, var, self.weight, self.bias, True, 1.0, self.eps)
            for group, mean, var in zip(groups, means, variances, strict=True)
        ]
        self._remember(means.mean(dim=0), variances.mean(dim=0))
        return torch.cat(out)

    def _over_ranks(self, x: Tensor) -> Tensor:
        out: Tensor
        out, mean, var = _SyncedNorm.apply(x, self.weight, self.bias, self.eps)
        self._remember(mean, var)
        return out

    def _remember(self, mean: Tensor, var: Tensor) -> None:
        assert self.running_mean is not None and self.running_var is not None
        assert self.momentum is not None
        self.running_mean.lerp_(mean.to(self.running_mean.dtype), self.momentum)
        self.running_var.lerp_(var.to(self.running_var.dtype), self.momentum)

    def _dtype(self) -> torch.dtype:
        assert self.running_mean is not None
        return self.running_mean.dtype


class _SyncedNorm(torch.autograd.Function):
    """Batch normalisation with the statistics of all ranks; one collective each way."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, eps: float
    ) -> tuple[Tensor, Tensor, Tensor]:
        mean, var, count = _global_statistics(x, weight.dtype)
        ctx.save_for_backward(x, weight, mean, var, count)
        ctx.eps, ctx.has_bias = eps, bias is not None
        out = F.batch_norm(x, mean, var, weight, bias, False, 0.0, eps)
        unbiased = var * (count / (count - 1))
        ctx.mark_non_differentiable(mean, unbiased)
        return out, mean, unbiased

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor, Tensor | None, None]:
        x, weight, mean, var, count = ctx.saved_tensors
        # As if mean and var were constants: dx = dy w / std, and the sums of dy xhat and of dy.
        dx, dweight, dbias = torch.ops.aten.native_batch_norm_backward(
            grads[0].contiguous(memory_format=_layout(x)),
            *(x, weight, mean, var, None, None, False, ctx.eps, [True, True, True]),
        )
        totals = collectives.all_sum(torch.cat([dweight, dbias])) / count.repeat(2)
        scale = -weight * (var + ctx.eps).rsqrt()
        share_weight, share_bias = (totals * scale.repeat(2)).chunk(2)
        # The rest, through mean and var, is an affine function of xhat: one more fused pass.
        dx = dx + F.batch_norm(x, mean, var, share_weight, share_bias, False, 0.0, ctx.eps)
        return dx, dweight, dbias if ctx.has_bias else None, None


def _layout(x: Tensor) -> torch.memory_format:
    is_last = x.ndim == 4 and x.is_contiguous(memory_format=torch.channels_last)
    return torch.channels_last if is_last else torch.contiguous_format


def _global_statistics(x: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    """Return mean, biased variance and number of values per channel, each (C,), over all ranks.

    Ranks combine their own two-pass variances (Chan et al. 1979), since E[x^2] - E[x]^2 cancels.
    """
    zeros = torch.zeros(x.shape[1], device=x.device, dtype=dtype)
    mean, var = torch.batch_norm_update_stats(x, zeros, zeros.clone(), 1.0)
    count = torch.full_like(mean, x.numel() // x.shape[1])  # ranks may differ by some images
    gathered = collectives.gather(torch.stack([mean, var, count])[None])  # (world_size, 3, C)
    means, variances, counts = gathered.unbind(dim=1)
    total = counts.sum(dim=0)
    shares = counts / total
    total_mean = (shares * means).sum(dim=0)
    total_var = (shares * (variances + (means - total_mean).square())).sum(dim=0)
    return total_mean, total_var, total


def images_together(mode: BatchNormMode) -> int:
    """Return how many images must stay on one rank: it normalises them as a group."""
    return mode.group_size if isinstance(mode, SplitNorm | ShuffleNorm) else 1


def set_batch_norm(module: nn.Module, mode: BatchNormMode) -> None:
    """Set the mode of every batch normalisation inside a module."""
    together = images_together(mode)
    for layer in module.modules():
        if isinstance(layer, BatchNorm):
            layer.group_size = together if isinstance(mode, SplitNorm | ShuffleNorm) else None
            layer.over_ranks = isinstance(mode, SyncNorm)


def group_size(module: nn.Module) -> int:
    """Return how many images must stay on one rank for the batch normalisations inside."""
    layers = (layer for layer in module.modules() if isinstance(layer, BatchNorm))
    return math.lcm(*(layer.group_size or 1 for layer in layers))


@torch.no_grad()
def share_running_statistics(module: nn.Module, shares: Shares | None = None) -> None:
    """Replace running statistics that ranks gathered alone by their mean over ranks.

    shares: the images of each rank, which weigh its statistics; None: as many on every rank.
    Layers in evaluation mode keep theirs. Running statistics are linear in the batch statistics,
    so once per step (or later) gives the same as after every layer. Every rank must call it.
    """
    if collectives.world_size() == 1:
        return
    buffers: list[Tensor] = []
    for layer in module.modules():
        if isinstance(layer, BatchNorm) and layer.training and not layer.over_ranks:
            assert layer.running_mean is not None and layer.running_var is not None
            buffers += [layer.running_mean, layer.running_var]
    if not buffers:
        return
    images = shares or collectives.equal_shares(1)
    flat = collectives.all_sum(torch.cat(buffers) * (images.mine / images.total))
    for buffer, values in zip(buffers, torch.split(flat, [len(b) for b in buffers]), strict=True):
        buffer.copy_(values)
