"""The codes of a layer: a dictionary as a convolution, and the modules that code images with it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from selfsup_ray.ops.patch_codes import Kind, Precision, patch_bits, triangle_code
from selfsup_ray.ops.spaced_patches import spaced


@dataclass(frozen=True)
class Dictionary:
    """A dictionary as a convolution: kernel (N, channels s s) and bias (N,), float32."""

    kernel: Tensor
    bias: Tensor
    patch_size: int

    @property
    def size(self) -> int:
        """N, the number of entries."""
        return len(self.bias)


class BitCode(nn.Module):
    """The packed code of every position for each k, from one pass over the distances."""

    kernel: Tensor
    bias: Tensor

    def __init__(
        self,
        dictionary: Dictionary,
        *,
        ks: Sequence[int],
        kind: Kind,
        stride: int = 1,
        padding: int = 0,
    ) -> None:
        super().__init__()
        self.patch_size, self.ks, self.kind = dictionary.patch_size, tuple(ks), kind
        self.stride, self.padding = stride, padding
        self.register_buffer("kernel", dictionary.kernel.clone())
        self.register_buffer("bias", dictionary.bias.clone())

    @torch.no_grad()
    def forward(self, images: Tensor) -> list[Tensor]:
        """Return a (B, h, w, ceil(N / 8)) uint8 code for each k of images (B, C, S, S)."""
        kind = images.device.type
        precision: Precision = "bfloat16" if torch.is_autocast_enabled(kind) else "float32"
        how = {"patch_size": self.patch_size, "stride": self.stride, "padding": self.padding}
        with torch.autocast(kind, enabled=False):
            near, patch_size = spaced(images.float(), **how)
            return patch_bits(
                near,
                self.kernel,
                self.bias,
                patch_size=patch_size,
                ks=self.ks,
                kind=self.kind,
                precision=precision,
                threads=torch.get_num_threads(),
            )


class TriangleCode(nn.Module):
    """ReLU(mean distance - distance) of every position; the kernel may be trained."""

    def __init__(
        self, dictionary: Dictionary, *, is_trained: bool, stride: int = 1, padding: int = 0
    ) -> None:
        super().__init__()
        self.patch_size, self.stride, self.padding = dictionary.patch_size, stride, padding
        self.kernel = nn.Parameter(dictionary.kernel.clone(), requires_grad=is_trained)
        self.bias = nn.Parameter(dictionary.bias.clone(), requires_grad=is_trained)

    def forward(self, images: Tensor) -> list[Tensor]:
        """Return one float code (B, N, h, w)."""
        how = {"patch_size": self.patch_size, "stride": self.stride, "padding": self.padding}
        near, patch_size = spaced(images, **how)
        return [triangle_code(near, self.kernel, self.bias, patch_size=patch_size)]
