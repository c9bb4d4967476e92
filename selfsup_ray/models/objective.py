"""Objective: the one base class of everything that is trained."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from selfsup_ray.collectives import Shares, equal_shares
from selfsup_ray.models.collapse import effective_rank
from selfsup_ray.models.norm import share_running_statistics

if TYPE_CHECKING:
    from selfsup_ray.data.datasets import Dataset
    from selfsup_ray.models.backbones import Backbone

Metrics = dict[str, Tensor]


class Objective(nn.Module):
    """A trained method: networks, loss and the state that goes with them (queue, bank, EMA).

    Everything a resumed run needs is in `state_dict`, which every rank calls: rank 0's is whole.
    Buffers are equal on all ranks after every `after_step`, but for the rows of a memory bank; DDP
    is therefore made with broadcast_buffers=False. The mean over ranks of the loss, and of every
    metric, each weighted by its rank's images, is that of the global batch.
    """

    shares: Shares | None = None
    """How the images of a forward lie on the ranks; `fit` sets it. None: as many on every rank."""
    num_views: int = 2
    """Random views of an image that a forward wants."""
    embedded: Tensor | None = None
    """(B, d) unit rows of all ranks, of the last forward, in which a collapse would show."""

    def shares_of(self, n: int) -> Shares:
        """Return how the images of a forward lie on the ranks, n of them on this one."""
        return self.shares or equal_shares(n)

    def forward(self, views: list[Tensor], ids: Tensor) -> tuple[Tensor, Metrics]:
        """Return the loss (scalar, nats) and detached scalar metrics of this rank's images.

        views: float images (n, 3, s, s), one tensor per view; ids: (n,) int64, the images' ids.
        """
        raise AssertionError(f"{type(self).__name__} does not say how to compute its loss")

    def encoder(self) -> Backbone:
        """Return the backbone that is kept when training ends."""
        raise AssertionError(f"{type(self).__name__} does not say which backbone to keep")

    def trainable(self) -> list[tuple[str, nn.Parameter]]:
        """Return the parameters that the optimizer gets, with their names."""
        return [(name, p) for name, p in self.named_parameters() if p.requires_grad]

    def should_step(self) -> bool:
        """Return whether the forwards since the last step gave anything to learn from.

        When not, `fit` leaves out the optimizer's step but still calls `after_step`. The answer
        is the same on every rank.
        """
        return True

    def after_step(self, progress: float) -> None:
        """Update what follows the optimizer's step; progress in [0, 1]. Every rank calls it."""
        share_running_statistics(self, self.shares)

    def at_record(self) -> dict[str, float]:
        """Return numbers for the record that is being made, too dear for every step.

        Every rank calls it and returns the same: the effective rank of the last embeddings.
        """
        if self.embedded is None:
            return {}
        return {"effective_rank": effective_rank(self.embedded)}

    def before_epoch(self, epoch: int, dataset: Dataset) -> None:
        """Prepare an epoch; called on every rank, not again when training resumes inside it."""

    def before_step(self, samples_seen: int, dataset: Dataset) -> None:
        """Prepare a step, of which every rank knows how many images all ranks saw before it.

        Called on every rank, with the same number; when training resumes, from the next step on.
        """

    def after_epoch(self, epoch: int) -> dict[str, float]:
        """Return numbers of a whole epoch, such as an accuracy, for the record that closes it.

        Every rank calls it after the epoch's last `after_step` and returns the same.
        """
        return {}


@contextmanager
def full_precision(x: Tensor) -> Iterator[None]:
    """Switch autocast off on x's device: similarities divided by a temperature need float32."""
    with torch.autocast(x.device.type, enabled=False):
        yield


def unit_rows(x: Tensor) -> Tensor:
    """Return the rows of x (n, d) at length 1, in float32 or better."""
    return F.normalize(at_least_float32(x), dim=1)


def at_least_float32(x: Tensor) -> Tensor:
    """Return x, as float32 when it is a half type."""
    return x.float() if x.dtype.itemsize < 4 else x


def embedding_std(z: Tensor) -> Tensor:
    """Return the spread of unit rows z (n, d): 1 when spread evenly over the sphere, 0 collapsed.

    It is the mean over dimensions of the standard deviation over rows, times sqrt(d)
    (Chen and He 2021, section 4.1).
    """
    spread = z.detach().float().std(dim=0, correction=0).mean()
    return spread * math.sqrt(z.shape[1])
