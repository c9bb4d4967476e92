"""Rotation prediction beside SeLa's labels, against slow loops and on several ranks."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from selfsup_ray import collectives
from selfsup_ray.models.backbones import ResNetConfig, build_backbone
from selfsup_ray.models.rotation import RotationHead, turned
from selfsup_ray.models.sela import SeLa
from selfsup_ray.models.sela_config import (
    AugmentedPass,
    RegularEvents,
    SeLaMethod,
    SinkhornConfig,
    UniformPrior,
)
from selfsup_ray.optim import SGDConfig
from selfsup_ray.training import TrainConfig, fit

OnRanks = Callable[..., list[Any]]
METHOD = SeLaMethod(
    num_clusters=4,
    num_heads=2,
    events=RegularEvents(every_epochs=2),
    heads_per_event="all",
    label_pass=AugmentedPass(),
    prior=UniformPrior(),
    sinkhorn=SinkhornConfig(lam=10.0, precision="float32"),
    epochs=6,
    batch_size=12,
    precision="float32",
    channels_last=False,
    seed=0,
    rotation=True,
)
TRAIN = TrainConfig(
    epochs=METHOD.epochs,
    batch_size=METHOD.batch_size,
    optim=SGDConfig(lr=0.05),
    precision="float32",
    channels_last=False,
    log_every=1000,
    checkpoint_every=1000,
)


class Ramps:
    """48 images that grow brighter downwards, with noise: each turn of one looks different."""

    def __init__(self) -> None:
        noise = torch.randint(0, 60, (48, 3, 8, 8), generator=torch.Generator().manual_seed(0))
        self.images = (torch.arange(8)[None, None, :, None] * 24 + noise).byte()

    def __len__(self) -> int:
        return len(self.images)

    def batch(self, ids: np.ndarray, *, epoch: int) -> list[Tensor]:
        return [self.images[torch.from_numpy(ids)]]


def plain_views(images: list[Tensor], ids: Tensor, epoch: int) -> list[Tensor]:
    return [images[0] / 127.5 - 1]


def sela(**values: Any) -> SeLa:
    return SeLa(
        dataclasses.replace(METHOD, **values),
        build_backbone(ResNetConfig(name="resnet18", stem="stl", width=4)),
        num_images=48,
        pass_views=plain_views,
    )


def double_views(images: list[Tensor], ids: Tensor, epoch: int) -> list[Tensor]:
    return [view.double() for view in plain_views(images, ids, epoch)]


def trained_in_64_bits() -> dict[str, Tensor]:
    """In 32 bits rounding grows from event to event."""
    objective = sela().double()
    objective.pass_views = double_views
    fit(objective, Ramps(), double_views, TRAIN, device="cpu")
    weight = objective.backbone.conv1.weight.detach()
    return {"weight": weight, "rotation": objective.rotation_head.weight.detach()}


@pytest.mark.parametrize("order", [torch.contiguous_format, torch.channels_last])
def test_turned_is_the_images_by_right_angles(order: torch.memory_format):
    images = torch.rand(3, 3, 5, 5).contiguous(memory_format=order)
    every = turned(images)
    assert every.is_contiguous(memory_format=order)
    for turns in range(4):
        for i in range(3):
            expected = np.rot90(images[i].numpy(), turns, axes=(1, 2))
            np.testing.assert_array_equal(every[3 * turns + i].numpy(), expected)


def test_the_loss_adds_the_rotations_of_all_copies_to_the_labels_of_the_unturned():
    objective = sela().double()
    ids = torch.tensor([7, 3, 44])
    view = plain_views(Ramps().batch(ids.numpy(), epoch=0), ids, 0)[0].double()
    loss, metrics = objective([view], ids)
    features = objective.backbone(turned(view))
    expected, hits = 0.0, 0
    for turns in range(4):
        for i in range(3):
            p = objective.rotation_head(features[3 * turns + i]).softmax(dim=0)
            expected -= math.log(p[turns].item()) / 12  # over 4 n copies, not over n images
            hits += int(p.argmax() == turns)
    assert metrics["rotation_loss"].item() == pytest.approx(expected, rel=1e-9)
    assert metrics["rotation_accuracy"].item() == pytest.approx(hits / 12)
    labels = collectives.gather(objective.labels.mine(), objective.labels.shares)
    for h, head in enumerate(objective.heads):
        for i, image in enumerate(ids):
            p = head(features[i]).softmax(dim=0)
            expected -= math.log(p[labels[image, h]].item()) / 6
    assert loss.item() == metrics["loss"].item() == pytest.approx(expected, rel=1e-9)


def test_the_network_learns_which_way_is_up():
    objective, data, ids = sela(), Ramps(), np.arange(48)
    fit(objective, data, plain_views, TRAIN, device="cpu")
    view = plain_views(data.batch(ids, epoch=0), torch.from_numpy(ids), 0)
    _, metrics = objective.eval()(view, torch.from_numpy(ids))
    assert metrics["rotation_accuracy"] > 0.9


def test_heads_of_labels_start_as_without_rotation():
    plain, both = sela(rotation=False), sela()
    assert plain.rotation_head is None and isinstance(both.rotation_head, RotationHead)
    own, other = plain.state_dict(), both.state_dict()
    assert set(other) - set(own) == {"rotation_head.weight", "rotation_head.bias"}
    assert all(torch.equal(own[name], other[name]) for name in own if name.startswith("heads"))


def test_two_ranks_train_to_the_weights_of_one(on_ranks: OnRanks):
    alone = trained_in_64_bits()
    for found in on_ranks(trained_in_64_bits, size=2):
        for name, value in alone.items():
            torch.testing.assert_close(found[name], value, rtol=0, atol=1e-8)
