"""Networks on a patch dictionary: a fixed code of each patch, and a trained part that is linear.

z = m * (V x + b) for Phi_full and z = m for Phi_hard, m the code of the patch x; then average
pooling, batch norm, 1 x 1 bottleneck, and a linear classifier (Brutzkus et al. 2022). What comes
after the code is linear in x as long as the code stays the same.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from selfsup_ray.models.layer_codes import BitCode, Dictionary, TriangleCode
from selfsup_ray.models.norm import BatchNorm
from selfsup_ray.models.patch_layers import (
    CodeConfig,
    DeeperCodeConfig,
    DeeperConvConfig,
    LayerConfig,
    PhiFullConfig,
    PhiHardConfig,
    VanillaConfig,
    entries,
)
from selfsup_ray.ops.gated_linear import gated_pool
from selfsup_ray.ops.patch_codes import Precision, pooled_counts, unpack_bits
from selfsup_ray.ops.relu_pool import relu_pool
from selfsup_ray.ops.spaced_patches import positions, spaced

Gate = Literal["full", "hard", "conv"]
"""What a layer makes of the code: m (V x + b), m, or ReLU(V x + b) without any code."""


class Layer(nn.Module):
    """One layer without its code: gate, pooling, batch norm, bottleneck, residual, in this order.

    channels, side: of its input. `out_channels` and `out_side` are those of its map.
    """

    def __init__(
        self,
        config: LayerConfig,
        *,
        gate: Gate,
        size: int,
        patch_size: int,
        channels: int,
        side: int,
        k: int | None = None,
    ) -> None:
        super().__init__()
        self.config, self.gate, self.size, self.patch_size = config, gate, size, patch_size
        self.k = k
        self.maps = config.maps_per_entry if isinstance(config, PhiFullConfig) else None
        if gate != "hard":
            self.linear = nn.Conv2d(channels, size * (self.maps or 1), patch_size)
        features = self.maps or size
        self.norm = BatchNorm(features) if config.batch_norm else nn.Identity()
        self.bottleneck: nn.Module = nn.Identity()
        if config.bottleneck is not None:
            self.bottleneck = nn.Conv2d(features, config.bottleneck, config.bottleneck_kernel)
            features = config.bottleneck
        here = positions(side, patch_size, config.stride, config.padding)
        self.out_side = config.side_after(here)
        if self.out_side < 1:
            raise ValueError(
                f"a layer of {patch_size} x {patch_size} patches leaves nothing of a map of "
                f"{side} x {side}; use smaller patches, less pooling, or fewer layers"
            )
        if config.residual == "add" and features != channels:
            raise ValueError(
                f"residual=add needs as many channels as the layer's input has, {channels}, but "
                f"the map has {features}; set bottleneck={channels}, or residual=cat"
            )
        self.out_channels = features + (channels if config.residual == "cat" else 0)

    def forward(self, images: Tensor, code: Tensor | None) -> Tensor:
        """Return the map (B, out_channels, out_side, out_side) of images (B, channels, S, S).

        code: packed bits, a float code (B, N, h, w), or None for a convolutional layer.
        """
        x = self._pooled(images, code)
        if self.config.adaptive_pool is not None:
            x = F.adaptive_avg_pool2d(x, self.config.adaptive_pool)
        made: Tensor = self.bottleneck(self.norm(x))
        if self.config.bottleneck_relu:
            made = F.relu(made)
        match self.config.residual:
            case "add":
                return made + _center(images, made.shape[-1])
            case "cat":
                return torch.cat([made, _center(images, made.shape[-1]).to(made.dtype)], dim=1)
        return made

    def _pooled(self, images: Tensor, code: Tensor | None) -> Tensor:
        """Return the gated values after the average pooling, (B, features, h', w')."""
        pool, stride = self.config.pool, self.config.pool_step
        side_by_side = pool if pool == stride else None  # what the fused layers can do
        z, is_pooled = self._gated(images, code, side_by_side)
        if pool is None or is_pooled:
            return z
        return F.avg_pool2d(z, pool, stride, ceil_mode=True)

    def _gated(self, images: Tensor, code: Tensor | None, pool: int | None) -> tuple[Tensor, bool]:
        """Return the gated values of all positions, or their means, and whether these."""
        kind = images.device.type
        precision: Precision = "bfloat16" if torch.is_autocast_enabled(kind) else "float32"
        apart = {"stride": self.config.stride, "padding": self.config.padding}
        near, s = spaced(images, patch_size=self.patch_size, **apart)
        if self.gate == "conv":
            with torch.autocast(kind, enabled=False):
                z = relu_pool(near.float(), *self._map(s), pool=pool or 1, precision=precision)
                return z, pool is not None
        assert code is not None, "a layer with a dictionary needs the code"
        if code.dtype == torch.uint8 and self.maps is None:
            with torch.autocast(kind, enabled=False):
                return self._from_bits(near.float(), code, s, pool, precision), pool is not None
        return self._from_code(near, code, s), False

    def _map(self, patch_size: int) -> tuple[Tensor, Tensor]:
        """Return V (N, C, s, s) for patches of this side, of as many numbers, and b (N,)."""
        weight, bias = self.linear.weight, self.linear.bias
        assert bias is not None, "the linear map has a bias"
        return weight.view(len(weight), -1, patch_size, patch_size), bias

    def _from_bits(
        self, images: Tensor, bits: Tensor, s: int, pool: int | None, precision: Precision
    ) -> Tensor:
        if self.gate == "full":
            weight, bias = self._map(s)
            return gated_pool(
                images, bits, weight, bias, patch_size=s, pool=pool, precision=precision
            )
        if pool is None:
            return unpack_bits(bits, self.size).permute(0, 3, 1, 2).float()
        return pooled_counts(bits, self.size, pool=pool, grid=None)

    def _from_code(self, images: Tensor, code: Tensor, s: int) -> Tensor:
        """Return m or m (V x + b) at every position; with c maps their sums over entries / k."""
        if code.dtype == torch.uint8:
            code = unpack_bits(code, self.size).permute(0, 3, 1, 2)
        if self.gate == "hard":
            return code.float()
        z = F.conv2d(images, *self._map(s))
        if self.maps is None:
            return z * code
        assert self.k is not None, "several maps an entry are divided by k"
        by_entry = z.view(len(z), self.maps, self.size, *z.shape[2:]) * code[:, None]
        summed: Tensor = by_entry.sum(dim=2) / self.k
        return summed


def _center(images: Tensor, side: int) -> Tensor:
    """Return the middle square of images (B, C, S, S)."""
    start = (images.shape[-1] - side) // 2
    return images[..., start : start + side, start : start + side]


class Block(nn.Module):
    """A layer with its code and its classifier; with several k, one of each for every k."""

    def __init__(
        self, code: BitCode | TriangleCode | None, layers: Sequence[Layer], num_classes: int
    ) -> None:
        super().__init__()
        self.code = code
        self.layers = nn.ModuleList(layers)
        self.classifiers = nn.ModuleList(
            nn.Linear(one.out_channels * one.out_side**2, num_classes) for one in layers
        )

    def maps(self, images: Tensor, codes: Sequence[Tensor] | None = None) -> list[Tensor]:
        """Return the map of each layer; codes: of these images, when they are known already."""
        if self.code is None:
            return [layer(images, None) for layer in self.layers]
        found = self.code(images) if codes is None else codes
        return [layer(images, code) for layer, code in zip(self.layers, found, strict=True)]

    def logits(self, maps: Sequence[Tensor]) -> list[Tensor]:
        """Return the classifier's logits (B, num_classes) of each map."""
        pairs = zip(self.classifiers, maps, strict=True)
        return [classifier(x.flatten(1)) for classifier, x in pairs]


