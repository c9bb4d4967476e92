"""Clusterer: a backbone and a cluster head on disk, and images to clusters with them."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from selfsup_ray.artifacts import Array, ShardedArray, write_json
from selfsup_ray.config import Positive, config, to_dict
from selfsup_ray.models.backbones import Backbone, BackboneConfig, build_backbone
from selfsup_ray.models.encoder import evaluation_view, for_inference
from selfsup_ray.models.inputs import ImageInput, Source, image_batches
from selfsup_ray.models.objective import at_least_float32
from selfsup_ray.models.weights import content_hash, load_part, read_description, write_weights
from selfsup_ray.storage import located


@config
class ClustererDescription:
    """What `clusterer.json` says of the weights beside it."""

    backbone: BackboneConfig
    images: ImageInput
    num_clusters: Positive


@dataclass(frozen=True)
class Prediction:
    """Clusters of some images: ids (n,) int32, and probabilities (n, K) float32."""

    clusters: Array
    """The most probable cluster; the lower id when two are equally probable."""
    probabilities: Array


class ClusterNetwork(nn.Module):
    """A network from uint8 images (B, 3, S, S) to cluster probabilities (B, K) float32."""

    def __init__(self, backbone: Backbone, head: nn.Linear, images: ImageInput) -> None:
        super().__init__()
        self.backbone = backbone
        self.head = head
        self.images = images

    @torch.no_grad()
    def forward(self, images: Tensor) -> Tensor:
        """Return the softmax over clusters of the images' evaluation views."""
        features = self.backbone(evaluation_view(images, self.images))
        return at_least_float32(self.head(features)).softmax(dim=1)


class Clusterer:
    """Handle on a folder with clusterer.safetensors, clusterer.json and the corpus's clusters."""

    def __init__(self, path: Path, description: ClustererDescription) -> None:
        self.path = path
        self.description = description

    @classmethod
    def open(cls, path: Path | str) -> Clusterer:
        """Return the clusterer in a folder.

        Raises ArtifactError when there is none, or when it is damaged.
        """
        path = located(path)
        return cls(path, read_description(ClustererDescription, path / "clusterer.json"))

    @property
    def num_clusters(self) -> int:
        """K."""
        return self.description.num_clusters

    @property
    def image_size(self) -> int:
        """Side in pixels that files are decoded to."""
        return self.description.images.image_size

    @cached_property
    def fingerprint(self) -> str:
        """Hash of weights and description: two clusterers that predict alike have the same."""
        return content_hash(self.path / "clusterer.json", self.path / "clusterer.safetensors")

    @property
    def assignments(self) -> ShardedArray:
        """Cluster of every image of the corpus: (N,) int32."""
        return ShardedArray.open(self.path / "assignments")

    @property
    def probabilities(self) -> ShardedArray:
        """Cluster probabilities of every image of the corpus: (N, K) float32."""
        return ShardedArray.open(self.path / "probabilities")

    def backbone(self) -> Backbone:
        """Return the backbone with its weights, for further training.

        Raises ArtifactError naming the keys that do not fit.
        """
        backbone = build_backbone(self.description.backbone)
        return load_part(backbone, self.path / "clusterer.safetensors", "backbone.")

    def head(self) -> nn.Linear:
        """Return the cluster head with its weights, from features (B, dim) to logits (B, K).

        Raises ArtifactError naming the keys that do not fit.
        """
        head = nn.Linear(self.description.backbone.dim, self.num_clusters)
        return load_part(head, self.path / "clusterer.safetensors", "head.")

    def module(self, device: str | torch.device = "cpu") -> nn.Module:
        """Return the network from uint8 (B, 3, S, S) to cluster probabilities (B, K) float32."""
        network = ClusterNetwork(self.backbone(), self.head(), self.description.images)
        return for_inference(network, device)

    def predict(
        self, images: Source, *, device: str | torch.device = "cpu", batch_size: int = 64
    ) -> Prediction:
        """Return clusters of image files, or of a uint8 tensor (n, 3, S, S).

        Raises ImageError naming the first file that is no readable image.
        """
        network = self.module(device)
        batches = image_batches(images, self.description.images, batch_size=batch_size)
        rows = [network(batch.to(device)).cpu().numpy() for batch in batches]
        empty = np.empty((0, self.num_clusters), dtype=np.float32)
        probabilities = np.concatenate([empty, *rows])
        return Prediction(probabilities.argmax(axis=1).astype(np.int32), probabilities)


def save_clusterer(
    out: Path, *, backbone: Backbone, head: nn.Linear, images: ImageInput
) -> Clusterer:
    """Write clusterer.safetensors and clusterer.json into a folder and return the handle."""
    description = ClustererDescription(
        backbone=backbone.config, images=images, num_clusters=head.out_features
    )
    parts = {"backbone.": backbone, "head.": head}
    write_weights(located(out) / "clusterer.safetensors", parts)
    write_json(located(out) / "clusterer.json", to_dict(description))
    return Clusterer(located(out), description)
