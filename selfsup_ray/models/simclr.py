"""SimCLR: the views of a batch are each other's negatives; config and objective."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from selfsup_ray import collectives
from selfsup_ray.config import PositiveFloat, config
from selfsup_ray.models.backbones import Backbone, seeded
from selfsup_ray.models.heads import Head, HeadConfig, MLPHead
from selfsup_ray.models.norm import BatchNormMode, SyncNorm, refuse_shuffle, set_batch_norm
from selfsup_ray.models.objective import (
    Metrics,
    Objective,
    embedding_std,
    full_precision,
    unit_rows,
)
from selfsup_ray.ops.losses import cross_view_nt_xent, nt_xent, one_way_nt_xent


@config
class SimCLRConfig:
    """SimCLR (Chen et al. 2020): the views of the whole batch are each other's negatives."""

    name: Literal["simclr"] = "simclr"
    temperature: PositiveFloat = 0.1
    """0.1 for ImageNet and in SCAN; SimCLR's paper has 0.5 for CIFAR-10."""
    loss: Literal["nt_xent", "one_way", "cross_view"] = "nt_xent"
    """`one_way`: only first views are anchors (SCAN's code). `cross_view`: negatives only from the
    other view, both directions in one logit (a published CIFAR comparison of SimCLR and BYOL)."""
    head: HeadConfig = MLPHead()
    batch_norm: BatchNormMode = SyncNorm()
    """Over both views of all ranks together; `shuffle` is MoCo's and refused here."""

    def __post_init__(self) -> None:
        refuse_shuffle(self.batch_norm, method=self.name)


LOSSES = {"nt_xent": nt_xent, "one_way": one_way_nt_xent, "cross_view": cross_view_nt_xent}


class SimCLR(Objective):
    """SimCLR's network and loss; views: two tensors of the same images."""

    def __init__(self, method: SimCLRConfig, backbone: Backbone, *, seed: int = 0) -> None:
        super().__init__()
        self.method = method
        self.backbone = backbone
        with seeded(seed):
            self.head = Head(method.head, backbone.dim)
        set_batch_norm(self, method.batch_norm)

    def forward(self, views: list[Tensor], ids: Tensor) -> tuple[Tensor, Metrics]:
        """Return the mean loss of this rank's anchors against the views of all ranks."""
        # One batch of both views: batch normalisation is over 2B rows, as in SimCLR's own code.
        out = self.head(self.backbone(torch.cat(views)))
        with full_precision(out):
            z0, z1 = unit_rows(out).chunk(2)
            shares = self.shares_of(len(z0))
            both = collectives.gather(torch.cat([z0, z1], dim=1), shares)  # (B, 2d), one traffic
            all0, all1 = both.chunk(2, dim=1)
            loss = LOSSES[self.method.loss](
                *(z0, z1),
                temperature=self.method.temperature,
                contrast=(all0, all1),
                first=shares.first,
            )
        self.embedded = all0.detach()
        metrics = {
            "loss": loss.detach(),
            "embedding_std": embedding_std(self.embedded),
            "positive_similarity": (z0 * z1).sum(dim=1).mean().detach(),
        }
        return loss, metrics

    def encoder(self) -> Backbone:
        """Return the trained backbone."""
        return self.backbone
