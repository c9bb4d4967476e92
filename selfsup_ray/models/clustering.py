"""Clustering objectives: SCAN and self-labelling."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from selfsup_ray import collectives
from selfsup_ray.models.backbones import Backbone, seeded
from selfsup_ray.models.norm import BatchNorm, SyncNorm, set_batch_norm
from selfsup_ray.models.objective import (
    Metrics,
    Objective,
    at_least_float32,
    full_precision,
)
from selfsup_ray.ops.losses import confident_cross_entropy, scan_loss

HEAD_MEMORY = 0.99  # share of a head's running loss that stays, each step: about 100 steps

BACK_OFF = 0.98  # factor on the threshold after a step in which nobody was confident
LOWEST_THRESHOLD = 0.5


class Scan(Objective):
    """SCAN's clustering step (Van Gansbeke et al. 2020); views: anchors and their neighbors.

    Batch normalisation of a trained backbone is over all ranks. A frozen backbone stays in
    evaluation mode; then only the heads' weights and biases are trained.
    """

    running_losses: Tensor

    def __init__(
        self,
        backbone: Backbone,
        *,
        num_clusters: int,
        num_heads: int = 1,
        entropy_weight: float = 5.0,
        freeze_backbone: bool = False,
        seed: int = 0,
    ) -> None:
        super().__init__()
        self.backbone = backbone.requires_grad_(not freeze_backbone)
        with seeded(seed):
            heads = [nn.Linear(backbone.dim, num_clusters) for _ in range(num_heads)]
        self.heads = nn.ModuleList(heads)
        self.entropy_weight = entropy_weight
        self.freeze_backbone = freeze_backbone
        self.register_buffer("running_losses", torch.zeros(num_heads))
        set_batch_norm(self, SyncNorm())

    def train(self, mode: bool = True) -> Scan:
        """Switch to training or evaluation; a frozen backbone always evaluates."""
        super().train(mode)
        if self.freeze_backbone:
            self.backbone.eval()
        return self

    def forward(self, views: list[Tensor], ids: Tensor) -> tuple[Tensor, Metrics]:
        """Return the sum of the heads' losses; the metric `loss` is their mean."""
        a, b = (at_least_float32(self._features(images)) for images in views)
        with full_precision(a):
            parts = [
                scan_loss(
                    head(a),
                    head(b),
                    entropy_weight=self.entropy_weight,
                    all_sum=collectives.all_sum,
                )
                for head in self.heads
            ]
        totals = torch.stack([part.total for part in parts])
        if self.training:
            self.running_losses.lerp_(totals.detach().to(self.running_losses), 1 - HEAD_MEMORY)
        metrics = {
            "loss": totals.detach().mean(),
            "consistency": torch.stack([part.consistency.detach() for part in parts]).mean(),
            "entropy": torch.stack([part.entropy.detach() for part in parts]).mean(),
        }
        per_head = {f"loss_head{i}": total for i, total in enumerate(totals.detach())}
        return totals.sum(), metrics | per_head

    def _features(self, images: Tensor) -> Tensor:
        with torch.set_grad_enabled(torch.is_grad_enabled() and not self.freeze_backbone):
            features: Tensor = self.backbone(images)
        return features

    def best_head(self) -> int:
        """Return the head with the lowest training loss over about the last 100 steps.

        SCAN's code compares validation losses with entropy weight 1; we select without a
        validation set, by the loss that is trained.
        """
        return int(self.running_losses.argmin())

    def encoder(self) -> Backbone:
        """Return the backbone under the heads."""
        return self.backbone


class SelfLabel(Objective):
    """SCAN's self-labelling step; views: a weak one (the evaluation view) and a strong one.

    The weak branch runs in training mode without gradient, as in SCAN's code. Where nobody in the
    global batch is confident, which is an error there, the step is left out and counted, and the
    threshold in use backs off by 2 %; every step with somebody brings it back up by as much.
    ema: after every step the weights become ema * before + (1 - ema) * after and training goes on
    from them, with batch-norm statistics kept at the start's (SCAN's code, ImageNet: 0.999).
    """

    current_threshold: Tensor
    skipped_steps: Tensor

    def __init__(
        self,
        backbone: Backbone,
        head: nn.Linear,
        *,
        threshold: float = 0.99,
        balance: bool = True,
        ema: float | None = None,
    ) -> None:
        super().__init__()
        self.backbone = backbone.requires_grad_()
        self.head = head.requires_grad_()
        self.threshold = threshold
        self.balance = balance
        self.ema = ema
        self.register_buffer("current_threshold", torch.tensor(threshold))
        self.register_buffer("skipped_steps", torch.zeros((), dtype=torch.int64))
        self._num_confident: list[Tensor] = []
        self._before: list[Tensor] | None = None
        set_batch_norm(self, SyncNorm())

    def forward(self, views: list[Tensor], ids: Tensor) -> tuple[Tensor, Metrics]:
        """Return the loss of the global batch's confident images, 0 when there are none."""
        weak, strong = views
        if self.ema is not None and self._before is None:
            self._before = [x.detach().clone() for x in self._averaged()]
        with torch.no_grad():
            weak_logits = self._logits(weak)
        # Before torch's change 165068, autocast reused weights that it had cast without gradient.
        torch.clear_autocast_cache()
        strong_logits = self._logits(strong)
        result = confident_cross_entropy(
            weak_logits,
            strong_logits,
            threshold=self.current_threshold,
            balance=self.balance,
            all_sum=collectives.all_sum,
        )
        counts = result.counts
        num_confident = counts.sum()
        self._num_confident.append(num_confident)
        metrics = {
            "loss": result.loss.detach(),
            "confident_share": num_confident / (len(ids) * collectives.world_size()),
            "confident_clusters": (counts > 0).sum().float(),
            "largest_confident_share": counts.max() / num_confident.clamp_min(1),
            "threshold": self.current_threshold.clone(),
            "skipped_steps": self.skipped_steps.float(),
        }
        return result.loss, metrics

    def _logits(self, images: Tensor) -> Tensor:
        features = self.backbone(images)
        with full_precision(features):
            logits: Tensor = self.head(
                features.float() if features.dtype.itemsize < 4 else features
            )
        return logits

    def should_step(self) -> bool:
        """Return whether anybody was confident since the last step."""
        return bool(torch.stack(self._num_confident).sum() > 0) if self._num_confident else True

    @torch.no_grad()
    def after_step(self, progress: float) -> None:
        """Average the weights, and move the threshold by whether anybody was confident."""
        super().after_step(progress)
        if self.should_step():
            self.current_threshold.div_(BACK_OFF).clamp_(max=self.threshold)
        else:
            self.skipped_steps += 1
            lowest = min(LOWEST_THRESHOLD, self.threshold)
            self.current_threshold.mul_(BACK_OFF).clamp_(min=lowest)
        self._num_confident = []
        if self.ema is None or self._before is None:
            return
        for now, before in zip(self._averaged(), self._before, strict=True):
            is_statistic = not now.requires_grad
            now.copy_(before) if is_statistic else now.lerp_(before, self.ema)
            before.copy_(now)

    def _averaged(self) -> list[Tensor]:
        """Return the parameters and, without gradient, the batch-norm statistics."""
        statistics = [
            buffer
            for layer in self.modules()
            if isinstance(layer, BatchNorm)
            for buffer in (layer.running_mean, layer.running_var)
            if buffer is not None
        ]
        return [*self.parameters(), *statistics]

    def encoder(self) -> Backbone:
        """Return the backbone under the head."""
        return self.backbone
