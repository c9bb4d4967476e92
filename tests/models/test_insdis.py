"""models/insdis.py and models/bank.py against the algorithm in slow loops, and over ranks."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from selfsup_ray import collectives
from selfsup_ray.errors import ConfigError
from selfsup_ray.models.backbones import Backbone, ResNetConfig, build_backbone
from selfsup_ray.models.bank import Bank, noise_ids
from selfsup_ray.models.heads import LinearHead, MLPHead
from selfsup_ray.models.insdis import InsDis, InsDisConfig, NCELoss
from selfsup_ray.models.norm import ShuffleNorm, SyncNorm
from selfsup_ray.models.pretext import build_pretext

OnRanks = Callable[..., list[Any]]
N, DIM = 10, 8


def backbone() -> Backbone:
    return build_backbone(ResNetConfig(stem="stl", width=4)).double()


def insdis(**values: Any) -> InsDis:
    values = {"head": LinearHead(dim=DIM), "batch_norm": SyncNorm(), "temperature": 0.2} | values
    objective = build_pretext(InsDisConfig(**values), backbone(), num_images=N).double()
    assert isinstance(objective, InsDis)
    return objective


def batch(step: int, size: int = 4) -> tuple[Tensor, Tensor]:
    """Images and their ids, other ones in every step."""
    generator = torch.Generator().manual_seed(step)
    images = torch.randn(size, 3, 12, 12, generator=generator, dtype=torch.float64)
    return images, torch.randperm(N, generator=generator)[:size]


class SlowInsDis:
    """The paper's algorithm: a list of rows, cross-entropy over all of them or NCE, then moves."""

    def __init__(self, objective: InsDis) -> None:
        self.network = copy.deepcopy(nn.Sequential(objective.backbone, objective.head))
        self.rows = list(objective.bank.rows.clone())
        self.optimizer = torch.optim.SGD(self.network.parameters(), lr=0.1)
        self.partition: float | None = None
        self.temperature = objective.method.temperature

    def softmax(self, v: Tensor, ids: Tensor) -> Tensor:
        return F.cross_entropy(v @ torch.stack(self.rows).T / self.temperature, ids)

    def nce(self, v: Tensor, ids: Tensor, noise: Tensor) -> Tensor:
        own = (v * torch.stack([self.rows[i] for i in ids])).sum(dim=1) / self.temperature
        others = torch.stack(
            [torch.stack([v[i] @ self.rows[j] for j in noise[i]]) for i in range(len(v))]
        )
        others = others / self.temperature
        if self.partition is None:
            self.partition = N * torch.cat([own[:, None], others], dim=1).exp().mean().item()
        p, q, density = own.exp() / self.partition, others.exp() / self.partition, 1 / N
        expected = noise.shape[1] * density
        data = (p / (p + expected)).log()
        return -(data + (expected / (q + expected)).log().sum(dim=1)).mean()

    def step(self, images: Tensor, ids: Tensor, noise: Tensor | None = None) -> float:
        v = F.normalize(self.network(images), dim=1)
        loss = self.softmax(v, ids) if noise is None else self.nce(v, ids, noise)
        self.optimizer.zero_grad()
        loss.backward()
        self.optimizer.step()
        for i, row in zip(ids.tolist(), v.detach(), strict=True):
            moved = 0.5 * self.rows[i] + 0.5 * row
            self.rows[i] = moved / moved.norm()
        return loss.item()


def steps(objective: InsDis, numbers: range) -> list[float]:
    optimizer = torch.optim.SGD([p for _, p in objective.trainable()], lr=0.1)
    losses = []
    for step in numbers:
        images, ids = batch(step)
        loss, metrics = objective([images], ids)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        objective.after_step(0.0)
        losses.append(loss.item())
        assert metrics["loss"].item() == loss.item()
    return losses


