"""Phi_full without its constraint: the code times the patch, and one linear layer on all of it."""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from selfsup_ray.models.locally_linear import BitCode, Dictionary
from selfsup_ray.ops.patch_codes import unpack_bits

_VALUES_AT_ONCE = 1 << 26
"""Values of the embedding that are held at a time: the whole is 15 million for an image."""


class SimpleNetwork(nn.Module):
    """Linear classifier on the N d values at every position (Table 2, Simple).

    weight: (P, N d, C), positions first: the values of a linear layer on
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
        self.size = dictionary.size
        side = image_size - dictionary.patch_size + 1
        values = dictionary.kernel.numel()
        bound = 1 / math.sqrt(values * side**2)
        weight = torch.empty(side**2, values, num_classes).uniform_(-bound, bound)
        self.weight = nn.Parameter(weight)
        self.bias = nn.Parameter(torch.empty(num_classes).uniform_(-bound, bound))

    def forward(self, images: Tensor, codes: list[Tensor] | None = None) -> list[Tensor]:
        """Return [logits (B, C)] of images (B, 3, S, S), normalised; codes: theirs, if known."""
        [bits] = self.code(images) if codes is None else codes
        patches = F.unfold(images.float(), self.code.patch_size).transpose(1, 2)  # (B, P, d)
        code = unpack_bits(bits.flatten(1, 2), self.size)  # (B, P, N)
        summed: Tensor = _Summed.apply(patches, code, self.weight)
        return [summed + self.bias]


class _Summed(torch.autograd.Function):
    """The sum over positions of embedding x weight, the embedding made anew in either direction."""

    @staticmethod
    def forward(ctx: Any, patches: Tensor, code: Tensor, weight: Tensor) -> Tensor:
        ctx.save_for_backward(patches, code, weight)
        total = patches.new_zeros(len(patches), weight.shape[2])
        for part in _parts(patches, code):
            total += torch.bmm(_embedding(patches, code, part), weight[part]).sum(dim=0)
        return total

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[None, None, Tensor]:
        patches, code, weight = ctx.saved_tensors
        grad = torch.empty_like(weight)
        for part in _parts(patches, code):
            values = _embedding(patches, code, part)
            torch.matmul(values.transpose(1, 2), grads[0], out=grad[part])
        return None, None, grad


def _parts(patches: Tensor, code: Tensor) -> list[slice]:
    each = len(patches) * patches.shape[2] * code.shape[2]
    step = max(1, _VALUES_AT_ONCE // each)
    return [slice(i, i + step) for i in range(0, patches.shape[1], step)]


def _embedding(patches: Tensor, code: Tensor, part: slice) -> Tensor:
    """Return the code times the patch at some positions, (p, B, N d)."""
    x, m = patches[:, part].transpose(0, 1), code[:, part].transpose(0, 1)
    return (m[..., None] * x[:, :, None]).flatten(2)
