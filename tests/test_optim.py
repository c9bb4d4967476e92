"""Optimizers and schedules against slow loops, torch's own, and the papers' published values."""

import math

import numpy as np
import pytest
import torch
from torch import nn

from selfsup_ray.config import build
from selfsup_ray.errors import ConfigError
from selfsup_ray.optim import (
    LARS,
    AdamConfig,
    ConstantSchedule,
    CosineSchedule,
    LARSConfig,
    SGDConfig,
    StepSchedule,
    build_optimizer,
    lr_ratio,
    peak_lr,
    set_lr,
)


def gradients(shapes: list[tuple[int, ...]], steps: int) -> list[list[torch.Tensor]]:
    generator = torch.Generator().manual_seed(1)
    return [
        [torch.randn(s, generator=generator, dtype=torch.float64) for s in shapes]
        for _ in range(steps)
    ]


def parameters(shapes: list[tuple[int, ...]]) -> list[nn.Parameter]:
    generator = torch.Generator().manual_seed(0)
    return [nn.Parameter(torch.randn(s, generator=generator, dtype=torch.float64)) for s in shapes]


def lars_in_loops(w, grads, *, lrs, momentum, eta, decay, excluded, lr_first):
    """LARS with numpy, one parameter, one step, one formula at a time."""
    v = np.zeros_like(w)
    for g, lr in zip(grads, lrs, strict=True):
        g = g if excluded else g + decay * w
        trust = 1.0
        if not excluded:
            w_norm, g_norm = math.sqrt((w * w).sum()), math.sqrt((g * g).sum())
            trust = eta * w_norm / g_norm if w_norm > 0 and g_norm > 0 else 1.0
        if lr_first:
            v = momentum * v + lr * trust * g
            w = w - v
        else:
            v = momentum * v + trust * g
            w = w - lr * v
    return w


@pytest.mark.parametrize("lr_first", [True, False])
def test_lars_follows_the_published_update_in_both_orders(lr_first):
    shapes, lrs = [(4, 3), (4,)], [0.3, 0.1, 0.5]
    made, grads = parameters(shapes), gradients(shapes, 3)
    config = LARSConfig(lr=1.0, trust=0.02, weight_decay=0.1, lr_in_momentum=lr_first)
    optimizer = build_optimizer(config, [("weight", made[0]), ("bias", made[1])])
    start = [p.detach().clone().numpy() for p in made]
    for step, lr in zip(grads, lrs, strict=True):
        for p, g in zip(made, step, strict=True):
            p.grad = g.clone()
        set_lr(optimizer, lr)
        optimizer.step()
    for i, p in enumerate(made):
        expected = lars_in_loops(
            start[i],
            [step[i].numpy() for step in grads],
            lrs=lrs,
            momentum=0.9,
            eta=0.02,
            decay=0.1,
            excluded=p.ndim == 1,
            lr_first=lr_first,
        )
        np.testing.assert_allclose(p.detach().numpy(), expected, rtol=1e-12)


def test_lars_moves_a_zero_weight_by_the_plain_gradient():
    w = nn.Parameter(torch.zeros(2, 2))
    w.grad = torch.ones(2, 2)
    LARS([w], lr=0.5, trust=0.001).step()
    torch.testing.assert_close(w.detach(), torch.full((2, 2), -0.5))


def test_lars_leaves_a_parameter_without_gradient_alone():
    w = nn.Parameter(torch.ones(3))
    LARS([w], lr=0.5).step()
    assert torch.equal(w.detach(), torch.ones(3))


@pytest.mark.parametrize("exclude", [True, False])
def test_sgd_decays_biases_and_norms_only_when_they_are_not_excluded(exclude):
    shapes = [(2, 3), (2,)]
    made = parameters(shapes)
    start = [p.detach().clone() for p in made]
    config = SGDConfig(lr=0.1, weight_decay=0.5, exclude_norm_and_bias=exclude)
    optimizer = build_optimizer(config, [("w", made[0]), ("b", made[1])])
    for p in made:
        p.grad = torch.zeros_like(p)
    optimizer.step()
    torch.testing.assert_close(made[0].detach(), start[0] * (1 - 0.1 * 0.5))
    torch.testing.assert_close(made[1].detach(), start[1] * (1 if exclude else 1 - 0.1 * 0.5))