def test_the_full_softmax_is_the_papers_algorithm() -> None:
    objective = insdis(head=MLPHead(hidden_dim=8, dim=DIM, batch_norm="hidden"))
    slow = SlowInsDis(objective)
    expected = [slow.step(*batch(step)) for step in range(4)]
    assert steps(objective, range(4)) == pytest.approx(expected, rel=1e-9)
    torch.testing.assert_close(objective.bank.rows, torch.stack(slow.rows))


def test_nce_is_the_papers_algorithm_with_the_partition_of_the_first_batch() -> None:
    objective = insdis(loss=NCELoss(noise=6))
    slow = SlowInsDis(objective)
    expected = []
    for step in range(3):
        images, ids = batch(step)
        drawn = noise_ids(ids, step=torch.tensor(step), num_images=N, noise=6, seed=0)
        expected.append(slow.step(images, ids, drawn))
    assert steps(objective, range(3)) == pytest.approx(expected, rel=1e-9)
    assert objective.partition.item() == pytest.approx(slow.partition)


def test_an_averaged_partition_moves_by_a_hundredth_a_step() -> None:
    frozen, followed = (
        insdis(loss=NCELoss(noise=6, partition=name)) for name in ("frozen", "average")
    )
    for objective in (frozen, followed):
        steps(objective, range(1))
    first = frozen.partition.item()
    assert followed.partition.item() == first
    images, ids = batch(1)
    followed([images], ids)
    drawn = noise_ids(ids, step=torch.tensor(1), num_images=N, noise=6, seed=0)
    v = F.normalize(frozen.head(frozen.backbone(images)), dim=1)
    rows = frozen.bank.rows[torch.cat([ids[:, None], drawn], dim=1)]
    now = N * (torch.einsum("nd,nkd->nk", v, rows) / 0.2).exp().mean().item()
    assert followed.partition.item() == pytest.approx(0.99 * first + 0.01 * now)


def test_the_bank_starts_within_the_published_bounds_as_a_function_of_the_id() -> None:
    rows = Bank(2000, 128, seed=3).rows
    assert rows.abs().max().item() == pytest.approx(0.1531, abs=1e-4)
    assert rows.std().item() == pytest.approx(0.1531 / 3**0.5, rel=0.01)
    assert torch.equal(Bank(50, 128, seed=3).rows, rows[:50])
    assert not torch.equal(Bank(50, 128, seed=4).rows, rows[:50])


def test_an_image_that_is_twice_in_a_step_keeps_what_came_last() -> None:
    bank = Bank(4, 2, seed=0).double()
    before = bank.rows.clone()
    v = F.normalize(torch.tensor([[1.0, 0], [0, 1], [1, 1]], dtype=torch.float64), dim=1)
    bank.update(torch.tensor([2, 0, 2]), v, momentum=0.5)
    expected = before.clone()
    expected[0] = F.normalize(before[0] + v[1], dim=0)
    expected[2] = F.normalize(before[2] + v[2], dim=0)
    torch.testing.assert_close(bank.rows, expected)


def test_noise_is_uniform_with_replacement_and_its_own_for_every_image_and_step() -> None:
    ids = torch.arange(200)
    drawn = noise_ids(ids, step=torch.tensor(5), num_images=7, noise=500, seed=0)
    shares = torch.bincount(drawn.flatten(), minlength=7) / drawn.numel()
    torch.testing.assert_close(shares, torch.full((7,), 1 / 7), rtol=0.03, atol=0)
    alone = noise_ids(ids[8:9], step=torch.tensor(5), num_images=7, noise=500, seed=0)
    assert torch.equal(alone[0], drawn[8]) and not torch.equal(drawn[8], drawn[9])
    later = noise_ids(ids, step=torch.tensor(6), num_images=7, noise=500, seed=0)
    assert not torch.equal(later, drawn)
    far = noise_ids(ids, step=torch.tensor(0), num_images=10**8, noise=50, seed=0)
    assert 0 <= far.min() and far.max() < 10**8 and (far % 2 == 1).float().mean() > 0.4


