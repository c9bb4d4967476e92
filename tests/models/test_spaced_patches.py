"""Layers whose patches lie some positions apart or reach over the border, against torch's own."""

from typing import Any

import pytest
import torch
import torch.nn.functional as F

from selfsup_ray.errors import ConfigError
from selfsup_ray.models.layer_codes import Dictionary
from selfsup_ray.models.locally_linear import Block, code_block, conv_block
from selfsup_ray.models.patch_layers import PhiFullConfig, PhiHardConfig, VanillaConfig
from selfsup_ray.stages.classify_config import ClassifyConfig

SIZE, S, K, SIDE = 16, 3, 4, 11
SPACINGS = [(1, 1), (2, 0), (2, 1), (3, 2)]


def images() -> torch.Tensor:
    return torch.randn(2, 3, SIDE, SIDE, generator=torch.Generator().manual_seed(1))


def made(kind: str, code: str = "up_to", **values: Any) -> Block:
    torch.manual_seed(0)
    values = {"batch_norm": False, "bottleneck": None, "pool": None} | values
    if kind == "vanilla":
        config = VanillaConfig(size=SIZE, patch_size=S, **values)
        return conv_block(config, channels=3, side=SIDE, num_classes=5)
    chosen = PhiFullConfig if kind == "full" else PhiHardConfig
    model = chosen(k=K, code=code, **values)  # type: ignore[arg-type]
    rows = torch.randn(SIZE, 3 * S * S)
    on = Dictionary(-rows, 0.5 * rows.square().sum(dim=1), S)
    return code_block(model, on, model=model, side=SIDE, num_classes=5)


def expected(block: Block, kind: str, code: str, stride: int, padding: int) -> torch.Tensor:
    """Return the gated values by torch's convolutions: (2, SIZE, h, h)."""
    layer: Any = block.layers[0]
    how = {"stride": stride, "padding": padding}
    if kind == "vanilla":
        return F.relu(F.conv2d(images(), layer.linear.weight, layer.linear.bias, **how))
    coded: Any = block.code
    apart = F.conv2d(images(), coded.kernel.view(SIZE, 3, S, S), coded.bias, **how)
    if code == "triangle":
        m = (apart.mean(dim=1, keepdim=True) - apart).relu()
    else:
        rank = apart.argsort(dim=1).argsort(dim=1)
        m = (rank < K if code == "up_to" else rank == K - 1).float()
    if kind == "hard":
        return m
    return m * F.conv2d(images(), layer.linear.weight, layer.linear.bias, **how)


@pytest.mark.parametrize(("stride", "padding"), SPACINGS)
@pytest.mark.parametrize("pool", [None, 2])
@pytest.mark.parametrize(
    ("kind", "code"),
    [("full", "up_to"), ("full", "triangle"), ("hard", "up_to"), ("hard", "kth"), ("vanilla", "")],
)
def test_values_are_those_of_a_convolution_with_stride_and_padding(
    kind: str, code: str, pool: int | None, stride: int, padding: int
):
    block = made(kind, code or "up_to", stride=stride, padding=padding, pool=pool)
    want = expected(block, kind, code, stride, padding)
    if pool is not None:
        want = F.avg_pool2d(want, pool, pool, ceil_mode=True)
    [got] = block.maps(images())
    torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-4)
    assert got.shape[-1] == block.layers[0].out_side
    assert block.logits([got])[0].shape == (2, 5)


@pytest.mark.parametrize("kind", ["full", "vanilla"])
def test_gradients_are_those_of_a_convolution_with_stride_and_padding(kind: str):
    block = made(kind, stride=2, padding=1, pool=2)
    layer: Any = block.layers[0]
    weights = torch.randn(2, SIZE, 3, 3)
    (block.maps(images())[0] * weights).sum().backward()
    got = layer.linear.weight.grad.clone(), layer.linear.bias.grad.clone()
    layer.zero_grad()
    want = F.avg_pool2d(expected(block, kind, "up_to", 2, 1), 2, 2, ceil_mode=True)
    (want * weights).sum().backward()
    torch.testing.assert_close(got[0], layer.linear.weight.grad, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(got[1], layer.linear.bias.grad, rtol=1e-4, atol=1e-4)


def test_several_maps_an_entry_and_a_residual_go_with_a_stride():
    block = made("full", stride=2, padding=1, maps_per_entry=3, residual="cat")
    assert block.maps(images())[0].shape == (2, 3 + 3, 6, 6)


def test_cached_codes_are_of_views_without_a_border_or_gaps():
    for values in ({"stride": 2}, {"padding": 1}):
        with pytest.raises(ConfigError, match="leave them or cache_codes out"):
            ClassifyConfig(model=PhiFullConfig(**values), cache_codes=True)  # type: ignore[arg-type]
