"""Low-shot linear classifier: softmax regression by plain SGD on class-balanced batches.

Every element of a batch draws a class uniformly, then one of its images uniformly, with
replacement (spec 2.7). Settings that differ in learning rate or weight decay see the same batches,
so they are one matrix product: nine cost little more than one.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from selfsup_ray.artifacts import Array

_DRAWN = 1000
"""Batches drawn at once."""


@dataclass(frozen=True)
class Rate:
    """Learning rate and weight decay of one setting."""

    lr: float
    weight_decay: float


class BalancedSampler:
    """Draws images by class: (steps, B) positions at a time, from the seed's numbers alone."""

    def __init__(
        self, classes: Array, *, num_classes: int, batch_size: int, seed: Sequence[int]
    ) -> None:
        """classes: (n,) in [0, num_classes), every class at least once."""
        self.order = np.argsort(classes, kind="stable")
        self.counts = np.bincount(classes, minlength=num_classes)
        assert self.counts.min() > 0, f"class {int(self.counts.argmin())} has no image"
        self.starts = np.concatenate([[0], np.cumsum(self.counts)[:-1]])
        self.batch_size = batch_size
        self.generator = np.random.Generator(np.random.Philox([*seed, batch_size]))

    def draw(self, steps: int) -> Array:
        """Return the positions of the next batches: (steps, B) int64."""
        shape = (steps, self.batch_size)
        drawn = self.generator.integers(len(self.counts), size=shape)
        place = (self.generator.random(shape) * self.counts[drawn]).astype(np.int64)
        return np.asarray(self.order[self.starts[drawn] + place], np.int64)


@dataclass(frozen=True)
class LinearState:
    """The classifiers of G settings after some iterations: weight (d, G, C), bias (G, C)."""

    iteration: int
    weight: Tensor
    bias: Tensor

    def log_probabilities(self, rows: Array) -> Iterator[Tensor]:
        """Yield the (n, G, C) log-probabilities of blocks of rows (N, d), in order."""
        d, g, c = self.weight.shape
        step = max(1, 2**24 // (g * c))
        for start in range(0, len(rows), step):
            x = torch.from_numpy(np.array(rows[start : start + step], np.float32))
            scores = torch.addmm(
                self.bias.reshape(-1), x.to(self.weight.device), self.weight.reshape(d, -1)
            )
            yield scores.view(-1, g, c).log_softmax(dim=2)


def train_balanced(
    rows: Array,
    classes: Array,
    rates: Sequence[Rate],
    *,
    num_classes: int,
    batch_size: int,
    iterations: int,
    eval_every: int,
    seed: Sequence[int],
    device: str = "cpu",
) -> Iterator[LinearState]:
    """Yield the classifiers every `eval_every` iterations and at the end.

    rows: (n, d) float32; classes: (n,) in [0, num_classes). One step is
    w <- w - lr (gradient of the mean negative log-likelihood + weight_decay w), for the bias as
    for the weight, without momentum, at constant lr. Weights start at 0: the problem is convex.
    """
    g, d = len(rates), rows.shape[1]
    x_all = torch.from_numpy(np.ascontiguousarray(rows, np.float32)).to(device)
    y_all = torch.from_numpy(np.asarray(classes, np.int64)).to(device)
    lr = torch.tensor([rate.lr for rate in rates], device=device)
    shrink = 1 - lr * torch.tensor([rate.weight_decay for rate in rates], device=device)
    weight = torch.zeros(d, g, num_classes, device=device)
    bias = torch.zeros(g, num_classes, device=device)
    flat_weight, flat_bias = weight.view(d, -1), bias.view(-1)
    shrink_all = shrink.repeat_interleave(num_classes)
    sampler = BalancedSampler(classes, num_classes=num_classes, batch_size=batch_size, seed=seed)
    own = torch.arange(batch_size, device=device)
    step_size = (lr / batch_size)[:, None]
    for iteration, positions in enumerate(_batches(sampler, iterations, device), start=1):
        x, y = x_all[positions], y_all[positions]
        scores = torch.addmm(flat_bias, x, flat_weight).view(batch_size, g, num_classes)
        error = scores.softmax(dim=2)
        error[own, :, y] -= 1
        error.mul_(step_size)
        error = error.view(batch_size, -1)
        flat_weight.mul_(shrink_all).addmm_(x.T, error, alpha=-1)
        flat_bias.mul_(shrink_all).sub_(error.sum(dim=0))
        if iteration % eval_every == 0 or iteration == iterations:
            yield LinearState(iteration, weight, bias)


def _batches(sampler: BalancedSampler, iterations: int, device: str) -> Iterator[Tensor]:
    for start in range(0, iterations, _DRAWN):
        drawn = sampler.draw(min(_DRAWN, iterations - start))
        yield from torch.from_numpy(drawn).to(device)


def evaluated_at(iterations: int, eval_every: int) -> list[int]:
    """Return the iterations after which `train_balanced` yields."""
    steps = list(range(eval_every, iterations + 1, eval_every))
    return steps if steps and steps[-1] == iterations else [*steps, iterations]
