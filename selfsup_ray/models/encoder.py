"""Encoder: a trained backbone on disk, and images to unit rows with it."""

from __future__ import annotations

from functools import cached_property
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from torch import Tensor, nn

from selfsup_ray.artifacts import Array, write_json
from selfsup_ray.config import config, to_dict
from selfsup_ray.errors import ArtifactError, ConfigError
from selfsup_ray.models.backbones import (
    Backbone,
    BackboneConfig,
    ResNetConfig,
    build_backbone,
    fold_batch_norm,
)
from selfsup_ray.models.heads import Head, HeadConfig
from selfsup_ray.models.inputs import ImageInput, Source, image_batches
from selfsup_ray.models.layers import STAGES, Layer, stage_dim, up_to
from selfsup_ray.models.objective import unit_rows
from selfsup_ray.models.weights import content_hash, load_part, read_description, write_weights
from selfsup_ray.ops.augment import center
from selfsup_ray.storage import located


@config
class EncoderDescription:
    """What `encoder.json` says of the weights beside it."""

    backbone: BackboneConfig
    images: ImageInput
    head: HeadConfig | None = None
    """The projection head, when it was saved too."""
    output: Literal["backbone", "head"] = "backbone"
    """Whose unit rows the embeddings are."""

    def __post_init__(self) -> None:
        if self.output == "head" and self.head is None:
            raise ValueError("output=head needs a head")


class UnitEncoder(nn.Module):
    """A network from uint8 images (B, 3, S, S) to float32 unit rows (B, dim), for inference."""

    def __init__(self, backbone: nn.Module, head: nn.Module, images: ImageInput) -> None:
        super().__init__()
        self.backbone = backbone
        self.head = head
        self.images = images

    @torch.no_grad()
    def forward(self, images: Tensor) -> Tensor:
        """Return the unit rows of the images' evaluation views."""
        return unit_rows(self.head(self.backbone(evaluation_view(images, self.images))))


def evaluation_view(images: Tensor, expected: ImageInput) -> Tensor:
    """Return the normalised view (B, 3, s, s), channels last, of uint8 images (B, 3, S, S)."""
    size = expected.view_size or expected.image_size
    mean, std = expected.mean, expected.std
    view = center(images, size=size, mean=mean, std=std, share=expected.share)
    return view.contiguous(memory_format=torch.channels_last)


def for_inference(module: nn.Module, device: str | torch.device) -> nn.Module:
    """Return the module on a device, in evaluation mode and without gradients, made fast.

    Batch normalisations are folded into their convolutions, and memory is channels last.
    """
    module.requires_grad_(False).eval()
    fold_batch_norm(module)
    return module.to(device=device, memory_format=torch.channels_last)  # type: ignore[call-overload, no-any-return]


class Encoder:
    """Handle on a folder with encoder.safetensors and encoder.json; weights load when asked for."""

    def __init__(self, path: Path, description: EncoderDescription) -> None:
        self.path = path
        self.description = description

    @classmethod
    def open(cls, path: Path | str) -> Encoder:
        """Return the encoder in a folder.

        Raises ArtifactError when there is none, or when it is damaged.
        """
        path = located(path)
        return cls(path, read_description(EncoderDescription, path / "encoder.json"))

    @property
    def dim(self) -> int:
        """Dimension of the embeddings."""
        return self._new_head().dim if self.description.output == "head" else self._features

    @property
    def image_size(self) -> int:
        """Side in pixels that files are decoded to."""
        return self.description.images.image_size

    @cached_property
    def fingerprint(self) -> str:
        """Hash of weights and description: two encoders that embed alike have the same."""
        return content_hash(self.path / "encoder.json", self.path / "encoder.safetensors")

    @property
    def _features(self) -> int:
        return self.description.backbone.dim

    def _new_head(self) -> Head:
        if self.description.head is None:
            raise ArtifactError(f"{self.path} was saved without its head. Pretrain it again.")
        return Head(self.description.head, self._features)

    def backbone(self) -> Backbone:
        """Return the backbone with its weights, for further training.

        Raises ArtifactError naming the keys that do not fit.
        """
        backbone = build_backbone(self.description.backbone)
        return load_part(backbone, self.path / "encoder.safetensors", "backbone.")

    def head(self) -> Head:
        """Return the projection head with its weights.

        Raises ArtifactError when none was saved, or naming the keys that do not fit.
        """
        return load_part(self._new_head(), self.path / "encoder.safetensors", "head.")

    def layer_dim(self, layer: Layer | None) -> int:
        """Return the length of a layer's rows; None: of the embeddings.

        Raises ConfigError when the encoder has no such layer.
        """
        config = self.description.backbone
        if layer is None:
            return self.dim
        if layer in STAGES:
            if not isinstance(config, ResNetConfig):
                raise ConfigError(
                    f"{self.path} holds a {config.name}, which has no {layer}. Choose `pooled`."
                )
            return stage_dim(config, layer)
        return self._new_head().dim if layer == "head" else self._features

    def module(
        self, device: str | torch.device = "cpu", *, layer: Layer | None = None
    ) -> nn.Module:
        """Return the network from uint8 (B, 3, S, S) to float32 unit rows (B, dim) of a layer."""
        layer = layer or ("head" if self.description.output == "head" else "pooled")
        head = self.head() if layer == "head" else nn.Identity()
        network = UnitEncoder(up_to(self.backbone(), layer), head, self.description.images)
        return for_inference(network, device)

    def embed(
        self,
        images: Source,
        *,
        layer: Layer | None = None,
        device: str | torch.device = "cpu",
        batch_size: int = 64,
    ) -> Array:
        """Return unit rows (n, dim) float32 of image files, or of a uint8 tensor (n, 3, S, S).

        layer: whose rows, as in `embed.layer`. Raises ImageError naming the first file that is no
        readable image.
        """
        network = self.module(device, layer=layer)
        batches = image_batches(images, self.description.images, batch_size=batch_size)
        rows = [network(batch.to(device)).cpu().numpy() for batch in batches]
        return np.concatenate([np.empty((0, self.layer_dim(layer)), dtype=np.float32), *rows])


def save_encoder(
    out: Path,
    *,
    backbone: Backbone,
    images: ImageInput,
    head: Head | None = None,
    output: Literal["backbone", "head"] = "backbone",
) -> Encoder:
    """Write encoder.safetensors and encoder.json into a folder and return the handle."""
    description = EncoderDescription(
        backbone=backbone.config,
        images=images,
        head=None if head is None else head.config,
        output=output,
    )
    parts = {"backbone.": backbone} if head is None else {"backbone.": backbone, "head.": head}
    write_weights(located(out) / "encoder.safetensors", parts)
    write_json(located(out) / "encoder.json", to_dict(description))
    return Encoder(located(out), description)
