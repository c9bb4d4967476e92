"""Optimizers and learning-rate schedules: their configs, LARS, and lr as a function of progress."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Annotated, Any, Literal

import torch
from pydantic import Field
from torch import Tensor, nn

from selfsup_ray.config import (
    NonNegativeFloat,
    Positive,
    PositiveFloat,
    Share,
    config,
)

REFERENCE_BATCH = 256


@config
class SGDConfig:
    """Stochastic gradient descent with momentum; weight decay is added to the gradient."""

    name: Literal["sgd"] = "sgd"
    lr: PositiveFloat = 0.03
    """Peak learning rate: for a batch of 256 with `linear_scaling`, else as it is."""
    momentum: Annotated[float, Field(ge=0, lt=1)] = 0.9
    nesterov: bool = False
    weight_decay: NonNegativeFloat = 1e-4
    linear_scaling: bool = False
    """Multiply lr by batch_size / 256."""
    exclude_norm_and_bias: bool = False
    """No weight decay for biases and normalisation layers (all parameters with one dimension)."""


@config
class AdamConfig:
    """Adam (Kingma and Ba 2015); weight decay is added to the gradient, as SCAN has it."""

    name: Literal["adam"] = "adam"
    lr: PositiveFloat = 1e-4
    """Peak learning rate: for a batch of 256 with `linear_scaling`, else as it is."""
    betas: tuple[Share, Share] = (0.9, 0.999)
    eps: PositiveFloat = 1e-8
    weight_decay: NonNegativeFloat = 1e-4
    linear_scaling: bool = False
    """Multiply lr by batch_size / 256."""
    exclude_norm_and_bias: bool = False
    """No weight decay for biases and normalisation layers (all parameters with one dimension)."""


@config
class LARSConfig:
    """LARS (You et al. 2017) as SimCLR and BYOL use it for batches of 1024 and more."""

    name: Literal["lars"] = "lars"
    lr: PositiveFloat = 0.3
    """Peak learning rate: for a batch of 256 with `linear_scaling`, else as it is."""
    momentum: Annotated[float, Field(ge=0, lt=1)] = 0.9
    trust: PositiveFloat = 0.001
    """Trust coefficient eta."""
    weight_decay: NonNegativeFloat = 1e-4
    linear_scaling: bool = True
    """Multiply lr by batch_size / 256."""
    exclude_norm_and_bias: bool = True
    """Neither weight decay nor the trust ratio for all parameters with one dimension."""
    lr_in_momentum: bool = True
    """Multiply by lr before the momentum (SimCLR) or after it (BYOL)."""


OptimConfig = Annotated[SGDConfig | AdamConfig | LARSConfig, Field(discriminator="name")]


@config
class ConstantSchedule:
    """The peak lr throughout, after an optional linear warm-up."""

    name: Literal["constant"] = "constant"
    warmup_epochs: NonNegativeFloat = 0


@config
class CosineSchedule:
    """Half a cosine from the peak lr to final_ratio times it, after an optional linear warm-up."""

    name: Literal["cosine"] = "cosine"
    warmup_epochs: NonNegativeFloat = 0
    final_ratio: Share = 0
    """Last lr over peak lr. SCAN's eta_min = lr * 0.1^3 is 0.001."""
    per: Literal["step", "epoch"] = "step"
    """How often lr changes; MoCo's and SCAN's published code changes it once an epoch."""


@config
class StepSchedule:
    """lr times `rate` from each milestone on, after an optional linear warm-up.

    MoCo's rule: epoch e (from 0) is decayed when e >= milestone. SCAN's code decays one epoch
    later; give milestone + 1 for that.
    """

    name: Literal["step"] = "step"
    warmup_epochs: NonNegativeFloat = 0
    milestones: tuple[Positive, ...] = (120, 160)
    """Epochs, counted from 0, from which lr is multiplied by `rate` once more."""
    rate: Annotated[float, Field(gt=0, le=1)] = 0.1


ScheduleConfig = Annotated[
    ConstantSchedule | CosineSchedule | StepSchedule, Field(discriminator="name")
]


def peak_lr(optim: OptimConfig, *, batch_size: int) -> float:
    """Return the peak lr for a global batch: the one place of the linear scaling rule."""
    return optim.lr * (batch_size / REFERENCE_BATCH if optim.linear_scaling else 1.0)


