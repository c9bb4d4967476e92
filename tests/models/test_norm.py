"""models/norm.py against torch.nn.BatchNorm; the modes over ranks are in test_collectives."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from selfsup_ray.errors import ConfigError
from selfsup_ray.models.norm import (
    BatchNorm,
    LocalNorm,
    ShuffleNorm,
    SplitNorm,
    SyncNorm,
    set_batch_norm,
)


def images(*shape: int, offset: float = 0.0, dtype: torch.dtype = torch.float64) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    return torch.randn(*shape, generator=generator, dtype=dtype) * 2 + offset


def alike(num_features: int) -> tuple[BatchNorm, nn.BatchNorm2d]:
    """Our layer and torch's with the same, not trivial, weights."""
    ours, theirs = BatchNorm(num_features).double(), nn.BatchNorm2d(num_features).double()
    generator = torch.Generator().manual_seed(1)
    for parameter in ours.parameters():
        nn.init.normal_(parameter, generator=generator)
    theirs.load_state_dict(ours.state_dict())
    return ours, theirs


@pytest.mark.parametrize("mode", [LocalNorm(), SyncNorm()])
@pytest.mark.parametrize("training", [True, False])
def test_one_process_gives_torchs_batch_norm(mode: LocalNorm | SyncNorm, training: bool) -> None:
    ours, theirs = alike(3)
    set_batch_norm(ours, mode)
    x, y = (images(4, 3, 5, 5).requires_grad_() for _ in range(2))
    for _ in range(2):
        out, expected = ours.train(training)(x), theirs.train(training)(y)
    torch.testing.assert_close(out, expected)
    out.square().sum().backward()
    expected.square().sum().backward()
    torch.testing.assert_close(x.grad, y.grad)
    torch.testing.assert_close(ours.weight.grad, theirs.weight.grad)
    torch.testing.assert_close(ours.state_dict(), theirs.state_dict())


@pytest.mark.parametrize("mode", [SplitNorm(group_size=2), ShuffleNorm(group_size=2)])
def test_split_is_torchs_batch_norm_of_each_group_alone(mode: SplitNorm | ShuffleNorm) -> None:
    ours, theirs = alike(3)
    set_batch_norm(ours, mode)
    x, y = (images(6, 3, 5, 5).requires_grad_() for _ in range(2))
    out = ours(x)
    expected = torch.cat([theirs(y[i : i + 2]) for i in (0, 2, 4)])
    torch.testing.assert_close(out, expected)
    out.square().sum().backward()
    expected.square().sum().backward()
    torch.testing.assert_close(x.grad, y.grad)
    torch.testing.assert_close(ours.weight.grad, theirs.weight.grad)


def test_split_remembers_the_mean_of_its_groups_statistics() -> None:
    ours = BatchNorm(3).double()
    set_batch_norm(ours, SplitNorm(group_size=2))
    x = images(6, 3, 5, 5, offset=3.0)
    ours(x)
    groups = x.view(3, 2, 3, 5, 5)
    means = groups.mean(dim=(1, 3, 4)).mean(dim=0)
    variances = groups.var(dim=(1, 3, 4)).mean(dim=0)
    torch.testing.assert_close(ours.running_mean, 0.1 * means)
    torch.testing.assert_close(ours.running_var, 0.9 + 0.1 * variances)


def test_groups_do_not_see_each_other() -> None:
    layer = BatchNorm(3).double()
    set_batch_norm(layer, SplitNorm(group_size=2))
    x = images(4, 3, 2, 2)
    changed = x.clone()
    changed[2:] *= 10
    torch.testing.assert_close(layer(x)[:2], layer(changed)[:2], rtol=0, atol=0)


def test_a_group_size_that_does_not_divide_the_batch_is_refused() -> None:
    layer = BatchNorm(3)
    set_batch_norm(layer, SplitNorm(group_size=4))
    with pytest.raises(ConfigError, match=r"group_size=4 must divide the 6 images"):
        layer(torch.zeros(6, 3, 2, 2))


def test_without_offset_rows_are_scaled_only() -> None:
    layer = BatchNorm(3, offset=False).double()
    x = images(8, 3)
    nn.init.constant_(layer.weight, 2.0)
    expected = 2 * (x - x.mean(dim=0)) / (x.var(dim=0, correction=0) + 1e-5).sqrt()
    torch.testing.assert_close(layer(x), expected)
    assert [name for name, _ in layer.named_parameters()] == ["weight"]


@pytest.mark.parametrize("mode", [LocalNorm(), SplitNorm(group_size=2)])
def test_bfloat16_channels_last_stays_so_and_keeps_float32_statistics(
    mode: LocalNorm | SplitNorm,
) -> None:
    layer = BatchNorm(4)
    set_batch_norm(layer, mode)
    x = images(4, 4, 6, 6, offset=50.0, dtype=torch.float32)
    half = x.to(torch.bfloat16, memory_format=torch.channels_last)
    out = layer(half)
    assert out.dtype == torch.bfloat16
    assert out.is_contiguous(memory_format=torch.channels_last)
    assert layer.running_mean is not None
    torch.testing.assert_close(layer.running_mean, 0.1 * half.float().mean(dim=(0, 2, 3)))