class PatchNetwork(nn.Module):
    """Blocks on top of each other, of which only the last is trained; the others evaluate.

    (In the released code the batch norm of a frozen first layer goes on using and gathering the
    statistics of batches; here the map below a layer is one function of the image.)
    """

    def __init__(self, blocks: Sequence[Block], *, sum_logits: bool = False) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(blocks)
        self.sum_logits = sum_logits
        for block in self.below:
            block.requires_grad_(False)

    @property
    def below(self) -> list[Block]:
        """The blocks that are kept as they are, the lowest first."""
        return [block for block in self.blocks if isinstance(block, Block)][:-1]

    @property
    def top(self) -> Block:
        """The block that is trained."""
        block = self.blocks[-1]
        assert isinstance(block, Block), "a network is made of blocks"
        return block

    @property
    def head_names(self) -> tuple[str, ...]:
        """What the numbers of each output end in: "" for the first k, `_k16` for another."""
        layers = [layer for layer in self.top.layers if isinstance(layer, Layer)]
        return ("", *(f"_k{layer.k}" for layer in layers[1:]))

    @property
    def output_names(self) -> tuple[str, ...]:
        """The k of each output, "-" where there is none."""
        layers = [layer for layer in self.top.layers if isinstance(layer, Layer)]
        return tuple("-" if layer.k is None else str(layer.k) for layer in layers)

    def train(self, mode: bool = True) -> PatchNetwork:
        """Switch the top block to training or evaluation; the others always evaluate."""
        super().train(mode)
        for block in self.below:
            block.eval()
        return self

    def forward(self, images: Tensor, codes: list[Tensor] | None = None) -> list[Tensor]:
        """Return logits (B, num_classes) for every k of images (B, C, S, S), normalised.

        codes: of the lowest block, when they are known already.
        """
        x, codes, summed = self.below_top(images, codes)
        logits = self.top.logits(self.top.maps(x, codes))
        return [one + summed for one in logits] if self.sum_logits and self.below else logits

    @torch.no_grad()
    def below_top(
        self, images: Tensor, codes: list[Tensor] | None = None
    ) -> tuple[Tensor, list[Tensor] | None, Tensor | float]:
        """Return what the top block reads, its codes if known, and the sum of logits below."""
        x, summed = images, 0.0
        total: Tensor | float = summed
        for block in self.below:
            [x] = block.maps(x, codes)
            codes = None
            if self.sum_logits:
                total = total + block.logits([x])[0]
        return x, codes, total

    def outputs(self, images: Tensor) -> Tensor:
        """Return the first map of the top block, (B, channels, side, side)."""
        x, codes, _ = self.below_top(images)
        return self.top.maps(x, codes)[0]


