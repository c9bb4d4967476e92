"""BYOL: a network predicts what a slowly moving copy of itself makes of another view."""

from __future__ import annotations

import copy
import math
from collections.abc import Iterator
from typing import Annotated, Literal

import torch
from pydantic import Field
from torch import Tensor, nn

from selfsup_ray import collectives
from selfsup_ray.config import Share, config
from selfsup_ray.models.backbones import Backbone, seeded
from selfsup_ray.models.heads import Head, LinearHead, MLPHead
from selfsup_ray.models.norm import BatchNormMode, SyncNorm, refuse_shuffle, set_batch_norm
from selfsup_ray.models.objective import (
    Metrics,
    Objective,
    embedding_std,
    full_precision,
    unit_rows,
)
from selfsup_ray.ops.losses import bootstrap

Layers = Annotated[MLPHead | LinearHead, Field(discriminator="name")]
OFFICIAL = MLPHead(hidden_dim=4096, dim=256, batch_norm="hidden")


@config
class BYOLConfig:
    """BYOL (Grill et al. 2020); the defaults are the official ones for ImageNet.

    A published comparison on CIFAR has momentum 0.996 throughout, a projector as wide as the
    backbone, a predictor of hidden width 256, and split batch normalisation in groups of 128.
    """

    name: Literal["byol"] = "byol"
    momentum: Share = 0.996
    """Share of the target network that stays, each step: tau at the start."""
    momentum_schedule: Literal["cosine", "fixed"] = "cosine"
    """`cosine` raises the momentum to 1 over all optimizer steps."""
    head: Layers = OFFICIAL
    """The projector of the online network."""
    target_head: Layers | None = None
    """The target's projector where it differs in batch normalisation; None: as `head`."""
    predictor: Layers = OFFICIAL
    """From projections to predictions of the target's projections."""
    batch_norm: BatchNormMode = SyncNorm()
    """Over one view at a time, in both networks, as published; `shuffle` is MoCo's and refused."""

    def __post_init__(self) -> None:
        refuse_shuffle(self.batch_norm, method=self.name)
        target = self.target_head or self.head
        if _shape(target) != _shape(self.head):
            raise ValueError(
                f"target_head and head must have the same layers but for batch norms, got "
                f"{_shape(target)} and {_shape(self.head)}"
            )
        if self.predictor.dim != self.head.dim:
            raise ValueError(
                f"predictor.dim={self.predictor.dim} must be head.dim={self.head.dim}: "
                f"predictions are compared with projections"
            )


def _shape(head: MLPHead | LinearHead) -> str:
    """Return what two heads must share so that one can follow the other, in words."""
    if isinstance(head, LinearHead):
        return f"linear {head.dim}"
    bias = "no bias" if head.batch_norm == "all" else "bias"
    hidden = head.hidden_dim or "as the backbone"
    return f"mlp {head.dim} of {head.layers} layers, hidden_dim {hidden}, {bias}"


class BYOL(Objective):
    """BYOL's online and target network and loss; views: two tensors of the same images.

    Each view goes through a network alone, four forwards in all, so that batch statistics are those
    of one view as in the official code; both networks are in training mode and keep statistics of
    their own. The target starts as a copy (the official code draws it anew, which is reported not
    to matter). What the target's projector has and the online one has not stays as it began.
    """

    def __init__(self, method: BYOLConfig, backbone: Backbone, *, seed: int = 0) -> None:
        super().__init__()
        self.method = method
        self.backbone = backbone
        with seeded(seed):
            self.head = Head(method.head, backbone.dim)
            self.predictor = Head(method.predictor, self.head.dim)
            target_head = Head(method.target_head or method.head, backbone.dim)
        set_batch_norm(self, method.batch_norm)
        set_batch_norm(target_head, method.batch_norm)
        self.target_backbone = copy.deepcopy(backbone).requires_grad_(False)
        self.target_head = target_head.requires_grad_(False)
        for target, online in self._pairs():
            target.data.copy_(online.data)

    def forward(self, views: list[Tensor], ids: Tensor) -> tuple[Tensor, Metrics]:
        """Return the mean over this rank's images of both directions' squared distances."""
        predictions = [self.predictor(self.head(self.backbone(view))) for view in views]
        with torch.no_grad():
            targets = [self.target_head(self.target_backbone(view)) for view in views]
        with full_precision(predictions[0]):
            p0, p1 = (unit_rows(out) for out in predictions)
            z0, z1 = (unit_rows(out) for out in targets)
            loss = bootstrap(p0, z1) + bootstrap(p1, z0)
        # The target's projections have no gradient to disturb, and are where a collapse shows.
        self.embedded = collectives.gather(z1, self.shares_of(len(z1)))
        return loss, {
            "loss": loss.detach(),
            "embedding_std": embedding_std(self.embedded),
            "positive_similarity": (1 - loss.detach() / 4),
        }

    def _pairs(self) -> Iterator[tuple[nn.Parameter, nn.Parameter]]:
        """Yield (target, online) of every parameter that both networks have."""
        yield from zip(self.target_backbone.parameters(), self.backbone.parameters(), strict=True)
        online = self.head.parts()
        for name, layer in self.target_head.parts().items():
            own = dict(online[name].named_parameters()) if name in online else {}
            for key, parameter in layer.named_parameters():
                if key in own:
                    yield parameter, own[key]

    @torch.no_grad()
    def after_step(self, progress: float) -> None:
        """Move the target's parameters towards the online network's; statistics are their own."""
        super().after_step(progress)
        tau = momentum_at(self.method, progress)
        for target, online in self._pairs():
            target.lerp_(online, 1 - tau)

    def encoder(self) -> Backbone:
        """Return the online backbone."""
        return self.backbone


def momentum_at(method: BYOLConfig, progress: float) -> float:
    """Return tau at `progress` in [0, 1]: with the cosine, momentum at 0 and 1 at the end."""
    if method.momentum_schedule == "fixed":
        return method.momentum
    return 1 - (1 - method.momentum) * (math.cos(math.pi * progress) + 1) / 2
