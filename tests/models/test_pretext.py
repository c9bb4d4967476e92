"""models/pretext.py against lightly and against the papers' pseudo-code in slow loops."""

from __future__ import annotations

import copy

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from lightly.loss import NTXentLoss
from torch import Tensor, nn

from selfsup_ray.errors import ConfigError
from selfsup_ray.models.backbones import Backbone, ResNetConfig, build_backbone
from selfsup_ray.models.heads import LinearHead, MLPHead
from selfsup_ray.models.norm import LocalNorm, ShuffleNorm, SplitNorm
from selfsup_ray.models.objective import embedding_std
from selfsup_ray.models.pretext import (
    MoCo,
    MoCoConfig,
    SimCLR,
    SimCLRConfig,
    build_pretext,
    check_method,
)

HEAD = MLPHead(hidden_dim=16, dim=8)


def backbone() -> Backbone:
    return build_backbone(ResNetConfig(stem="stl", width=4)).double()


def two_views(batch: int, *, seed: int = 0) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    shape = (batch, 3, 12, 12)
    return [torch.randn(shape, generator=generator, dtype=torch.float64) for _ in range(2)]


def simclr(**values: object) -> SimCLR:
    objective = build_pretext(SimCLRConfig(head=HEAD, **values), backbone()).double()  # type: ignore[arg-type]
    assert isinstance(objective, SimCLR)
    return objective


def moco(**values: object) -> MoCo:
    config = MoCoConfig(**({"head": HEAD, "queue_size": 12, "batch_norm": LocalNorm()} | values))  # type: ignore[arg-type]
    objective = build_pretext(config, backbone()).double()
    assert isinstance(objective, MoCo)
    return objective


def ids(views: list[Tensor]) -> Tensor:
    return torch.arange(len(views[0]))


def test_simclr_is_lightlys_loss_of_both_views_normalised_as_one_batch() -> None:
    objective = simclr(temperature=0.3)
    reference = copy.deepcopy(objective)
    views = two_views(5)
    loss, metrics = objective(views, ids(views))
    z = reference.head(reference.backbone(torch.cat(views)))
    expected = NTXentLoss(temperature=0.3)(*z.chunk(2))
    torch.testing.assert_close(loss, expected)
    cosine = F.cosine_similarity(*z.chunk(2)).mean()
    torch.testing.assert_close(metrics["positive_similarity"], cosine.detach())
    loss.backward()
    expected.backward()
    for ours, theirs in zip(objective.parameters(), reference.parameters(), strict=True):
        torch.testing.assert_close(ours.grad, theirs.grad)


def test_the_three_simclr_losses_differ() -> None:
    views = two_views(4)
    losses = {
        name: simclr(loss=name)(views, ids(views))[0].item()
        for name in ("nt_xent", "one_way", "cross_view")
    }
    assert len(set(losses.values())) == 3


def test_embedding_std_is_zero_for_a_collapse_and_one_for_a_random_sphere() -> None:
    generator = torch.Generator().manual_seed(0)
    sphere = F.normalize(torch.randn(20_000, 16, generator=generator), dim=1)
    assert embedding_std(sphere).item() == pytest.approx(1, abs=0.01)
    assert embedding_std(sphere[:1].expand(50, -1)).item() == pytest.approx(0, abs=1e-6)


def test_simclr_refuses_the_shuffle_of_moco() -> None:
    with pytest.raises(ConfigError, match="shuffle is for moco"):
        SimCLRConfig(batch_norm=ShuffleNorm())


class SlowMoCo:
    """Algorithm 1 of MoCo's paper, with the key network updated before the forward."""

    def __init__(self, objective: MoCo) -> None:
        self.query_net = nn.Sequential(objective.backbone, objective.head)
        self.query_net = copy.deepcopy(self.query_net)
        self.key_net = copy.deepcopy(self.query_net).requires_grad_(False)
        self.queue = list(objective.queue.clone())
        self.method = objective.method
        self.optimizer = torch.optim.SGD(self.query_net.parameters(), lr=0.1)

    def pair_loss(self, x_q: Tensor, x_k: Tensor) -> tuple[Tensor, Tensor]:
        q = F.normalize(self.query_net(x_q), dim=1)
        k = F.normalize(self.key_net(x_k), dim=1).detach()
        losses = []
        for query, key in zip(q, k, strict=True):
            scores = torch.stack([query @ key, *(query @ negative for negative in self.queue)])
            losses.append(-(scores / self.method.temperature).log_softmax(dim=0)[0])
        return torch.stack(losses).mean(), k

    def step(self, x_q: Tensor, x_k: Tensor) -> float:
        m = self.method.momentum
        for key, query in zip(self.key_net.parameters(), self.query_net.parameters(), strict=True):
            key.data = m * key.data + (1 - m) * query.data
        loss, keys = self.pair_loss(x_q, x_k)
        if self.method.symmetric:
            other, more = self.pair_loss(x_k, x_q)
            loss, keys = loss + other, torch.cat([keys, more])
        self.optimizer.zero_grad()
        loss.backward()
        self.optimizer.step()
        self.queue = self.queue[len(keys) :] + list(keys)  # dequeue the oldest
        return loss.item()


