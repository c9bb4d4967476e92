"""models/probe.py and models/online_probe.py against scikit-learn, torch's SGD and no probe."""

from __future__ import annotations

import copy
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from sklearn.linear_model import LogisticRegression
from torch import Tensor, nn

from selfsup_ray.models.backbones import Backbone, ResNetConfig, build_backbone
from selfsup_ray.models.heads import MLPHead
from selfsup_ray.models.objective import Objective
from selfsup_ray.models.online_probe import OnlineProbe, OnlineProbeConfig
from selfsup_ray.models.pretext import (
    BYOLConfig,
    InsDisConfig,
    MoCoConfig,
    PretextMethod,
    SimCLRConfig,
    build_pretext,
)
from selfsup_ray.models.probe import BackboneClassifier, factors_of


def backbone(width: int = 4) -> Backbone:
    return build_backbone(ResNetConfig(stem="stl", width=width)).double()


def images(batch: int, *, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(batch, 3, 12, 12, generator=generator, dtype=torch.float64)


def classifier(labels: Tensor, *, width: int = 4, **values: Any) -> BackboneClassifier:
    network = backbone(width)
    made = BackboneClassifier(network, labels, dim=network.dim, num_classes=3, **values)
    return made.double().train()


def test_the_probe_reaches_scikit_learns_optimum_and_ignores_unknown_labels() -> None:
    x, labels = images(30), torch.randint(0, 3, (30,), generator=torch.Generator().manual_seed(0))
    labels[::5] = -1
    probe = classifier(labels, width=1)
    head, features = probe.head(""), probe.backbone(x).detach()
    optimizer = torch.optim.LBFGS(head.parameters(), max_iter=500, tolerance_grad=1e-9)

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss, _ = probe([x], torch.arange(30))
        (total := loss + 0.01 * head.weight.square().sum()).backward()
        return total

    optimizer.step(closure)
    known = labels >= 0
    reference = LogisticRegression(C=1 / (0.02 * int(known.sum())), tol=1e-9, max_iter=5000)
    reference.fit(features[known].numpy(), labels[known].numpy())
    expected = torch.from_numpy(reference.predict_proba(features.numpy()))
    torch.testing.assert_close(head(features).softmax(dim=1), expected, rtol=1e-4, atol=1e-4)
    correct = expected.argmax(dim=1)[known] == labels[known]
    accuracy = probe([x], torch.arange(30))[1]["train_accuracy"]
    assert accuracy.item() == pytest.approx(correct.double().mean().item())


def test_a_probe_without_any_label_in_the_batch_loses_nothing() -> None:
    loss, metrics = classifier(torch.full((4,), -1))([images(4)], torch.arange(4))
    assert loss.item() == 0 and metrics["train_accuracy"].item() == 0


def test_a_probes_backbone_is_frozen_and_evaluates() -> None:
    probe = classifier(torch.zeros(4, dtype=torch.int64))
    before = copy.deepcopy(probe.backbone.state_dict())
    probe([images(4)], torch.arange(4))[0].backward()
    torch.testing.assert_close(probe.backbone.state_dict(), before, rtol=0, atol=0)
    assert [name for name, _ in probe.trainable()] == ["heads.0.weight", "heads.0.bias"]
    assert not probe.head("").bias.any()


def test_a_fine_tuned_backbone_learns_and_updates_its_statistics() -> None:
    tuned = classifier(torch.arange(4) % 3, frozen=False)
    before = copy.deepcopy(tuned.backbone.state_dict())
    tuned([images(4)], torch.arange(4))[0].backward()
    assert tuned.backbone.conv1.weight.grad.abs().sum() > 0  # type: ignore[union-attr]
    assert not tuned.backbone.state_dict()["bn1.running_mean"].equal(before["bn1.running_mean"])


@pytest.mark.parametrize("nesterov", [False, True])
def test_learning_rates_tried_beside_each_other_give_what_each_gives_alone(nesterov: bool) -> None:
    x, labels, lrs = images(12), torch.arange(12) % 3, (0.5, 2.0, 30.0)

    def weights(lr: float, factors: dict[str, float]) -> list[Tensor]:
        probe = classifier(labels, factors=factors, start="zero")
        parameters = [p for _, p in probe.trainable()]
        optimizer = torch.optim.SGD(parameters, lr=lr, momentum=0.9, nesterov=nesterov)
        for _ in range(5):
            optimizer.zero_grad()
            probe([x], torch.arange(12))[0].backward()
            optimizer.step()
        return [head.weight.detach() for head in probe.heads]  # type: ignore[union-attr]

    together = weights(2.0, factors_of(lrs, 2.0))
    alone = [weights(lr, {"": 1.0})[0] for lr in lrs]
    torch.testing.assert_close(together, alone)


def test_a_rate_that_diverges_does_not_end_the_others() -> None:
    probe = classifier(torch.arange(4) % 3, factors={"a": 1.0, "b": 1.0})
    nn.init.constant_(probe.head("a").weight, float("inf"))
    loss, _ = probe([images(4)], torch.arange(4))
    loss.backward()
    assert loss.isfinite() and probe.head("b").weight.grad.isfinite().all()  # type: ignore[union-attr]


class Pixels:
    """Images with labels, seen as they are."""

    def __init__(self, x: Tensor, labels: np.ndarray[Any, Any]) -> None:
        self.x, self.labels = x, labels

    def __len__(self) -> int:
        return len(self.x)

    def read(self, positions: np.ndarray[Any, Any]) -> Tensor:
        return self.x[positions]

    def views(self, batch: Tensor) -> list[Tensor]:
        return [batch]


def test_the_accuracy_of_every_class_is_counted_by_hand(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("selfsup_ray.models.probe.TESTED_AT_ONCE", 7)
    labels = np.arange(20) % 2  # class 2 is not among them
    probe = classifier(
        torch.zeros(1, dtype=torch.int64), measured={"test": Pixels(images(20), labels)}
    )
    found = probe.after_epoch(0)
    probe.eval()
    predicted = probe.logits(images(20))[0].argmax(dim=1).numpy()
    assert found == {"test_accuracy": pytest.approx((predicted == labels).mean())}
    by_hand = [(predicted[labels == c] == c).mean() for c in (0, 1)]
    assert probe.per_class("test", "") == [*map(pytest.approx, by_hand), None]


HEAD = MLPHead(hidden_dim=8, dim=8)
METHODS: dict[str, PretextMethod] = {
    "simclr": SimCLRConfig(head=HEAD),
    "moco": MoCoConfig(head=HEAD, queue_size=32, batch_norm={"name": "split", "group_size": 4}),  # type: ignore[arg-type]
    "byol": BYOLConfig(),
    "insdis": InsDisConfig(batch_norm={"name": "sync"}),  # type: ignore[arg-type]
}


def pretext(name: str) -> Objective:
    network = build_backbone(ResNetConfig(stem="stl", width=4))
    values = {"num_images": 16} if name == "insdis" else {}
    return build_pretext(METHODS[name], network, seed=0, **values)  # type: ignore[arg-type]


def steps(objective: Objective, *, count: int) -> list[float]:
    optimizer = torch.optim.SGD([p for _, p in objective.trainable()], lr=0.05, momentum=0.9)
    seen = []
    for step in range(count):
        optimizer.zero_grad()
        views = [images(8, seed=2 * step + i).float() for i in range(objective.num_views)]
        loss, metrics = objective(views, torch.arange(8) + 8 * (step % 2))
        loss.backward()
        optimizer.step()
        objective.after_step(step / count)
        seen.append(float(metrics.get("online_loss", loss.detach())))
    return seen


@pytest.mark.parametrize("name", METHODS)
def test_an_online_probe_changes_no_bit_of_the_encoder(name: str) -> None:
    alone, watched = pretext(name).train(), pretext(name)
    probe = OnlineProbe(
        watched, torch.arange(16) % 3, num_classes=3, config=OnlineProbeConfig()
    ).train()
    steps(alone, count=3)
    steps(probe, count=3)
    assert probe.weight.any()
    torch.testing.assert_close(watched.state_dict(), alone.state_dict(), rtol=0, atol=0)


def test_an_online_probe_takes_the_steps_of_sgd_on_the_first_view() -> None:
    class Fixed(Objective):
        def __init__(self) -> None:
            super().__init__()
            self.network = backbone().eval()

        def train(self, mode: bool = True) -> Fixed:
            self.training = mode
            return self

        def forward(self, views: list[Tensor], ids: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
            return self.network(torch.cat(views)).sum(), {}

        def encoder(self) -> Backbone:
            return self.network

    labels = torch.tensor([0, 1, 2, -1, 1, 0, 2, 1])
    method = Fixed()
    probe = OnlineProbe(method, labels, num_classes=3, config=OnlineProbeConfig(lr=0.3)).double()
    reference = nn.Linear(method.network.dim, 3).double()
    nn.init.zeros_(reference.weight)
    nn.init.zeros_(reference.bias)
    optimizer = torch.optim.SGD(reference.parameters(), lr=0.3, momentum=0.9)
    for step in range(4):
        x = images(8, seed=step)
        _, metrics = probe.train()([x, images(8, seed=100 + step)], torch.arange(8))
        probe.after_step(0.0)
        optimizer.zero_grad()
        loss = F.cross_entropy(reference(method.network(x).detach()), labels, ignore_index=-1)
        loss.backward()
        optimizer.step()
        assert metrics["online_loss"].item() == pytest.approx(loss.item())
    torch.testing.assert_close(probe.weight[:, :-1], reference.weight.detach())
    torch.testing.assert_close(probe.weight[:, -1], reference.bias.detach())
