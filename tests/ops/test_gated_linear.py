"""The gated linear layer is conv * mask and AvgPool, forwards and backwards."""

import pytest
import torch
import torch.nn.functional as F

from selfsup_ray.ops import gated_linear
from selfsup_ray.ops.gated_linear import gated_pool
from selfsup_ray.ops.patch_codes import patch_bits, unpack_bits


def case(batch: int, channels: int, height: int, width: int, size: int, side: int, k: int):
    """Return images, the bits of some code, weight and bias, seeded."""
    generator = torch.Generator().manual_seed(0)

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator)

    images = normal(batch, channels, height, width)
    dim = channels * side * side
    kernel, bias = normal(size, dim), normal(size)
    [bits] = patch_bits(images, kernel, bias, patch_size=side, ks=[k])
    return images, bits, normal(size, dim), normal(size)


def plain(images, bits, weight, bias, side: int, pool: int | None) -> torch.Tensor:
    """Return AvgPool(mask * conv) by torch's layers, in float64."""
    filters = weight.view(len(weight), images.shape[1], side, side)
    mask = unpack_bits(bits, len(weight)).permute(0, 3, 1, 2)
    gated = F.conv2d(images, filters, bias) * mask
    return gated if pool is None else F.avg_pool2d(gated, pool, pool, ceil_mode=True)


def with_gradients(call, gradient, *tensors: torch.Tensor) -> list[torch.Tensor]:
    """Return what a call gives, and the gradients of its tensors."""
    leaves = [tensor.clone().requires_grad_() for tensor in tensors]
    out = call(*leaves)
    out.backward(gradient.to(out.dtype))
    return [out.detach(), *(leaf.grad for leaf in leaves)]


SHAPES = [
    pytest.param((3, 3, 12, 11, 70, 5, 20), 4, id="windows that stick out"),
    pytest.param((6, 3, 10, 10, 64, 3, 9), None, id="no pooling"),
    pytest.param((2, 7, 14, 14, 65, 3, 9), 2, id="many channels"),
    pytest.param((2, 2, 6, 6, 9, 1, 3), 7, id="a window larger than the image"),
    pytest.param((5, 1, 25, 31, 8, 2, 8), 3, id="all entries, five images"),
    pytest.param((5, 3, 12, 11, 130, 3, 4), 4, id="few bits"),
    pytest.param((20, 3, 7, 7, 70, 3, 1), None, id="one bit, no pooling"),
]


@pytest.mark.parametrize("shape, pool", SHAPES)
@pytest.mark.parametrize("precision, tolerance", [("float32", 1e-5), ("bfloat16", 1e-2)])
@pytest.mark.parametrize("has_numba", [True, False])
def test_it_is_the_pooled_masked_convolution_with_its_gradients(
    shape, pool, precision, tolerance: float, has_numba: bool, monkeypatch: pytest.MonkeyPatch
):
    if not has_numba:
        monkeypatch.setattr(gated_linear, "find_spec", lambda name: None)
    images, bits, weight, bias = case(*shape)
    side = shape[5]

    def ours(x, v, b):
        return gated_pool(x, bits, v, b, patch_size=side, pool=pool, precision=precision)

    def theirs(x, v, b):
        return plain(x, bits, v, b, side, pool)

    gradient = torch.randn(
        theirs(images, weight, bias).shape, generator=torch.Generator().manual_seed(1)
    )
    found = with_gradients(ours, gradient, images, weight, bias)
    doubles = (t.double() for t in (images, weight, bias))
    expected = with_gradients(theirs, gradient, *doubles)
    for mine, exact in zip(found, expected, strict=True):
        assert mine.shape == exact.shape and mine.dtype == torch.float32
        assert (mine - exact).norm() <= tolerance * exact.norm()


def test_images_get_no_gradient_unless_they_ask():
    images, bits, weight, bias = case(2, 3, 9, 9, 64, 3, 5)
    weight.requires_grad_()
    out = gated_pool(images, bits, weight.view(64, 3, 3, 3), bias, patch_size=3, pool=2)
    out.square().sum().backward()
    assert images.grad is None and bias.grad is None and weight.grad.shape == (64, 27)


@pytest.mark.parametrize("k", [1, 20], ids=["few bits", "many"])
@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
def test_threads_change_no_bit(precision, k: int):
    images, bits, weight, bias = case(9, 3, 12, 12, 64, 3, k)
    before, found = torch.get_num_threads(), []

    def call(x, v, b):
        return gated_pool(x, bits, v, b, patch_size=3, pool=2, precision=precision)

    gradient = torch.ones(9, 64, 5, 5)
    try:
        for threads in (1, 3):
            torch.set_num_threads(threads)
            found.append(with_gradients(call, gradient, images, weight, bias))
            assert torch.get_num_threads() == threads
    finally:
        torch.set_num_threads(before)
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))


def test_no_images_have_gradients_of_zero():
    images, bits, weight, bias = case(2, 3, 9, 9, 64, 3, 5)
    weight.requires_grad_()
    out = gated_pool(images[:0], bits[:0], weight, bias, patch_size=3, pool=2)
    out.sum().backward()
    assert out.shape == (0, 64, 4, 4) and not weight.grad.any()


def test_channels_come_last_in_memory():
    images, bits, weight, bias = case(2, 3, 9, 9, 64, 3, 5)
    out = gated_pool(images, bits, weight, bias, patch_size=3, pool=2)
    assert out.is_contiguous(memory_format=torch.channels_last)


def test_autocast_leaves_float32_alone():
    images, bits, weight, bias = case(2, 3, 9, 9, 64, 3, 5)
    alone = gated_pool(images, bits, weight, bias, patch_size=3, pool=2)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(gated_pool(images, bits, weight, bias, patch_size=3, pool=2), alone)
