"""Losses of the trained methods, as functions of tensors; sums over ranks come in as arguments."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from selfsup_ray.collectives import Reduce, identity

Views = tuple[Tensor, Tensor]


def nt_xent(
    z0: Tensor, z1: Tensor, *, temperature: float, contrast: Views | None = None, first: int = 0
) -> Tensor:
    """NT-Xent loss of SimCLR (Chen et al. 2020, eq. 1), the mean over all 2n anchors, in nats.

    z0, z1: (n, d) with unit rows; row i of both shows image i. Every other row is a negative.
    contrast: the same for all B images of the batch, (B, d) twice, when the anchors are only the
    rows from `first` on; the mean over ranks is then the loss of the whole batch.
    """
    all0, all1 = contrast or (z0, z1)
    own = torch.arange(first, first + len(z0), device=z0.device)
    logits = torch.cat([z0, z1]) / temperature @ torch.cat([all0, all1]).T
    itself = torch.cat([own, own + len(all0)])
    partner = torch.cat([own + len(all0), own])
    # A view is not its own negative.
    logits.scatter_(1, itself[:, None], float("-inf"))
    return F.cross_entropy(logits, partner)


def one_way_nt_xent(
    z0: Tensor, z1: Tensor, *, temperature: float, contrast: Views | None = None, first: int = 0
) -> Tensor:
    """SimCLR loss of SCAN's code: as `nt_xent`, but only the n first views are anchors.

    Negatives are still both views of every other image; shapes as in `nt_xent`.
    """
    all0, all1 = contrast or (z0, z1)
    own = torch.arange(first, first + len(z0), device=z0.device)
    logits = z0 / temperature @ torch.cat([all0, all1]).T
    logits.scatter_(1, own[:, None], float("-inf"))
    return F.cross_entropy(logits, own + len(all0))


def cross_view_nt_xent(
    z0: Tensor, z1: Tensor, *, temperature: float, contrast: Views | None = None, first: int = 0
) -> Tensor:
    """Cross-view loss of the CIFAR comparison: one logit per pair of images, no same-view pairs.

    With S_ij = <z0_i, z1_j>, the logits are (S + S^T - diag(S)) / temperature and image i is the
    target of row i. Shapes as in `nt_xent`; the mean is over the n images.
    """
    all0, all1 = contrast or (z0, z1)
    own = torch.arange(first, first + len(z0), device=z0.device)
    logits = z0 @ all1.T + z1 @ all0.T
    doubled = (z0 * z1).sum(dim=1, keepdim=True)  # the diagonal is in both terms
    logits = logits.scatter_add(1, own[:, None], -doubled)
    return F.cross_entropy(logits / temperature, own)


def info_nce(q: Tensor, k: Tensor, queue: Tensor, *, temperature: float) -> Tensor:
    """InfoNCE loss of MoCo (He et al. 2020, eq. 1), the mean over queries, in nats.

    q, k: (n, d) unit rows, row i of k the key of query i; queue: (K, d) unit rows, the negatives.
    k and queue should not require a gradient.
    """
    positive = (q * k).sum(dim=1) / temperature
    negatives = torch.logsumexp(q / temperature @ queue.T, dim=1)
    return (torch.logaddexp(positive, negatives) - positive).mean()


def instance_softmax(own: Tensor, everyone: Tensor) -> Tensor:
    """Instance discrimination by the full softmax (Wu et al. 2018, eq. 2), the mean, in nats.

    own: (n,) similarity of each image to its own row of the bank, over the temperature.
    everyone: (n,) log of the sum of exp of its similarities to all rows, over the temperature.
    """
    return (everyone - own).mean()


def nce(logits: Tensor, *, log_partition: Tensor, num_images: int) -> Tensor:
    """Noise-contrastive instance discrimination (Wu et al. 2018, eq. 7), the mean, in nats.

    logits: (n, 1 + K) similarities to bank rows over the temperature, to the image's own row first,
    then to K rows drawn uniformly from num_images. log_partition: ln Z, a scalar. With
    p = exp(logits) / Z and K / num_images as the density of the noise, the own row should be judged
    data and the others noise. Exact in the log domain, where the published code adds 1e-7.
    """
    noise = logits.shape[1] - 1
    odds = logits - log_partition - math.log(noise / num_images)  # ln(p / (K Pn))
    is_data, is_noise = F.logsigmoid(odds[:, 0]), F.logsigmoid(-odds[:, 1:])
    return -(is_data + is_noise.sum(dim=1)).mean()


def bootstrap(p: Tensor, z: Tensor) -> Tensor:
    """One term of BYOL's loss (Grill et al. 2020, eq. 2): the mean of |p - z|^2, in [0, 4].

    p, z: (n, d) unit rows, the predictions and the targets; z should not require a gradient.
    """
    return (2 - 2 * (p * z).sum(dim=1)).mean()


@dataclass(frozen=True)
class ScanLoss:
    """SCAN's loss and its two parts, of the whole batch, in nats."""

    total: Tensor
    """consistency - entropy_weight * entropy; at best -entropy_weight * ln(K)."""
    consistency: Tensor
    """Mean -log of the probability that anchor and neighbor fall into one cluster; >= 0."""
    entropy: Tensor
    """Entropy of the mean prediction, in [0, ln(K)]; ln(K) when clusters are used equally."""


