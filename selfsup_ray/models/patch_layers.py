"""The configs of networks on a patch dictionary, and of the convolutional ones beside them."""

from __future__ import annotations

import math
import re
from typing import Annotated, Literal

from pydantic import Field

from selfsup_ray.config import NonNegative, Positive, PositiveFloat, config

Block = int | Literal["M", "A"]

BLOCKS: dict[str, tuple[Block, ...]] = {
    "mlp": (),
    "VGGs": (8, "M", 16, "M", 32, "M"),
    "VGGsw": (64, "M", 128, "M", 256, "M"),
    "VGGsxw": (128, "M", 256, "M", 512, "M"),
    "VGG8c": (64, 128, "M", 256, 256, "M", 512, 512, "M"),
    "VGG8b": (128, 256, "M", 256, 512, "M", 512, "M", 512, "M"),
    "VGG11b": (128, 128, 128, 256, "M", 256, 512, "M", 512, 512, "M", 512, "M"),
    "VGG11c": (64, 128, "M", 256, 256, "M", *[512] * 4, "M"),
    "VGG13c": (64, 64, 128, 128, "M", 256, 256, "M", *[512] * 4, "M"),
    "VGG16c": (64, 64, 128, 128, "M", *[256] * 3, "M", *[512] * 6, "M"),
    "VGG19c": (64, 64, 128, 128, "M", *[256] * 4, "M", *[512] * 8, "M"),
    "VGG11": (64, "M", 128, "M", 256, 256, "M", 512, 512, "M", 512, 512, "M"),
    "VGG13": (64, 64, "M", 128, 128, "M", 256, 256, "M", 512, 512, "M", 512, 512, "M"),
    "VGG16": (64, 64, "M", 128, 128, "M", *[256] * 3, "M", *[512] * 3, "M", *[512] * 3, "M"),
    "VGG19": (64, 64, "M", 128, 128, "M", *[256] * 4, "M", *[512] * 4, "M", *[512] * 4, "M"),
}
"""Channels of each convolution; M: 2 x 2 maximum, A: 2 x 2 average inside the block before it."""

REGULAR = re.compile(r"VGGc([1-9]\d*)d([1-9]\d*)(A?)")


def blocks_of(architecture: str) -> tuple[Block, ...]:
    """Return the blocks of an architecture: channels of a convolution, or the letter of a pooling.

    Raises ValueError naming the ones there are.
    """
    if architecture in BLOCKS:
        return BLOCKS[architecture]
    if found := REGULAR.fullmatch(architecture):
        channels, depth = int(found[1]), int(found[2])
        first: tuple[Block, ...] = (channels, "A") if found[3] else (channels,)
        return (*first, *[channels] * (depth - 1))
    raise ValueError(
        f"architecture={architecture!r} is none of {', '.join(BLOCKS)}, nor of the form "
        f"VGGc{{channels}}d{{depth}}, with or without A, such as VGGc1024d2A"
    )


OpenShare = Annotated[float, Field(gt=0, lt=1)]
EntriesK = Positive | OpenShare
"""Nearest entries that are set: a number, or a share of the dictionary such as 0.25."""


def entries(k: float, size: int) -> int:
    """Return k as a number of entries of a dictionary of `size`; a share is rounded, at least 1."""
    return int(k) if k >= 1 else max(1, math.floor(k * size + 0.5))


