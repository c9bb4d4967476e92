"""Arithmetic of a memory bank: a few rows with a gradient against many without one.

The bank may be too large for a matrix of all similarities, so both functions work in pieces, and
none of the pieces is kept for the backward pass.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

PIECE = 1 << 24
"""Numbers of one piece: 64 MB of float32."""


def log_sum_exp(v: Tensor, rows: Tensor, *, temperature: float) -> Tensor:
    """Return ln sum_j exp(<v_i, rows_j> / temperature), (n,), with a gradient into v alone.

    v: (n, d); rows: (N, d), at least one. The backward pass costs nothing: the gradient is the mean
    row under the softmax, which the forward pass sums up as it goes.
    """
    value: Tensor = _LogSumExp.apply(v, rows, temperature)
    return value


class _LogSumExp(torch.autograd.Function):
    """Streamed: the maximum so far is taken out, and what was summed before is scaled to it."""

    @staticmethod
    def forward(ctx: Any, v: Tensor, rows: Tensor, temperature: float) -> Tensor:
        top = v.new_full((len(v),), float("-inf"))
        total, mean = torch.zeros_like(top), torch.zeros_like(v)
        for part in torch.split(rows, max(1, PIECE // max(1, len(v)))):
            logits = v @ part.T / temperature
            new = torch.maximum(top, logits.amax(dim=1))
            kept, weights = (top - new).exp(), (logits - new[:, None]).exp_()
            total = total * kept + weights.sum(dim=1)
            mean = mean * kept[:, None] + weights @ part
            top = new
        ctx.save_for_backward(mean / (total * temperature)[:, None])
        return top + total.log()

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None]:
        return grads[0][:, None] * ctx.saved_tensors[0], None, None


def similarities(v: Tensor, rows: Tensor, columns: Tensor) -> Tensor:
    """Return <v_i, rows_j> for j = columns[i, k], (n, K), with a gradient into v alone.

    v: (n, d); rows: (N, d); columns: (n, K) int64 in [0, N), or -1, where the result is 0.
    """
    value: Tensor = _Similarities.apply(v, rows, columns)
    return value


class _Similarities(torch.autograd.Function):
    """Some rows of v at a time, since (n, K, d) numbers would not fit."""

    @staticmethod
    def forward(ctx: Any, v: Tensor, rows: Tensor, columns: Tensor) -> Tensor:
        ctx.save_for_backward(rows, columns)
        return _by_pieces("nd,nkd->nk", v, rows, columns) * (columns >= 0)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None]:
        rows, columns = ctx.saved_tensors
        return _by_pieces("nk,nkd->nd", grads[0] * (columns >= 0), rows, columns), None, None


def _by_pieces(equation: str, left: Tensor, rows: Tensor, columns: Tensor) -> Tensor:
    """Return the einsum of left (n, …) and the chosen rows (n, K, d)."""
    step = max(1, PIECE // max(1, columns.shape[1] * rows.shape[1]))
    pieces = zip(torch.split(left, step), torch.split(columns, step), strict=True)
    return torch.cat(
        [torch.einsum(equation, part, rows[chosen.clamp_min(0)]) for part, chosen in pieces]
    )


def moved(rows: Tensor, v: Tensor, *, momentum: float) -> Tensor:
    """Return unit rows on the way from `rows` to v: n(momentum rows + (1 - momentum) v)."""
    return F.normalize(momentum * rows + (1 - momentum) * v, dim=1)


def last_of_each(ids: Tensor) -> Tensor:
    """Return for each of ids (n,) the last place where the same id stands, (n,) int64.

    Rows written through it do not depend on which of two writers of one id comes first.
    """
    same = ids[:, None] == ids[None, :]
    return (same * torch.arange(len(ids), device=ids.device)).amax(dim=1)