def test_adam_follows_the_published_update():
    [p], grads = parameters([(3, 2)]), gradients([(3, 2)], 4)
    w = p.detach().numpy().copy()
    optimizer = build_optimizer(AdamConfig(lr=0.01, weight_decay=0.2), [("w", p)])
    m, v = np.zeros_like(w), np.zeros_like(w)
    for t, [gradient] in enumerate(grads, start=1):
        p.grad = gradient.clone()
        optimizer.step()
        g = gradient.numpy() + 0.2 * w
        m, v = 0.9 * m + 0.1 * g, 0.999 * v + 0.001 * g * g
        w = w - 0.01 * (m / (1 - 0.9**t)) / (np.sqrt(v / (1 - 0.999**t)) + 1e-8)
    np.testing.assert_allclose(p.detach().numpy(), w, rtol=1e-10)


def test_the_scan_cosine_has_its_published_values():
    schedule = CosineSchedule(final_ratio=0.1**3, per="epoch")
    published = {0: 0.4, 125: 0.341480, 250: 0.200200, 375: 0.058920, 499: 0.000403944}
    for epoch, lr in published.items():
        for within in (0.0, 0.99):  # the lr of an epoch holds to its end
            ratio = lr_ratio(schedule, progress=(epoch + within) / 500, epochs=500)
            assert 0.4 * ratio == pytest.approx(lr, rel=1e-5)


def test_the_cosine_agrees_with_torch_at_every_step():
    optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=1.0)
    reference = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, T_max=70, eta_min=0.05)
    schedule = CosineSchedule(final_ratio=0.05)
    for step in range(70):
        ours = lr_ratio(schedule, progress=step / 70, epochs=7)
        assert ours == pytest.approx(optimizer.param_groups[0]["lr"], abs=1e-9)
        optimizer.step()
        reference.step()


def test_the_step_schedule_agrees_with_torch_in_every_epoch():
    optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=1.0)
    reference = torch.optim.lr_scheduler.MultiStepLR(optimizer, [120, 160, 190], gamma=0.1)
    schedule = StepSchedule(milestones=(120, 160, 190))
    for epoch in range(201):
        first = lr_ratio(schedule, progress=(epoch * 97) / (201 * 97), epochs=201)
        last = lr_ratio(schedule, progress=(epoch * 97 + 96) / (201 * 97), epochs=201)
        assert first == last == pytest.approx(optimizer.param_groups[0]["lr"], rel=1e-9)
        optimizer.step()
        reference.step()


@pytest.mark.parametrize("schedule", [ConstantSchedule, CosineSchedule, StepSchedule])
def test_the_warm_up_is_linear_from_zero_to_the_peak(schedule):
    made = schedule(warmup_epochs=10)
    ratios = [lr_ratio(made, progress=epoch / 100, epochs=100) for epoch in (0, 2.5, 5, 10)]
    assert ratios == pytest.approx([0.0, 0.25, 0.5, 1.0])


def test_the_cosine_fills_what_the_warm_up_leaves():
    schedule = CosineSchedule(warmup_epochs=20)
    ratios = [lr_ratio(schedule, progress=epoch / 100, epochs=100) for epoch in (20, 60, 100)]
    assert ratios == pytest.approx([1.0, 0.5, 0.0])


def test_linear_scaling_is_relative_to_a_batch_of_256():
    assert peak_lr(SGDConfig(lr=0.3, linear_scaling=True), batch_size=4096) == pytest.approx(4.8)
    assert peak_lr(SGDConfig(lr=0.3), batch_size=4096) == 0.3


def test_an_optimizer_key_of_another_optimizer_is_refused_by_name():
    from selfsup_ray.training import TrainConfig

    with pytest.raises(ConfigError, match=r"optim\.momentum"):
        build(TrainConfig, {"epochs": 1, "optim": {"name": "adam", "momentum": 0.9}})
