"""Bank: one remembered row for each image of a corpus, cut over the ranks by image id."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from selfsup_ray import collectives
from selfsup_ray.ops.bank import last_of_each, log_sum_exp, moved, similarities
from selfsup_ray.ops.rng import uniforms

BANK_STREAM, NOISE_STREAM = 1_002, 1_003  # their own random numbers, apart from the views'
DRAWN_AT_ONCE = 65_536
"""Rows drawn, and rows sent to rank 0, at a time."""


class Bank(nn.Module):
    """The rows of a memory bank; neighboring ids lie on one rank, as equally as they divide.

    Only what concerns a batch travels: its vectors, a number per image and rank, similarities and
    gradients. Every method is called by all ranks alike, with the images of all of them. Rows
    start uniform in +- 1 / sqrt(dim / 3), as functions of seed and id (Wu et al. 2018, their code).
    """

    rows: Tensor

    def __init__(self, num_images: int, dim: int, *, seed: int) -> None:
        super().__init__()
        self.shares = collectives.shares(num_images)
        first, stop = self.shares.first, self.shares.first + self.shares.mine
        rows, bound = torch.empty(self.shares.mine, dim), 1 / math.sqrt(dim / 3)
        for start in range(first, stop, DRAWN_AT_ONCE):
            ids = torch.arange(start, min(start + DRAWN_AT_ONCE, stop))
            draws = uniforms(seed=seed, epoch=0, ids=ids, draws=dim, stream=BANK_STREAM)
            rows[start - first :][: len(ids)] = (2 * draws - 1) * bound
        self.register_buffer("rows", rows, persistent=False)

    def __len__(self) -> int:
        return self.shares.total

    def get_extra_state(self) -> Tensor:
        """Return the rows of all ranks by id on rank 0 and no row elsewhere, for the checkpoint."""
        return collectives.on_first(self.rows, self.shares, at_once=DRAWN_AT_ONCE)

    def set_extra_state(self, state: Tensor) -> None:
        """Take this rank's rows out of all rows, however many ranks there were."""
        assert len(state) == len(self), f"{len(state)} rows for a bank of {len(self)}"
        self.rows.copy_(state[self.shares.first :][: self.shares.mine])

    def _places(self, ids: Tensor) -> Tensor:
        """Return where ids are among this rank's rows, -1 for those of other ranks."""
        places = ids - self.shares.first
        return torch.where((places >= 0) & (places < self.shares.mine), places, -1)

    @torch.no_grad()
    def of(self, ids: Tensor) -> Tensor:
        """Return the rows (B, dim) of these ids, from wherever they are."""
        places = self._places(ids)
        return collectives.all_sum(self.rows[places.clamp_min(0)] * (places >= 0)[:, None])

    def log_sum_exp(self, v: Tensor, *, temperature: float) -> Tensor:
        """Return ln sum_j exp(<v_i, row_j> / temperature), (B,), over all rows of all ranks."""
        own = log_sum_exp(v, self.rows, temperature=temperature)
        return collectives.gather(own[None]).logsumexp(dim=0)

    def similarities(self, v: Tensor, ids: Tensor) -> Tensor:
        """Return <v_i, row of ids[i, k]>, (B, K): each rank computes those with its own rows."""
        return collectives.all_sum(similarities(v, self.rows, self._places(ids)))

    @torch.no_grad()
    def update(self, ids: Tensor, v: Tensor, *, momentum: float) -> None:
        """Move the rows of these ids towards v (B, dim); the last one wins where an id is twice."""
        places = self._places(ids)
        mine = (places >= 0).nonzero()[:, 0]
        places, v = places[mine], v[last_of_each(ids)[mine]]
        if len(mine):
            self.rows.index_copy_(0, places, moved(self.rows[places], v, momentum=momentum))


def noise_ids(ids: Tensor, *, step: Tensor, num_images: int, noise: int, seed: int) -> Tensor:
    """Return ids of negatives, (B, noise) int64, uniform with replacement among num_images.

    A function of (seed, step, image id). Two 24-bit numbers each: one alone could not reach, and
    not hit equally often, every image of a corpus of millions.
    """
    numbers = step * num_images + ids
    u = uniforms(seed=seed, epoch=0, ids=numbers, draws=2 * noise, stream=NOISE_STREAM).double()
    return ((u[:, :noise] + u[:, noise:] * 2.0**-24) * num_images).long().clamp_max(num_images - 1)
