"""Bytes of a training step as planned are those that the collectives are called with."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.distributed as dist

from selfsup_ray.costs_traffic import pretext_size
from selfsup_ray.models.backbones import ResNetConfig, build_backbone
from selfsup_ray.models.norm import LocalNorm, ShuffleNorm, SyncNorm
from selfsup_ray.models.pretext import MoCoConfig, SimCLRConfig, build_pretext
from selfsup_ray.stages.pretext import PretextConfig

BATCH, SIDE = 16, 16
METHODS: dict[str, Any] = {
    "simclr, sync": SimCLRConfig(batch_norm=SyncNorm()),
    "simclr, local": SimCLRConfig(batch_norm=LocalNorm()),
    "moco, shuffle": MoCoConfig(queue_size=64, batch_norm=ShuffleNorm(group_size=4)),
    "moco, sync": MoCoConfig(queue_size=64, batch_norm=SyncNorm(), symmetric=True),
}


def config(name: str) -> PretextConfig:
    backbone = ResNetConfig(stem="stl", width=4)
    return PretextConfig(
        method=METHODS[name], backbone=backbone, batch_size=BATCH, precision="float32"
    )


def bytes_asked_for(name: str) -> float:
    """Return what one step of this rank puts into rings, gradients left out (DDP sends them)."""
    made, size = config(name), dist.get_world_size()
    objective = build_pretext(made.method, build_backbone(made.backbone), num_images=64)
    asked, gather, reduce = [0.0], dist.all_gather, dist.all_reduce

    def counted_gather(parts: Any, x: torch.Tensor) -> Any:
        asked[0] += (size - 1) * x.numel() * x.element_size()
        return gather(parts, x)

    def counted_reduce(x: torch.Tensor) -> Any:
        asked[0] += 2 * (size - 1) / size * x.numel() * x.element_size()
        return reduce(x)

    dist.all_gather, dist.all_reduce = counted_gather, counted_reduce  # type: ignore[assignment]
    rows = BATCH // size
    views = [torch.randn(rows, 3, SIDE, SIDE) for _ in range(2)]
    loss, _ = objective.train()(views, torch.arange(rows))
    loss.backward()
    objective.after_step(0.0)
    return asked[0]


@pytest.mark.parametrize("name", METHODS)
def test_the_planned_bytes_of_a_step_are_those_of_its_collectives(name: str, on_ranks: Any):
    step = pretext_size(config(name), workers=2, side=SIDE, n=64).step
    assert sum(on_ranks(bytes_asked_for, name, size=2)) == step.total - step.gradients


def test_the_planned_gradients_are_all_parameters_twice_over_every_border():
    made = config("simclr, sync")
    objective = build_pretext(made.method, build_backbone(made.backbone))
    parameters = sum(p.numel() for p in objective.parameters())
    for workers in (1, 2, 8):
        step = pretext_size(made, workers=workers, side=SIDE, n=64).step
        assert step.gradients == 2 * (workers - 1) * parameters * 4
    assert pretext_size(made, workers=1, side=SIDE, n=64).step.total == 0
