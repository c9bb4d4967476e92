"""Pretext methods: the union of their configs, what they ask of a batch, and how they are built."""

from __future__ import annotations

from typing import Annotated

from pydantic import Field

from selfsup_ray.models.backbones import Backbone
from selfsup_ray.models.byol import BYOL, BYOLConfig
from selfsup_ray.models.insdis import InsDis, InsDisConfig
from selfsup_ray.models.moco import MoCo, MoCoConfig, check_moco
from selfsup_ray.models.simclr import SimCLR, SimCLRConfig

__all__ = [
    "BYOL",
    "BYOLConfig",
    "InsDis",
    "InsDisConfig",
    "MoCo",
    "MoCoConfig",
    "PretextMethod",
    "Pretraining",
    "SimCLR",
    "SimCLRConfig",
    "build_pretext",
    "check_method",
]

PretextMethod = Annotated[
    SimCLRConfig | MoCoConfig | BYOLConfig | InsDisConfig, Field(discriminator="name")
]
Pretraining = SimCLR | MoCo | BYOL | InsDis
"""An objective with a backbone and a head."""


def check_method(method: PretextMethod, *, batch_size: int) -> None:
    """Raise ConfigError when a method cannot train on global batches of batch_size images."""
    if isinstance(method, MoCoConfig):
        check_moco(method, batch_size=batch_size)


def build_pretext(
    method: PretextMethod, backbone: Backbone, *, num_images: int | None = None, seed: int = 0
) -> Pretraining:
    """Return the objective of a method around a backbone; the seed draws head, queue and bank.

    num_images: of the corpus, which instance discrimination has a row for each of.
    """
    match method:
        case SimCLRConfig():
            return SimCLR(method, backbone, seed=seed)
        case MoCoConfig():
            return MoCo(method, backbone, seed=seed)
        case BYOLConfig():
            return BYOL(method, backbone, seed=seed)
        case InsDisConfig():
            assert num_images is not None, "a memory bank has a row for each image: give num_images"
            return InsDis(method, backbone, num_images=num_images, seed=seed)