def scan_loss(
    anchor_logits: Tensor,
    neighbor_logits: Tensor,
    *,
    entropy_weight: float,
    all_sum: Reduce = identity,
) -> ScanLoss:
    """SCAN's clustering loss (Van Gansbeke et al. 2020, eq. 2): agree, and use all clusters.

    anchor_logits, neighbor_logits: (n, K), before softmax; row i of the latter is a neighbor of
    anchor i. all_sum adds a tensor over all ranks, with gradient: the entropy is that of the whole
    batch's mean. Logs are exact where SCAN's code clamps them (at -100, and at mean 1e-8).
    """
    p, q = anchor_logits.log_softmax(dim=1), neighbor_logits.log_softmax(dim=1)
    disagreement = -torch.logsumexp(p + q, dim=1).sum()
    ones = p.new_tensor(len(p))
    # One traffic of K + 2 numbers: sum of probabilities, of disagreements, number of images.
    sums = all_sum(torch.cat([p.exp().sum(dim=0), torch.stack([disagreement, ones])]))
    count = sums[-1]
    mean = sums[:-2] / count
    entropy = -(mean * mean.clamp_min(torch.finfo(mean.dtype).tiny).log()).sum()
    consistency = sums[-2] / count
    return ScanLoss(consistency - entropy_weight * entropy, consistency, entropy)


@dataclass(frozen=True)
class ConfidentLoss:
    """Self-labelling's loss, of the whole batch, and whom it was taken from."""

    loss: Tensor
    """Mean cross-entropy over confident images, in nats; 0, with a gradient of 0, without any."""
    counts: Tensor
    """(K,) confident images per pseudo-label, over all ranks."""


def confident_cross_entropy(
    weak_logits: Tensor,
    strong_logits: Tensor,
    *,
    threshold: float | Tensor,
    balance: bool,
    all_sum: Reduce = identity,
) -> ConfidentLoss:
    """Self-labelling loss of SCAN (Van Gansbeke et al. 2020, section 2.3).

    weak_logits, strong_logits: (n, K) of two views of the same images. The pseudo-label of an image
    is its most probable cluster in the weak view, without gradient, and counts when that
    probability is above `threshold`. With `balance`, every cluster that is present weighs the same,
    however many images it has. all_sum adds a tensor over all ranks, with gradient.
    """
    confidence, label = weak_logits.detach().softmax(dim=1).max(dim=1)
    is_confident = confidence > threshold
    present = F.one_hot(label, weak_logits.shape[1]) * is_confident[:, None]
    counts = all_sum(present.sum(dim=0).to(strong_logits.dtype))
    total = counts.sum()
    # A mean over the images of a cluster, then over clusters present: weight total / count each.
    weights = total / counts.clamp_min(1) if balance else torch.ones_like(counts)
    losses = F.cross_entropy(strong_logits, label, reduction="none") * weights[label]
    # `where`, not a product: 0 * inf of an image left out would be nan.
    summed = all_sum(torch.where(is_confident, losses, 0).sum())
    return ConfidentLoss(summed / (counts * weights).sum().clamp_min(1), counts.detach())
