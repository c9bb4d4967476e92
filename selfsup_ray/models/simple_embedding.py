"""Phi_full without its constraint: the code times the patch, and one linear layer on all of it."""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from selfsup_ray.models.layer_codes import BitCode, Dictionary
from selfsup_ray.ops.patch_codes import unpack_bits

_VALUES_AT_ONCE = 1 << 22
"""Products of patches and weights that are held at a time: of a size that caches keep."""


class SimpleNetwork(nn.Module):
    """Linear classifier on the N d values at every position (Table 2, Simple).

    weight: (P, d, N C), positions first: the values of a linear layer on
    `patch_codes.full_embedding` in another order, started as that layer starts.
    """

    head_names = ("",)

    def __init__(
        self, dictionary: Dictionary, *, k: int, image_size: int, num_classes: int
    ) -> None:
        super().__init__()
        if k > dictionary.size:
            raise ValueError(
                f"k={k} is more than the {dictionary.size} entries of the dictionary; lower it"
            )
        self.code = BitCode(dictionary, ks=(k,), kind="up_to")
        self.output_names = (str(k),)
        self.size, self.num_classes = dictionary.size, num_classes
        side = image_size - dictionary.patch_size + 1
        dim = dictionary.kernel.shape[1]
        bound = 1 / math.sqrt(dictionary.kernel.numel() * side**2)
        weight = torch.empty(side**2, dim, self.size * num_classes).uniform_(-bound, bound)
        self.weight = nn.Parameter(weight)
        self.bias = nn.Parameter(torch.empty(num_classes).uniform_(-bound, bound))

    def forward(self, images: Tensor, codes: list[Tensor] | None = None) -> list[Tensor]:
        """Return [logits (B, C)] of images (B, 3, S, S), normalised; codes: theirs, if known."""
        [bits] = self.code(images) if codes is None else codes
        patches = F.unfold(images.float(), self.code.patch_size).transpose(1, 2)  # (B, P, d)
        code = unpack_bits(bits.flatten(1, 2), self.size)  # (B, P, N)
        with torch.autocast(images.device.type, enabled=False):
            summed: Tensor = _Summed.apply(patches, code, self.weight)
        return [summed + self.bias]


class _Summed(torch.autograd.Function):
    """The sum over positions and entries of code x patch x weight, the embedding never made.

    patches: (B, P, d); code: (B, P, N) bool; weight: (P, d, N C); result (B, C). At a position, all
    entries' products with the patch are one matrix product, and the code picks some.
    """

    @staticmethod
    def forward(ctx: Any, patches: Tensor, code: Tensor, weight: Tensor) -> Tensor:
        ctx.save_for_backward(patches, code, weight)
        count, size = len(patches), code.shape[2]
        total = patches.new_zeros(count, weight.shape[2] // size)
        for part in _parts(code, weight):
            products = torch.bmm(patches[:, part].transpose(0, 1), weight[part])
            by_entry = products.view(-1, count, size, total.shape[1])  # (p, B, N, C)
            total += (by_entry * code[:, part].transpose(0, 1)[..., None]).sum(dim=(0, 2))
        return total

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[None, None, Tensor]:
        patches, code, weight = ctx.saved_tensors
        grad, of_logits = torch.empty_like(weight), grads[0].to(weight.dtype)[:, None]
        for part in _parts(code, weight):
            picked = code[:, part].transpose(0, 1)[..., None] * of_logits  # (p, B, N, C)
            torch.bmm(patches[:, part].permute(1, 2, 0), picked.flatten(2), out=grad[part])
        return None, None, grad


def _parts(code: Tensor, weight: Tensor) -> list[slice]:
    step = max(1, _VALUES_AT_ONCE // (len(code) * weight.shape[2]))
    return [slice(i, i + step) for i in range(0, code.shape[1], step)]
