"""models/byol.py against the paper's algorithm in plain torch, lightly's loss and its schedule."""

from __future__ import annotations

import copy
import itertools

import pytest
import torch
import torch.nn.functional as F
from lightly.loss import NegativeCosineSimilarity
from lightly.utils.scheduler import cosine_schedule
from torch import Tensor, nn

from selfsup_ray.errors import ConfigError
from selfsup_ray.models.backbones import Backbone, ResNetConfig, build_backbone
from selfsup_ray.models.byol import BYOL, BYOLConfig, momentum_at
from selfsup_ray.models.heads import LinearHead, MLPHead
from selfsup_ray.models.norm import BatchNorm, ShuffleNorm, SyncNorm
from selfsup_ray.models.pretext import build_pretext
from selfsup_ray.ops.losses import bootstrap

BITS = ["".join(bits) for bits in itertools.product("01", repeat=3)]


def backbone() -> Backbone:
    return build_backbone(ResNetConfig(stem="stl", width=4)).double()


def layers(bit: str, *, affine: bool = True) -> MLPHead:
    has = bit == "1"
    return MLPHead(
        hidden_dim=12, dim=8, batch_norm="hidden" if has else None, affine=affine or not has
    )


def ablation(bits: str, *, affine: bool = True, momentum: float = 0.7) -> BYOL:
    """BN1 in the online projector, BN2 in the predictor, BN3 in the target's projector."""
    method = BYOLConfig(
        head=layers(bits[0], affine=affine),
        predictor=layers(bits[1], affine=affine),
        target_head=layers(bits[2], affine=affine),
        momentum=momentum,
        momentum_schedule="fixed",
    )
    objective = build_pretext(method, backbone()).double()
    assert isinstance(objective, BYOL)
    return objective


def two_views(step: int) -> list[Tensor]:
    generator = torch.Generator().manual_seed(step)
    shape = (6, 3, 12, 12)
    return [torch.randn(shape, generator=generator, dtype=torch.float64) for _ in range(2)]


class SlowProjector(nn.Module):
    """Linear, batch norm or not, ReLU, linear: with names of their own."""

    def __init__(self, config: MLPHead, in_dim: int) -> None:
        super().__init__()
        self.first = nn.Linear(in_dim, 12).double()
        has = config.batch_norm is not None
        self.norm = nn.BatchNorm1d(12, affine=config.affine).double() if has else None
        self.last = nn.Linear(12, 8).double()

    def forward(self, x: Tensor) -> Tensor:
        hidden = self.first(x) if self.norm is None else self.norm(self.first(x))
        projected: Tensor = self.last(hidden.relu())
        return projected

    def copied(self, head: nn.Sequential) -> SlowProjector:
        linear = [layer for layer in head if isinstance(layer, nn.Linear)]
        self.first.load_state_dict(linear[0].state_dict())
        self.last.load_state_dict(linear[1].state_dict())
        return self


class SlowBYOL:
    """Algorithm 1 of the paper for one batch at a time, in plain torch layers."""

    def __init__(self, objective: BYOL) -> None:
        method, dim = objective.method, objective.backbone.dim
        self.trunk = copy.deepcopy(objective.backbone)
        self.projector = SlowProjector(method.head, dim).copied(objective.head)
        self.predictor = SlowProjector(method.predictor, 8).copied(objective.predictor)
        self.target_trunk = copy.deepcopy(self.trunk)
        target_head = method.target_head or method.head
        self.target = SlowProjector(target_head, dim).copied(objective.target_head)
        modules = (self.trunk, self.projector, self.predictor)
        parameters = [p for module in modules for p in module.parameters()]
        self.optimizer = torch.optim.SGD(parameters, lr=0.1)
        self.tau = method.momentum

    def step(self, x0: Tensor, x1: Tensor) -> float:
        p0, p1 = (self.predictor(self.projector(self.trunk(x))) for x in (x0, x1))
        with torch.no_grad():
            z0, z1 = (self.target(self.target_trunk(x)) for x in (x0, x1))
        similarity = NegativeCosineSimilarity()
        loss = (2 + 2 * similarity(p0, z1)) + (2 + 2 * similarity(p1, z0))
        self.optimizer.zero_grad()
        loss.backward()
        self.optimizer.step()
        online = dict(self.projector.named_parameters())
        for name, parameter in self.target.named_parameters():
            if name in online:
                self.follow(parameter, online[name])
        for parameter, own in zip(
            self.target_trunk.parameters(), self.trunk.parameters(), strict=True
        ):
            self.follow(parameter, own)
        return loss.item()

    def follow(self, parameter: Tensor, online: Tensor) -> None:
        parameter.data = self.tau * parameter.data + (1 - self.tau) * online.data


def steps(objective: BYOL, numbers: range) -> list[float]:
    optimizer = torch.optim.SGD([p for _, p in objective.trainable()], lr=0.1)
    losses = []
    for step in numbers:
        views = two_views(step)
        loss, metrics = objective(views, torch.arange(6))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        objective.after_step(0.0)
        losses.append(loss.item())
        assert metrics["positive_similarity"].item() == pytest.approx(1 - loss.item() / 4)
    return losses