@config
class LayerConfig:
    """Where a layer looks, and what follows its code, in this order; each part can be left out."""

    stride: Positive = 1
    """Positions from a patch to the next, of the code and of the gated values alike."""
    padding: NonNegative = 0
    """Zeros around the layer's input, for patches that reach over its border."""
    pool: Positive | None = 4
    """Side of the windows of the average pooling; one over the border is averaged over its
    inside."""
    pool_stride: Positive | None = None
    """Positions between two windows; None: the side, so that windows lie side by side."""
    adaptive_pool: Positive | None = None
    """Side of the map after an adaptive average pooling; 6 in Thiry et al. 2021."""
    batch_norm: bool = True
    """Statistics are those of the batch over all workers."""
    bottleneck: Positive | None = 32
    """Channels after a convolution with bias, 1 x 1 unless `bottleneck_kernel` says otherwise."""
    bottleneck_kernel: Positive = 1
    """Side of the bottleneck's kernel, no padding."""
    bottleneck_relu: bool = False
    """ReLU after the bottleneck: the network is then no longer locally linear."""
    residual: Literal["none", "add", "cat"] = "none"
    """The layer's input, cut to the middle, added to the map or put beside it as channels."""

    def __post_init__(self) -> None:
        if self.bottleneck is None and (self.bottleneck_relu or self.bottleneck_kernel != 1):
            raise ValueError(
                f"`bottleneck` is null, so bottleneck_relu={self.bottleneck_relu} and "
                f"bottleneck_kernel={self.bottleneck_kernel} have nothing to act on"
            )
        if self.pool is None and self.pool_stride is not None:
            raise ValueError(f"`pool` is null, so pool_stride={self.pool_stride} moves nothing")

    @property
    def pool_step(self) -> int | None:
        """Positions between two windows; None without pooling."""
        return self.pool_stride or self.pool

    def side_after(self, side: int) -> int:
        """Return the side of the layer's map for `side` positions along an axis; 0 if none."""
        if side < 1:
            return 0
        if self.pool is not None and self.pool_step is not None:
            windows = -(-(side - self.pool) // self.pool_step) + 1
            side = windows - ((windows - 1) * self.pool_step >= side)  # each begins inside
            if side < 1:  # as AvgPool2d has it: the first window is far too large
                return 0
        side = self.adaptive_pool or side
        return max(0, side if self.bottleneck is None else side - self.bottleneck_kernel + 1)


@config
class CodeConfig(LayerConfig):
    """The code of a patch by its nearest dictionary entries, and what follows."""

    k: EntriesK = 256
    """Nearest entries of the dictionary that are set; below 1 a share of it."""
    code: Literal["up_to", "kth", "triangle"] = "up_to"
    """`up_to`: 1 for the k nearest. `kth`: 1 for the k-th nearest alone. `triangle`: ReLU(mean
    distance - distance) of Coates and Ng 2012, without k."""
    embedding: Literal["dictionary", "random", "learnable"] = "dictionary"
    """Kernel and bias of the distances: the dictionary's, or those a convolution of its shape
    starts with, kept or trained. Only `triangle` lets a gradient through."""
    also_k: tuple[EntriesK, ...] = ()
    """Other k, each with a network of its own trained beside the first on the same images: the
    distances, which cost most, are computed once."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.embedding == "learnable" and self.code != "triangle":
            raise ValueError(
                f"embedding=learnable needs code=triangle: with code={self.code} the code's "
                f"entries are 0 or 1 and no gradient reaches the kernel"
            )
        if self.also_k and self.code == "triangle":
            raise ValueError("code=triangle has no k, so `also_k` must be left out")
        if len({self.k, *self.also_k}) <= len(self.also_k):
            raise ValueError(f"`k` and `also_k` hold a value twice: {[self.k, *self.also_k]}")


@config
class PhiFullConfig(CodeConfig):
    """Phi_full: each entry gates a linear function of the patch that it learns."""

    name: Literal["phi_full"] = "phi_full"
    maps_per_entry: Positive | None = None
    """c: when given, an entry has c functions, and the map has c channels: the sums over the set
    entries divided by k. None: one function, and a channel for each entry."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.maps_per_entry is not None and self.code != "up_to":
            raise ValueError(
                f"maps_per_entry divides by k, so it needs code=up_to, not {self.code}"
            )


@config
class PhiHardConfig(CodeConfig):
    """Phi_hard: the code itself is the map."""

    name: Literal["phi_hard"] = "phi_hard"


@config
class PhiSimpleConfig:
    """Phi_full unconstrained (Table 2, Simple): code times patch, then one linear layer."""

    name: Literal["phi_simple"] = "phi_simple"
    k: EntriesK = 64
    """Nearest entries of the dictionary that are set; below 1 a share of it."""


@config
class VanillaConfig(LayerConfig):
    """The code replaced by a trained convolution and ReLU; needs no dictionary."""

    name: Literal["vanilla"] = "vanilla"
    size: Positive = 1024
    """Filters, N."""
    patch_size: Positive = 5
    """Side of a filter."""


@config
class CNNConfig:
    """A convolutional network trained end to end: blocks of convolution, ReLU and what follows."""

    name: Literal["cnn"] = "cnn"
    architecture: str = "VGG11c"
    """VGGc{channels}d{depth}, with A for a 2 x 2 average pooling in the first block; VGGs, VGGsw,
    VGGsxw, VGG8b, VGG8c, VGG11b, VGG11, VGG13, VGG16, VGG19, the same four with c for small
    images; mlp: no convolution."""
    kernel_size: tuple[Positive, ...] = (3,)
    """Side of the kernels, of each convolution or of all alike."""
    padding: tuple[NonNegative, ...] = (1,)
    """Zeros around each convolution's input, of each or of all alike."""
    batch_norm: Literal["none", "first", "all"] = "all"
    """Which blocks have batch normalisation, after the ReLU and the average pooling."""
    bottleneck: Positive | None = None
    """Channels after a 1 x 1 convolution, without ReLU, that ends every block."""
    hidden: tuple[Positive, ...] = (128,)
    """Widths of the hidden layers, each with batch normalisation where the blocks have it, and
    ReLU, before the last linear layer."""

    def __post_init__(self) -> None:
        convolutions = [c for c in blocks_of(self.architecture) if isinstance(c, int)]
        for key in ("kernel_size", "padding"):
            if len(getattr(self, key)) not in (1, len(convolutions)):
                raise ValueError(
                    f"{key} has {len(getattr(self, key))} values, but {self.architecture} has "
                    f"{len(convolutions)} convolutions; give one value, or one for each"
                )


ModelConfig = Annotated[
    PhiFullConfig | PhiHardConfig | PhiSimpleConfig | VanillaConfig | CNNConfig,
    Field(discriminator="name"),
]


@config
class DeeperCodeConfig(LayerConfig):
    """A further layer of Phi_full or Phi_hard: a dictionary of patches of the map below.

    Kind, code and embedding are the first layer's.
    """

    name: Literal["code"] = "code"
    size: Positive = 1024
    """Entries of the dictionary, N."""
    patch_size: Positive = 3
    """Side of a patch."""
    k: EntriesK = 128
    """Nearest entries of the dictionary that are set; below 1 a share of it."""
    source: Literal["maps", "gaussian", "uniform"] = "maps"
    """What patches are drawn from; `gaussian`, `uniform`: noise N(0, 1) or [-1, 1) in their
    place."""
    select: Literal["kmeans", "farthest", "sample"] = "kmeans"
    """How entries come from the whitened patches: centroids, patches far from each other, or
    patches as they were drawn."""
    patches_per_entry: Positive = 256
    """Patches drawn for each entry; with 1, or select=sample, they are the dictionary."""
    unit_norm: bool = False
    """Scale the whitened entries to length 1."""
    iterations: Positive = 25
    """Rounds of k-means."""
    regularization: PositiveFloat = 1e-3
    """Added to the root of each variance of the patches before they are divided by it."""
    pool: Positive | None = None
    batch_norm: bool = False

    @property
    def chosen_by(self) -> Literal["kmeans", "farthest", "sample"]:
        """How entries are chosen when there may be as many patches as entries."""
        return "sample" if self.patches_per_entry == 1 else self.select

    @property
    def patches(self) -> int:
        """Patches that are drawn."""
        return self.size * (1 if self.chosen_by == "sample" else self.patches_per_entry)


@config
class DeeperConvConfig(LayerConfig):
    """A further layer of the layer-wise convolutional network."""

    name: Literal["conv"] = "conv"
    size: Positive = 1024
    """Filters, N."""
    patch_size: Positive = 3
    """Side of a filter."""
    pool: Positive | None = None
    batch_norm: bool = False


DeeperConfig = Annotated[DeeperCodeConfig | DeeperConvConfig, Field(discriminator="name")]
