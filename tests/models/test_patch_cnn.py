"""The convolutional baselines: sizes by hand, order of a block, names."""

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from selfsup_ray.errors import ConfigError
from selfsup_ray.models.patch_cnn import PatchCNN
from selfsup_ray.models.patch_layers import BLOCKS, CNNConfig, blocks_of

TABLE_4: dict[str, Any] = {"padding": [0], "batch_norm": "first", "bottleneck": 32, "hidden": []}


def table_4(depth: int) -> CNNConfig:
    kernels = [5, *[3] * (depth - 1)]
    return CNNConfig(architecture=f"VGGc1024d{depth}A", kernel_size=kernels, **TABLE_4)


@pytest.mark.parametrize(("depth", "features"), [(1, 6272), (2, 4608), (3, 3200), (4, 2048)])
def test_the_networks_of_table_4_have_the_papers_linear_layers(depth: int, features: int):
    with torch.device("meta"):
        network = PatchCNN(table_4(depth), image_size=32, num_classes=10)
    last = network.classifier[-1]
    assert isinstance(last, nn.Linear) and last.in_features == features
    first = 1024 * 76 + 2 * 1024 + 1024 * 32 + 32  # convolution, batch norm, bottleneck
    further = 1024 * (32 * 9 + 1) + 1024 * 32 + 32
    wanted = first + (depth - 1) * further + 10 * (features + 1)
    assert sum(p.numel() for p in network.parameters()) == wanted


@pytest.mark.parametrize("side", [12, 13])
def test_a_block_is_convolution_relu_pooling_batch_norm_bottleneck(side: int):
    torch.manual_seed(0)
    config = CNNConfig(architecture="VGGc8d2A", kernel_size=[5, 3], **TABLE_4)
    network = PatchCNN(config, image_size=side, num_classes=3).eval()
    images = torch.randn(4, 3, side, side, requires_grad=True)
    weights = dict(network.named_parameters())

    def conv(x: torch.Tensor, name: str) -> torch.Tensor:
        return F.conv2d(x, weights[f"{name}.weight"], weights[f"{name}.bias"])

    x = F.avg_pool2d(F.relu(conv(images, "blocks.0.0.conv")), 2)
    x = conv(x / (1 + 1e-5) ** 0.5, "blocks.0.2")  # batch norm as it starts
    x = conv(F.relu(conv(x, "blocks.1.0.conv")), "blocks.1.1")
    want = F.linear(x.flatten(1), weights["classifier.0.weight"], weights["classifier.0.bias"])
    [got] = network(images)
    torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-5)
    for a, b in zip(
        torch.autograd.grad(
            got.square().sum(), [images, *weights.values()], retain_graph=True, allow_unused=True
        ),
        torch.autograd.grad(want.square().sum(), [images, *weights.values()], allow_unused=True),
        strict=True,
    ):
        if a is not None and b is not None:
            torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("name", [name for name in BLOCKS if name[-1] in "cbswp"])
def test_every_network_for_small_images_takes_cifar(name: str):
    with torch.device("meta"):
        network = PatchCNN(CNNConfig(architecture=name), image_size=32, num_classes=10).eval()
        [logits] = network(torch.empty(2, 3, 32, 32))
    assert logits.shape == (2, 10)


def test_a_multilayer_perceptron_has_no_convolution():
    network = PatchCNN(CNNConfig(architecture="mlp"), image_size=8, num_classes=4)
    assert sum(p.numel() for p in network.parameters()) == 192 * 128 + 128 + 256 + 128 * 4 + 4


def test_names_give_width_and_depth():
    assert blocks_of("VGGc64d3") == (64, 64, 64)
    assert blocks_of("VGGc1024d2A") == (1024, "A", 1024)
    with pytest.raises(ConfigError, match="kernel_size has 2 values, but VGGc64d3 has 3"):
        CNNConfig(architecture="VGGc64d3", kernel_size=[5, 3])


def test_a_network_that_leaves_nothing_of_the_image_is_refused():
    with pytest.raises(ValueError, match="VGG11 leaves nothing of the image at block"):
        PatchCNN(CNNConfig(architecture="VGG11"), image_size=16, num_classes=10)
