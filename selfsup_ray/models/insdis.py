"""Instance discrimination: every image is a class of its own, remembered in a bank."""

from __future__ import annotations

from typing import Annotated, Literal

import torch
from pydantic import Field
from torch import Tensor

from selfsup_ray import collectives
from selfsup_ray.config import Positive, PositiveFloat, Share, config
from selfsup_ray.models.backbones import Backbone, seeded
from selfsup_ray.models.bank import Bank, noise_ids
from selfsup_ray.models.heads import Head, HeadConfig, LinearHead
from selfsup_ray.models.norm import BatchNormMode, SplitNorm, refuse_shuffle, set_batch_norm
from selfsup_ray.models.objective import (
    Metrics,
    Objective,
    embedding_std,
    full_precision,
    unit_rows,
)
from selfsup_ray.ops.losses import instance_softmax, nce

PARTITION_KEPT = 0.99
"""Share of Z that stays at each step when it is averaged."""


@config
class SoftmaxLoss:
    """All images of the corpus are classes."""

    name: Literal["softmax"] = "softmax"


@config
class NCELoss:
    """Noise-contrastive estimation: as many classes as are drawn, whatever the corpus's size."""

    name: Literal["nce"] = "nce"
    noise: Positive = 4096
    """Negatives of each image, drawn from all images with replacement."""
    partition: Literal["frozen", "average"] = "frozen"
    """The constant Z: that of the first batch for ever, as published; the bank is random then, so
    `average` follows it with a moving average of factor 0.99."""


@config
class InsDisConfig:
    """Instance discrimination (Wu et al. 2018); one view of each image."""

    name: Literal["insdis"] = "insdis"
    temperature: PositiveFloat = 0.07
    """0.07 for ImageNet; on CIFAR 0.1 in the published code, and 0.2 to 0.3 are better."""
    momentum: Share = 0.5
    """Share of an image's row in the bank that stays when the image is seen."""
    loss: Annotated[SoftmaxLoss | NCELoss, Field(discriminator="name")] = SoftmaxLoss()
    head: HeadConfig = LinearHead()
    batch_norm: BatchNormMode = SplitNorm(group_size=32)
    """The published runs have 32 images on each GPU; `shuffle` is MoCo's and refused here."""

    def __post_init__(self) -> None:
        refuse_shuffle(self.batch_norm, method=self.name)


class InsDis(Objective):
    """Network and memory bank of instance discrimination; views: one tensor of the images.

    The loss is taken against the bank as it was before the step; the rows of the step's images
    move after it. ids must be the numbers 0..N-1 of the corpus's images.
    """

    num_views = 1
    partition: Tensor
    steps: Tensor

    def __init__(
        self, method: InsDisConfig, backbone: Backbone, *, num_images: int, seed: int = 0
    ) -> None:
        super().__init__()
        self.method, self.seed = method, seed
        self.backbone = backbone
        with seeded(seed):
            self.head = Head(method.head, backbone.dim)
        set_batch_norm(self, method.batch_norm)
        self.bank = Bank(num_images, self.head.dim, seed=seed)
        self.register_buffer("partition", torch.zeros((), dtype=torch.float64))
        self.register_buffer("steps", torch.zeros((), dtype=torch.int64))
        self._seen: list[tuple[Tensor, Tensor]] = []

    def forward(self, views: list[Tensor], ids: Tensor) -> tuple[Tensor, Metrics]:
        """Return the mean loss of this rank's images against the bank of all ranks."""
        out = self.head(self.backbone(views[0]))
        with full_precision(out):
            v = unit_rows(out)
            shares = self.shares_of(len(v))
            all_v, all_ids = collectives.gather(v, shares), collectives.gather(ids, shares)
            own = self.bank.of(all_ids)[shares.first :][: len(v)]
            match self.method.loss:
                case SoftmaxLoss():
                    loss = self._softmax(v, own, all_v)
                case NCELoss(noise=noise):
                    loss = self._nce(v, all_v, all_ids, noise=noise)
        self.embedded = all_v.detach()
        if self.training:
            self._seen.append((all_ids, self.embedded))
        return loss, {
            "loss": loss.detach(),
            "embedding_std": embedding_std(self.embedded),
            "positive_similarity": (v * own).sum(dim=1).mean().detach(),
        }

    def _softmax(self, v: Tensor, own: Tensor, all_v: Tensor) -> Tensor:
        everyone = self.bank.log_sum_exp(all_v, temperature=self.method.temperature)
        mine = everyone[self.shares_of(len(v)).first :][: len(v)]
        return instance_softmax((v * own).sum(dim=1) / self.method.temperature, mine)

    def _nce(self, v: Tensor, all_v: Tensor, all_ids: Tensor, *, noise: int) -> Tensor:
        drawn = noise_ids(
            all_ids, step=self.steps, num_images=len(self.bank), noise=noise, seed=self.seed
        )
        columns = torch.cat([all_ids[:, None], drawn], dim=1)  # (B, 1 + noise), own row first
        logits = self.bank.similarities(all_v, columns) / self.method.temperature
        if self.training:
            self._follow(logits.detach())
        mine = logits[self.shares_of(len(v)).first :][: len(v)]
        return nce(mine, log_partition=self.partition.log(), num_images=len(self.bank))

    def _follow(self, logits: Tensor) -> None:
        """Set the partition Z = N mean(exp(logits)) at the first batch, and follow if asked."""
        now = len(self.bank) * logits.double().exp().mean()
        is_frozen = isinstance(self.method.loss, NCELoss) and self.method.loss.partition == "frozen"
        kept = 1.0 if is_frozen else PARTITION_KEPT
        followed = kept * self.partition + (1 - kept) * now
        self.partition.copy_(torch.where(self.partition == 0, now, followed))

    @torch.no_grad()
    def after_step(self, progress: float) -> None:
        """Move the rows of the step's images towards what the network made of them."""
        super().after_step(progress)
        for ids, v in self._seen:
            self.bank.update(ids, v, momentum=self.method.momentum)
        self._seen = []
        self.steps += 1

    def encoder(self) -> Backbone:
        """Return the trained backbone."""
        return self.backbone
