"""Labels: the pseudo-labels of several heads, cut over the ranks by image id, and how they move."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import numpy as np
import torch
from torch import Tensor, nn

from selfsup_ray import collectives
from selfsup_ray.artifacts import Array
from selfsup_ray.collectives import Shares

Source = Callable[[int, int], Array]
"""(first, stop) -> labels (stop - first, T) of the images with these ids."""

AT_ONCE = 1 << 22
"""Labels that are made, read or sent to rank 0 at a time."""


class Labels(nn.Module):
    """Labels of T heads; neighboring ids lie on one rank, as equally as they divide.

    Only what concerns a batch travels in a step: its ids, and T numbers an image. All ranks call
    `of` and the states alike. The labels of this rank's images are made when one is first asked
    for: a process that only looks at a checkpoint never has them all.
    """

    rows: Tensor

    def __init__(self, num_images: int, num_heads: int, source: Source) -> None:
        """source: of the labels to start from."""
        super().__init__()
        self.shares, self.num_heads = collectives.shares(num_images), num_heads
        self.register_buffer("rows", torch.empty(0, num_heads, dtype=torch.int32), persistent=False)
        self._source: Source | None = source

    def __len__(self) -> int:
        return self.shares.total

    @property
    def ids(self) -> Array:
        """The ids of this rank's images, (n,) int64, ascending."""
        return np.arange(self.shares.first, self.shares.first + self.shares.mine)

    def start_from(self, source: Source) -> None:
        """Take labels from elsewhere, when one is first asked for."""
        self._source = source

    def between(self, first: int, stop: int) -> Array:
        """Return the labels (stop - first, T) int32 of neighboring images of this rank."""
        if self._source is not None:
            return np.asarray(self._source(first, stop), np.int32)
        return self.rows[first - self.shares.first :][: stop - first].cpu().numpy()

    def mine(self) -> Tensor:
        """Return the labels (n, T) int32 of this rank's images, to be read or changed in place."""
        if self._source is not None:
            first = self.shares.first
            made = torch.empty(self.shares.mine, self.num_heads, dtype=torch.int32)
            for start, stop in pieces(first, first + self.shares.mine, num_heads=self.num_heads):
                made[start - first : stop - first] = torch.from_numpy(self.between(start, stop))
            self.rows, self._source = made.to(self.rows.device), None
        return self.rows

    @torch.no_grad()
    def of(self, ids: Tensor, shares: Shares) -> Tensor:
        """Return the labels (n, T) of this rank's part of a batch, from wherever they are.

        ids: (n,) of the part; shares: how the batch lies on the ranks.
        """
        rows, everyone = self.mine(), collectives.gather(ids, shares)
        places = everyone - self.shares.first
        is_mine = (places >= 0) & (places < self.shares.mine)
        found = rows.new_zeros(len(everyone), self.num_heads)
        found[is_mine] = rows[places[is_mine]]
        return collectives.all_sum(found)[shares.first :][: len(ids)]

    def get_extra_state(self) -> Tensor:
        """Return the labels of all ranks by id on rank 0 and none elsewhere, for the checkpoint."""
        rows, at_once = self.mine(), max(1, AT_ONCE // self.num_heads)
        return collectives.on_first(rows, self.shares, at_once=at_once, on_disk=True)

    def set_extra_state(self, state: Tensor) -> None:
        """Take this rank's labels out of all labels, however many ranks there were."""
        assert state.shape == (len(self), self.num_heads), f"labels {tuple(state.shape)}"
        self.start_from(lambda first, stop: state[first:stop].cpu().numpy())


def pieces(first: int, stop: int, *, num_heads: int) -> Iterator[tuple[int, int]]:
    """Yield (first, stop) of neighboring images, AT_ONCE labels each, that make up a range."""
    step = max(1, AT_ONCE // num_heads)
    for start in range(first, stop, step):
        yield start, min(start + step, stop)


class Route:
    """Brings a number of each image to the rank that the image's id lies on.

    ids: (n,) of the images that this rank has numbers of. Raises RuntimeError on every rank unless
    all ranks together have each image exactly once.
    """

    def __init__(self, ids: Array, shares: Shares, device: torch.device) -> None:
        owner = np.searchsorted(np.cumsum(shares.rows), ids, side="right")
        self.order = torch.from_numpy(np.argsort(owner, kind="stable")).to(device)
        self.sent = np.bincount(owner, minlength=len(shares.rows)).tolist()
        one_each = [1] * len(self.sent)
        counts = torch.tensor(self.sent, device=device)
        self.arriving = collectives.exchange(counts, one_each, one_each).tolist()
        self.places = self._moved(torch.from_numpy(ids).to(device)) - shares.first
        times = torch.bincount(self.places, minlength=shares.mine)
        wrong = int(collectives.all_sum((times != 1).sum()))
        if wrong:
            raise RuntimeError(f"{wrong} of {shares.total} images were not seen exactly once")

    def __call__(self, values: Tensor) -> Tensor:
        """Return the numbers of this rank's images by id; values: (n,) in the order of `ids`."""
        arrived = self._moved(values.to(self.places.device))
        return torch.empty_like(arrived).index_copy_(0, self.places, arrived)

    def _moved(self, values: Tensor) -> Tensor:
        return collectives.exchange(values[self.order], self.sent, self.arriving)