def code_block(
    config: CodeConfig | DeeperCodeConfig,
    dictionary: Dictionary,
    *,
    model: PhiFullConfig | PhiHardConfig,
    side: int,
    num_classes: int,
) -> Block:
    """Return an untrained block on a dictionary, for maps of `side` with its channels.

    model: of the first layer, whose kind, code and embedding all layers have. Raises ValueError
    when a k is more than the dictionary has, or nothing is left of the map.
    """
    size, s = dictionary.size, dictionary.patch_size
    channels = dictionary.kernel.shape[1] // s**2
    ks, gate = _ks(config, size, model), gate_of(model)
    each: Sequence[int | None] = ks or [None]
    if max(ks, default=0) > size:
        raise ValueError(f"k={max(ks)} is more than the {size} entries of the dictionary; lower it")
    if len(set(ks)) < len(ks):
        raise ValueError(f"k and also_k come to the same number of {size} entries: {ks}")
    layers = [
        Layer(config, gate=gate, size=size, patch_size=s, channels=channels, side=side, k=k)
        for k in each
    ]
    return Block(_code(config, model, dictionary, ks), layers, num_classes)


def _ks(config: CodeConfig | DeeperCodeConfig, size: int, model: CodeConfig) -> list[int]:
    """Return the number of entries for each network; none where the code knows no k."""
    if model.code == "triangle":
        return []
    also = config.also_k if isinstance(config, CodeConfig) else ()
    return [entries(k, size) for k in (config.k, *also)]


def _code(
    config: LayerConfig, model: CodeConfig, dictionary: Dictionary, ks: Sequence[int]
) -> BitCode | TriangleCode:
    apart = {"stride": config.stride, "padding": config.padding}
    if model.embedding != "dictionary":
        dictionary = _random_like(dictionary)
    if model.code == "triangle":
        return TriangleCode(dictionary, is_trained=model.embedding == "learnable", **apart)
    return BitCode(dictionary, ks=ks, kind=model.code, **apart)


def _random_like(dictionary: Dictionary) -> Dictionary:
    """Return kernel and bias as torch's convolution of this shape starts with."""
    s = dictionary.patch_size
    conv = nn.Conv2d(dictionary.kernel.shape[1] // s**2, dictionary.size, s)
    assert conv.bias is not None
    return Dictionary(conv.weight.detach().flatten(1), conv.bias.detach(), s)


def conv_block(
    config: VanillaConfig | DeeperConvConfig, *, channels: int, side: int, num_classes: int
) -> Block:
    """Return an untrained block of a convolution and ReLU in place of the code.

    Raises ValueError when nothing is left of the map.
    """
    size, s = config.size, config.patch_size
    layer = Layer(config, gate="conv", size=size, patch_size=s, channels=channels, side=side)
    return Block(None, [layer], num_classes)


def gate_of(config: PhiFullConfig | PhiHardConfig) -> Gate:
    """Return what the layers of a network make of their codes."""
    return "full" if isinstance(config, PhiFullConfig) else "hard"
