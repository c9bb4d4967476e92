"""Balanced assignment by optimal transport: Sinkhorn-Knopp as SeLa uses it.

Asano, Rupprecht, Vedaldi (ICLR 2020): Q* = diag(r) P^lambda diag(c), P (K x N) the softmax
probabilities of N images, Q with column sums 1/N and given row sums, 1/K by default. An image's
label is its largest entry of Q, so only r has to be known: label = argmax_k lambda l_k + log r_k,
with logits l in place of log p, which differs from them by a constant of the image.

Each image's part of P^lambda is divided by its largest entry, which c absorbs: no image can
underflow as a whole, so 16 or 32 bits do where the original needs 64. Both halves of an iteration
are formed in one read. When r leaves a safe range, or a cluster underflows everywhere, log r moves
into the exponent and the matrix is formed anew (absorption, Schmitzer 2019): any scores are safe.

Images may lie on many workers: only K-vectors are added over them, as integers, so that results do
not depend on which worker holds which block.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from selfsup_ray.artifacts import Array
from selfsup_ray.collectives import Reduce, identity
from selfsup_ray.ops.sinkhorn_rows import Precision, Rows, hold

_FIXED_BITS = 40  # of a cluster's sum in fixed point
_LOST = 80.0  # what a cluster rises by that underflows everywhere, which it does below e^-87


@dataclass(frozen=True)
class Balanced:
    """The scaling of a balanced assignment, and how it was reached.

    log_r: (K,) float64, of the clusters, the largest 0. change: mean |c / c' - 1| over the images
    at the last check. converged: whether that came down to the tolerance.
    """

    log_r: Array
    iterations: int
    change: float
    converged: bool


def sinkhorn_knopp(
    scores: Sequence[Array],
    *,
    lam: float,
    marginals: Array | None = None,
    start: Array | None = None,
    precision: Precision = "bfloat16",
    tolerance: float = 2e-5,
    check_every: int = 10,
    max_iterations: int = 1000,
    threads: int = 1,
    device: str = "cpu",
    folder: Path | None = None,
    all_sum: Reduce = identity,
) -> Balanced:
    """Return the cluster scaling that makes the assignment of all images balanced.

    scores: blocks (n, K) float32 of logits of this worker's images; a block is asked for when the
    matrix is formed, so it may be computed then. marginals: (K,) positive shares of the clusters,
    by default equal. start: log_r of a similar assignment; without it, c = 1/N as published.
    tolerance: of the mean |c / c' - 1|, looked at in iterations 1, 11, 21, ...; the original has
    its sum over the images (0.1 for ImageNet, 0.01 for CIFAR), which float32 cannot reach for
    many. precision: of the stored matrix; K-vectors are float64. folder: where the matrix lies in
    files instead of memory. all_sum: adds tensors up over the workers, each with its own blocks.

    Raises ValueError when a score is not finite or a marginal not positive.
    """
    rows = hold(scores, lam=lam, precision=precision, threads=threads, device=device, folder=folder)
    rows.form(None if start is None else np.asarray(start - np.max(start), np.float64))
    total = float(all_sum(torch.tensor([len(rows.spread)], dtype=torch.int64))[0])
    iteration = _Iteration(rows, np.log(_shares(marginals, rows.width) * total), all_sum, start)
    if start is None:
        iteration.begin_published()
    change = math.inf
    for t in range(1, max_iterations + 1):
        moved = iteration.step()
        if (t - 1) % check_every == 0:
            change = moved / total
            if change <= tolerance:
                return Balanced(iteration.log_r, t, change, True)
    return Balanced(iteration.log_r, max_iterations, change, False)


def balanced_labels(logits: Array, log_r: Array, *, lam: float) -> tuple[Array, float]:
    """Return the label of each image, (n,) int32, and the sum of -log p of the labels.

    logits: (n, K) float32; log_r: of `sinkhorn_knopp`. Equal scores go to the lower label.
    """
    from selfsup_ray.ops.sinkhorn_kernels import choose

    logits = np.ascontiguousarray(logits, np.float32)
    labels, line = np.empty(len(logits), np.int32), np.empty(logits.shape[1], np.float32)
    added = (log_r - log_r.max()).astype(np.float32)
    return labels, float(choose(logits, np.float32(lam), added, labels, line))


def _shares(marginals: Array | None, width: int) -> Array:
    if marginals is None:
        return np.full(width, 1 / width)
    shares = np.asarray(marginals, np.float64)
    if shares.shape != (width,) or not (np.isfinite(shares) & (shares > 0)).all():
        raise ValueError(f"marginals must be {width} positive numbers, got {shares.tolist()[:8]}")
    return np.asarray(shares / shares.sum())


class _Iteration:
    """r between steps: `absorbed` is in the exponent of the stored matrix, `rest` is not."""

    def __init__(self, rows: Rows, log_target: Array, all_sum: Reduce, start: Array | None) -> None:
        self.rows, self.log_target, self.all_sum = rows, log_target, all_sum
        self.absorbed: Array = np.zeros(rows.width) if start is None else start - np.max(start)
        self.rest: Array = np.zeros(rows.width)

    @property
    def log_r(self) -> Array:
        """(K,) log r, the largest 0."""
        both: Array = self.absorbed + self.rest
        return np.asarray(both - both.max())

    def begin_published(self) -> None:
        """Set the first r from c = 1/N."""
        spread = self._added(np.array([[self.rows.spread.sum(), len(self.rows.spread)]]))
        # 1/N where rows are divided by their largest p^lambda, but for a common factor.
        log_c = np.clip(self.rows.lam * (spread[0] / spread[1] - self.rows.spread), -600, 600)
        rest = self.log_target - _log(self._added(self.rows.weighted_sums(np.exp(log_c))))
        if np.isfinite(rest).all():  # else r = 1 will do
            self.rest = rest - rest.max()
            self.rows.remember(-log_c - rest.max())

    def step(self) -> float:
        """Do one iteration and return the sum of |c / c' - 1|."""
        if np.ptp(self.rest) > self.rows.log_range:
            self._absorb(self.absorbed + self.rest)
        sums, moved = self.rows.sweep(np.exp(self.rest))
        both = self._added(np.concatenate([sums, moved[:, None]], axis=1))
        rest = self.log_target - _log(both[:-1])
        lost = ~np.isfinite(rest)
        if lost.any():
            self._absorb(self.absorbed + np.where(lost, self.rest + _LOST, rest))
            return math.inf
        self.rest = rest
        return float(both[-1])

    def _absorb(self, log_r: Array) -> None:
        self.absorbed, self.rest = log_r - log_r.max(), np.zeros(len(log_r))
        self.rows.form(self.absorbed)

    def _added(self, sums: Array) -> Array:
        """Return the sum of (blocks, columns) over all blocks of all workers, in any order alike.

        A first sum gives each column's size, a second one adds integers.
        """
        size = self.all_sum(torch.from_numpy(sums.sum(axis=0))).numpy()
        size = np.where(np.isfinite(size) & (size > 0), size, 1.0)
        unit = np.exp2(_FIXED_BITS - np.floor(np.log2(size)))
        fixed = np.rint(np.nan_to_num(sums) * unit).astype(np.int64).sum(axis=0)
        return np.asarray(self.all_sum(torch.from_numpy(fixed)).numpy() / unit)


def _log(sums: Array) -> Array:
    with np.errstate(divide="ignore"):
        return np.asarray(np.log(sums))
