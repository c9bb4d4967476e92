"""Projection heads: what a contrastive loss sees of a backbone's features."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field
from torch import nn

from selfsup_ray.config import Positive, config
from selfsup_ray.models.norm import BatchNorm


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
    affine: bool = True
    """Whether the batch normalisations have a scale and an offset that are learned."""

    def __post_init__(self) -> None:
        if not self.affine and self.batch_norm is None:
            raise ValueError("affine=false needs a batch_norm, all or hidden, that it belongs to")


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


class Head(nn.Sequential):
    """A projection head from features (B, in_dim) to embeddings (B, dim), not unit rows."""

    def __init__(self, config: MLPHead | LinearHead | NoHead, in_dim: int) -> None:
        match config:
            case MLPHead():
                layers, dim = _mlp(config, in_dim), config.dim
            case LinearHead():
                layers, dim = [nn.Linear(in_dim, config.dim)], config.dim
            case NoHead():
                layers, dim = [], in_dim
        super().__init__(*layers)
        self.config = config
        self.dim = dim

    def parts(self) -> dict[str, nn.Module]:
        """Return the layers with weights by kind and depth: linear1, norm1, linear2, ...

        Heads with and without batch normalisation call the same linear layers the same.
        """
        depth, found = 0, dict[str, nn.Module]()
        for layer in self:
            if isinstance(layer, nn.Linear):
                depth += 1
                found[f"linear{depth}"] = layer
            elif isinstance(layer, BatchNorm):
                found[f"norm{depth}"] = layer
        return found


def _mlp(config: MLPHead, in_dim: int) -> list[nn.Module]:
    hidden = config.hidden_dim or in_dim
    has_bias = config.batch_norm != "all"
    layers: list[nn.Module] = []
    for i in range(config.layers - 1):
        layers.append(nn.Linear(in_dim if i == 0 else hidden, hidden, bias=has_bias))
        if config.batch_norm is not None:
            layers.append(BatchNorm(hidden, affine=config.affine))
        layers.append(nn.ReLU(inplace=True))
    layers.append(nn.Linear(hidden, config.dim, bias=has_bias))
    if config.batch_norm == "all":
        layers.append(BatchNorm(config.dim, offset=False, affine=config.affine))
    return layers
