"""models/backbones.py against torchvision's networks and the published sizes."""

from __future__ import annotations

import pytest
import torch
import torchvision
from torch import Tensor, nn

from selfsup_ray.models.backbones import ResNetConfig, build_backbone, fold_batch_norm
from selfsup_ray.models.norm import BatchNorm


def images(batch: int, side: int) -> Tensor:
    return torch.randn(batch, 3, side, side, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("name", ["resnet18", "resnet34", "resnet50"])
def test_torchvisions_weights_load_strictly_and_give_its_features(name: str) -> None:
    theirs = getattr(torchvision.models, name)(weights=None)
    theirs.fc = nn.Identity()
    ours = build_backbone(ResNetConfig(name=name))  # type: ignore[arg-type]
    ours.load_state_dict(theirs.state_dict(), strict=True)
    x = images(2, 64)
    torch.testing.assert_close(ours(x), theirs(x))  # training mode: batch statistics
    torch.testing.assert_close(ours.eval()(x), theirs.eval()(x))


@pytest.mark.parametrize(
    ("name", "stem", "parameters", "dim"),
    [
        ("resnet18", "cifar", 11_168_832, 512),
        ("resnet18", "stl", 11_168_832, 512),
        ("resnet50", "imagenet", 23_508_032, 2048),
        ("resnet50", "cifar", 23_500_352, 2048),
    ],
)
def test_sizes_are_the_published_ones(name: str, stem: str, parameters: int, dim: int) -> None:
    config = ResNetConfig(name=name, stem=stem)  # type: ignore[arg-type]
    with torch.device("meta"):
        backbone = build_backbone(config)
    assert sum(p.numel() for p in backbone.parameters()) == parameters
    assert backbone.dim == config.dim == dim


@pytest.mark.parametrize(
    ("stem", "side", "expected"),
    [
        ("cifar", 32, [32, 32, 16, 8, 4]),
        ("stl", 96, [96, 49, 25, 13, 7]),
        ("imagenet", 224, [112, 56, 28, 14, 7]),
        ("stl", 28, [28, 15, 8, 4, 2]),
    ],
)
def test_stages_have_the_published_sides(stem: str, side: int, expected: list[int]) -> None:
    backbone = build_backbone(ResNetConfig(stem=stem, width=2))  # type: ignore[arg-type]
    sides = []
    for layer in ("bn1", "layer1", "layer2", "layer3", "layer4"):
        backbone.get_submodule(layer).register_forward_hook(
            lambda _, __, out: sides.append(out.shape[-1])
        )
    assert backbone(images(2, side)).shape == (2, 16)
    assert sides == expected


def test_width_scales_every_channel() -> None:
    narrow, wide = (build_backbone(ResNetConfig(name="resnet50", width=width)) for width in (4, 8))
    assert (narrow.dim, wide.dim) == (128, 256)
    for key, weight in narrow.state_dict().items():
        if key.startswith("layer") and weight.ndim == 4:
            assert wide.state_dict()[key].shape[:2] == tuple(2 * s for s in weight.shape[:2])


def test_the_seed_alone_decides_the_weights_and_the_global_generator_is_left_alone() -> None:
    before = torch.get_rng_state()
    first = build_backbone(ResNetConfig(width=4), seed=3).state_dict()
    torch.testing.assert_close(torch.get_rng_state(), before, rtol=0, atol=0)
    torch.rand(7)
    again = build_backbone(ResNetConfig(width=4), seed=3).state_dict()
    other = build_backbone(ResNetConfig(width=4), seed=4).state_dict()
    torch.testing.assert_close(first, again, rtol=0, atol=0)
    assert not torch.equal(first["conv1.weight"], other["conv1.weight"])


def test_convolutions_start_kaiming_normal_by_fan_out() -> None:
    weight = build_backbone(ResNetConfig(width=64)).state_dict()["layer3.0.conv2.weight"]
    fan_out = weight.shape[0] * 9
    assert weight.std().item() == pytest.approx((2 / fan_out) ** 0.5, rel=0.01)
    assert weight.mean().item() == pytest.approx(0, abs=1e-4)


@pytest.mark.parametrize("name", ["resnet18", "resnet50"])
def test_folded_batch_norm_gives_the_same_features(name: str) -> None:
    config = ResNetConfig(name=name, stem="stl", width=4)  # type: ignore[arg-type]
    backbone = build_backbone(config).double()
    generator = torch.Generator().manual_seed(0)
    for key, value in backbone.state_dict().items():
        if "bn" in key or "downsample.1" in key:  # not the trivial 0 and 1
            value.copy_(torch.rand(value.shape, generator=generator) + 0.5)
    expected = backbone.eval()(images(2, 20).double())
    fold_batch_norm(backbone)
    assert not any(isinstance(layer, BatchNorm) for layer in backbone.modules())
    torch.testing.assert_close(backbone(images(2, 20).double()), expected)


def test_channels_last_gives_the_same_features() -> None:
    backbone = build_backbone(ResNetConfig(stem="stl", width=8)).eval()
    x = images(2, 28)
    expected = backbone(x)
    backbone.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    torch.testing.assert_close(backbone(x.to(memory_format=torch.channels_last)), expected)
