"""relu_pool equals convolution, ReLU and pooling, and so do its gradients."""

import pytest
import torch
import torch.nn.functional as F

from selfsup_ray.ops.relu_pool import relu_pool


@pytest.mark.parametrize(
    ("batch", "channels", "side", "size", "patch", "pool"),
    [(3, 3, 13, 70, 5, 4), (5, 3, 12, 64, 5, 2), (2, 6, 9, 130, 3, 1), (9, 1, 8, 8, 3, 3)],
)
@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
def test_values_and_gradients_are_those_of_the_plain_layers(
    batch: int, channels: int, side: int, size: int, patch: int, pool: int, precision: str
):
    generator = torch.Generator().manual_seed(0)

    def draw(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator).requires_grad_()

    images, weight, bias = (
        draw(batch, channels, side, side),
        draw(size, channels, patch, patch),
        draw(size),
    )
    got = relu_pool(images, weight, bias, pool=pool, precision=precision)
    ahead = torch.randn(got.shape, generator=generator)
    mine = torch.autograd.grad((got * ahead).sum(), (images, weight, bias))
    plain = F.avg_pool2d(F.relu(F.conv2d(images, weight, bias)), pool, pool, ceil_mode=True)
    theirs = torch.autograd.grad((plain * ahead).sum(), (images, weight, bias))
    for a, b in zip((got, *mine), (plain, *theirs), strict=True):
        assert a.shape == b.shape and a.dtype == torch.float32
        # In bfloat16 a product near 0 may have the other sign: compared as a whole.
        if precision == "bfloat16":
            assert (a - b).norm() < 0.06 * b.norm()
        else:
            torch.testing.assert_close(a, b, rtol=0, atol=1e-5 * b.abs().max().item())


def test_the_number_of_threads_changes_nothing():
    generator = torch.Generator().manual_seed(0)
    images, weight = torch.randn(9, 3, 12, 12, generator=generator), torch.randn(70, 3, 5, 5)
    weight.requires_grad_()
    found = []
    for threads in (1, 2):
        torch.set_num_threads(threads)
        made = relu_pool(images, weight, torch.zeros(70), pool=2)
        found.append((made, torch.autograd.grad(made.square().sum(), weight)[0]))
    torch.set_num_threads(1)
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))


def test_without_numba_the_layers_are_torchs(monkeypatch: pytest.MonkeyPatch):
    generator = torch.Generator().manual_seed(0)
    images, weight = torch.randn(2, 3, 9, 9, generator=generator), torch.randn(10, 3, 3, 3)
    fast = relu_pool(images, weight, torch.zeros(10), pool=2)
    monkeypatch.setattr("selfsup_ray.ops.relu_pool.find_spec", lambda name: None)
    plain = relu_pool(images, weight, torch.zeros(10), pool=2)
    torch.testing.assert_close(fast, plain, rtol=1e-4, atol=1e-4)