@pytest.mark.parametrize("affine", [True, False])
@pytest.mark.parametrize("bits", BITS)
def test_every_combination_of_batch_norms_is_the_papers_algorithm(bits: str, affine: bool) -> None:
    objective = ablation(bits, affine=affine)
    slow = SlowBYOL(objective)
    expected = [slow.step(*two_views(step)) for step in range(3)]
    assert steps(objective, range(3)) == pytest.approx(expected, rel=1e-8)
    found = [layer for layer in objective.target_head if isinstance(layer, nn.Linear)]
    torch.testing.assert_close(found[0].weight, slow.target.first.weight)
    torch.testing.assert_close(found[1].weight, slow.target.last.weight)
    norms = [layer for layer in objective.target_head if isinstance(layer, BatchNorm)]
    assert len(norms) == int(bits[2])
    if norms and slow.target.norm is not None:
        torch.testing.assert_close(norms[0].running_mean, slow.target.norm.running_mean)
        assert len(list(norms[0].parameters())) == (2 if affine else 0)


def test_a_batch_norm_of_the_target_alone_keeps_the_scale_it_began_with() -> None:
    objective = ablation("011")
    steps(objective, range(3))
    norm = objective.target_head[1]
    assert isinstance(norm, BatchNorm) and norm.bias is not None
    assert torch.equal(norm.weight, torch.ones_like(norm.weight)) and not norm.bias.any()
    followed = ablation("111")
    steps(followed, range(3))
    both = followed.target_head[1]
    assert isinstance(both, BatchNorm) and both.bias is not None and both.bias.any()


def test_one_term_has_the_published_value() -> None:
    import numpy as np

    random = np.random.RandomState(0)
    a, b = (F.normalize(torch.from_numpy(random.randn(4, 8)), dim=1) for _ in range(2))
    assert bootstrap(a, b).item() == pytest.approx(2.309630, abs=1e-6)


def test_tau_has_the_published_values_and_is_lightlys_schedule() -> None:
    method = BYOLConfig(momentum=0.996)
    assert [momentum_at(method, p) for p in (0.0, 0.5, 1.0)] == pytest.approx([0.996, 0.998, 1])
    for step in (0, 3, 17, 39):
        # lightly reaches the end at its last step, one before ours.
        expected = cosine_schedule(step, max_steps=41, start_value=0.996, end_value=1.0)
        assert momentum_at(method, step / 40) == pytest.approx(expected)
    fixed = BYOLConfig(momentum=0.996, momentum_schedule="fixed")
    assert momentum_at(fixed, 0.7) == 0.996


def test_statistics_are_of_one_view_and_of_each_network_alone() -> None:
    objective = ablation("111")
    views = [torch.full_like(view, 3.0) + view for view in two_views(0)]
    reference = copy.deepcopy(objective.backbone)
    objective(views, torch.arange(6))
    for view in views:
        reference(view)
    torch.testing.assert_close(objective.backbone.bn1.running_mean, reference.bn1.running_mean)
    steps(objective, range(2))
    own, target = objective.backbone.bn1.running_mean, objective.target_backbone.bn1.running_mean
    assert not torch.allclose(own, target)


def test_only_the_online_network_is_trained() -> None:
    names = {name.split(".")[0] for name, _ in ablation("111").trainable()}
    assert names == {"backbone", "head", "predictor"}


def test_sizes_are_the_published_ones() -> None:
    head = MLPHead(dim=256, batch_norm="hidden")
    predictor = MLPHead(hidden_dim=256, dim=256, batch_norm="hidden")
    method = BYOLConfig(head=head, predictor=predictor)
    with torch.device("meta"):
        objective = build_pretext(method, build_backbone(ResNetConfig(stem="cifar")))
    assert sum(p.numel() for _, p in objective.trainable()) == 11_563_840 + 132_096


def test_a_restored_byol_continues_as_if_it_had_not_stopped() -> None:
    straight, again = ablation("101"), ablation("101")
    stopped = copy.deepcopy(straight)
    steps(straight, range(3))
    steps(stopped, range(2))
    again.load_state_dict(stopped.state_dict())
    steps(again, range(2, 3))
    torch.testing.assert_close(again.state_dict(), straight.state_dict(), rtol=0, atol=0)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"target_head": LinearHead(dim=256)}, "target_head and head must have the same layers"),
        ({"predictor": LinearHead(dim=8)}, r"predictor\.dim=8 must be head\.dim=256"),
        ({"batch_norm": ShuffleNorm()}, "shuffle is for moco; byol takes one of sync"),
    ],
)
def test_settings_that_cannot_be_are_refused(values: dict[str, object], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        BYOLConfig(**values)  # type: ignore[arg-type]


def test_a_target_without_a_learned_scale_may_stand_beside_an_online_one_with_it() -> None:
    method = BYOLConfig(
        head=layers("1"),
        predictor=layers("1"),
        target_head=layers("1", affine=False),
        batch_norm=SyncNorm(),
    )
    objective = build_pretext(method, backbone()).double()
    assert isinstance(objective, BYOL)
    before = copy.deepcopy(objective.target_head[0].weight)
    steps(objective, range(2))
    assert not torch.equal(objective.target_head[0].weight, before)