@pytest.mark.parametrize("symmetric", [False, True])
@pytest.mark.parametrize("head", [LinearHead(dim=8), HEAD])  # v1, v2
def test_moco_is_the_papers_algorithm(symmetric: bool, head: LinearHead | MLPHead) -> None:
    objective = moco(symmetric=symmetric, head=head, momentum=0.7)
    slow = SlowMoCo(objective)
    optimizer = torch.optim.SGD([p for _, p in objective.trainable()], lr=0.1)
    for step in range(5):  # the queue of 12 goes round
        views = two_views(3, seed=step)
        loss, metrics = objective(views, ids(views))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        objective.after_step(0.0)
        assert loss.item() == pytest.approx(slow.step(*views), rel=1e-9)
        assert metrics["loss"].item() == pytest.approx(loss.item())
    seen = 5 * 3 * (2 if symmetric else 1)
    oldest_first = objective.queue.roll(-(seen % 12), dims=0)
    torch.testing.assert_close(oldest_first, torch.stack(slow.queue))


def test_the_key_networks_statistics_are_its_own_and_never_averaged() -> None:
    objective = moco(momentum=0.5)
    views = two_views(3)
    for _ in range(2):
        objective(views, ids(views))[0].backward()
        objective.after_step(0.0)
    expected = build_backbone(ResNetConfig(stem="stl", width=4)).double()
    expected(views[1]), expected(views[1])  # weights have not moved, so neither have the keys'
    torch.testing.assert_close(objective.key_backbone.bn1.running_mean, expected.bn1.running_mean)


def test_queue_fill_counts_keys_until_the_queue_is_full() -> None:
    objective = moco()
    fills = []
    for _ in range(6):
        views = two_views(3)
        fills.append(objective(views, ids(views))[1]["queue_fill"].item())
        objective.after_step(0.0)
    assert fills == [0.0, 0.25, 0.5, 0.75, 1.0, 1.0]


def test_the_queue_starts_as_unit_rows_drawn_from_the_seed() -> None:
    queues = [MoCo(MoCoConfig(queue_size=64), backbone(), seed=seed).queue for seed in (1, 1, 2)]
    torch.testing.assert_close(queues[0].norm(dim=1), torch.ones(64))
    assert torch.equal(queues[0], queues[1]) and not torch.equal(queues[0], queues[2])


def test_only_the_query_network_is_trained() -> None:
    names = [name for name, _ in moco().trainable()]
    assert names and all(name.startswith(("backbone.", "head.")) for name in names)


def keys_of_groups(objective: MoCo, images: Tensor, groups: list[list[int]]) -> Tensor:
    """Keys when each of these groups has a GPU, and so batch statistics, of its own."""
    network = copy.deepcopy(nn.Sequential(objective.key_backbone, objective.key_head))
    keys = torch.empty(len(images), 8, dtype=torch.float64)
    for group in groups:
        keys[group] = F.normalize(network(images[group]), dim=1)
    return keys


def test_shuffle_normalises_keys_in_random_groups_that_change_each_step() -> None:
    objective = moco(batch_norm=ShuffleNorm(group_size=2), momentum=1.0)
    # The three ways to cut four images into two groups of two.
    cuts = [[[0, other], sorted({1, 2, 3} - {other})] for other in (1, 2, 3)]
    found = []
    for step in range(12):
        views = two_views(4, seed=step)
        expected = [keys_of_groups(objective, views[1], groups) for groups in cuts]
        at = int(objective.keys_seen) % 12
        objective(views, ids(views))
        objective.after_step(0.0)
        keys = objective.queue[at : at + 4]
        found.append([i for i, e in enumerate(expected) if torch.allclose(keys, e)])
    assert all(len(matches) == 1 for matches in found)
    assert {i for (i,) in found} == {0, 1, 2}


