"""models/clustering.py against the original's update rules written out, and scikit-learn."""

from __future__ import annotations

import copy

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from selfsup_ray.models.backbones import Backbone, ResNetConfig, build_backbone
from selfsup_ray.models.clustering import Scan, SelfLabel


def backbone(width: int = 4) -> Backbone:
    return build_backbone(ResNetConfig(stem="stl", width=width)).double()


def images(batch: int, *, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(batch, 3, 12, 12, generator=generator, dtype=torch.float64)


def scan(**values: object) -> Scan:
    return Scan(backbone(), **({"num_clusters": 3} | values)).double().train()  # type: ignore[arg-type]


def ids(x: Tensor) -> Tensor:
    return torch.arange(len(x))


def test_scan_sums_over_heads_what_each_would_lose_alone() -> None:
    objective = scan(num_heads=3, entropy_weight=2.0)
    network = copy.deepcopy(objective.backbone)
    anchors, neighbors = images(6), images(6, seed=1)
    a, b = network(anchors), network(neighbors)  # two forwards: two batches for batch norm
    expected = []
    for head in objective.heads:
        p, q = head(a).softmax(dim=1), head(b).softmax(dim=1)
        mean = p.mean(dim=0)
        expected.append(-(p * q).sum(dim=1).log().mean() + 2 * (mean * mean.log()).sum())
    loss, metrics = objective([anchors, neighbors], ids(anchors))
    torch.testing.assert_close(loss, torch.stack(expected).sum())
    torch.testing.assert_close(metrics["loss"], torch.stack(expected).mean().detach())
    for i, value in enumerate(expected):
        torch.testing.assert_close(metrics[f"loss_head{i}"], value.detach())


def test_a_frozen_backbone_is_left_exactly_as_it_was() -> None:
    objective = scan(num_heads=2, freeze_backbone=True)
    before = copy.deepcopy(objective.backbone.state_dict())
    assert {name for name, _ in objective.trainable()} == {
        f"heads.{i}.{kind}" for i in (0, 1) for kind in ("weight", "bias")
    }
    loss, _ = objective([images(6), images(6, seed=1)], ids(images(6)))
    loss.backward()
    torch.testing.assert_close(objective.backbone.state_dict(), before, rtol=0, atol=0)
    assert objective.heads[0].weight.grad is not None
    expected = backbone().eval()(images(6))
    torch.testing.assert_close(objective.backbone(images(6)), expected)  # running statistics


def test_the_best_head_is_the_one_with_the_lowest_training_loss() -> None:
    objective = scan(num_heads=3, freeze_backbone=True)
    with torch.no_grad():
        objective.heads[1].weight.zero_()  # uniform predictions: the loss stays at 0 here
        for head in (objective.heads[0], objective.heads[2]):
            head.weight.normal_(generator=torch.Generator().manual_seed(0)).mul_(20)
    objective.entropy_weight = 1.0
    totals = torch.zeros(3, dtype=torch.float64)
    for step in range(4):
        x, y = images(6, seed=step), images(6, seed=step + 10)
        _, metrics = objective([x, y], ids(x))
        totals += torch.stack([metrics[f"loss_head{i}"] for i in range(3)])
    assert len(set(totals.tolist())) >= 2
    assert objective.best_head() == int(totals.argmin())


def test_heads_differ_from_the_start_and_follow_the_seed() -> None:
    first, again, other = (scan(num_heads=2, seed=seed) for seed in (1, 1, 2))
    weights = [head.weight for head in first.heads]
    assert not torch.equal(weights[0], weights[1])
    torch.testing.assert_close(first.heads.state_dict(), again.heads.state_dict())
    assert not torch.equal(first.heads[0].weight, other.heads[0].weight)


def self_label(*, scale: float = 1.0, **values: object) -> SelfLabel:
    """A self-labelling objective whose confidence grows with the scale of its head."""
    head = nn.Linear(32, 3)
    nn.init.normal_(head.weight, std=scale, generator=torch.Generator().manual_seed(0))
    nn.init.zeros_(head.bias)
    return SelfLabel(backbone(), head, **values).double().train()  # type: ignore[arg-type]


def test_self_label_fits_the_strong_view_to_confident_weak_predictions() -> None:
    objective = self_label(scale=1.0, threshold=0.9, balance=False)
    network = copy.deepcopy(nn.Sequential(objective.backbone, objective.head))
    weak, strong = images(8), images(8, seed=1)
    confidence, label = network(weak).softmax(dim=1).max(dim=1)  # training mode, as the original
    chosen = confidence > 0.9
    assert 0 < chosen.sum() < 8
    expected = F.cross_entropy(network(strong)[chosen], label[chosen])
    loss, metrics = objective([weak, strong], ids(weak))
    torch.testing.assert_close(loss, expected)
    assert metrics["confident_share"].item() == pytest.approx(chosen.double().mean().item())
    counts = np.bincount(label[chosen].numpy(), minlength=3)
    assert metrics["confident_clusters"].item() == (counts > 0).sum()
    assert metrics["largest_confident_share"].item() == pytest.approx(counts.max() / counts.sum())


def test_a_step_with_nobody_confident_is_left_out_and_the_threshold_backs_off() -> None:
    objective = self_label(scale=1e-3, threshold=0.9)
    weak = images(6)
    thresholds, skipped = [], []
    for _ in range(40):
        loss, metrics = objective([weak, weak], ids(weak))
        thresholds.append(metrics["threshold"].item())
        skipped.append(metrics["skipped_steps"].item())
        assert loss.item() == 0 and metrics["confident_share"].item() == 0
        assert not objective.should_step()
        objective.after_step(0.0)
    assert thresholds[:2] == pytest.approx([0.9, 0.9 * 0.98])
    assert thresholds[-1] == 0.5  # never below: the prediction must have a majority
    assert skipped == list(range(40))


def test_the_threshold_comes_back_when_somebody_is_confident() -> None:
    objective = self_label(scale=100.0, threshold=0.9)
    objective.current_threshold.fill_(0.88)
    weak = images(6)
    for expected in (0.88, 0.88 / 0.98, 0.9, 0.9):
        _, metrics = objective([weak, weak], ids(weak))
        assert metrics["threshold"].item() == pytest.approx(expected)
        assert objective.should_step()
        objective.after_step(0.0)
    assert int(objective.skipped_steps) == 0


def test_ema_continues_from_the_averaged_weights_with_the_first_statistics() -> None:
    objective = self_label(scale=100.0, ema=0.9)
    optimizer = torch.optim.SGD(objective.parameters(), lr=0.01)
    shadow = {name: p.detach().clone() for name, p in objective.named_parameters()}
    statistics = copy.deepcopy(dict(objective.backbone.named_buffers()))
    for step in range(3):
        objective([images(6, seed=step), images(6, seed=step + 9)], ids(images(6)))[0].backward()
        optimizer.step()
        for name, p in objective.named_parameters():  # the original's rule, by name
            shadow[name] = 0.9 * shadow[name] + 0.1 * p.detach()
        objective.after_step(0.0)
        torch.testing.assert_close(dict(objective.named_parameters()), shadow)
    now = dict(objective.backbone.named_buffers())
    for name in ("bn1.running_mean", "layer4.1.bn2.running_var"):
        torch.testing.assert_close(now[name], statistics[name], rtol=0, atol=0)


def test_under_bfloat16_the_weak_branch_does_not_cut_the_gradient() -> None:
    # autocast caches cast weights; those cast in the branch without gradient must not be reused.
    objective = self_label(scale=100.0, threshold=0.5).float()
    with torch.autocast("cpu", torch.bfloat16):
        loss, _ = objective([images(6).float(), images(6, seed=1).float()], ids(images(6)))
    loss.backward()
    assert objective.backbone.conv1.weight.grad is not None
    assert objective.backbone.conv1.weight.grad.any()
