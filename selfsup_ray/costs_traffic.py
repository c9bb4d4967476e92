"""Bytes that the workers of a training send each other in a step, from the method's definition."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import nn

from selfsup_ray.models.backbones import build_backbone
from selfsup_ray.models.heads import NoHead
from selfsup_ray.models.insdis import NCELoss
from selfsup_ray.models.norm import BatchNorm, ShuffleNorm, SyncNorm
from selfsup_ray.models.pretext import (
    BYOL,
    BYOLConfig,
    InsDisConfig,
    MoCo,
    MoCoConfig,
    PretextMethod,
    Pretraining,
    build_pretext,
)

if TYPE_CHECKING:
    from selfsup_ray.stages.pretext import PretextConfig

FLOAT = 4
"""Bytes of a number in gradients, embeddings and statistics."""


@dataclass(frozen=True)
class StepBytes:
    """Sent by all workers together in one step, in rings: each number crosses W - 1 borders.

    An all-gather of B rows over W workers sends (W - 1) B rows, an all-reduce of P numbers
    2 (W - 1) P of them.
    """

    gradients: int
    """2 (W - 1) P: the sum of the gradients of P parameters."""
    embeddings: int
    """(W - 1) B d for each gather, and 2 (W - 1) B d where a gradient flows back through it."""
    images: int
    """(W - 1) B 3 s^2: ShuffleBN's batch, each image to every worker."""
    statistics: int
    """Batch normalisation: per layer in the forward and backward pass, or once a step."""

    @property
    def total(self) -> int:
        """Bytes of a step."""
        return self.gradients + self.embeddings + self.images + self.statistics


@dataclass(frozen=True)
class PretextSize:
    """What a pretext training keeps and sends, from the modules themselves, without memory."""

    step: StepBytes
    checkpoint_bytes: int
    """Of one checkpoint: parameters, buffers, and one moment of SGD for each parameter."""


def pretext_size(config: PretextConfig, *, workers: int, side: int, n: int) -> PretextSize:
    """Return bytes of a step over `workers`, and of a checkpoint; nothing is computed.

    side: of the views, in pixels; n: images of the corpus.
    """
    with torch.device("meta"):
        backbone = build_backbone(config.backbone)
        objective = build_pretext(config.method, backbone, num_images=n)
    trained = sum(p.numel() for _, p in objective.trainable())
    state = sum(t.numel() * t.element_size() for t in objective.state_dict().values())
    sent = max(workers, 1) - 1
    rows = sent * config.batch_size
    step = StepBytes(
        gradients=2 * sent * trained * FLOAT,
        embeddings=_embeddings(config.method, objective) * rows * FLOAT,
        images=_images(config, rows, side),
        statistics=_statistics(config.method, objective, max(workers, 1)),
    )
    return PretextSize(step, state + trained * FLOAT)


def _forwards(method: PretextMethod) -> int:
    """Return how often a step calls each network."""
    symmetric = isinstance(method, MoCoConfig) and method.symmetric
    return 2 if symmetric or isinstance(method, BYOLConfig) else 1


def _embeddings(method: PretextMethod, objective: Pretraining) -> int:
    """Return numbers of a row of the batch that cross one border."""
    d = objective.head.dim
    match method:
        case MoCoConfig():
            return d * _forwards(method)  # keys; no gradient flows back
        case BYOLConfig():
            return d  # targets, to watch for a collapse
        case InsDisConfig(loss=NCELoss(noise=noise)):
            # Vectors and ids, then rows, similarities and gradients, each summed over ranks.
            return d + 2 + 2 * d + 2 * 2 * (noise + 1) + 2 * d
        case InsDisConfig():
            return d + 2 + 2 * d + 2 * d
    return 2 * d * (1 + 2)  # both views; their gradient is summed over ranks


def _images(config: PretextConfig, rows: int, side: int) -> int:
    if not isinstance(config.method.batch_norm, ShuffleNorm):
        return 0
    number = 2 if config.precision == "bfloat16" else FLOAT
    return rows * 3 * side * side * number * _forwards(config.method)


def _statistics(method: PretextMethod, objective: Pretraining, workers: int) -> int:
    """Return the bytes of means and variances, and of the sums that their gradient needs."""
    sent, keys = workers - 1, 0
    channels = sum(m.num_features for m in objective.modules() if isinstance(m, BatchNorm))
    if not isinstance(method.batch_norm, SyncNorm):  # running statistics, once a step
        return 2 * sent * 2 * channels * FLOAT
    both = _without_gradient(objective)
    if both:
        modules = [m for net in both for m in net.modules() if isinstance(m, BatchNorm)]
        keys = sum(m.num_features for m in modules)
    forward = sent * workers * 3 * channels * FLOAT  # means, variances, numbers of values
    backward = 2 * sent * 2 * (channels - keys) * FLOAT
    return (forward + backward) * _forwards(method)


def _without_gradient(objective: Pretraining) -> tuple[nn.Module, ...]:
    match objective:
        case MoCo():
            return objective.key_backbone, objective.key_head
        case BYOL():
            return objective.target_backbone, objective.target_head
    return ()


def bank_bytes(made: PretextConfig, n: int) -> float:
    """Return the memory of a worker's rows of a bank; the first has all of them at a checkpoint."""
    if not isinstance(made.method, InsDisConfig):
        return 0
    head, workers = made.method.head, max(made.resources.workers, 1)
    rows = n * (made.backbone.dim if isinstance(head, NoHead) else head.dim) * FLOAT
    return rows / workers + (rows if workers > 1 else 0)