def test_split_normalises_keys_and_queries_in_consecutive_groups() -> None:
    objective = moco(batch_norm=SplitNorm(group_size=2))
    views = two_views(4)
    expected = keys_of_groups(objective, views[1], [[0, 1], [2, 3]])
    objective(views, ids(views))
    objective.after_step(0.0)
    torch.testing.assert_close(objective.queue[:4], expected)


def test_shuffling_uses_no_global_random_numbers() -> None:
    views = two_views(4)
    losses = []
    for seed in (0, 1):
        torch.manual_seed(seed)
        objective = moco(batch_norm=ShuffleNorm(group_size=2))
        losses.append(objective(views, ids(views))[0].item())
    assert losses[0] == losses[1]


def test_a_restored_moco_continues_as_if_it_had_not_stopped() -> None:
    straight = moco(batch_norm=ShuffleNorm(group_size=2), momentum=0.9)
    stopped = copy.deepcopy(straight)
    train(straight, steps=range(4))
    train(stopped, steps=range(2))
    again = moco(batch_norm=ShuffleNorm(group_size=2), momentum=0.9)
    again.load_state_dict(stopped.state_dict())
    train(again, steps=range(2, 4))
    torch.testing.assert_close(again.state_dict(), straight.state_dict(), rtol=0, atol=0)


def train(objective: MoCo, *, steps: range) -> None:
    optimizer = torch.optim.SGD([p for _, p in objective.trainable()], lr=0.1)
    for step in steps:
        views = two_views(4, seed=step)
        optimizer.zero_grad()
        objective(views, ids(views))[0].backward()
        optimizer.step()
        objective.after_step(0.0)


@pytest.mark.parametrize(("symmetric", "keys"), [(False, 5), (True, 10)])
def test_a_queue_that_is_no_multiple_of_the_keys_of_a_step_is_refused(
    symmetric: bool, keys: int
) -> None:
    method = MoCoConfig(queue_size=64, symmetric=symmetric)
    with pytest.raises(ConfigError, match=rf"queue_size=64 must be a multiple of the {keys} keys"):
        check_method(method, batch_size=5)
    views = two_views(5)
    with pytest.raises(ConfigError, match="queue_size"):
        MoCo(method, backbone())(views, ids(views))


@pytest.mark.parametrize(("batch_size", "group_size"), [(8, 8), (8, 3)])
def test_shuffling_needs_two_equal_groups_or_more(batch_size: int, group_size: int) -> None:
    method = MoCoConfig(queue_size=64, batch_norm=ShuffleNorm(group_size=group_size))
    with pytest.raises(ConfigError, match=rf"group_size={group_size} must divide batch_size=8"):
        check_method(method, batch_size=batch_size)


def test_bfloat16_changes_the_loss_only_by_rounding() -> None:
    generator = np.random.default_rng(0)
    views = [torch.from_numpy(generator.normal(size=(8, 3, 16, 16))).float() for _ in range(2)]
    methods = [
        SimCLRConfig(head=HEAD),
        MoCoConfig(head=HEAD, queue_size=16, batch_norm=LocalNorm()),
    ]
    for method in methods:
        objective = build_pretext(method, build_backbone(ResNetConfig(stem="stl", width=8)))
        exact, _ = copy.deepcopy(objective)(views, ids(views))
        with torch.autocast("cpu", torch.bfloat16):
            rounded, metrics = objective(views, ids(views))
        assert rounded.dtype == torch.float32
        assert rounded.item() == pytest.approx(exact.item(), rel=0.05)
        rounded.backward()
        assert all(p.grad is not None for _, p in objective.trainable())
        assert all(value.dtype == torch.float32 for value in metrics.values())


def test_every_method_gives_the_backbone_that_is_kept() -> None:
    for method in (SimCLRConfig(), MoCoConfig(queue_size=16)):
        network = backbone()
        assert build_pretext(method, network).encoder() is network


def test_the_head_depends_on_the_seed_alone() -> None:
    heads = []
    for _ in range(2):
        torch.rand(3)
        heads.append(build_pretext(SimCLRConfig(head=HEAD), backbone(), seed=7).head.state_dict())
    torch.testing.assert_close(heads[0], heads[1], rtol=0, atol=0)
