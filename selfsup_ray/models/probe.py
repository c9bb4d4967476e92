"""Linear classifiers on a backbone's features, or on its maps: frozen or trained with it."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Literal, Protocol

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from selfsup_ray import collectives
from selfsup_ray.artifacts import Array
from selfsup_ray.models.backbones import Backbone, seeded
from selfsup_ray.models.layer_maps import MapProbe
from selfsup_ray.models.norm import SyncNorm, set_batch_norm
from selfsup_ray.models.objective import Metrics, Objective, at_least_float32, full_precision

TESTED_AT_ONCE = 256
"""Images of one forward pass when the accuracy is measured."""


class Measured(Protocol):
    """Labelled images to measure the accuracy on, at positions 0..len-1."""

    labels: Array
    """(n,) int64 in [0, C)."""

    def __len__(self) -> int: ...

    def read(self, positions: Array) -> Tensor:
        """Return what `views` takes of these positions, on the CPU."""
        ...

    def views(self, batch: Tensor) -> Iterable[Tensor]:
        """Return the network's inputs, on the device of the batch; their logits are averaged."""
        ...


class BackboneClassifier(Objective):
    """Linear classifiers on one view's features; views: one tensor of images.

    labels: (N,) int64 by the ids that `forward` gets, in [0, num_classes), -1 unknown: left out.
    factors: {name: factor}, one classifier each. Its loss is multiplied by the factor, which under
    SGD without weight decay is the same as multiplying its learning rate: several rates are tried
    on the features of one forward pass. start: weights N(0, 0.01) (contrastive probes' convention)
    or zero (SimCLR); biases are zero. A frozen backbone stays in evaluation mode; that of a trained
    one is normalised over all ranks. layers: {name: (channels, side)} of the maps that a frozen
    backbone returns, for one classifier on each in place of `factors`; trained side by side they
    are what each would be alone. measured: name -> images whose accuracy is measured after every
    `every` epochs, from epoch `first` on, counted from 0, and after the last.
    """

    labels: Tensor
    hits: Tensor

    def __init__(
        self,
        backbone: nn.Module,
        labels: Tensor,
        *,
        dim: int,
        num_classes: int,
        frozen: bool = True,
        factors: Mapping[str, float] | None = None,
        layers: Mapping[str, tuple[int, int]] | None = None,
        start: Literal["normal", "zero"] = "normal",
        seed: int = 0,
        measured: Mapping[str, Measured] | None = None,
        epochs: int = 1,
        every: int = 1,
        first: int = 0,
        precision: str = "float32",
    ) -> None:
        super().__init__()
        self.backbone = backbone.requires_grad_(not frozen)
        self.frozen = frozen
        self.factors = dict(factors or {"": 1.0})
        self.measured, self.epochs, self.every = dict(measured or {}), epochs, every
        self.first, self.precision = first, precision
        with seeded(seed):
            if layers:
                self.factors = {f"_{name}": 1.0 for name in layers}
                made = [MapProbe(*shape, num_classes) for shape in layers.values()]
                self.heads = nn.ModuleList(made)
                set_batch_norm(self.heads, SyncNorm())
            else:
                self.heads = nn.ModuleList(_head(dim, num_classes, start) for _ in self.factors)
        self.register_buffer("labels", labels, persistent=False)
        # Of the images that were measured last, by set, classifier and class.
        shape = (len(self.measured), len(self.factors), num_classes)
        self.register_buffer("hits", torch.zeros(shape, dtype=torch.int64))
        if not frozen:
            set_batch_norm(self, SyncNorm())

    def train(self, mode: bool = True) -> BackboneClassifier:
        """Switch to training or evaluation; a frozen backbone always evaluates."""
        super().train(mode)
        if self.frozen:
            self.backbone.eval()
        return self

    def logits(self, view: Tensor) -> list[Tensor]:
        """Return the logits (B, C) of every classifier."""
        with torch.set_grad_enabled(torch.is_grad_enabled() and not self.frozen):
            found = self.backbone(view)
        features = found if isinstance(found, list) else [found] * len(self.heads)
        with full_precision(features[0]):
            return [head(at_least_float32(x)) for head, x in zip(self.heads, features, strict=True)]

    def forward(self, views: list[Tensor], ids: Tensor) -> tuple[Tensor, Metrics]:
        """Return the sum of the classifiers' mean cross-entropies over the labelled images."""
        label = self.labels[ids.to(self.labels.device)]
        known, sums = (label >= 0).sum(), []
        for logits in self.logits(views[0]):
            summed = F.cross_entropy(logits, label, ignore_index=-1, reduction="sum")
            sums += [summed, (logits.argmax(dim=1) == label).sum().to(summed)]
        totals = collectives.all_sum(torch.stack([*sums, known.to(sums[0])]))
        count = totals[-1].detach().clamp_min(1)
        losses, correct = totals[:-1:2] / count, totals[1:-1:2].detach() / count
        factors = losses.new_tensor(list(self.factors.values()))
        if len(losses) > 1:  # a rate that is too high must not end the others
            losses = torch.where(losses.isfinite(), losses, 0.0)
        metrics: Metrics = {}
        for name, loss, share in zip(self.factors, losses.detach(), correct, strict=True):
            metrics |= {f"loss{name}": loss, f"train_accuracy{name}": share}
        return (losses * factors).sum(), metrics

    def after_epoch(self, epoch: int) -> dict[str, float]:
        """Return `{set}_accuracy{classifier}` when it is time to measure."""
        if (epoch < self.first or (epoch + 1) % self.every) and epoch + 1 != self.epochs:
            return {}
        found = {}
        for i, (name, images) in enumerate(self.measured.items()):
            self.hits[i] = self.correct(images)
            for head, hits in zip(self.factors, self.hits[i].sum(dim=1).tolist(), strict=True):
                found[f"{name}_accuracy{head}"] = hits / len(images)
        return found

    @torch.no_grad()
    def correct(self, images: Measured) -> Tensor:
        """Return (classifiers, C) int64: images of each class that each classifier is right about.

        In evaluation mode; every rank takes its own share.
        """
        before, device = self.training, self.labels.device
        self.eval()
        mine = np.arange(collectives.rank(), len(images), collectives.world_size())
        hits = torch.zeros(self.hits.shape[1:], dtype=torch.int64, device=device)
        for start in range(0, len(mine), TESTED_AT_ONCE):
            positions = mine[start : start + TESTED_AT_ONCE]
            label = torch.from_numpy(images.labels[positions]).to(device)
            total: list[Tensor] | None = None
            for view in images.views(images.read(positions).to(device)):
                with torch.autocast(device.type, torch.bfloat16, self.precision == "bfloat16"):
                    logits = self.logits(view)
                total = (
                    logits if total is None else [a + b for a, b in zip(total, logits, strict=True)]
                )
            assert total is not None, "no view of an image"
            for i, one in enumerate(total):  # the largest sum is the largest mean
                right = label[one.argmax(dim=1) == label]
                hits[i] += torch.bincount(right, minlength=hits.shape[1])
        self.train(before)
        return collectives.all_sum(hits)

    def per_class(self, name: str, head: str) -> list[float | None]:
        """Return the accuracy of every class as last measured; None where a class has no image."""
        images = self.measured[name]
        of = np.bincount(images.labels, minlength=self.hits.shape[2])
        place = list(self.measured).index(name), list(self.factors).index(head)
        hits = self.hits[place].tolist()
        return [h / n if n else None for h, n in zip(hits, of.tolist(), strict=True)]

    def head(self, name: str) -> nn.Linear:
        """Return one of the classifiers."""
        found = self.heads[list(self.factors).index(name)]
        assert isinstance(found, nn.Linear)
        return found

    def encoder(self) -> Backbone:
        """Return the backbone under the classifiers."""
        assert isinstance(self.backbone, Backbone), "stored rows have no backbone"
        return self.backbone


def _head(dim: int, num_classes: int, start: Literal["normal", "zero"]) -> nn.Linear:
    head = nn.Linear(dim, num_classes)
    nn.init.normal_(head.weight, std=0.01) if start == "normal" else nn.init.zeros_(head.weight)
    nn.init.zeros_(head.bias)
    return head


def factors_of(lrs: Sequence[float], lr: float) -> dict[str, float]:
    """Return {name: lr / the optimizer's lr} of learning rates that are tried; {"": 1} for none."""
    return {f"_lr{one:g}": one / lr for one in lrs} or {"": 1.0}
