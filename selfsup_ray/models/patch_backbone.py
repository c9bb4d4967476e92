"""PatchBackbone: images to pooled codes on a fixed dictionary of patches; nothing is trained."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from selfsup_ray.artifacts import Array
from selfsup_ray.models.backbone import Backbone, PatchBackboneConfig
from selfsup_ray.ops.patch_codes import patch_bits, pooled_counts, triangle_code

__all__ = ["PIXEL_MEAN", "PIXEL_STD", "PatchBackbone", "PatchBackboneConfig"]

PIXEL_MEAN = PIXEL_STD = (0.5, 0.5, 0.5)
"""Normalisation of the images that codes are made of: levels in [-1, 1]."""
_ENTRIES_AT_ONCE = 1 << 26
"""Positions times entries coded at a time, whatever the batch: bounds the memory of a forward."""


class PatchBackbone(Backbone):
    """The code of every position, averaged over a grid of parts of the image.

    The dictionary is two buffers: a convolution with them ranks as distance does, see
    `ops.whitening.code_kernel`. Images are normalised with PIXEL_MEAN and PIXEL_STD, of any side
    that a patch fits in.
    """

    kernel: Tensor
    bias: Tensor

    def __init__(self, config: PatchBackboneConfig) -> None:
        super().__init__(config)
        self.code = config
        dim = config.channels * config.patch_size**2
        self.register_buffer("kernel", torch.zeros(config.size, dim))
        self.register_buffer("bias", torch.zeros(config.size))

    @classmethod
    def of(cls, config: PatchBackboneConfig, kernel: Array, bias: Array) -> PatchBackbone:
        """Return the backbone on a dictionary: kernel (N, d) and bias (N,), float32."""
        made = cls(config)
        made.kernel.copy_(torch.from_numpy(kernel))
        made.bias.copy_(torch.from_numpy(bias))
        return made

    @property
    def dictionary(self) -> tuple[Tensor, Tensor]:
        """Kernel (N, d) and bias (N,), float32."""
        return self.kernel, self.bias

    @torch.no_grad()
    def forward(self, images: Tensor) -> Tensor:
        """Return pooled codes (B, N grid^2) float32: entries slowest, then rows, then columns."""
        side = self.code.patch_size
        positions = max(1, (images.shape[2] - side + 1) * (images.shape[3] - side + 1))
        step = max(1, _ENTRIES_AT_ONCE // (positions * self.code.size))
        with torch.autocast(images.device.type, enabled=False):
            parts = [self._pooled(some.float()) for some in torch.split(images, step)]
        return torch.cat(parts).flatten(1)

    def _pooled(self, images: Tensor) -> Tensor:
        """Return the averages (b, N, grid, grid) of some images."""
        code = self.code
        if code.code == "triangle":
            dense = triangle_code(images, self.kernel, self.bias, patch_size=code.patch_size)
            return F.adaptive_avg_pool2d(dense, code.grid)
        [bits] = patch_bits(
            images,
            self.kernel,
            self.bias,
            patch_size=code.patch_size,
            ks=[code.k],
            kind="up_to" if code.code == "hard" else "kth",
            precision=code.precision,
            threads=torch.get_num_threads(),
        )
        return pooled_counts(bits, code.size, pool=None, grid=code.grid)