def lr_ratio(schedule: ScheduleConfig, *, progress: float, epochs: int) -> float:
    """Return lr over peak lr at `progress` in [0, 1] of a training of `epochs` epochs.

    The warm-up is linear from 0 (SimCLR's and BYOL's code); the cosine fills what is left.
    """
    epoch = progress * epochs + 1e-9  # 119.9999999 is epoch 120: progress is a rounded quotient
    if epoch < schedule.warmup_epochs:
        return progress * epochs / schedule.warmup_epochs
    match schedule:
        case ConstantSchedule():
            return 1.0
        case CosineSchedule():
            now = math.floor(epoch) if schedule.per == "epoch" else progress * epochs
            length = max(epochs - schedule.warmup_epochs, 1e-9)
            share = min(max((now - schedule.warmup_epochs) / length, 0.0), 1.0)
            cosine = (1 + math.cos(math.pi * share)) / 2
            return schedule.final_ratio + (1 - schedule.final_ratio) * cosine
        case StepSchedule():
            return float(schedule.rate ** sum(epoch >= m for m in schedule.milestones))


def build_optimizer(
    optim: OptimConfig, parameters: Sequence[tuple[str, nn.Parameter]]
) -> torch.optim.Optimizer:
    """Return the optimizer of these named parameters; set its lr with `set_lr` before each step.

    Two groups: parameters with weight decay, and those without (`exclude_norm_and_bias`).
    """
    excluded = [p for _, p in parameters if optim.exclude_norm_and_bias and p.ndim <= 1]
    regular = [p for _, p in parameters if not (optim.exclude_norm_and_bias and p.ndim <= 1)]
    groups: list[dict[str, Any]] = [
        {"params": regular, "weight_decay": optim.weight_decay},
        {"params": excluded, "weight_decay": 0.0},
    ]
    match optim:
        case SGDConfig():
            return torch.optim.SGD(
                groups, lr=optim.lr, momentum=optim.momentum, nesterov=optim.nesterov, fused=True
            )
        case AdamConfig():
            return torch.optim.Adam(
                groups, lr=optim.lr, betas=optim.betas, eps=optim.eps, fused=True
            )
        case LARSConfig():
            groups[1]["trust"] = None
            return LARS(
                groups,
                lr=optim.lr,
                momentum=optim.momentum,
                trust=optim.trust,
                lr_in_momentum=optim.lr_in_momentum,
            )


def set_lr(optimizer: torch.optim.Optimizer, lr: float) -> None:
    """Set the learning rate of all groups."""
    for group in optimizer.param_groups:
        group["lr"] = lr


class LARS(torch.optim.Optimizer):
    """Layer-wise adaptive rates: v <- m v + lr * trust * (g + wd * w), then w <- w - v.

    trust = eta ||w|| / ||g + wd * w||, 1 where either norm is 0 or the group's `trust` is None.
    With lr_in_momentum False: v <- m v + trust * (g + wd * w), w <- w - lr * v (BYOL's order).
    SimCLR's code is the source; it, too, takes the norm after the weight decay is added.
    """

    def __init__(
        self,
        params: Any,
        *,
        lr: float,
        momentum: float = 0.9,
        trust: float | None = 0.001,
        weight_decay: float = 0.0,
        lr_in_momentum: bool = True,
    ) -> None:
        defaults = {"lr": lr, "momentum": momentum, "trust": trust}
        super().__init__(
            params, defaults | {"weight_decay": weight_decay, "lr_in_momentum": lr_in_momentum}
        )

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> None:  # type: ignore[override]
        """Update every parameter that has a gradient."""
        assert closure is None, "LARS takes no closure"
        for group in self.param_groups:
            for w in group["params"]:
                if w.grad is not None:
                    self._update(w, group)

    def _update(self, w: Tensor, group: dict[str, Any]) -> None:
        update = w.grad.add(w, alpha=group["weight_decay"]) if w.grad is not None else w
        if group["trust"] is not None:
            w_norm, g_norm = w.norm(), update.norm()
            usable = (w_norm > 0) & (g_norm > 0)
            update *= torch.where(usable, group["trust"] * w_norm / g_norm, 1.0)
        state = self.state[w]
        if "velocity" not in state:
            state["velocity"] = torch.zeros_like(w)
        inner, outer = (group["lr"], 1.0) if group["lr_in_momentum"] else (1.0, group["lr"])
        velocity = state["velocity"].mul_(group["momentum"]).add_(update, alpha=inner)
        w.sub_(velocity, alpha=outer)