def test_evaluation_leaves_the_bank_and_the_partition_alone() -> None:
    objective = insdis(loss=NCELoss(noise=6))
    steps(objective, range(1))
    before = copy.deepcopy(objective.state_dict())
    images, ids = batch(1)
    objective.eval()([images], ids)
    objective.after_step(0.0)
    before["steps"] += 1
    torch.testing.assert_close(objective.state_dict(), before, rtol=0, atol=0)


def test_shuffled_batch_norm_is_refused() -> None:
    with pytest.raises(ConfigError, match="shuffle is for moco; insdis takes one of sync"):
        InsDisConfig(batch_norm=ShuffleNorm())


def bank_answers() -> dict[str, Tensor]:
    """What a bank of 11 rows answers to a batch of 3 images, and its rows after an update."""
    bank = Bank(11, 4, seed=1).double()
    generator = torch.Generator().manual_seed(0)
    v = F.normalize(torch.randn(3, 4, generator=generator, dtype=torch.float64), dim=1)
    ids = torch.tensor([9, 0, 4])
    columns = torch.tensor([[0, 10, 3], [5, 5, 6], [9, 4, 1]])
    fetched = bank.of(ids)
    v.requires_grad_()
    lse = bank.log_sum_exp(v, temperature=0.1)
    similar = bank.similarities(v, columns)
    (lse.square().sum() + (similar * columns).sum()).backward()
    assert v.grad is not None
    bank.update(ids, v.detach(), momentum=0.5)
    whole = bank.get_extra_state()
    assert len(whole) == (11 if collectives.rank() == 0 else 0)
    answers = {"fetched": fetched, "lse": lse.detach(), "similar": similar.detach()}
    # Every rank has the loss of the whole batch, so the sum over ranks is differentiated.
    gradient = collectives.all_sum(v.grad) / collectives.world_size()
    return answers | {"gradient": gradient, "rows": whole.clone()}


@pytest.mark.parametrize("size", [2, 4])
def test_a_bank_in_pieces_answers_as_a_whole_one(on_ranks: OnRanks, size: int) -> None:
    alone = bank_answers()
    for rank, found in enumerate(on_ranks(bank_answers, size=size)):
        rows = found.pop("rows")
        torch.testing.assert_close(found, {key: alone[key] for key in found})
        if rank == 0:
            torch.testing.assert_close(rows, alone["rows"])


def continued(state: dict[str, Any], first: int, last: int) -> dict[str, Any]:
    """The state on rank 0 after training from `state` on, this rank's share of each batch."""
    objective = insdis()
    if state:
        objective.load_state_dict(state)
    optimizer = torch.optim.SGD([p for _, p in objective.trainable()], lr=0.1)
    for step in range(first, last):
        images, ids = batch(step)
        shares = collectives.shares(len(ids))
        rows = slice(shares.first, shares.first + shares.mine)
        loss, _ = objective([images[rows]], ids[rows])
        optimizer.zero_grad()
        (loss * shares.mine / shares.total).backward()
        for _, parameter in objective.trainable():
            assert parameter.grad is not None
            parameter.grad = collectives.all_sum(parameter.grad)
        optimizer.step()
        objective.after_step(0.0)
    return {key: value.clone() for key, value in objective.state_dict().items()}


@pytest.mark.parametrize(("before", "after"), [(1, 2), (4, 2)])
def test_a_checkpoint_continues_on_another_number_of_ranks(
    on_ranks: OnRanks, before: int, after: int
) -> None:
    straight = continued({}, 0, 4)
    state = on_ranks(continued, {}, 0, 2, size=before)[0]
    again = on_ranks(continued, state, 2, 4, size=after)[0]
    assert len(again["bank._extra_state"]) == N
    torch.testing.assert_close(again, straight, rtol=1e-7, atol=1e-8)
