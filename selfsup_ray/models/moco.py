"""MoCo: keys of a slowly moving network, kept in a queue, are the negatives; both versions."""

from __future__ import annotations

import copy
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from selfsup_ray import collectives
from selfsup_ray.config import Positive, PositiveFloat, Share, config
from selfsup_ray.errors import ConfigError
from selfsup_ray.models.backbones import Backbone, seeded
from selfsup_ray.models.heads import Head, HeadConfig, MLPHead
from selfsup_ray.models.norm import BatchNormMode, ShuffleNorm, set_batch_norm
from selfsup_ray.models.objective import (
    Metrics,
    Objective,
    embedding_std,
    full_precision,
    unit_rows,
)
from selfsup_ray.ops.losses import info_nce
from selfsup_ray.ops.rng import uniforms


@config
class MoCoConfig:
    """MoCo (He et al. 2020); the defaults are v2. v1: head.name=linear, temperature=0.07."""

    name: Literal["moco"] = "moco"
    queue_size: Positive = 65536
    """Keys kept as negatives: a multiple of the keys per step, and well below the corpus's size."""
    momentum: Share = 0.999
    """Share of the key network that stays, each step; 0.99 for short CIFAR runs."""
    temperature: PositiveFloat = 0.2
    symmetric: bool = False
    """Each view is query once and key once; the queue then takes two keys per image."""
    head: HeadConfig = MLPHead()
    batch_norm: BatchNormMode = ShuffleNorm()
    """`local` and `sync` leak which key belongs to which query: see ShuffleNorm."""


def check_moco(method: MoCoConfig, *, batch_size: int) -> None:
    """Raise ConfigError unless queue and groups fit global batches of batch_size images."""
    keys = batch_size * (2 if method.symmetric else 1)
    if method.queue_size % keys:
        near = max(1, round(method.queue_size / keys)) * keys
        raise ConfigError(
            f"method.queue_size={method.queue_size} must be a multiple of the {keys} keys that one "
            f"step makes (batch_size={batch_size}). Choose e.g. {near}."
        )
    if isinstance(method.batch_norm, ShuffleNorm):
        _check_groups(method.batch_norm.group_size, batch_size)


def _check_groups(group_size: int, batch_size: int) -> None:
    if batch_size % group_size or batch_size == group_size:
        raise ConfigError(
            f"method.batch_norm.group_size={group_size} must divide batch_size={batch_size} into "
            f"two groups or more, between which the keys are shuffled. Choose e.g. half of it."
        )


def _as_network_sees(images: Tensor) -> Tensor:
    """Return images as the first layer under autocast rounds them anyway: half the traffic."""
    device = images.device.type
    return (
        images.to(torch.get_autocast_dtype(device)) if torch.is_autocast_enabled(device) else images
    )


class MoCo(Objective):
    """MoCo's query and key networks, queue and loss; views: two tensors of the same images.

    The paper updates the key network before a batch's forward; here that happens after the step
    before it, which is the same, as both networks start equal. The keys of a step enter the queue
    after it. ShuffleBN permutes the keys of all ranks and normalises them in groups of fixed size,
    so one process with groups of 32 computes what 8 ranks with 32 images each do.
    """

    queue: Tensor
    keys_seen: Tensor

    def __init__(self, method: MoCoConfig, backbone: Backbone, *, seed: int = 0) -> None:
        super().__init__()
        self.method = method
        self.backbone = backbone
        with seeded(seed):
            self.head = Head(method.head, backbone.dim)
            queue = F.normalize(torch.randn(method.queue_size, self.head.dim), dim=1)
        set_batch_norm(self, method.batch_norm)
        self.key_backbone = copy.deepcopy(backbone).requires_grad_(False)
        self.key_head = copy.deepcopy(self.head).requires_grad_(False)
        self.register_buffer("queue", queue)
        self.register_buffer("keys_seen", torch.zeros((), dtype=torch.int64))
        self._new_keys: list[Tensor] = []

    def forward(self, views: list[Tensor], ids: Tensor) -> tuple[Tensor, Metrics]:
        """Return the mean loss of this rank's queries, view 0, against their keys and the queue."""
        first, second = views
        check_moco(self.method, batch_size=self.shares_of(len(first)).total)
        loss, metrics = self._match(first, second)
        if not self.method.symmetric:
            return loss, metrics
        back, back_metrics = self._match(second, first)
        both = {key: (metrics[key] + back_metrics[key]) / 2 for key in metrics}
        return loss + back, both | {"loss": metrics["loss"] + back_metrics["loss"]}

    def _match(self, query_images: Tensor, key_images: Tensor) -> tuple[Tensor, Metrics]:
        out = self.head(self.backbone(query_images))
        all_keys = self._keys(key_images)  # (B, d), in the order of the images
        if self.training:
            self._new_keys.append(all_keys)
        k = all_keys[self.shares_of(len(out)).first :][: len(out)]
        with full_precision(out):
            q = unit_rows(out)
            loss = info_nce(q, k, self.queue, temperature=self.method.temperature)
        self.embedded = all_keys
        fill = self.keys_seen.clamp_max(len(self.queue)) / len(self.queue)
        metrics = {
            "loss": loss.detach(),
            "embedding_std": embedding_std(all_keys),
            "positive_similarity": (q * k).sum(dim=1).mean().detach(),
            "queue_fill": fill,
        }
        return loss, metrics

    @torch.no_grad()
    def _keys(self, images: Tensor) -> Tensor:
        """Return the unit keys (B, d) of all ranks' images, in the order of the images."""
        shares = self.shares_of(len(images))
        if not isinstance(self.method.batch_norm, ShuffleNorm):
            return collectives.gather(unit_rows(self.key_head(self.key_backbone(images))), shares)
        everyone = collectives.gather(_as_network_sees(images), shares)
        order = self._order(len(everyone))
        mine = everyone[order[shares.first :][: shares.mine]]
        shuffled = collectives.gather(unit_rows(self.key_head(self.key_backbone(mine))), shares)
        keys = torch.empty_like(shuffled)
        keys[order] = shuffled
        return keys

    def _order(self, n: int) -> Tensor:
        """Return a permutation of n that is the same on every rank, new each step."""
        numbers = self.keys_seen + torch.arange(n, device=self.keys_seen.device)
        stream = len(self._new_keys)  # differs between the forwards of one step
        draws = uniforms(seed=0, epoch=0, ids=numbers, draws=1, stream=stream)[:, 0]
        return draws.argsort(stable=True)

    @torch.no_grad()
    def after_step(self, progress: float) -> None:
        """Enqueue the step's keys, then move the key network's parameters towards the query's."""
        super().after_step(progress)
        for keys in self._new_keys:
            self._enqueue(keys)
        self._new_keys = []
        for key_net, net in ((self.key_backbone, self.backbone), (self.key_head, self.head)):
            # Parameters only: running statistics are each network's own.
            for key_parameter, parameter in zip(
                key_net.parameters(), net.parameters(), strict=True
            ):
                key_parameter.lerp_(parameter, 1 - self.method.momentum)

    def _enqueue(self, keys: Tensor) -> None:
        places = (self.keys_seen + torch.arange(len(keys), device=keys.device)) % len(self.queue)
        self.queue.index_copy_(0, places, keys.to(self.queue.dtype))
        self.keys_seen += len(keys)

    def encoder(self) -> Backbone:
        """Return the query backbone."""
        return self.backbone
