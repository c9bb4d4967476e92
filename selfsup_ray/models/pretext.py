"""Pretext methods: SimCLR and MoCo, each beside its config."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from selfsup_ray.config import Positive, PositiveFloat, Share, config
from selfsup_ray.errors import ConfigError
from selfsup_ray.models.backbones import Backbone
from selfsup_ray.models.norm import BatchNormMode, ShuffleNorm, SyncNorm
from selfsup_ray.models.objective import Objective


@config
class MLPHead:
    """Linear layers with ReLU between them."""

    name: Literal["mlp"] = "mlp"
    layers: Annotated[int, Field(ge=2)] = 2
    """Linear layers: 2 in SimCLR, MoCo v2 and SCAN, 3 in SimCLR v2."""
    hidden_dim: Positive | None = None
    """Width of the hidden layers; None: the backbone's."""
    dim: Positive = 128
    """Dimension of the embedding that the loss sees."""
    batch_norm: Literal["all", "hidden"] | None = None
    """`all`: after every linear layer, none of which has a bias, the last without offset (SimCLR).
    `hidden`: after the hidden layers (BYOL). None: nowhere (MoCo v2, SCAN)."""


@config
class LinearHead:
    """One linear layer (MoCo v1)."""

    name: Literal["linear"] = "linear"
    dim: Positive = 128
    """Dimension of the embedding that the loss sees."""


@config
class NoHead:
    """The loss sees the backbone's features."""

    name: Literal["none"] = "none"


HeadConfig = Annotated[MLPHead | LinearHead | NoHead, Field(discriminator="name")]


@config
class SimCLRConfig:
    """SimCLR (Chen et al. 2020): the views of the whole batch are each other's negatives."""

    name: Literal["simclr"] = "simclr"
    temperature: PositiveFloat = 0.1
    """0.1 for ImageNet and in SCAN; SimCLR's paper has 0.5 for CIFAR-10."""
    loss: Literal["nt_xent", "one_way", "cross_view"] = "nt_xent"
    """`one_way`: only first views are anchors (SCAN). `cross_view`: negatives only from the other
    view, both directions in one logit (the CIFAR comparison of contrastive.md)."""
    head: HeadConfig = MLPHead()
    batch_norm: BatchNormMode = SyncNorm()
    """Over both views of all ranks together; `shuffle` is MoCo's and refused here."""

    def __post_init__(self) -> None:
        if isinstance(self.batch_norm, ShuffleNorm):
            raise ValueError("batch_norm.name=shuffle is for moco; simclr takes sync, split, local")


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
    """`local` in one process leaks which key belongs to which query; see ShuffleNorm."""


PretextMethod = Annotated[SimCLRConfig | MoCoConfig, Field(discriminator="name")]


def check_method(method: PretextMethod, *, batch_size: int) -> None:
    """Raise ConfigError when a method cannot train on global batches of batch_size images."""
    if not isinstance(method, MoCoConfig):
        return
    keys = batch_size * (2 if method.symmetric else 1)
    if method.queue_size % keys:
        near = max(1, round(method.queue_size / keys)) * keys
        raise ConfigError(
            f"method.queue_size={method.queue_size} must be a multiple of the {keys} keys that one "
            f"step makes (batch_size={batch_size}). Choose e.g. {near}."
        )


def build_pretext(method: PretextMethod, backbone: Backbone, *, seed: int = 0) -> Objective:
    """Return the objective of a method around a backbone; the seed draws the head and the queue."""
    match method:
        case SimCLRConfig():
            return SimCLR(method, backbone, seed=seed)
        case MoCoConfig():
            return MoCo(method, backbone, seed=seed)


class SimCLR(Objective):
    """SimCLR's networks and loss; views: two tensors of the same images."""

    def __init__(self, method: SimCLRConfig, backbone: Backbone, *, seed: int = 0) -> None:
        super().__init__()
        self.backbone = backbone

    def encoder(self) -> Backbone:
        """Return the trained backbone."""
        return self.backbone


class MoCo(Objective):
    """MoCo's query and key networks, queue and loss; views: two tensors of the same images."""

    def __init__(self, method: MoCoConfig, backbone: Backbone, *, seed: int = 0) -> None:
        super().__init__()
        self.backbone = backbone

    def encoder(self) -> Backbone:
        """Return the query backbone."""
        return self.backbone
