"""models/labels.py: labels by image id on several ranks, against one table of all of them."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from selfsup_ray import collectives
from selfsup_ray.models.labels import Labels, Route
from selfsup_ray.training import load_state, save_state

OnRanks = Callable[..., list[Any]]
N, T = 23, 3
TABLE = np.random.default_rng(0).integers(0, 50, (N, T), np.int32)
CPU = torch.device("cpu")


def labels() -> Labels:
    return Labels(N, T, lambda first, stop: TABLE[first:stop])


def of_a_batch(rows: tuple[int, ...]) -> dict[str, Any]:
    """What each rank gets for its part of a batch, how much it holds, and its largest message."""
    made, shares = labels(), collectives.Shares(rows)
    ids = torch.tensor([7, 22, 0, 7, 15, 3, 11])[shares.first :][: shares.mine]
    numbers, reduce = list[int](), dist.all_reduce

    def counted(x: Tensor, *args: Any, **options: Any) -> Any:
        numbers.append(x.numel())
        return reduce(x, *args, **options)

    dist.all_reduce = counted
    found = made.of(ids, shares)
    return {"ids": ids, "found": found, "held": len(made.rows), "numbers": max(numbers)}


@pytest.mark.parametrize("rows", [(4, 3), (3, 0, 2, 2)])
def test_a_batch_gets_its_labels_from_the_ranks_that_hold_them(
    on_ranks: OnRanks, rows: tuple[int, ...]
) -> None:
    results = on_ranks(of_a_batch, rows, size=len(rows))
    for result in results:
        assert torch.equal(result["found"], torch.from_numpy(TABLE)[result["ids"]])
        assert result["held"] <= -(-N // len(rows)), "a rank holds its share alone"
        assert result["numbers"] == sum(rows) * T, "labels of the batch are all that travels"


def routed() -> dict[str, Tensor]:
    """Each rank has numbers of other images than those that lie on it."""
    shares = collectives.shares(N)
    order = np.random.default_rng(1).permutation(N)
    ids = order[shares.first :][: shares.mine]
    route = Route(ids, shares, CPU)
    return {"found": route(torch.from_numpy(TABLE[ids, 0])), "first": torch.tensor(shares.first)}


@pytest.mark.parametrize("size", [2, 3])
def test_numbers_of_shuffled_images_arrive_in_the_order_of_ids(
    on_ranks: OnRanks, size: int
) -> None:
    parts = on_ranks(routed, size=size)
    assert torch.equal(routed()["found"], torch.from_numpy(TABLE[:, 0]))
    assert torch.equal(torch.cat([part["found"] for part in parts]), torch.from_numpy(TABLE[:, 0]))


def refused() -> str:
    """Rank 0 has an image that rank 1 has, too."""
    ids = np.arange(N)[collectives.shares(N).first :][: collectives.shares(N).mine]
    if collectives.rank() == 0:
        ids[0] = N - 1
    with pytest.raises(RuntimeError) as error:
        Route(ids, collectives.shares(N), CPU)
    return str(error.value)


def test_an_image_that_is_seen_twice_is_an_error_on_every_rank(on_ranks: OnRanks) -> None:
    wanted = f"2 of {N} images were not seen exactly once"
    assert on_ranks(refused, size=2) == [wanted, wanted]


def kept(path: Path) -> int:
    """Change the labels of this rank and save the state; return the rows of the state."""
    made = labels()
    made.mine().add_(1)
    state = made.state_dict()
    if collectives.rank() == 0:
        save_state(path, {"objective": state, "optimizer": {}, "step": 3, "history": []})
    return len(state["_extra_state"])


def restored(path: Path) -> Tensor:
    state = load_state(path)
    assert state is not None
    made = labels()
    made.load_state_dict(state["objective"])
    return made.mine()


def test_a_checkpoint_of_two_ranks_is_that_of_any_number(on_ranks: OnRanks, tmp_path: Path) -> None:
    path = tmp_path / "checkpoint.pt"
    assert on_ranks(kept, path, size=2) == [N, 0], "rank 0 alone has the state of all"
    for size in (1, 3):
        parts = on_ranks(restored, path, size=size)
        assert torch.equal(torch.cat(parts), torch.from_numpy(TABLE + 1))


def test_labels_of_a_checkpoint_are_read_by_range_and_held_by_nobody(tmp_path: Path) -> None:
    kept(tmp_path / "checkpoint.pt")
    state, made = load_state(tmp_path / "checkpoint.pt"), labels()
    assert state is not None
    made.load_state_dict(state["objective"])
    assert (made.between(5, 9) == TABLE[5:9] + 1).all()
    assert len(made.rows) == 0


def test_ten_billion_labels_cost_nothing_before_one_is_asked_for() -> None:
    made = Labels(10**9, 10, lambda first, stop: np.full((stop - first, 10), first % 7))
    assert len(made) == 10**9 and made.between(10**8, 10**8 + 2).tolist() == [[2] * 10] * 2
