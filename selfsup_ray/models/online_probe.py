"""A linear classifier that watches a pretext method learn, without any influence on it."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from selfsup_ray import collectives
from selfsup_ray.config import PositiveFloat, config
from selfsup_ray.models.backbones import Backbone
from selfsup_ray.models.objective import Metrics, Objective

if TYPE_CHECKING:
    from selfsup_ray.data.datasets import Dataset

MOMENTUM = 0.9


@config
class OnlineProbeConfig:
    """A linear probe on the features of a method that is being trained, by SGD of its own."""

    lr: PositiveFloat = 0.1
    """Peak learning rate; it follows a cosine to 0 over the training. Momentum 0.9, no decay."""


class OnlineProbe(Objective):
    """A pretext method, and beside it a softmax regression on the features of its first view.

    The classifier's weights are buffers, its gradient is the closed form (p - y) x', and its step
    is its own: labels touch neither autograd nor the method's optimizer, so the encoder becomes
    bit for bit what it becomes without a probe. `online_accuracy` counts before the step that
    learns from a batch. labels: (N,) int64 by id, -1 is unknown.
    """

    labels: Tensor
    weight: Tensor
    velocity: Tensor

    def __init__(
        self, method: Objective, labels: Tensor, *, num_classes: int, config: OnlineProbeConfig
    ) -> None:
        super().__init__()
        self.method, self.lr = method, config.lr
        self.num_views = method.num_views
        dim = method.encoder().dim
        self.register_buffer("labels", labels, persistent=False)
        self.register_buffer("weight", torch.zeros(num_classes, dim + 1))  # the last column: bias
        self.register_buffer("velocity", torch.zeros(num_classes, dim + 1))
        self._seen: list[Tensor] = []
        self._gradients: list[Tensor] = []
        method.encoder().register_forward_hook(self._note)

    def _note(self, network: nn.Module, inputs: Any, output: Tensor) -> None:
        if self.training and not self._seen:
            self._seen.append(output.detach())

    def forward(self, views: list[Tensor], ids: Tensor) -> tuple[Tensor, Metrics]:
        """Return the method's loss and metrics, with `online_accuracy` and `online_loss`."""
        self.method.shares = self.shares
        self._seen.clear()
        loss, metrics = self.method(views, ids)
        if not self._seen:
            return loss, metrics
        # Every method's first pass through its encoder starts with the first view of the batch.
        return loss, metrics | self._measured(self._seen.pop()[: len(ids)], ids)

    @torch.no_grad()
    def _measured(self, features: Tensor, ids: Tensor) -> Metrics:
        with torch.autocast(features.device.type, enabled=False):
            x = F.pad(features.to(self.weight.dtype), (0, 1), value=1.0)  # (n, dim + 1)
            label = self.labels[ids.to(self.labels.device)]
            x, label = x[label >= 0], label[label >= 0]
            logits = x @ self.weight.T
            p = logits.softmax(dim=1)
            gradient = (p - F.one_hot(label, logits.shape[1])).T @ x
            summed = F.cross_entropy(logits, label, reduction="sum")
            hits = (logits.argmax(dim=1) == label).sum().to(summed)
            counts = torch.stack([summed, hits, hits.new_tensor(len(label))])
        counts, gradient = collectives.all_sum(counts), collectives.all_sum(gradient)
        count = counts[2].clamp_min(1)
        self._gradients.append(gradient / count)
        return {"online_accuracy": counts[1] / count, "online_loss": counts[0] / count}

    @torch.no_grad()
    def after_step(self, progress: float) -> None:
        """Let the method update what follows its step; then take the classifier's own."""
        self.method.after_step(progress)
        if self._gradients:
            gradient = torch.stack(self._gradients).mean(dim=0)  # of the parts of a batch
            self.velocity.mul_(MOMENTUM).add_(gradient)
            self.weight.sub_(self.velocity, alpha=self.lr * (1 + math.cos(math.pi * progress)) / 2)
            self._gradients = []

    def encoder(self) -> Backbone:
        """Return the method's backbone."""
        return self.method.encoder()

    def trainable(self) -> list[tuple[str, nn.Parameter]]:
        """Return the method's parameters: the probe has none."""
        return self.method.trainable()

    def should_step(self) -> bool:
        """Return what the method says."""
        return self.method.should_step()

    def at_record(self) -> dict[str, float]:
        """Return the method's numbers."""
        return self.method.at_record()

    def before_epoch(self, epoch: int, dataset: Dataset) -> None:
        """Let the method prepare an epoch."""
        self.method.before_epoch(epoch, dataset)

    def after_epoch(self, epoch: int) -> dict[str, float]:
        """Return the method's numbers of an epoch."""
        return self.method.after_epoch(epoch)
