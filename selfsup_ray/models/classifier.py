"""The objective of labelled networks: cross-entropy, and the accuracy after every epoch."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Protocol

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from selfsup_ray import collectives
from selfsup_ray.artifacts import Array
from selfsup_ray.models.norm import SyncNorm, set_batch_norm
from selfsup_ray.models.objective import Metrics, Objective, at_least_float32, full_precision

TESTED_AT_ONCE = 64
"""Images of one forward pass when the accuracy is measured."""


class LabelledViews(Protocol):
    """Images to measure the accuracy on, at positions 0..len-1, in their evaluation view."""

    labels: Array
    """(n,) int64 in [0, C)."""

    def __len__(self) -> int: ...

    def batch(self, positions: Array) -> list[Tensor]:
        """Return what the objective's forward takes as views, of these positions."""
        ...


class Classifier(Objective):
    """A labelled network with one output or several, each with a loss of its own.

    network(images, codes) gives a list of logits (B, C); its `head_names` say what the numbers of
    each end in, its `output_names` the k of each, or "-". labels: (n,) int64 by the position that
    `forward` gets as id. measured: name -> images whose accuracy is measured after every `every`
    epochs and after the last. Batch norm is over all ranks, so that the network does not depend on
    their number.
    """

    labels: Tensor

    def __init__(
        self,
        network: nn.Module,
        labels: Array,
        *,
        measured: Mapping[str, LabelledViews],
        epochs: int,
        every: int = 1,
        precision: str = "float32",
    ) -> None:
        super().__init__()
        self.network = network
        self.head_names: tuple[str, ...] = network.head_names  # type: ignore[assignment]
        self.output_names: tuple[str, ...] = network.output_names  # type: ignore[assignment]
        self.measured, self.epochs, self.every = dict(measured), epochs, every
        self.precision = precision
        self.register_buffer("labels", torch.from_numpy(labels), persistent=False)
        set_batch_norm(self, SyncNorm())

    def forward(self, views: list[Tensor], ids: Tensor) -> tuple[Tensor, Metrics]:
        """Return the sum of the outputs' cross-entropies; the metric `loss` is the first one's.

        views: [images (B, 3, S, S), packed codes (B, h, w * bytes) if they are known].
        """
        label = self.labels[ids.to(self.labels.device)]
        total, metrics = label.new_zeros((), dtype=torch.float32), Metrics()
        for name, logits in zip(self.head_names, self.outputs(views), strict=True):
            with full_precision(logits):
                loss = F.cross_entropy(at_least_float32(logits), label)
            total = total + loss
            metrics[f"loss{name}"] = loss.detach()
            metrics[f"train_accuracy{name}"] = (logits.argmax(dim=1) == label).float().mean()
        return total, metrics

    def outputs(self, views: list[Tensor]) -> list[Tensor]:
        """Return the logits (B, C) of every output."""
        images, *rest = views
        codes = [packed.view(*packed.shape[:2], packed.shape[1], -1) for packed in rest] or None
        logits: list[Tensor] = self.network(images, codes)
        return logits

    def after_epoch(self, epoch: int) -> dict[str, float]:
        """Return `{name}_accuracy` of every set and output when it is time to measure them."""
        if (epoch + 1) % self.every and epoch + 1 != self.epochs:
            return {}
        found: dict[str, float] = {}
        for name, images in self.measured.items():
            correct = self.correct(images)
            for head, hits in zip(self.head_names, correct, strict=True):
                found[f"{name}_accuracy{head}"] = hits / len(images)
        return found

    def correct(self, images: LabelledViews) -> list[int]:
        """Return how many images each output is right about; every rank takes its own share."""
        mine = np.arange(collectives.rank(), len(images), collectives.world_size())
        hits = torch.zeros(len(self.head_names), dtype=torch.float64, device=self.labels.device)
        for start in range(0, len(mine), TESTED_AT_ONCE):
            positions = mine[start : start + TESTED_AT_ONCE]
            label = torch.from_numpy(images.labels[positions]).to(self.labels.device)
            for i, predicted in enumerate(self.predictions(images, positions)):
                hits[i] += (predicted == label).sum()
        return [int(total) for total in collectives.all_sum(hits).tolist()]

    @torch.no_grad()
    def predictions(self, images: LabelledViews, positions: Array) -> list[Tensor]:
        """Return the class (n,) that each output gives to these images, in evaluation mode."""
        before, device = self.training, self.labels.device
        self.eval()
        views = [view.to(device) for view in images.batch(positions)]
        with torch.autocast(device.type, torch.bfloat16, enabled=self.precision == "bfloat16"):
            found = [logits.argmax(dim=1) for logits in self.outputs(views)]
        self.train(before)
        return found
